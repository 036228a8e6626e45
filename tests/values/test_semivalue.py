"""Covariances of values against sums over all 2^P masks, and at large P against sampling.

Tolerances: 2^8 terms of a size cancel in a difference of a difference: 1e-11 of the sum of their
absolute values, where a wrong weight or sign is worth 1e-3 and more.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import hypergeom

from lpserve.masks import all_masks
from lpserve.surrogate.kernel import MaskKernel
from lpserve.testing.kernels import KINDS, covariance, random_kernel, weight_matrix
from lpserve.values.semivalue import empty_weight, value_covariance, value_variance

pytestmark = pytest.mark.usefixtures("one_blas_thread")


def some_sizes(num_players: int) -> list[tuple[int, int]]:
    last = num_players - 1
    wanted = [(0, 0), (0, last), (last, last), (last // 2, last), (0, last // 2), (1, last - 1)]
    wanted += [(last // 2, last // 2)]
    return sorted({(low, high) for low, high in wanted if 0 <= low <= high})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_players", range(1, 9))
@pytest.mark.parametrize("empty_known", [False, True])
def test_covariances_equal_the_sum_over_all_masks(kind, num_players, empty_known, rng):
    kernel = random_kernel(num_players, rng, kind)
    every = all_masks(num_players)
    gram = covariance(kernel, every, every)
    for sizes in some_sizes(num_players):
        weights = weight_matrix(num_players, sizes)
        if empty_known:
            weights[:, 0] = 0.0  # the empty coalition comes first in key order
        terms = np.abs(weights) @ np.abs(gram)
        got = value_covariance(kernel, every, sizes, empty_known=empty_known)
        np.testing.assert_allclose(got, weights @ gram, rtol=0, atol=1e-11 * terms.max())
        got = value_variance(kernel, sizes, empty_known=empty_known)
        expected = ((weights @ gram) * weights).sum(axis=1)
        largest = (terms * np.abs(weights)).sum(axis=1).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11 * largest)


@pytest.mark.parametrize("num_players", range(1, 7))
def test_the_weight_of_the_empty_coalition_is_that_of_the_definition(num_players):
    for low in range(num_players):
        for high in range(low, num_players):
            weights = weight_matrix(num_players, (low, high))
            np.testing.assert_allclose(-weights[:, 0], empty_weight((low, high)), rtol=1e-12)


def test_more_masks_than_a_chunk_are_the_same_one_by_one(rng):
    num_players, sizes = 12, (3, 10)
    kernel = random_kernel(num_players, rng)
    masks = rng.random((1100, num_players)) < rng.random((1100, 1))  # three chunks, one short
    together = value_covariance(kernel, masks, sizes, empty_known=True)
    rows = [0, 511, 512, 1023, 1024, 1099, *rng.integers(1100, size=20)]
    for row in rows:
        alone = value_covariance(kernel, masks[row : row + 1], sizes, empty_known=True)
        np.testing.assert_allclose(together[:, row], alone[:, 0], rtol=1e-9, atol=1e-12)


def large_kernel(rng: np.random.Generator) -> MaskKernel:
    """80 players; scales chosen so that no few masks outweigh all others."""
    return MaskKernel(
        constant=0.5,
        linear=0.01,
        pairs=2e-4,
        product=1.0,
        nugget=0.5,
        decay_P=rng.uniform(0.002, 0.05, 80),
        growth_P=rng.normal(0.0, 0.03, 80),
    )


def coalitions(player: int, size_Q: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random coalitions of 80 players without one, of the given sizes, `bool[Q, 80]`."""
    order = rng.random((len(size_Q), 80))
    order[:, player] = 2.0  # last, so never among the kept
    return order.argsort(axis=1).argsort(axis=1) < size_Q[:, None]


def joined(masks: np.ndarray, player: int) -> np.ndarray:
    masks = masks.copy()
    masks[:, player] = True
    return masks


