"""Engines: what turns masks into scores. `open_engine` builds one from its kind."""

from __future__ import annotations

from typing import Any

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import Engine
from lpserve.errors import InputError
from lpserve.types import EngineSpec

ENGINE_KINDS = ("transformers", "vllm", "synthetic")


def open_engine(
    model: str,
    windows: TokenWindows,
    kind: str = "transformers",
    dtype: str = "float32",
    device: str = "auto",
    **options: Any,
) -> Engine:
    """Open an engine on a checkpoint folder.

    Args:
        model: checkpoint folder (`synthetic`: ignored).
        windows: what `score` scores when no other windows are named.
        kind: one of `ENGINE_KINDS`.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu` or a torch device such as `cuda:0`.
        options: of the kind; see `engine.hf.TransformersEngine`, `engine.vllm.VllmEngine` and
            `engine.synthetic.SyntheticEngine`.

    Raises:
        InputError: the model, windows or options cannot be used.
        EngineError: the model's structure cannot be driven layer by layer.
    """
    spec = EngineSpec(kind=kind, model=str(model), dtype=dtype, device=device, options=options)
    return build_engine(spec, windows)


def build_engine(spec: EngineSpec, windows: TokenWindows) -> Engine:
    """Build the engine that a spec describes."""
    if spec.kind == "transformers":
        from lpserve.engine.hf.engine import TransformersEngine

        return _build(TransformersEngine, spec, windows)
    if spec.kind == "vllm":
        from lpserve.engine.vllm.engine import VllmEngine

        return VllmEngine(spec, windows)  # its options are vLLM's: checked there
    if spec.kind == "synthetic":
        from lpserve.engine.synthetic import SyntheticEngine

        return _build(SyntheticEngine, spec, windows)
    raise InputError(f"unknown engine {spec.kind!r}: one of {', '.join(ENGINE_KINDS)}")


def _build(engine: type, spec: EngineSpec, windows: TokenWindows) -> Engine:
    known = engine.OPTIONS
    unknown = sorted(set(spec.options) - set(known))
    if unknown:
        raise InputError(
            f"engine {spec.kind!r} has no option {unknown[0]!r}: it knows {', '.join(known)}"
        )
    return engine(spec, windows)
