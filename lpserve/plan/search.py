"""Which sets to remove may beat the best scored ones, and which of them to score next.

`best_predicted_sets` finds the sets of one size that a surrogate likes best;
`select_by_expected_improvement` picks a batch of unscored sets of all sizes by expected
improvement; `probability_of_improvement` says how likely a set beats the best scored one of its
size, which is when a search may end.

A set is given by the mask that keeps the rest. Improvements are shares of perplexity where the
utility is a perplexity ratio (above 0), else plain differences. Deterministic; ties go to the
smaller mask key.

Notation: P players, Q queried masks, r = number removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.stats import norm

from lpserve.masks import add_one, all_masks, drop_one, keys, pack, sort_distinct, swap_one
from lpserve.surrogate import KernelSurrogate, Surrogate, acquisition_model, kernel_of
from lpserve.types import BoolArray, FloatArray

MAX_EXHAUSTIVE = 20_000
"""Strata up to this size are searched whole; larger ones by beam search over swaps."""
STD_INFLATION = 2.0
"""The search's standard deviations are this much wider than leave-one-out says: on an exact game of
12 layers the best unscored sets of 5 and 6 layers are missed by 1.3 to 2.5 of those (root mean
square)."""
MIN_EXPECTED_IMPROVEMENT = 1e-4
"""Expected improvement that is worth a score."""
_STARTS = 4  # best scored sets of a size that a beam search starts from or beside
_BEAM = 8
_MAX_STEPS = 20
_SHORTLIST = 64
_MOST_JOINT = 512  # candidates of all sizes that a batch is picked from: their covariance is kept
_LEAST_VARIANCE = 1e-14


def starts(masks_MP: BoolArray, utilities_M: FloatArray, num_removed: int) -> BoolArray:
    """Where a beam search for sets of one size begins, `bool[Q, P]`.

    At the best scored sets of that size and, one player more or less removed, at those of the sizes
    next to it: the best sets of two sizes may have no player in common, and no swap that helps
    leads from one to the other.

    Args:
        utilities_M: NaN where a mask was not scored.
    """
    removed_M = (~masks_MP).sum(axis=1)
    found = [np.empty((0, masks_MP.shape[1]), dtype=bool)]
    for r in (num_removed - 1, num_removed, num_removed + 1):
        rows = np.flatnonzero((removed_M == r) & np.isfinite(utilities_M))
        best_QP = masks_MP[rows[np.argsort(-utilities_M[rows], kind="stable")[:_STARTS]]]
        if r == num_removed:
            found.append(best_QP)
        else:
            found += [
                drop_one(mask_P) if r < num_removed else add_one(mask_P) for mask_P in best_QP
            ]
    return np.concatenate(found)


def best_predicted_sets(
    surrogate: Surrogate, num_players: int, num_removed: int, starts_MP: BoolArray
) -> BoolArray:
    """The sets of one size that a surrogate likes best, best first, `bool[<=64, P]`.

    Exhaustive where C(P, r) is small, else beam search over swaps from `starts_MP` (see `starts`).
    Of `auto` the best kernel surrogate is asked, whoever answers: it knows a whole neighbourhood at
    once.
    """
    surrogate = acquisition_model(surrogate) or surrogate
    if math.comb(num_players, num_removed) <= MAX_EXHAUSTIVE:
        pool = all_masks(num_players, num_players - num_removed)
        return _top(pool, surrogate.mean(pool))[0]
    pool, _ = sort_distinct(starts_MP)
    pool, value_Q = _top(pool, surrogate.mean(pool))
    expanded: set[bytes] = set()
    for _ in range(_MAX_STEPS):
        fresh = [row for row, key in enumerate(keys(pool[:_BEAM])) if key not in expanded]
        if not fresh:
            break
        expanded.update(keys(pool[fresh]))
        near = [_best_swaps(surrogate, pool[row]) for row in fresh]
        pool, place_Q = sort_distinct(np.concatenate([pool, *(masks for masks, _ in near)]))
        said_Q = np.concatenate([value_Q, *(values for _, values in near)])
        value_Q = np.empty(len(pool))
        value_Q[place_Q[::-1]] = said_Q[::-1]  # what was said first stands
        pool, value_Q = _top(pool, value_Q)
    return pool


def _best_swaps(surrogate: Surrogate, mask_P: BoolArray) -> tuple[BoolArray, FloatArray]:
    """The best of a set's swaps and their predicted utilities."""
    near = swap_one(mask_P)
    if isinstance(surrogate, KernelSurrogate):
        return _top(near, surrogate.swap_means(mask_P).ravel())
    return _top(near, surrogate.mean(near))


def _top(masks_QP: BoolArray, value_Q: FloatArray) -> tuple[BoolArray, FloatArray]:
    """The highest values, ties to the smaller key."""
    order = np.lexsort((*pack(masks_QP).T[::-1], -value_Q))[:_SHORTLIST]
    return masks_QP[order], value_Q[order]