def paired(kernel: MaskKernel, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """k(S, T) of row by row pairs without their own parts, `float64[Q]`."""
    agree = np.where(left == right, 1.0, -1.0)
    inner = agree.sum(axis=1)
    grown = np.exp((~left) @ kernel.growth_P + (~right) @ kernel.growth_P)
    smooth = kernel.product * grown * np.exp(-((left != right) @ kernel.decay_P))
    return kernel.constant + kernel.linear * inner + kernel.pairs * (inner**2 - 80) / 2 + smooth


LARGE_SIZES = [(0, 79), (40, 79), (20, 30), (79, 79)]
SAMPLE = 20_000


def within_5_errors(sample_Q: np.ndarray, got: np.ndarray) -> bool:
    """One in 1.7 million samples lies further off; rounding where nothing is left to chance."""
    error = sample_Q.std(ddof=1) / math.sqrt(len(sample_Q))
    return bool(abs(sample_Q.mean() - got) < 5 * error + 1e-9 * np.abs(sample_Q).max())


@pytest.mark.parametrize("sizes", LARGE_SIZES)
def test_covariances_of_80_players_agree_with_sampled_coalitions(sizes, rng):
    kernel = dataclasses.replace(large_kernel(rng), nugget=0.0)
    masks = rng.random((4, 80)) < np.array([[0.3], [0.6], [0.9], [1.0]])
    got = value_covariance(kernel, masks, sizes)
    assert np.isfinite(got).all()
    for player in rng.choice(80, 3, replace=False).tolist():
        size_Q = rng.integers(sizes[0], sizes[1] + 1, size=SAMPLE)
        without = coalitions(player, size_Q, rng)
        for row, mask in enumerate(masks):
            right = np.broadcast_to(mask, without.shape)
            gain_Q = paired(kernel, joined(without, player), right) - paired(kernel, without, right)
            assert within_5_errors(gain_Q, got[player, row])


@pytest.mark.parametrize("sizes", LARGE_SIZES)
def test_variances_of_80_players_agree_with_sampled_coalitions(sizes, rng):
    kernel = dataclasses.replace(large_kernel(rng), nugget=0.0)
    got = value_variance(kernel, sizes)
    assert np.isfinite(got).all()
    assert (got >= 0).all()
    for player in rng.choice(80, 3, replace=False).tolist():
        one, other = (
            coalitions(player, rng.integers(sizes[0], sizes[1] + 1, size=SAMPLE), rng)
            for _ in range(2)
        )
        with_one, with_other = joined(one, player), joined(other, player)
        change_Q = paired(kernel, with_one, with_other) - paired(kernel, with_one, other)
        change_Q -= paired(kernel, one, with_other) - paired(kernel, one, other)
        assert within_5_errors(change_Q, got[player])


@pytest.mark.parametrize("sizes", LARGE_SIZES)
def test_own_parts_of_80_players_are_sums_over_sizes(sizes, rng):
    """A mask's own part meets a value with the mask's weight, its variance with the square."""
    kernel = large_kernel(rng)
    smooth = dataclasses.replace(kernel, nugget=0.0)
    num_sizes = sizes[1] - sizes[0] + 1
    kept = np.arange(80)
    masks = np.array([rng.permutation(80) < count for count in range(81)])
    weights = np.zeros((80, 81))
    for k in range(sizes[0], sizes[1] + 1):
        share = 1.0 / (num_sizes * math.comb(79, k))
        weights[:, k] -= share * ~masks[k]
        weights[:, k + 1] += share * masks[k + 1]
    own = value_covariance(kernel, masks, sizes) - value_covariance(smooth, masks, sizes)
    expected = weights * kernel.nugget * np.exp(2 * (~masks) @ kernel.growth_P)
    np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-13)
    # with the same growth for all players the mean over coalitions of a size is one term
    same = dataclasses.replace(kernel, growth_P=np.full(80, 0.02))
    extra = value_variance(same, sizes)
    extra -= value_variance(dataclasses.replace(same, nugget=0.0), sizes)
    dropped = 79 - kept[sizes[0] : sizes[1] + 1]
    terms = [
        (math.exp(0.04 * d) + math.exp(0.04 * (d + 1))) / (num_sizes**2 * math.comb(79, d))
        for d in dropped.tolist()
    ]
    # a small part of a variance: rounding of the whole
    np.testing.assert_allclose(extra, kernel.nugget * sum(terms), rtol=1e-9, atol=1e-13)


@pytest.mark.thorough
@pytest.mark.parametrize("num_players", [12, 80, pytest.param(200, marks=pytest.mark.slow)])
def test_players_of_one_scale_give_hypergeometric_sums(num_players, rng):
    """All players alike: k(S, m) hangs on two counts, exact at any P without enumeration."""
    decay, growth = rng.uniform(0.005, 0.1), rng.normal(0.0, 0.01)
    kernel = MaskKernel(
        constant=0.0,
        linear=0.0,
        pairs=0.0,
        product=1.0,
        nugget=0.0,
        decay_P=np.full(num_players, decay),
        growth_P=np.full(num_players, growth),
    )
    low = int(rng.integers(num_players))
    sizes = (low, int(rng.integers(low, num_players)))
    masks = rng.random((6, num_players)) < rng.random((6, 1))
    expected = np.empty((num_players, len(masks)))
    for row, mask in enumerate(masks):
        for player in range(num_players):
            others = int((~np.delete(mask, player)).sum())
            means = []
            for k in range(sizes[0], sizes[1] + 1):
                drops = num_players - 1 - k
                both = np.arange(drops + 1)
                chance = hypergeom.pmf(both, num_players - 1, others, drops)
                apart = drops + others - 2 * both
                means.append(chance @ np.exp(growth * (drops + others) - decay * apart))
            if_kept = 1.0 if mask[player] else math.exp(growth - decay)
            if_dropped = math.exp(growth - decay) if mask[player] else math.exp(2 * growth)
            expected[player, row] = (if_kept - if_dropped) * np.mean(means)
    got = value_covariance(kernel, masks, sizes)
    # hypergeometric chances are good to about 1e-11; both sides are sums of positive terms
    np.testing.assert_allclose(got, expected, rtol=1e-8)


@pytest.mark.parametrize("num_players", [80, 160])
@pytest.mark.parametrize("kind", KINDS)
def test_many_players_with_strong_scales_give_finite_numbers(num_players, kind, rng):
    kernel = random_kernel(num_players, rng, kind)
    masks = rng.random((5, num_players)) < rng.random((5, 1))
    for sizes in ((0, num_players - 1), (0, 0), (num_players // 2, num_players - 1)):
        for empty_known in (False, True):
            prior = value_variance(kernel, sizes, empty_known=empty_known)
            cross = value_covariance(kernel, masks, sizes, empty_known=empty_known)
            assert np.isfinite(prior).all()
            assert np.isfinite(cross).all()
            assert (prior > 0).all()
            # no covariance beyond what both variances allow
            bound = np.sqrt(np.outer(prior, kernel.variance(masks)))
            assert (np.abs(cross) <= bound * (1 + 1e-9)).all()
