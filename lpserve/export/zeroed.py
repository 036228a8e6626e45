"""Parts of layers as tensors of zeros: a checkpoint without them that loads anywhere.

A part whose weights are all zero returns zero, which is what its absence means
(`lpserve.engine.parts`). Such a checkpoint needs no code of its own, and saves no time and no
memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lpserve.errors import InputError
from lpserve.model.checkpoint import Checkpoint
from lpserve.model.players import player_label
from lpserve.types import Player


def part_tensors(
    checkpoint: Checkpoint,
    prefix: str,
    parts: Sequence[Player],
    modules: Mapping[int, Mapping[str, Sequence[str]]],
) -> set[str]:
    """Names of the tensors that hold the weights of parts of layers.

    Args:
        prefix: what the names of layers' tensors begin with, such as `model.layers.`.
        modules: of each layer, the child modules that are each of its parts, as the model's class
            names them (`lpserve.engine.parts.Modules`).

    Raises:
        InputError: the tensors of a part cannot be told from its layer's others: the files name
            modules otherwise than the model's class does, and more than one.
    """
    stored: dict[int, dict[str, list[str]]] = {}
    for entry in checkpoint.tensors:
        if entry.name.startswith(prefix):
            number, module, *_ = entry.name.removeprefix(prefix).split(".")
            stored.setdefault(int(number), {}).setdefault(module, []).append(entry.name)
    found: set[str] = set()
    for part in parts:
        known = modules[part.layer]
        named = {name: kind for kind, names in known.items() for name in names}
        tensors = stored.get(part.layer, {})
        matrices = _with_matrices(checkpoint, tensors)
        renamed = [name for name in matrices if name not in named]
        absent = [name for name in named if name not in tensors]
        if len(renamed) == len(absent) == 1:
            named[renamed[0]] = named.pop(absent[0])
        elif renamed or absent:
            raise InputError(
                f"model {checkpoint.path}: {player_label(part)} cannot be left out: its files name "
                f"the parts of the layer {', '.join(sorted(matrices))}, the model's class "
                f"{', '.join(sorted(named))}"
            )
        for name, kind in named.items():
            if kind == part.part:
                found |= set(tensors[name])
    return found


def _with_matrices(checkpoint: Checkpoint, tensors: Mapping[str, list[str]]) -> list[str]:
    """Modules of a layer that hold matrices."""
    shapes = {entry.name: entry.shape for entry in checkpoint.tensors}
    return [
        module
        for module, names in tensors.items()
        if any(len(shapes[name]) > 1 and name.count(".") > 0 for name in names)
    ]
