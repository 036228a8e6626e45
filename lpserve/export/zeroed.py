"""Parts of layers as tensors of zeros: a checkpoint without them that loads anywhere.

A part whose weights are all zero returns zero, which is what its absence means
(`lpserve.engine.parts`). Such a checkpoint needs no code of its own, and saves no time and no
memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lpserve.model.checkpoint import Checkpoint
from lpserve.model.players import part_entries
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
        modules: as of `part_entries`.

    Raises:
        InputError: as `part_entries`.
    """
    layers = sorted({part.layer for part in parts})
    found = {layer: part_entries(checkpoint, prefix, layer, modules[layer]) for layer in layers}
    return {entry.name for part in parts for entry in found[part.layer][part.part]}
