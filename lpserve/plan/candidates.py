"""Which scored sets of one size a plan lists: its candidates, and sets that are unlike them.

Notation: M masks, P players.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpserve.masks import keys
from lpserve.plan.constraint import Constraint
from lpserve.types import BoolArray, FloatArray


def choose_candidates(
    masks_MP: BoolArray,
    utilities_M: FloatArray,
    num_removed: int,
    *,
    greedy: Sequence[BoolArray],
    ranking: BoolArray | None,
    sources: dict[bytes, str],
    within: Constraint | None = None,
) -> list[tuple[int, str]]:
    """The candidates of one size as (row of `masks_MP`, how it was found), best utility first.

    Candidates are the two best scored sets, the greedy path's set and the set of the lowest values,
    as far as they have a finite score and are within the constraint. Ties go to the smaller mask
    key. Empty when no scored set of this size is within.

    Args:
        masks_MP: scored masks, distinct.
        utilities_M: NaN or infinite where a mask has no usable score.
        num_removed: the size, in removed players.
        greedy: the greedy path, one mask for each number removed from the constraint's smallest
            on; may be shorter.
        ranking: the mask that drops the players of the lowest values, `bool[P]`.
        sources: mask key -> how the mask was found, for those that are neither.
        within: what sets may be candidates; None: any.
    """
    wanted: dict[bytes, str] = {}
    for mask_P in greedy:
        if (~mask_P).sum() == num_removed:
            wanted[keys(mask_P[None])[0]] = "greedy"
    if ranking is not None:
        wanted.setdefault(keys(ranking[None])[0], "ranking")
    chosen: list[tuple[int, str]] = []
    for place, (row, key) in enumerate(_best_first(masks_MP, utilities_M, num_removed, within)):
        if place < 2 or key in wanted:
            chosen.append((row, wanted.get(key) or sources.get(key, "design")))
    return chosen


def choose_alternatives(
    masks_MP: BoolArray,
    utilities_M: FloatArray,
    chosen: int,
    *,
    count: int,
    min_distance: int,
    within: Constraint | None = None,
) -> list[int]:
    """Rows of the best scored sets that are unlike a chosen one, and unlike one another.

    Sets are taken by their utility, the best first (ties: the smaller mask key), each if it differs
    from the chosen set and from all taken before in at least `min_distance` players: it removes so
    many that the other keeps. May be fewer than `count`.

    Args:
        masks_MP: scored masks, distinct.
        utilities_M: NaN or infinite where a mask has no usable score.
        chosen: the row of the plan's set, whose size all have.
        within: what sets may be listed; None: any.
    """
    num_removed = int((~masks_MP[chosen]).sum())
    taken: list[int] = []
    for row, _ in _best_first(masks_MP, utilities_M, num_removed, within):
        if len(taken) == count:
            break
        apart = (masks_MP[[chosen, *taken]] & ~masks_MP[row]).sum(axis=1)
        if (apart >= min_distance).all():
            taken.append(row)
    return taken


def _best_first(
    masks_MP: BoolArray, utilities_M: FloatArray, num_removed: int, within: Constraint | None
) -> list[tuple[int, bytes]]:
    """(row, mask key) of the sets of one size that have a finite utility and are within a
    constraint, best utility first; ties go to the smaller key."""
    within = within or Constraint(masks_MP.shape[1])
    same = (~masks_MP).sum(axis=1) == num_removed
    rows = np.flatnonzero(same & np.isfinite(utilities_M) & within.holds(masks_MP))
    found = zip(rows.tolist(), keys(masks_MP[rows]), strict=True)
    return sorted(found, key=lambda one: (-utilities_M[one[0]], one[1]))
