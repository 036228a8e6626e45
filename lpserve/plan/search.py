"""Bayesian optimisation over sets to remove: propose sets by prediction, select a batch to score.

`best_predicted_sets` finds the sets that meet one target (`lpserve.plan.targets`) with the highest
predicted utility; `select_by_expected_improvement` selects a batch among unscored sets of all
targets by expected improvement (Jones, Schonlau & Welch 1998); `probability_of_improvement`
(Kushner 1964) is the criterion by which a search may end.

A set is given by the mask that keeps the rest. Improvements are relative where the best utility is
above 0 (for a perplexity ratio: shares of perplexity), else plain differences. Deterministic; ties
go to the smaller mask key.

Notation: P players, Q queried masks, r = number removed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from scipy.stats import norm

from lpserve.masks import add_one, drop_one, keys, pack, sort_distinct, swap_one
from lpserve.plan.targets import Target
from lpserve.surrogate import KernelSurrogate, Surrogate, acquisition_model, kernel_of
from lpserve.types import BoolArray, FloatArray

MAX_EXHAUSTIVE = 20_000
"""Sizes with at most this many sets are searched exhaustively, larger ones by beam search over
swaps."""
STD_INFLATION = 2.0
"""Factor on the surrogate's standard deviations in the search. On an exact game of 12 layers the
prediction errors of the best unscored sets of 5 and 6 layers are 1.3 to 2.5 of the deviations
calibrated by leave-one-out (root mean square)."""
MIN_EXPECTED_IMPROVEMENT = 1e-4
"""Sets of a smaller expected improvement (share of perplexity) are not scored."""
_NUM_STARTS = 4  # best scored sets of each size that a beam search starts from
_BEAM_WIDTH = 8
_MAX_STEPS = 20
_SHORTLIST = 64
_MAX_JOINT = 512  # candidates of a batch: their joint covariance is held in memory
_MIN_VARIANCE = 1e-14


class PredictsSets(Protocol):
    """What a search needs of a model of sets."""

    def mean(self, queried_MP: BoolArray) -> FloatArray:
        """Predicted utility, `float64[Q]`."""
        ...


@runtime_checkable
class PredictsSwaps(Protocol):
    """A model that predicts all swaps of a set at once."""

    def swap_means(self, mask_P: BoolArray) -> FloatArray:
        """Predicted utility of every swap, `float64[kept, dropped]`, in the order of `swap_one`."""
        ...


def starts(masks_MP: BoolArray, utilities_M: FloatArray, target: Target) -> BoolArray:
    """Masks that meet a target, where a beam search for its sets starts, `bool[Q, P]`.

    These are, for every size that is searched, the best scored sets of that size, and the best
    scored sets of the two neighbouring sizes with every possible player removed or brought back.
    The latter matter because the best sets of two sizes may have no player in common, with no
    improving swap from one to the other.

    Args:
        utilities_M: NaN where a mask was not scored.
    """
    removed_M = (~masks_MP).sum(axis=1)
    found = [np.empty((0, masks_MP.shape[1]), dtype=bool)]
    for r in range(target.sizes[0] - 1, target.sizes[-1] + 2):
        rows = np.flatnonzero((removed_M == r) & np.isfinite(utilities_M))
        best_MP = masks_MP[rows[np.argsort(-utilities_M[rows], kind="stable")[:_NUM_STARTS]]]
        if r in target.sizes:
            found.append(best_MP)
        if r + 1 in target.sizes:
            found += [drop_one(mask_P) for mask_P in best_MP]
        if r - 1 in target.sizes:
            found += [add_one(mask_P) for mask_P in best_MP]
    near_MP = np.concatenate(found)
    return near_MP[target.holds(near_MP)]


def grown_sets(
    surrogate: PredictsSets, masks_MP: BoolArray, utilities_M: FloatArray, target: Target
) -> BoolArray:
    """Sets that meet a target and differ by little from the best scored ones, best predicted first,
    `bool[Q, P]`.

    They are `starts`. Where there are none, the best scored sets of the largest size below grow by
    a player at a time, the best predicted ones going on.

    Args:
        utilities_M: NaN where a mask was not scored.
    """
    surrogate = acquisition_model(surrogate) or surrogate
    near_MP = starts(masks_MP, utilities_M, target)
    if not len(near_MP):
        removed_M = (~masks_MP).sum(axis=1)
        usable_M = np.isfinite(utilities_M) & (removed_M < target.sizes[-1])
        usable_M &= target.within.holds(masks_MP)
        largest = removed_M[usable_M].max(initial=0)
        rows = np.flatnonzero(usable_M & (removed_M == largest))
        grown_MP = masks_MP[rows[np.argsort(-utilities_M[rows], kind="stable")[:_NUM_STARTS]]]
        met = [near_MP]
        while len(grown_MP) and (~grown_MP[0]).sum() < target.sizes[-1]:
            grown = [target.within.drops(mask_P) for mask_P in grown_MP]
            grown_MP = sort_distinct(np.concatenate(grown))[0]
            grown_MP, _ = _top(grown_MP, surrogate.mean(grown_MP))
            met.append(grown_MP[target.holds(grown_MP)])
        near_MP = np.concatenate(met)
    near_MP = sort_distinct(near_MP)[0]
    return near_MP[np.argsort(-surrogate.mean(near_MP), kind="stable")]


def best_predicted_sets(
    surrogate: PredictsSets,
    target: Target,
    starts_MP: BoolArray,
    *,
    beam: tuple[int, int] = (_BEAM_WIDTH, _MAX_STEPS),
) -> BoolArray:
    """The sets that meet a target with the highest predicted utility, best first, `bool[<=64, P]`.

    Of every size that is searched: exhaustive where at most `MAX_EXHAUSTIVE` sets of it are within
    the constraint, else beam search over swaps from the sets of that size among `starts_MP` (see
    `starts`) and from the sets found of the size below, each with a player more removed.
    Predictions are those of the acquisition model where there is one.

    Args:
        beam: sets whose swaps a step of the search predicts, and the most steps.
    """
    surrogate = acquisition_model(surrogate) or surrogate
    removed = (~starts_MP).sum(axis=1)
    found, values = [starts_MP[:0]], [np.empty(0)]
    for size in target.sizes:
        begin = [starts_MP[removed == size]]
        begin += [drop_one(mask_P) for mask_P in found[-1][:_NUM_STARTS]]
        sets_MP, value = _best_of_size(surrogate, target, size, np.concatenate(begin), beam)
        found.append(sets_MP)
        values.append(value)
    return _top(np.concatenate(found), np.concatenate(values))[0]


def _best_of_size(
    surrogate: PredictsSets, target: Target, size: int, starts_MP: BoolArray, beam: tuple[int, int]
) -> tuple[BoolArray, FloatArray]:
    """The sets of one size that meet a target with the highest predicted utilities, and these."""
    if target.within.count(size) <= MAX_EXHAUSTIVE:
        pool = target.within.all_sets(size)
        pool = pool[target.holds(pool)]
        return _top(pool, surrogate.mean(pool))
    pool, _ = sort_distinct(starts_MP[target.holds(starts_MP)])
    if not len(pool):
        return pool, np.empty(0)
    pool, value = _top(pool, surrogate.mean(pool))
    expanded: set[bytes] = set()
    for _ in range(beam[1]):
        fresh = [row for row, key in enumerate(keys(pool[: beam[0]])) if key not in expanded]
        if not fresh:
            break
        expanded.update(keys(pool[fresh]))
        near = [_best_swaps(surrogate, pool[row], target) for row in fresh]
        pool, place = sort_distinct(np.concatenate([pool, *(masks for masks, _ in near)]))
        predicted = np.concatenate([value, *(values for _, values in near)])
        value = np.empty(len(pool))
        value[place[::-1]] = predicted[::-1]  # of repeated sets the first prediction stays
        pool, value = _top(pool, value)
    return pool, value


def _best_swaps(
    surrogate: PredictsSets, mask_P: BoolArray, target: Target
) -> tuple[BoolArray, FloatArray]:
    """The swaps of a set with the highest predicted utilities, and these utilities."""
    near = swap_one(mask_P)
    holds = target.holds(near)
    near = near[holds]
    if isinstance(surrogate, PredictsSwaps):
        return _top(near, surrogate.swap_means(mask_P).ravel()[holds])
    return _top(near, surrogate.mean(near))


def _top(queried_MP: BoolArray, value: FloatArray) -> tuple[BoolArray, FloatArray]:
    """The masks of the highest values and these values, best first, at most 64."""
    order = np.lexsort((*pack(queried_MP).T[::-1], -value))[:_SHORTLIST]
    return queried_MP[order], value[order]


def expected_improvement(mean: FloatArray, std: FloatArray, best: FloatArray) -> FloatArray:
    """Expected improvement, E max(u - best, 0) for u ~ N(mean, std^2), `float64[Q]`.

    Mockus 1975; Jones, Schonlau & Welch 1998, eq. 15. Infinite where `best` is -inf, since no set
    that meets that target is scored; 0 where it is inf.
    """
    std = np.maximum(std, 1e-12)
    z = (mean - best) / std
    with np.errstate(invalid="ignore"):
        gain = std * (z * norm.cdf(z) + norm.pdf(z))
    return np.where(best == np.inf, 0.0, np.where(np.isfinite(best), gain, np.inf))


def select_by_expected_improvement(
    surrogate: Surrogate,
    sets_MP: BoolArray,
    targets: Sequence[Target],
    best: FloatArray,
    count: int,
    *,
    pending_MP: BoolArray,
    min_improvement: float = MIN_EXPECTED_IMPROVEMENT,
) -> BoolArray:
    """A batch of sets by expected improvement, in the order of selection, `bool[<=count, P]`.

    Improvement is over the best scored set that meets the same target (where a set meets several,
    over that of the target which it improves most); sets of all targets compete. With a kernel
    surrogate, pending and selected sets count as scored with their predicted utility (kriging
    believer: Ginsbourger, Le Riche & Carraro 2010), which leaves the predictions as they are and
    conditions the covariance, so that a batch does not hold ten sets of nearly the same
    information. Other surrogates select one by one, without regard to pending sets.

    Args:
        surrogate: fitted to search utilities.
        sets_MP: distinct sets, none scored or pending.
        targets: what sets are searched for; one that meets none is never selected.
        best: for each target the best scored utility, -inf where none is scored.
        count: size of the batch.
        pending_MP: masks that are being scored.
        min_improvement: selection ends at a smaller expected improvement.
    """
    surrogate = kernel_of(surrogate) or surrogate
    if not len(sets_MP) or count < 1:
        return sets_MP[:0]
    meets = np.array([target.holds(sets_MP) for target in targets])
    beaten = _to_beat(meets, best)
    share = np.where(beaten > 0, beaten, 1.0)
    if not isinstance(surrogate, KernelSurrogate):
        mean, std = surrogate.predict(sets_MP)
        gain = expected_improvement(mean, STD_INFLATION * std, beaten) / share
        order = np.argsort(-gain, kind="stable")[:count]
        return sets_MP[order[gain[order] > min_improvement]]
    sets_MP, rows = _shortlist(surrogate, sets_MP, beaten)
    meets, beaten, share = meets[:, rows], beaten[rows], share[rows]
    mean, covariance = _posterior(surrogate, pending_MP, sets_MP)
    free = np.ones(len(sets_MP), dtype=bool)
    picked: list[int] = []
    for _ in range(min(count, len(sets_MP))):
        std = np.sqrt(np.maximum(covariance.diagonal(), _MIN_VARIANCE))
        gain = expected_improvement(mean, std, beaten) / share
        unscored = free & (beaten == -np.inf)
        if unscored.any():  # a target without any score: its best predicted set first
            pick = int(np.argmax(np.where(unscored, mean, -np.inf)))
            best = np.where(meets[:, pick] & ~np.isfinite(best), mean[pick], best)
            beaten = _to_beat(meets, best)
        else:
            pick = int(np.argmax(np.where(free, gain, -np.inf)))
            if gain[pick] <= min_improvement:
                break
        picked.append(pick)
        free[pick] = False
        _condition_on(covariance, pick)
    return sets_MP[picked]


def _posterior(
    surrogate: KernelSurrogate, pending_MP: BoolArray, sets_MP: BoolArray
) -> tuple[FloatArray, FloatArray]:
    """Means and covariance of sets with pending masks scored, `float64[Q]` and `float64[Q, Q]`."""
    mean, covariance = surrogate.joint(np.concatenate([pending_MP, sets_MP]))
    covariance *= STD_INFLATION**2
    for row in range(len(pending_MP)):
        _condition_on(covariance, row)
    return mean[len(pending_MP) :], covariance[len(pending_MP) :, len(pending_MP) :]


def _to_beat(meets: BoolArray, best: FloatArray) -> FloatArray:
    """What each set improves on, `float64[Q]`: the lowest best of the targets that it meets (`bool[
    targets, Q]`); infinite where it meets none."""
    return np.where(meets, best[:, None], np.inf).min(axis=0)


def _shortlist(
    surrogate: KernelSurrogate, sets_MP: BoolArray, best: FloatArray
) -> tuple[BoolArray, np.ndarray]:
    """At most 512 sets, those of the highest expected improvement, and their rows; order kept."""
    rows = np.arange(len(sets_MP))
    if len(sets_MP) > _MAX_JOINT:
        mean, std = surrogate.predict(sets_MP)
        gain = expected_improvement(mean, STD_INFLATION * std, best)
        rows = np.sort(np.argsort(-gain, kind="stable")[:_MAX_JOINT])
    return sets_MP[rows], rows


def _condition_on(covariance: FloatArray, row: int) -> None:
    """Condition a covariance on the score of one of its masks, in place."""
    if covariance[row, row] > _MIN_VARIANCE:
        half = covariance[row] / math.sqrt(covariance[row, row])
        covariance -= np.outer(half, half)


def probability_of_improvement(
    surrogate: Surrogate, sets_MP: BoolArray, best: float, gain: float
) -> FloatArray:
    """Probability that each unscored set of one size beats the best scored one, `float64[Q]`.

    The probability of improvement of Kushner 1964, with `gain` as its margin.

    Args:
        best: best scored utility of that size.
        gain: a set of utility u beats it if u (1 - gain) > best, which for a perplexity ratio is a
            perplexity lower by the share `gain`; if u - gain > best where best <= 0.
    """
    mean, std = surrogate.predict(sets_MP)
    target = best / (1.0 - gain) if best > 0 else best + gain
    return norm.sf((target - mean) / np.maximum(STD_INFLATION * std, 1e-12))
