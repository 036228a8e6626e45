"""Sets of removed players as masks: the best of some, the ranking's, and their lists of indices.

A set is given by the mask that keeps the rest. Ties go to the smaller mask key.

Notation: M masks, P players.
"""

from __future__ import annotations

import numpy as np

from lpserve.masks import keys, removed_players, without
from lpserve.types import BoolArray, FloatArray


def best_row(masks_MP: BoolArray, utilities_M: FloatArray) -> int | None:
    """Row of the highest finite utility (ties: the smaller mask key); None when none is finite."""
    rows = np.flatnonzero(np.isfinite(utilities_M))
    if not len(rows):
        return None
    best = utilities_M[rows].max()
    tied = rows[utilities_M[rows] == best]
    tied_keys = keys(masks_MP[tied])
    return int(tied[tied_keys.index(min(tied_keys))])


def ranking_mask(values_P: FloatArray, num_removed: int) -> BoolArray:
    """The mask that drops the `num_removed` players of the lowest values, `bool[P]`.

    Ties drop the earlier player.
    """
    order = np.argsort(values_P, kind="stable")
    return without(len(values_P), [int(i) for i in order[:num_removed]])


def removed_list(mask_P: BoolArray) -> list[int]:
    """Sorted indices of the removed players, as plain integers for JSON."""
    return list(removed_players(mask_P))