def expected_improvement(mean_Q: FloatArray, std_Q: FloatArray, best_Q: FloatArray) -> FloatArray:
    """E max(u - best, 0) for u ~ N(mean, std^2) (Mockus 1975); infinite where nothing is scored."""
    std_Q = np.maximum(std_Q, 1e-12)
    z_Q = (mean_Q - best_Q) / std_Q
    with np.errstate(invalid="ignore"):
        gain_Q = std_Q * (z_Q * norm.cdf(z_Q) + norm.pdf(z_Q))
    return np.where(np.isfinite(best_Q), gain_Q, np.inf)


def select_by_expected_improvement(
    surrogate: Surrogate,
    sets_QP: BoolArray,
    best_of: Mapping[int, float],
    count: int,
    *,
    pending_MP: BoolArray,
    min_improvement: float = MIN_EXPECTED_IMPROVEMENT,
) -> BoolArray:
    """The most promising of some sets, in the order in which they were picked, `bool[<=count, P]`.

    By expected improvement on the best scored set of the same size; sizes compete. Under a kernel
    surrogate every pick, and what is being scored already, is taken as scored with the value that
    is expected (Ginsbourger, Le Riche & Carraro 2010: kriging believer), so that a batch does not
    ask for ten sets that would all say the same.

    Args:
        sets_QP: distinct sets, none scored or pending.
        best_of: number removed -> best scored utility; -inf where none is.
        pending_MP: masks that are being scored.
        min_improvement: expected improvement below which a set is left.
    """
    surrogate = kernel_of(surrogate) or surrogate
    if not len(sets_QP) or count < 1:
        return sets_QP[:0]
    removed_Q = (~sets_QP).sum(axis=1)
    best_Q = np.array([best_of.get(int(r), -np.inf) for r in removed_Q])
    share_Q = np.where(best_Q > 0, best_Q, 1.0)
    if not isinstance(surrogate, KernelSurrogate):
        mean_Q, std_Q = surrogate.predict(sets_QP)
        gain_Q = expected_improvement(mean_Q, STD_INFLATION * std_Q, best_Q) / share_Q
        order = np.argsort(-gain_Q, kind="stable")[:count]
        return sets_QP[order[gain_Q[order] > min_improvement]]
    sets_QP, rows = _shortened(surrogate, sets_QP, best_Q)
    removed_Q, best_Q, share_Q = removed_Q[rows], best_Q[rows], share_Q[rows]
    mean_Q, cov_QQ = surrogate.joint(np.concatenate([pending_MP, sets_QP]))
    cov_QQ *= STD_INFLATION**2
    for row in range(len(pending_MP)):
        _take_as_scored(cov_QQ, row)
    known = len(pending_MP)
    mean_Q, cov_QQ = mean_Q[known:], cov_QQ[known:, known:]
    free_Q = np.ones(len(sets_QP), dtype=bool)
    picked: list[int] = []
    for _ in range(min(count, len(sets_QP))):
        std_Q = np.sqrt(np.maximum(cov_QQ.diagonal(), _LEAST_VARIANCE))
        gain_Q = expected_improvement(mean_Q, std_Q, best_Q) / share_Q
        unscored_Q = free_Q & ~np.isfinite(best_Q)
        if unscored_Q.any():  # a size without any score: its likeliest set first
            pick = int(np.argmax(np.where(unscored_Q, mean_Q, -np.inf)))
            best_Q = np.where(removed_Q == removed_Q[pick], mean_Q[pick], best_Q)
        else:
            pick = int(np.argmax(np.where(free_Q, gain_Q, -np.inf)))
            if gain_Q[pick] <= min_improvement:
                break
        picked.append(pick)
        free_Q[pick] = False
        _take_as_scored(cov_QQ, pick)
    return sets_QP[picked]


def _shortened(
    surrogate: KernelSurrogate, sets_QP: BoolArray, best_Q: FloatArray
) -> tuple[BoolArray, np.ndarray]:
    """The most promising sets one by one, in the order given; all where they are few."""
    rows = np.arange(len(sets_QP))
    if len(sets_QP) > _MOST_JOINT:
        mean_Q, std_Q = surrogate.predict(sets_QP)
        gain_Q = expected_improvement(mean_Q, STD_INFLATION * std_Q, best_Q)
        rows = np.sort(np.argsort(-gain_Q, kind="stable")[:_MOST_JOINT])
    return sets_QP[rows], rows


def _take_as_scored(cov_QQ: FloatArray, row: int) -> None:
    """Condition a covariance on one of its masks, in place."""
    if cov_QQ[row, row] > _LEAST_VARIANCE:
        half_Q = cov_QQ[row] / math.sqrt(cov_QQ[row, row])
        cov_QQ -= np.outer(half_Q, half_Q)


def probability_of_improvement(
    surrogate: Surrogate, sets_QP: BoolArray, best: float, gain: float
) -> FloatArray:
    """Probability of each unscored set of one size to beat the best by a share, `float64[Q]`.

    Args:
        best: best scored utility of that size.
        gain: a set of utility u beats it if u (1 - gain) > best, which is a perplexity lower by the
            share `gain` where the utility is a perplexity ratio; u - gain > best where best <= 0.
    """
    mean_Q, std_Q = surrogate.predict(sets_QP)
    target = best / (1.0 - gain) if best > 0 else best + gain
    return norm.sf((target - mean_Q) / np.maximum(STD_INFLATION * std_Q, 1e-12))
