"""What the rest of the package needs to know about a kind of engine, without opening one.

Each kind describes itself in one module (`hf/kind.py`, `vllm/kind.py`, `synthetic.py`) as one
`EngineKind`, and `registry.py` lists it. Nothing here loads torch, transformers or vLLM: `build`
imports what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import Engine
from lpserve.errors import InputError
from lpserve.inputs.shapes import check_value
from lpserve.model.architecture import check_decoder
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.players import checkpoint_players
from lpserve.model.size import ITEM_BYTES
from lpserve.types import EngineSpec, Player


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineResources:
    """What one engine takes of a cluster. It runs `ranks * stages` worker processes."""

    ranks: int = 1
    """Ranks that share every layer (tensor parallelism)."""
    stages: int = 1
    """Consecutive groups of layers (pipeline parallelism)."""
    may_use_gpu: bool = True
    """Whether it takes a GPU for each worker where nodes have some."""
    weight_bytes: int = 0
    """Bytes of all weights in the engine's dtype; 0: it loads none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InUse:
    """How `lpserve speed` measures a checkpoint in this engine, outside of lpserve."""

    script: Path
    """A Python file that defines `open_checkpoint(task, device, memory)` and imports nothing of
    lpserve; see `lpserve.evaluation.speed_worker`."""
    check: Callable[[str], None]
    """Raises InputError where the engine cannot be measured on this device (`auto` or `cpu`)."""


def same_spec(spec: EngineSpec, _: Any = None) -> EngineSpec:
    """The spec as it is."""
    return spec


def with_memory_settings(spec: EngineSpec, settings: Mapping[str, Any]) -> EngineSpec:
    """A spec with the state budget and micro-batch that an engine of it resolved, as options."""
    options = dict(spec.options)
    if "state_budget_bytes" in settings:
        options["state_budget_mb"] = settings["state_budget_bytes"] / 2**20
    if settings.get("pack_states"):
        options["micro_batch_tokens"] = settings["micro_batch_tokens"]
    return replace(spec, options=options)


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """One kind of engine: how to open it, what it may be given, and what it takes."""

    name: str
    """The value of the configuration key `engine`."""
    build: Callable[[EngineSpec, TokenWindows], Engine]
    """Open an engine; raises InputError or EngineError."""
    check_options: Callable[[Mapping[str, Any]], None]
    """Raise InputError for options that no engine of this kind takes; loads nothing heavy."""
    players: Callable[[str, Mapping[str, Any], str], tuple[Player, ...]]
    """Players of a model (checkpoint folder, options, configuration key `players`), from the
    checkpoint's headers; raises InputError where the model cannot be used, or not so."""
    resources: Callable[[EngineSpec], EngineResources]
    """What an engine of this spec takes of a cluster."""
    reads_checkpoint: bool = True
    """Whether `model` names a checkpoint folder with a vocabulary and positions."""
    capabilities: tuple[type, ...] = ()
    """Protocols of `engine.base` beyond `Engine` that its engines satisfy."""
    pinned: Callable[[EngineSpec, Mapping[str, Any]], EngineSpec] = with_memory_settings
    """A spec with the settings (`EngineInfo.settings`) that an engine of it resolved: what every
    further engine of a run uses, and a resumed run again."""
    for_length: Callable[[EngineSpec, int], EngineSpec] = same_spec
    """A spec whose engine takes windows of so many tokens."""
    over_nodes: Callable[[EngineSpec], EngineSpec] = same_spec
    """The spec of an engine whose workers are spread over several nodes of a Ray cluster."""
    in_use: InUse | None = None
    """None: `lpserve speed` does not measure it."""
    option_help: str = ""
    """A sentence about its options, for the command line."""
    is_game: bool = False
    """A stand-in for tests: left out of the command line's help."""


MEMORY_OPTIONS: dict[str, Any] = {
    "state_budget_mb": Annotated[float, Meta(gt=0, le=1e12, description="a number above 0")],
    "micro_batch_tokens": Annotated[int, Meta(ge=1, le=2**40, description="a number above 0")],
}
"""Options of engines that run the trie: name -> type (`lpserve.inputs.shapes`)."""


def check_known_options(kind: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise InputError naming the first option that is not a known one, or is of another type.

    Args:
        known: name -> type (`lpserve.inputs.shapes.check_value`).
    """
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(
            f"engine {kind!r} has no option {unknown[0]!r}: it knows {', '.join(known)}"
        )
    check_option_types(options, known)


def check_option_types(options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise InputError naming the first option of another type than it is known to have."""
    for name, value in options.items():
        if name in known:
            check_value(value, known[name], f"engine option {name}")


def folder_players(model: str, _: Mapping[str, Any], kind: str) -> tuple[Player, ...]:
    """The players of a checkpoint folder; raises InputError unless it is a decoder."""
    checkpoint = read_checkpoint(model)
    check_decoder(checkpoint)
    return checkpoint_players(checkpoint, kind)


def checkpoint_resources(spec: EngineSpec) -> EngineResources:
    """The weights of the checkpoint in the engine's dtype, over all ranks that its options name."""
    return EngineResources(
        ranks=int(spec.options.get("tensor_parallel_size", 1)),
        stages=int(spec.options.get("pipeline_parallel_size", 1)),
        may_use_gpu=spec.device != "cpu",
        weight_bytes=read_checkpoint(spec.model).num_parameters * ITEM_BYTES[spec.dtype],
    )
