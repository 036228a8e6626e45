"""Greedy removal among scored masks, and pruning of its next step by a lazy rule.

A step of greedy removal compares all sets that remove one more player. Most of them need no score:
`unpruned_options` says which do. A set is given by the mask that keeps the rest. Nothing here
scores; everything is deterministic.

Notation: M masks, P players, S steps, O options of a step (in the order of `drop_one`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from lpserve.masks import best_row, drop_one, keys
from lpserve.plan.constraint import Constraint
from lpserve.types import BoolArray, FloatArray

_PRUNE_BEYOND = 4.0  # standard deviations of how losses change from step to step
_MIN_CHANGES = 8  # with fewer known changes no set of a step is pruned


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
        pruned: keys of masks that a step may leave unscored (`unpruned_options`).
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


def unpruned_options(
    path: Sequence[BoolArray],
    masks_MP: BoolArray,
    utilities_M: FloatArray,
    within: Constraint | None = None,
) -> BoolArray:
    """Which options of the next greedy step must be scored, `bool[O]`; False: pruned.

    The loss of dropping a player changes little from one step to the next, so its last known loss
    predicts the next one. (Lazy greedy, Minoux 1978, prunes by old losses as exact bounds; layer
    games are not submodular, so here they are estimates.) Drift and standard deviation of the
    change are estimated from the cheaper half of the players between the last two steps. An option
    is pruned when its predicted loss exceeds the smallest predicted loss by more than 4 standard
    deviations of what both may have changed since they were scored. Nothing is pruned while fewer
    than 8 changes are known.

    Args:
        path: masks of the steps so far, at least one.
        masks_MP: scored masks, distinct.
        utilities_M: their utilities.
        within: what sets may be on the path; None: any.
    """
    within = within or Constraint(masks_MP.shape[1])
    loss = _losses([np.ones(masks_MP.shape[1], dtype=bool), *path], masks_MP, utilities_M)
    options = np.setdiff1d(np.flatnonzero(path[-1]), within.protected)
    change = _last_changes(loss)
    if len(change) < _MIN_CHANGES:
        return np.ones(len(options), dtype=bool)
    steps = len(loss)
    known = np.isfinite(loss[:, options])
    age = known[::-1].argmax(axis=0)
    predicted = loss[steps - 1 - age, options] + change.mean() * age
    predicted[~known.any(axis=0)] = -np.inf  # nothing is known of it
    if not np.isfinite(predicted).any():
        return np.ones(len(options), dtype=bool)
    cheapest = int(np.argmin(np.where(np.isfinite(predicted), predicted, np.inf)))
    moved = change.std(ddof=1) * np.sqrt(age + age[cheapest])
    return np.asarray(predicted - predicted[cheapest] <= _PRUNE_BEYOND * moved)


def _losses(path: Sequence[BoolArray], masks_MP: BoolArray, utilities_M: FloatArray) -> FloatArray:
    """Loss of utility by dropping each player from each mask of a path, `float64[S, P]`.

    NaN where a player is gone already or the mask was not scored.
    """
    row_of = {key: row for row, key in enumerate(keys(masks_MP))}
    loss = np.full((len(path), masks_MP.shape[1]), np.nan)
    for step, mask_P in enumerate(path):
        here = row_of.get(keys(mask_P[None])[0])
        for player, key in zip(np.flatnonzero(mask_P), keys(drop_one(mask_P)), strict=True):
            row = row_of.get(key)
            if here is not None and row is not None:
                loss[step, player] = utilities_M[here] - utilities_M[row]
    return loss


def _last_changes(loss: FloatArray) -> FloatArray:
    """Changes of losses from step to step, of the cheaper half of the players, `float64[changes]`.

    From the last step backwards, until there are at least 8.
    """
    changes: list[FloatArray] = []
    for step in range(len(loss) - 1, 0, -1):
        before_P = loss[step - 1]
        known = np.flatnonzero(np.isfinite(before_P) & np.isfinite(loss[step]))
        known = known[np.argsort(before_P[known], kind="stable")]
        cheap = known[: max(_MIN_CHANGES, len(known) // 2)]
        changes.append(loss[step, cheap] - before_P[cheap])
        if sum(map(len, changes)) >= _MIN_CHANGES:
            break
    return np.concatenate([np.empty(0), *changes])
