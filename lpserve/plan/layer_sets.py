"""Named sets of removed layers and parts of layers.

Numbers are 0-based layers of the original model; `7.attention` and `7.mlp` are parts of one. Knows
no engine. Files that hold sets are read by `lpserve.plan.set_files`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.errors import InputError
from lpserve.inputs.rules import PART_NAME
from lpserve.masks import without
from lpserve.model.players import ATTENTION, named_players
from lpserve.types import BoolArray, Player


@dataclass(frozen=True, slots=True)
class LayerSet:
    """Named layers to remove."""

    name: str
    removed: tuple[int | str, ...]
    """0-based, sorted: numbers of layers, and parts of layers such as `7.attention`."""

    @property
    def has_parts(self) -> bool:
        """Whether it removes parts of layers."""
        return any(isinstance(one, str) for one in self.removed)

    def mask(self, players: Sequence[Player]) -> BoolArray:
        """The mask that keeps all else, `bool[P]`, True = kept.

        Raises:
            InputError: it removes what no player of these is.
        """
        if self.has_parts and not any(player.part == ATTENTION for player in players):
            raise InputError(
                f"set {self.name!r} removes parts of layers: give players = half (--players half)"
            )
        return without(len(players), named_players(players, self.removed, f"set {self.name!r}"))


def layer_set_masks(sets: Sequence[LayerSet], players: Sequence[Player]) -> BoolArray:
    """The mask of every set, `bool[M, P]`, True = kept."""
    return np.array([layer_set.mask(players) for layer_set in sets], dtype=bool)


def named_apart(sets: Sequence[tuple[Path, LayerSet]]) -> list[LayerSet]:
    """Sets of several files or folders: one that is given twice is one, and where different sets
    have one name, as in two runs, their folders' names stand in front.

    Args:
        sets: with the file or folder that each comes from.
    """
    once = list(dict.fromkeys(sets))
    names = Counter(name for name, _ in {(s.name, s.removed) for _, s in once})
    folders = {(path if path.is_dir() else path.parent).resolve().name for path, _ in once}
    tell_apart = len(folders) == len({path for path, _ in once})

    def named(path: Path, found: LayerSet) -> LayerSet:
        if names[found.name] == 1:
            return found
        folder = (path if path.is_dir() else path.parent).resolve().name
        return LayerSet(f"{folder if tell_apart else path}/{found.name}", found.removed)

    return list(dict.fromkeys(named(path, found) for path, found in once))


def full_model() -> LayerSet:
    """The set that removes nothing."""
    return LayerSet("all layers", ())


def layer_set(name: str, removed: Sequence[Any], num_players: int, source: str) -> LayerSet:
    """A set of checked layer numbers.

    Raises:
        InputError: something is no layer number of this model, or repeats; names `source`.
    """
    numbers: list[int] = []
    parts: dict[str, int] = {}
    for item in removed:
        if isinstance(item, str) and re.match(PART_NAME, item):
            parts[item] = int(item.partition(".")[0])
        elif isinstance(item, bool) or not isinstance(item, int):
            raise InputError(f"{source}: {item!r} is no layer number")
        else:
            numbers.append(item)
    everywhere = [*numbers, *parts.values()]
    outside = [number for number in everywhere if not 0 <= number < num_players]
    if outside:
        from_one = max(everywhere) == num_players and min(everywhere) > 0
        hint = "; are they counted from 1? The first layer is 0" if from_one else ""
        raise InputError(
            f"{source}: layer {outside[0]} is not one of 0..{num_players - 1}, the model's "
            f"layers{hint}"
        )
    if len(set(numbers)) + len(parts) != len(removed):
        if set(numbers) <= {0, 1} and len(numbers) == num_players:
            raise InputError(
                f"{source}: {numbers} is a mask, and layer numbers are needed: write the mask "
                "without commas to --mask"
            )
        raise InputError(f"{source}: a layer comes twice in {list(removed)}")
    both = sorted({*numbers} & {*parts.values()})
    if both:
        raise InputError(f"{source}: layer {both[0]} is removed whole, and a part of it besides")
    return LayerSet(name, tuple(_sorted([*numbers, *parts])))


def mask_set(text: str, num_players: int, source: str) -> LayerSet:
    """A set from a mask written as 0 and 1, first layer first, 1 = kept.

    Raises:
        InputError: it is not one digit 0 or 1 for each layer; names `source`.
    """
    if not re.fullmatch("[01]+", text) or len(text) != num_players:
        raise InputError(
            f"{source}: {text!r} is no mask of {num_players} layers: give one 0 (removed) or 1 "
            "(kept) for each"
        )
    removed = [i for i, bit in enumerate(text) if bit == "0"]
    return LayerSet(set_name(removed), tuple(removed))


def set_name(removed: Sequence[int | str]) -> str:
    """The name of a set that was given none: `-3,7`."""
    return "-" + ",".join(map(str, _sorted(removed))) if removed else "all layers"


def _sorted(removed: Sequence[int | str]) -> list[int | str]:
    return sorted(removed, key=lambda one: (int(str(one).partition(".")[0]), str(one)))
