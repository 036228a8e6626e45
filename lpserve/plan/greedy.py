"""Greedy removal among scored masks.

A step of greedy removal compares all sets that remove one more player. A set is given by the mask
that keeps the rest. Nothing here scores; everything is deterministic.

Notation: M masks, P players.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from lpserve.masks import best_row, keys
from lpserve.plan.constraint import Constraint
from lpserve.types import BoolArray, FloatArray


def greedy_path(
    masks_MP: BoolArray,
    utilities_M: FloatArray,
    max_steps: int,
    pruned: Collection[bytes] = (),
    within: Constraint | None = None,
) -> list[BoolArray]:
    """Greedy removal (the rule of SLEB, arXiv 2402.09025): each step drops the player whose loss
    costs least, among scored masks. One mask for each step, at most `max_steps`.

    The path ends early at a step that has an option neither scored nor pruned, or no finite score.
    Where players must be removed, the first step removes all of them.

    Args:
        masks_MP: scored masks, distinct.
        utilities_M: NaN where a score is not usable; such a mask is never chosen.
        pruned: keys of masks that a step may leave unscored, since a run knew that they could not
            be its best.
        within: what sets may be on the path; None: any.
    """
    within = within or Constraint(masks_MP.shape[1])
    row_of = {key: row for row, key in enumerate(keys(masks_MP))}
    path: list[BoolArray] = []
    options = within.first()[None] if within.forced else within.drops(within.first())
    for _ in range(max_steps):
        found = [(key, row_of.get(key)) for key in keys(options)]
        if any(row is None and key not in pruned for key, row in found):
            break
        rows = np.array([row for _, row in found if row is not None], dtype=np.int64)
        best = best_row(masks_MP[rows], utilities_M[rows])
        if best is None:
            break
        path.append(masks_MP[rows[best]])
        options = within.drops(path[-1])
    return path
