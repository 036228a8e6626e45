"""Engines turn masks into scores. `open_engine` opens one; `registry` lists the kinds."""

from __future__ import annotations

from typing import Any

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import Engine
from lpserve.engine.registry import engine_kind
from lpserve.model.players import FULL_LAYER
from lpserve.types import EngineSpec


def open_engine(
    model: str,
    windows: TokenWindows,
    kind: str = "transformers",
    dtype: str = "float32",
    device: str = "auto",
    players: str = "layer",
    **options: Any,
) -> Engine:
    """Open an engine on a checkpoint folder.

    Args:
        model: checkpoint folder (`synthetic`: ignored).
        windows: what `score` scores when no other windows are named.
        kind: a key of `registry.ENGINE_KINDS`: `transformers`, `vllm` or `synthetic`.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu` or a torch device such as `cuda:0`.
        players: what masks keep or drop: `layer`, or `half` for attention and feed-forward parts
            apart.
        options: of the kind; see `engine.hf.engine.TransformersEngine`,
            `engine.vllm.engine.VllmEngine` and `engine.synthetic.SyntheticEngine`.

    Raises:
        InputError: the model, windows or options cannot be used.
        EngineError: the model's structure cannot be driven layer by layer.
    """
    found = engine_kind(kind)
    found.check_options(options)
    spec = EngineSpec(
        kind=kind,
        model=str(model),
        dtype=dtype,
        device=device,
        options=options,
        players=() if players == FULL_LAYER else found.players(str(model), options, players),
    )
    return build_engine(spec, windows)


def build_engine(spec: EngineSpec, windows: TokenWindows) -> Engine:
    """Open the engine that a spec describes; raises as `open_engine` does."""
    kind = engine_kind(spec.kind)
    kind.check_options(spec.options)
    return kind.build(spec, windows)
