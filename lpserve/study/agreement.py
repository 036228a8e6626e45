"""Which choices of a study matter: how far points agree that differ in a single dimension.

For a dimension (the corpora, the number of windows, the utility, ...) every pair of its levels is
compared over matched points, which have everything else in common, the seed included. Values are
compared by Kendall's tau-b of the players' order, sets of r removed players by the share that both
remove.

The dimension `seed` compares points that differ only in the seed of the sampled masks: how much
another sample changes. Neither it nor the intervals contain the randomness of the windows; to see
that, give `window_seed` several levels.

Intervals are over seeds (level 90%): Student's t of the jackknife's pseudo-values, a seed left out
at a time. They need two seeds, three for the dimension `seed` itself.

Notation: P players, r = number removed.

Kendall, Biometrika 1938; the jackknife: Tukey 1958, Miller, Biometrika 1974.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import kendalltau, t

from lpserve.types import FloatArray

LEVEL = 0.90


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PointAnswer:
    """What a point found."""

    id: str
    levels: Mapping[str, str]
    values_P: FloatArray
    removed: Mapping[int, frozenset[int]]
    """r -> the players of the plan's set."""
    heldout_nll: Mapping[int, float]
    """r -> nats per token of that set on the study's held-out windows; NaN: not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean over matched points, and its interval over seeds where there are enough."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two levels of a dimension."""

    dimension: str
    levels: tuple[str, str]
    points: int
    """Number of matched pairs of points."""
    tau: Estimate
    overlap: Mapping[int, Estimate]
    """r -> share of the removed players that both remove."""
    heldout: Mapping[int, Estimate]
    """r -> held-out nats per token of the second level minus the first's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A dimension: all pairs of its levels together."""

    dimension: str
    pairs: tuple[Pair, ...]
    tau: Estimate
    overlap: Mapping[int, Estimate]


def choices(answers: Sequence[PointAnswer], dimensions: Sequence[str]) -> list[Choice]:
    """Every dimension that has matched points, the one with the lowest agreement first.

    Args:
        dimensions: names of dimensions with more than one level. `model` is left out: models are
            never compared with each other.
    """
    found = []
    for dimension in dimensions:
        if dimension == "model":
            continue
        matched = _matched(answers, dimension)
        if not matched:
            continue
        names = list(dict.fromkeys((a.levels[dimension], b.levels[dimension]) for a, b in matched))
        pairs = [_pair(dimension, name, matched) for name in names]
        found.append(
            Choice(
                dimension=dimension,
                pairs=tuple(pairs),
                tau=_taus(matched, dimension),
                overlap=_overlaps(matched, dimension),
            )
        )
    return sorted(found, key=lambda choice: choice.tau.mean)


def tau(first: PointAnswer, second: PointAnswer) -> float:
    """Kendall's tau-b of two orders of the players; NaN where one has no order."""
    found: Any = kendalltau(first.values_P, second.values_P)
    return float(found.statistic)


def overlap(first: PointAnswer, second: PointAnswer, num_removed: int) -> float:
    """Share of the removed players that both remove."""
    a, b = first.removed[num_removed], second.removed[num_removed]
    return len(a & b) / num_removed


def _matched(
    answers: Sequence[PointAnswer], dimension: str
) -> list[tuple[PointAnswer, PointAnswer]]:
    """Pairs of points that differ in one dimension alone, earlier levels first."""
    rest: dict[tuple[tuple[str, str], ...], list[PointAnswer]] = {}
    for answer in answers:
        others = tuple((d, v) for d, v in answer.levels.items() if d != dimension)
        rest.setdefault(others, []).append(answer)
    pairs = [pair for members in rest.values() for pair in itertools.combinations(members, 2)]
    order = list(dict.fromkeys(a.levels[dimension] for a in answers))
    place = {level: i for i, level in enumerate(order)}
    return [
        (a, b) if place[a.levels[dimension]] <= place[b.levels[dimension]] else (b, a)
        for a, b in pairs
    ]


def _pair(
    dimension: str, names: tuple[str, str], matched: Sequence[tuple[PointAnswer, PointAnswer]]
) -> Pair:
    mine = [(a, b) for a, b in matched if (a.levels[dimension], b.levels[dimension]) == names]
    return Pair(
        dimension=dimension,
        levels=names,
        points=len(mine),
        tau=_taus(mine, dimension),
        overlap=_overlaps(mine, dimension),
        heldout={
            r: _over_seeds(mine, dimension, lambda a, b, r=r: b.heldout_nll[r] - a.heldout_nll[r])
            for r in _sizes(mine)
        },
    )


def _taus(matched: Sequence[tuple[PointAnswer, PointAnswer]], dimension: str) -> Estimate:
    return _over_seeds(matched, dimension, tau, (-1.0, 1.0))


def _overlaps(
    matched: Sequence[tuple[PointAnswer, PointAnswer]], dimension: str
) -> dict[int, Estimate]:
    return {
        r: _over_seeds(matched, dimension, lambda a, b, r=r: overlap(a, b, r), (0.0, 1.0))
        for r in _sizes(matched)
    }


def _sizes(matched: Sequence[tuple[PointAnswer, PointAnswer]]) -> list[int]:
    """Numbers of removed players that all of these points have a set of."""
    sets = [set(answer.removed) for pair in matched for answer in pair]
    return sorted(set.intersection(*sets)) if sets else []


def _over_seeds(
    matched: Sequence[tuple[PointAnswer, PointAnswer]],
    dimension: str,
    compare: Callable[[PointAnswer, PointAnswer], float],
    possible: tuple[float, float] = (-np.inf, np.inf),
) -> Estimate:
    """The mean over pairs and its jackknife interval over seeds, clipped to the possible range."""
    compared = [({a.levels["seed"], b.levels["seed"]}, compare(a, b)) for a, b in matched]
    compared = [(seeds, value) for seeds, value in compared if np.isfinite(value)]
    if not compared:
        return Estimate(mean=float("nan"))
    mean = float(np.mean([value for _, value in compared]))
    seeds = sorted(set().union(*(own for own, _ in compared)))
    if len(seeds) < (3 if dimension == "seed" else 2):
        return Estimate(mean=mean)
    kept = [[value for own, value in compared if seed not in own] for seed in seeds]
    without = np.array([np.mean(values) if values else np.nan for values in kept])
    if not np.isfinite(without).all():
        return Estimate(mean=mean)  # a seed has a part in every pair
    pseudo = len(seeds) * mean - (len(seeds) - 1) * without
    half = float(t.ppf((1 + LEVEL) / 2, len(seeds) - 1) * pseudo.std(ddof=1) / len(seeds) ** 0.5)
    low, high = max(mean - half, possible[0]), min(mean + half, possible[1])
    return Estimate(mean=mean, low=low, high=high)
