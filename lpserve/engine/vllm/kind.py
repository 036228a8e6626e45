"""The engine kind `vllm`, described without loading torch or vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import Engine, Generates
from lpserve.engine.kind import (
    EngineKind,
    InUse,
    checkpoint_resources,
    folder_players,
    with_memory_settings,
)
from lpserve.engine.vllm.options import check_options
from lpserve.errors import InputError
from lpserve.types import EngineSpec


def _build(spec: EngineSpec, windows: TokenWindows) -> Engine:
    from lpserve.engine.vllm.engine import VllmEngine

    return VllmEngine(spec, windows)


def pinned(spec: EngineSpec, settings: Mapping[str, Any]) -> EngineSpec:
    """The memory settings, and the path: in half precision, scores of two paths do not mix."""
    spec = with_memory_settings(spec, settings)
    if "path" not in settings:
        return spec
    return replace(spec, options={**spec.options, "path": settings["path"]})


def for_length(spec: EngineSpec, length: int) -> EngineSpec:
    """Room for the windows' tokens and the one token that vLLM generates, unless it is set."""
    return replace(spec, options={"max_model_len": length + 1, **spec.options})


def over_nodes(spec: EngineSpec) -> EngineSpec:
    """vLLM's Ray executor, which takes over the placement group of the actor it runs in."""
    return replace(spec, options={"distributed_executor_backend": "ray", **spec.options})


def check_in_use(device: str) -> None:
    """Raise InputError where vLLM is not installed, or would take a GPU against the user's word."""
    if find_spec("vllm") is None:
        raise InputError("engine vllm needs vLLM: install lpserve[vllm]")
    import torch

    if device == "cpu" and torch.cuda.is_available():
        raise InputError("engine vllm takes the GPU where there is one: leave --device out")


VLLM = EngineKind(
    name="vllm",
    build=_build,
    check_options=check_options,
    players=folder_players,
    resources=checkpoint_resources,
    capabilities=(Generates,),
    pinned=pinned,
    for_length=for_length,
    over_nodes=over_nodes,
    in_use=InUse(script=Path(__file__).with_name("in_use.py"), check=check_in_use),
    option_help="For vllm: path=auto|scoring|requests, and any "
    "argument of vllm.LLM, such as tensor_parallel_size=2",
)
