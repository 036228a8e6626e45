"""Which scored sets a plan lists for a target: its candidates, and sets that are unlike them.

Notation: M masks, P players.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpserve.masks import keys
from lpserve.plan.targets import Target
from lpserve.types import BoolArray, FloatArray


def choose_candidates(
    masks_MP: BoolArray,
    utilities_M: FloatArray,
    target: Target,
    *,
    greedy: Sequence[BoolArray],
    ranking: BoolArray | None,
    sources: dict[bytes, str],
) -> list[tuple[int, str]]:
    """The candidates of a target as (row of `masks_MP`, how it was found), best utility first.

    Candidates are the two best scored sets, the greedy path's first set that meets the target and
    the set of the lowest values, as far as they have a finite score. Ties go to the smaller mask
    key. Empty when no scored set meets the target.

    Args:
        masks_MP: scored masks, distinct.
        utilities_M: NaN or infinite where a mask has no usable score.
        greedy: the greedy path, one mask for each number removed from the constraint's smallest
            on; may be shorter.
        ranking: the mask that drops the players of the lowest values, `bool[P]`.
        sources: mask key -> how the mask was found, for those that are neither.
    """
    wanted: dict[bytes, str] = {}
    for mask_P in greedy:
        if target.holds(mask_P[None])[0]:
            wanted[keys(mask_P[None])[0]] = "greedy"
            break
    if ranking is not None:
        wanted.setdefault(keys(ranking[None])[0], "ranking")
    chosen: list[tuple[int, str]] = []
    for place, (row, key) in enumerate(_best_first(masks_MP, utilities_M, target)):
        if place < 2 or key in wanted:
            chosen.append((row, wanted.get(key) or sources.get(key, "design")))
    return chosen


def choose_alternatives(
    masks_MP: BoolArray,
    utilities_M: FloatArray,
    chosen: int,
    target: Target,
    *,
    count: int,
    min_distance: int,
) -> list[int]:
    """Rows of the best scored sets that are unlike a chosen one, and unlike one another.

    Sets are taken by their utility, the best first (ties: the smaller mask key), each if it differs
    from the chosen set and from all taken before in at least `min_distance` players: each removes
    so many that the other keeps. May be fewer than `count`.

    Args:
        masks_MP: scored masks, distinct.
        utilities_M: NaN or infinite where a mask has no usable score.
        chosen: the row of the plan's set.
        target: what it meets, and all others that are listed.
    """
    taken: list[int] = []
    for row, _ in _best_first(masks_MP, utilities_M, target):
        if len(taken) == count:
            break
        others_MP = masks_MP[[chosen, *taken]]
        more, fewer = others_MP & ~masks_MP[row], masks_MP[row] & ~others_MP
        if (np.minimum(more.sum(axis=1), fewer.sum(axis=1)) >= min_distance).all():
            taken.append(row)
    return taken


def _best_first(
    masks_MP: BoolArray, utilities_M: FloatArray, target: Target
) -> list[tuple[int, bytes]]:
    """(row, mask key) of the sets that meet a target and have a finite utility, best utility first;
    ties go to the smaller key."""
    rows = np.flatnonzero(np.isfinite(utilities_M) & target.holds(masks_MP))
    found = zip(rows.tolist(), keys(masks_MP[rows]), strict=True)
    return sorted(found, key=lambda one: (-utilities_M[one[0]], one[1]))
