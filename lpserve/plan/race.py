"""Races: which of a few sets of one size is the best on windows without end, or that it is a tie.

The sets of a plan were chosen on few windows, among many, so that their order there says little. In
a race the contenders are scored on windows that no choice has read, and after each look those that
are known to be worse leave (sequential elimination: Maron & Moore 1994, Hoeffding races; Birattari
et al. 2002, F-Race). Sets are compared by the differences of their losses on the same windows,
which vary far less than the losses.

The error probability holds over all comparisons and all looks of a race, by Bonferroni's
inequality: with M contenders and K looks, the best set is dropped with probability at most `error`,
since it must then have been found worse than one of M - 1 others at one of K looks, each a
one-sided Student t-test at level error / (K (M - 1)). A difference is a sum over the tokens of a
window, means over windows are near normal; no bound on a loss is assumed. `tests/plan/test_race.py`
simulates it, with heavy tails too.

A set ties with the leader where both bounds of their difference lie within `tie`, at the same
level, though it be known to be worse; or where the windows end before they are told apart.

Notation: M contenders, N windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from lpserve.types import BoolArray, FloatArray, IntArray

MAX_CONTENDERS = 8
"""Sets of one size that race at most."""
MIN_WINDOWS = 5
"""Of a look: with fewer, variances say nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RaceRule:
    """When a race ends."""

    error: float
    """Probability that the best set is dropped, at most, over a whole race."""
    tie: float
    """Nats per token by which sets may differ and still tie."""
    looks: int

    def level(self, num_contenders: int) -> float:
        """Of each one-sided comparison."""
        return self.error / (self.looks * max(num_contenders - 1, 1))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Standing:
    """A race at a look."""

    alive_M: BoolArray
    """Contenders that are not known to be worse than the leader, or tie."""
    leader: int
    """Of the lowest mean loss among them."""
    behind_M: FloatArray
    """Mean loss of each contender beyond the leader's, nats per token."""
    half_width_M: FloatArray
    """How far the bounds of that difference reach to either side."""
    decided: bool
    """Whether one is left, or all that are left tie."""


def standing(
    loss_MN: FloatArray, weight_N: IntArray, alive_M: BoolArray, rule: RaceRule
) -> Standing:
    """Look at a race.

    Args:
        loss_MN: summed losses of every contender on the windows so far; those of contenders that
            have left may be NaN.
        weight_N: what their sum is divided by: tokens.
        alive_M: contenders that earlier looks have left in.
    """
    num_contenders, num_windows = loss_MN.shape
    total = float(weight_N.sum())
    mean_M = np.where(alive_M, loss_MN.sum(axis=1) / total, np.inf)
    leader = int(np.argmin(mean_M))
    behind_M = mean_M - mean_M[leader]
    half_M = np.full(num_contenders, np.inf)
    if num_windows >= MIN_WINDOWS:
        level = rule.level(num_contenders)
        quantile = float(student.isf(level, num_windows - 1))
        for row in np.flatnonzero(alive_M):
            difference_N = loss_MN[row] - loss_MN[leader]
            residual_N = difference_N - behind_M[row] * weight_N
            spread = num_windows / (num_windows - 1) * (residual_N**2).sum()
            half_M[row] = quantile * math.sqrt(spread) / total
    ties_M = behind_M + half_M <= rule.tie
    ties_M[leader] = True
    left_M = alive_M & (ties_M | ~(behind_M > half_M))
    return Standing(
        alive_M=left_M,
        leader=leader,
        behind_M=behind_M,
        half_width_M=half_M,
        decided=bool((ties_M | ~left_M).all()),
    )


def look_sizes(first: int, most: int) -> list[int]:
    """Windows up to each look: `first`, then twice as many each time, `most` at last."""
    sizes = []
    while first < most:
        sizes.append(first)
        first *= 2
    return [*sizes, most]
