"""The masks that remove at most so many players, in the order of the prefix trie.

The order is that of mask keys: player 0 first, dropped before kept. Neighbours in it share long
prefixes, so that a contiguous range of it is what one engine scores best. The masks are numbered
and made from their numbers; the family itself is never held.

Notation: M masks, P players, r = number removed.
"""

from __future__ import annotations

import math

import numpy as np

from lpserve.errors import InputError
from lpserve.types import BoolArray, IntArray

MOST_MASKS = 1_000_000_000
"""More than this are refused: at a thousand masks a second they take twelve days."""


class SmallRemovals:
    """All masks of `num_players` players that remove at most `max_removed`, and the mask that
    removes all: a game is centred on it.

    Raises:
        InputError: `max_removed` is out of range, or the masks are more than `MOST_MASKS`.
    """

    def __init__(self, num_players: int, max_removed: int) -> None:
        if not 1 <= max_removed <= num_players:
            raise InputError(
                f"max_removed must be 1..{num_players} for {num_players} players: got {max_removed}"
            )
        self.num_players, self.max_removed = num_players, max_removed
        self._has_empty_apart = max_removed < num_players
        self.count = _at_most(num_players, max_removed) + self._has_empty_apart
        """How many masks there are."""
        if self.count > MOST_MASKS:
            raise InputError(
                f"{self.count:,} sets remove at most {max_removed} of {num_players} players, more "
                f"than {MOST_MASKS:,}: lower max_removed"
            )
        self._completions = np.array(
            [
                [_at_most(num_players - i - 1, z) for z in range(max_removed + 1)]
                for i in range(num_players)
            ],
            dtype=np.int64,
        )
        """[i, z]: masks of the players after i that remove at most z of them."""

    @property
    def layer_forwards(self) -> int:
        """Layer-forwards of the trie over all of them: a prefix is computed once, and every prefix
        that removes at most `max_removed` is that of some mask."""
        return sum(_at_most(i, self.max_removed) for i in range(self.num_players))

    @property
    def skip_layer_forwards(self) -> int:
        """Layer-forwards where masks share nothing: the layers that they keep."""
        return sum(
            math.comb(self.num_players, r) * (self.num_players - r)
            for r in range(self.max_removed + 1)
        )

    def masks(self, start: int, stop: int) -> BoolArray:
        """The masks number `start` up to `stop`, `bool[M, P]`."""
        if not 0 <= start <= stop <= self.count:
            raise ValueError(f"masks {start} to {stop} of {self.count}")
        rank_M = np.arange(start, stop, dtype=np.int64) - self._has_empty_apart
        is_empty_M = rank_M < 0
        rank_M[is_empty_M] = 0
        removable_M = np.full(len(rank_M), self.max_removed)
        masks_MP = np.empty((len(rank_M), self.num_players), dtype=bool)
        for i in range(self.num_players):
            below_M = self._dropping(i, removable_M)
            masks_MP[:, i] = rank_M >= below_M
            rank_M -= np.where(masks_MP[:, i], below_M, 0)
            removable_M -= ~masks_MP[:, i]
        masks_MP[is_empty_M] = False
        return masks_MP

    def ranks(self, masks_MP: BoolArray) -> IntArray:
        """The number of each mask, `int64[M]`; -1 where it is not one of these."""
        rank_M = np.full(len(masks_MP), int(self._has_empty_apart), dtype=np.int64)
        removable_M = np.full(len(masks_MP), self.max_removed)
        for i in range(self.num_players):
            kept_M = masks_MP[:, i]
            rank_M += np.where(kept_M, self._dropping(i, removable_M), 0)
            removable_M -= ~kept_M
        rank_M[removable_M < 0] = -1
        rank_M[~masks_MP.any(axis=1)] = 0
        return rank_M

    def _dropping(self, player: int, removable_M: IntArray) -> IntArray:
        """How many masks drop the player, of those that agree on the players before and may remove
        so many more."""
        found = self._completions[player][np.maximum(removable_M - 1, 0)]
        return np.where(removable_M > 0, found, 0)


def _at_most(num_players: int, removed: int) -> int:
    """Masks of so many players that remove at most `removed` of them."""
    return sum(math.comb(num_players, r) for r in range(min(removed, num_players) + 1))
