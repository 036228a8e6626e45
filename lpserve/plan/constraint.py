"""Which sets of removed players are asked about: those that keep some and remove some others.

A set is given by the mask that keeps the rest. Notation: M masks, P players, r = number removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lpserve.errors import InputError
from lpserve.masks import all_masks, drop_one, ranking_mask, without
from lpserve.types import BoolArray, FloatArray


@dataclass(frozen=True, slots=True)
class Constraint:
    """Players that every set keeps, and players that every set removes."""

    num_players: int
    protected: tuple[int, ...] = ()
    forced: tuple[int, ...] = ()

    @property
    def given(self) -> bool:
        """Whether it excludes any set."""
        return bool(self.protected or self.forced)

    @property
    def free(self) -> list[int]:
        """Players that a set may keep or remove."""
        bound = {*self.protected, *self.forced}
        return [player for player in range(self.num_players) if player not in bound]

    def sizes(self, max_removed: int) -> range:
        """The numbers of removed players from 1 to `max_removed` that sets within have."""
        return range(max(1, len(self.forced)), max_removed + 1)

    def check(self, max_removed: int) -> None:
        """Raise InputError where no set of some size is within."""
        players = range(self.num_players)
        for name, given in (("protect", self.protected), ("force", self.forced)):
            for player in given:
                if player not in players:
                    raise InputError(f"{name}: player {player} is not one of 0..{players[-1]}")
        both = sorted({*self.protected} & {*self.forced})
        if both:
            raise InputError(f"player {both[0]} cannot be both protected and forced")
        if len(self.forced) > max_removed:
            raise InputError(
                f"force removes {len(self.forced)} players, max_removed is {max_removed}: force "
                "fewer, or raise max_removed"
            )
        most = self.num_players - len(self.protected)
        if most < max_removed:
            raise InputError(
                f"protect leaves {most} players to remove, max_removed is {max_removed}: protect "
                "fewer, or lower max_removed"
            )

    def holds(self, masks_MP: BoolArray) -> BoolArray:
        """Which masks are within, `bool[M]`."""
        kept_M = masks_MP[:, list(self.protected)].all(axis=1)
        return np.asarray(kept_M & ~masks_MP[:, list(self.forced)].any(axis=1))

    def first(self) -> BoolArray:
        """The mask within that keeps most, `bool[P]`: all but the forced players."""
        return without(self.num_players, self.forced)

    def drops(self, mask_P: BoolArray) -> BoolArray:
        """Masks within that drop one more player than a mask within."""
        options_MP = drop_one(mask_P)
        return options_MP[self.holds(options_MP)]

    def count(self, num_removed: int) -> int:
        """How many sets of a size are within."""
        left = num_removed - len(self.forced)
        return math.comb(len(self.free), left) if left >= 0 else 0

    def all_sets(self, num_removed: int) -> BoolArray:
        """Every mask of a size that is within."""
        free = self.free
        return self.embed(all_masks(len(free), len(free) + len(self.forced) - num_removed))

    def embed(self, masks_over_free: BoolArray) -> BoolArray:
        """Masks over the free players as masks over all, `bool[M, P]`."""
        masks_MP = np.broadcast_to(self.first(), (len(masks_over_free), self.num_players)).copy()
        masks_MP[:, self.free] = masks_over_free
        return masks_MP

    def ranking(self, values_P: FloatArray, num_removed: int) -> BoolArray:
        """The mask within that drops the players of the lowest values, `bool[P]`.

        Ties drop the earlier player.
        """
        of_free = ranking_mask(values_P[self.free], num_removed - len(self.forced))
        return self.embed(of_free[None])[0]


def constraint_of(
    num_players: int, protect: Iterable[int] | None = None, force: Iterable[int] | None = None
) -> Constraint:
    """The constraint of these players, each once and in order."""
    return Constraint(num_players, *(tuple(sorted(set(some or ()))) for some in (protect, force)))


def constraint_text(protected: Sequence[int | str], forced: Sequence[int | str]) -> str:
    """In words: `keep 0, 1 and remove 7`."""
    said = [("keep", protected), ("remove", forced)]
    return " and ".join(f"{verb} {', '.join(map(str, some))}" for verb, some in said if some)
