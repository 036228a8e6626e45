"""Races: which of a few sets of one size is the best on windows without end, or that it is a tie.

The sets of a plan were chosen on few windows, among many, so that their order there says little. In
a race the contenders are scored on windows that no choice has read, and after each look those that
are known to be worse leave (sequential elimination: Maron & Moore 1994, Hoeffding races; Birattari
et al. 2002, F-Race). Sets are compared by the differences of their losses on the same windows,
which vary far less than the losses.

The error probability holds over all comparisons and all looks of a race, by Bonferroni's
inequality: with C contenders and K looks, the best set is dropped with probability at most `error`,
since it must then have been found worse than one of C - 1 others at one of K looks, each a
one-sided Student t-test at level error / (K (C - 1)). A difference is a sum over the tokens of a
window, means over windows are near normal; no bound on a loss is assumed. `tests/plan/test_race.py`
simulates it, with heavy tails too.

A set ties with the leader where both bounds of their difference lie within `tie`, at the same
level, though it be known to be worse; or where the windows end before they are told apart.

Notation: C contenders, N windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from lpserve.types import BoolArray, FloatArray, IntArray

MAX_CONTENDERS = 8
"""Sets of one size that race at most."""
_MIN_WINDOWS = 5  # of a look: with fewer, variances say nothing


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

    alive_C: BoolArray
    """Contenders that are not known to be worse than the leader, or tie."""
    leader: int
    """Of the lowest mean loss among them."""
    behind_C: FloatArray
    """Mean loss of each contender beyond the leader's, nats per token."""
    half_width_C: FloatArray
    """How far the bounds of that difference reach to either side."""
    decided: bool
    """Whether one is left, or all that are left tie."""


def standing(
    loss_CN: FloatArray, weight_N: IntArray, alive_C: BoolArray, rule: RaceRule
) -> Standing:
    """Look at a race.

    Args:
        loss_CN: summed losses of every contender on the windows so far; those of contenders that
            have left may be NaN.
        weight_N: what their sum is divided by: tokens.
        alive_C: contenders that earlier looks have left in.
    """
    num_contenders, num_windows = loss_CN.shape
    total = float(weight_N.sum())
    mean_C = np.where(alive_C, loss_CN.sum(axis=1) / total, np.inf)
    leader = int(np.argmin(mean_C))
    behind_C = mean_C - mean_C[leader]
    half_C = np.full(num_contenders, np.inf)
    if num_windows >= _MIN_WINDOWS:
        level = rule.level(num_contenders)
        quantile = float(student.isf(level, num_windows - 1))
        for row in np.flatnonzero(alive_C):
            difference_N = loss_CN[row] - loss_CN[leader]
            residual_N = difference_N - behind_C[row] * weight_N
            spread = num_windows / (num_windows - 1) * (residual_N**2).sum()
            half_C[row] = quantile * math.sqrt(spread) / total
    ties_C = behind_C + half_C <= rule.tie
    ties_C[leader] = True
    left_C = alive_C & (ties_C | ~(behind_C > half_C))
    return Standing(
        alive_C=left_C,
        leader=leader,
        behind_C=behind_C,
        half_width_C=half_C,
        decided=bool((ties_C | ~left_C).all()),
    )


def look_sizes(first: int, most: int) -> list[int]:
    """Windows up to each look: `first`, then twice as many each time, `most` at last."""
    sizes = []
    while first < most:
        sizes.append(first)
        first *= 2
    return [*sizes, most]
