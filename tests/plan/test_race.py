"""Races of sets with known means: the error probability holds, ties are ties, few windows suffice.

Statistical claims have fixed seeds; bounds are four standard errors of the simulated share.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from lpserve.plan.race import RaceRule, Standing, look_sizes, standing

TOKENS = 128


def raced(loss_MN, weight_N, rule, sizes) -> tuple[Standing, int]:
    """The last standing, and the windows that the race took."""
    alive_M = np.ones(len(loss_MN), dtype=bool)
    found, size = None, 0
    for size in sizes:
        found = standing(loss_MN[:, :size], weight_N[:size], alive_M, rule)
        alive_M = found.alive_M
        if found.decided:
            break
    assert found is not None
    return found, size


def drawn_losses(rng, means_M, num_windows, heavy):
    """Losses of windows: a common part, and each set's own, of 3 degrees of freedom if heavy."""
    common_N = rng.normal(3.0, 0.5, num_windows)
    shape = (len(means_M), num_windows)
    own_MN = rng.standard_t(3, shape) / np.sqrt(3) if heavy else rng.normal(size=shape)
    return TOKENS * (common_N + means_M[:, None] + 0.05 * own_MN)


@pytest.mark.parametrize("heavy", [False, True])
def test_the_best_set_is_dropped_at_most_as_often_as_said(heavy):
    """Contenders as close as they come, so that there is most to be wrong about: 1,500 races."""
    rng, sizes = np.random.default_rng(7), look_sizes(10, 320)
    rule = RaceRule(error=0.1, tie=0.0005, looks=len(sizes))
    weight_N = np.full(sizes[-1], TOKENS)
    means_M = np.array([0.0, 0.002, 0.004, 0.006, 0.01, 0.02])
    dropped = 0
    for _ in range(1500):
        losses = drawn_losses(rng, means_M, sizes[-1], heavy)
        found, _ = raced(losses, weight_N, rule, sizes)
        dropped += not found.alive_M[0]
    assert dropped / 1500 < 0.1 + 4 * np.sqrt(0.1 * 0.9 / 1500)
    assert dropped > 0  # the bound is no vacuous one


def test_sets_that_are_far_behind_leave_after_few_windows():
    rng, sizes = np.random.default_rng(3), look_sizes(10, 640)
    rule = RaceRule(error=0.1, tie=0.005, looks=len(sizes))
    means_M = np.array([0.0, 0.1, 0.2, 0.03])
    used = []
    for _ in range(100):
        losses = drawn_losses(rng, means_M, sizes[-1], heavy=False)
        found, size = raced(losses, np.full(sizes[-1], TOKENS), rule, sizes)
        used.append(size)
        assert found.decided
        assert found.alive_M.tolist() == [True, False, False, False]
    assert np.mean(used) < 200  # of 640


def test_equal_sets_tie_once_their_difference_is_known_to_be_small():
    rng, sizes = np.random.default_rng(5), look_sizes(10, 5120)
    rule = RaceRule(error=0.1, tie=0.01, looks=len(sizes))
    for _ in range(50):
        losses = drawn_losses(rng, np.zeros(3), sizes[-1], heavy=False)
        found, size = raced(losses, np.full(sizes[-1], TOKENS), rule, sizes)
        assert found.decided
        assert size < sizes[-1]
        assert found.alive_M.sum() >= 2


def test_the_bounds_are_students_of_paired_differences(rng):
    """By hand, with windows of one length."""
    losses = drawn_losses(rng, np.array([0.0, 0.01]), 24, heavy=False)
    rule = RaceRule(error=0.08, tie=0.001, looks=4)
    found = standing(losses, np.full(24, TOKENS), np.ones(2, dtype=bool), rule)
    other = 1 - found.leader
    difference_N = (losses[other] - losses[found.leader]) / TOKENS
    assert found.behind_M[other] == pytest.approx(difference_N.mean())
    half = student.isf(0.08 / 4, 23) * difference_N.std(ddof=1) / np.sqrt(24)
    assert found.half_width_M[other] == pytest.approx(half)
    assert found.alive_M[other] == (difference_N.mean() <= half)


def test_windows_of_unequal_length_weigh_by_their_tokens(rng):
    weight_N = rng.integers(20, 200, 30)
    losses = np.stack([weight_N * 2.0, weight_N * 2.5])
    rule = RaceRule(error=0.1, tie=0.001, looks=1)
    found = standing(losses, weight_N, np.ones(2, dtype=bool), rule)
    assert found.behind_M[1] == pytest.approx(0.5)
    assert found.half_width_M[1] == pytest.approx(0.0, abs=1e-9)
    assert found.decided
    assert not found.alive_M[1]


def test_those_that_left_do_not_come_back_and_few_windows_decide_nothing(rng):
    losses = drawn_losses(rng, np.array([0.0, 0.0, 0.0]), 40, heavy=False)
    losses[1] = np.nan
    alive_M = np.array([True, False, True])
    found = standing(losses, np.full(40, TOKENS), alive_M, RaceRule(error=0.1, tie=1e-9, looks=3))
    assert not found.alive_M[1]
    assert not found.decided
    few = standing(losses[:, :4], np.full(4, TOKENS), alive_M, RaceRule(error=0.1, tie=1, looks=3))
    assert not few.decided
    assert (few.alive_M == alive_M).all()


def test_looks_double():
    assert look_sizes(10, 100) == [10, 20, 40, 80, 100]
    assert look_sizes(10, 10) == [10]
    assert look_sizes(10, 7) == [7]
