"""Residual corrections against the exact values of the residual game."""

from __future__ import annotations

import numpy as np
import pytest

from lpserve.masks import all_masks, draw
from lpserve.values.exact import exact_values
from lpserve.values.residual_correction import corrected, correction
from lpserve.values.result import ShapleyValues

P = 8


def drawn(sizes: tuple[int, int], per_stratum: int, rng: np.random.Generator) -> np.ndarray:
    strata = range(sizes[0], sizes[1] + 2)
    return np.concatenate([draw(P, kept, per_stratum, rng) for kept in strata])


def game(rng: np.random.Generator) -> np.ndarray:
    """A utility for every mask by code."""
    return rng.normal(size=1 << P)


def of(table: np.ndarray, masks: np.ndarray) -> np.ndarray:
    return table[masks @ (1 << np.arange(P))]


def known_values(values_P: np.ndarray, sizes: tuple[int, int]) -> ShapleyValues:
    return ShapleyValues(
        values_P=values_P, stderr_P=np.full(P, 1e-3), sizes=sizes, estimator="known"
    )


@pytest.mark.parametrize("sizes", [(0, P - 1), (3, 6), (7, 7)])
def test_with_every_mask_drawn_the_correction_is_exact(sizes, rng):
    """Distinct masks: the sum over strata is the definition; 1e-12: rounding."""
    table, masks = game(rng), all_masks(P)
    kept = masks.sum(axis=1)
    needed = masks[(kept >= sizes[0]) & (kept <= sizes[1] + 1)]
    got, _ = correction(needed, of(table, needed), sizes)
    expected = exact_values(masks, of(table, masks)[:, None], sizes)[:, 0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize("sizes", [(0, P - 1), (3, 6)])
def test_it_is_unbiased_and_its_variance_is_honest(sizes, rng):
    """2,000 draws: means within 5 standard errors; variances within 10% (their own error is 3%)."""
    table, masks = game(rng), all_masks(P)
    expected = exact_values(masks, of(table, masks)[:, None], sizes)[:, 0]
    found, variances = [], []
    for _ in range(2000):
        some = drawn(sizes, 6, rng)
        correction_P, variance_P = correction(some, of(table, some), sizes)
        found.append(correction_P)
        variances.append(variance_P)
    spread = np.std(found, axis=0, ddof=1)
    assert (np.abs(np.mean(found, axis=0) - expected) < 5 * spread / np.sqrt(2000)).all()
    np.testing.assert_allclose(np.mean(variances, axis=0).sum(), (spread**2).sum(), rtol=0.1)


def test_a_surrogate_that_misses_much_is_corrected(rng):
    """The residual is a strong main effect: the correction's variance is far below its square."""
    sizes = (3, 7)
    some = drawn(sizes, 80, rng)
    effect = rng.choice([-1, 1], P) * rng.uniform(1, 2, P)
    residual = some @ effect + 0.05 * rng.normal(size=len(some))
    before = known_values(np.zeros(P), sizes)
    after = corrected(before, some, residual, int(rng.integers(1000)))
    assert "residuals of" in after.estimator
    assert ((after.values_P - effect) ** 2).sum() < 0.5 * (effect**2).sum()
    # 5 standard errors: one failure in 200,000 runs
    assert (np.abs(after.values_P - effect) < 5 * after.stderr_P).all()


def test_a_surrogate_that_misses_nothing_is_mostly_left_alone(rng):
    """Pure noise has no part in the values: the correction would only add variance. Held-out error
    says so in most of 200 games (a coin would in 100)."""
    sizes = (3, 7)
    left_alone = 0
    for seed in range(200):
        some = drawn(sizes, 12, rng)
        after = corrected(known_values(np.zeros(P), sizes), some, rng.normal(size=len(some)), seed)
        if after.estimator == "known":
            left_alone += 1
            np.testing.assert_array_equal(after.values_P, np.zeros(P))
            assert (after.stderr_P > 1e-3).all()  # what the surrogate may miss is in the interval
    assert left_alone > 140


def test_few_masks_say_nothing(rng):
    some = drawn((7, 7), 9, rng)[:19]
    before = known_values(rng.normal(size=P), (7, 7))
    assert corrected(before, some, rng.normal(size=len(some)), 0) is before
