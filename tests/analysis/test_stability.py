"""Draws of the windows and what they say about a plan, against loops and known distributions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from lpserve.analysis.resample import mean_nll, window_weights
from lpserve.analysis.stability import set_stability
from lpserve.masks import all_masks, removed_players
from lpserve.types import Z90

TOKENS = 50


@pytest.mark.parametrize("sizes", [[10], [3, 12], [2, 2, 7]])
def test_weights_keep_every_corpus_its_share(sizes, rng):
    weights = window_weights(sizes, draws=200, seed=int(rng.integers(1 << 30)))
    assert weights.shape == (200, sum(sizes))
    start = 0
    for n in sizes:
        part = weights[:, start : start + n]
        np.testing.assert_allclose(part.sum(axis=1), n, rtol=1e-12)
        drawn = part * (n - 1) / n
        np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-12)
        start += n
    assert len(np.unique(weights, axis=0)) > 1


def test_the_spread_of_a_mean_over_draws_is_its_standard_error(rng):
    """Linear statistics: unbiased. 20,000 draws: 5 sampling errors of a deviation are 2.5%."""
    for sizes in ([6], [4, 9]):
        x = rng.normal(size=sum(sizes)) * rng.uniform(0.5, 2, sum(sizes))
        weights = window_weights(sizes, draws=20_000, seed=int(rng.integers(1 << 30)))
        spread = (weights @ x / sum(sizes)).std(ddof=1)
        start, variance = 0, 0.0
        for n in sizes:
            variance += n * x[start : start + n].var(ddof=1)
            start += n
        np.testing.assert_allclose(spread, math.sqrt(variance) / sum(sizes), rtol=0.025)


def test_a_corpus_of_one_window_is_drawn_with_the_others():
    weights = window_weights([1, 4], draws=100)
    assert len(np.unique(weights[:, 0])) > 1
    np.testing.assert_allclose(weights.sum(axis=1), 5)
    with pytest.raises(ValueError, match="single window"):
        window_weights([1])


def test_mean_nll_divides_once_at_the_end(rng):
    nll, tokens = rng.uniform(50, 90, (5, 4)), rng.integers(20, 60, 4)
    weights = window_weights([4], draws=7)
    got = mean_nll(nll, tokens, weights)
    for m, b in product(range(5), range(7)):
        expected = sum(weights[b] * nll[m]) / sum(weights[b] * tokens)
        np.testing.assert_allclose(got[m, b], expected, rtol=1e-12)


def sets_with(means: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Six-player sets of three with given mean NLLs per token and noise [M, N] around them."""
    masks = all_masks(6, 3)[: len(means)]
    return masks, TOKENS * (means[:, None] + noise), np.full(noise.shape[1], TOKENS)


def test_a_clear_winner_is_settled(rng):
    means = np.array([3.0, 3.5, 3.6, 4.0])
    masks, nll, tokens = sets_with(means, rng.normal(0, 0.01, (4, 12)))
    found = set_stability(
        masks_MP=masks, loss_MN=nll, num_tokens_N=tokens, corpora=[("a", 12)], chosen=0, seed=0
    )
    assert found is not None
    assert found.stays_best == 1.0
    assert found.settled
    assert found.rival is None
    assert found.regret == 0.0
    assert found.halves_overlap == 1.0
    assert found.halves_regret == 0.0
    assert found.corpora == {}
    assert found.num_sets == 4


def test_a_tie_within_window_noise_is_told_with_the_windows_that_would_settle_it(statistical_rng):
    """The rival is a known gap behind; noise that both share cancels."""
    num_windows, gap = 16, 0.02
    own = statistical_rng.normal(0, 0.1, num_windows)
    own -= own.mean()
    shared = statistical_rng.normal(0, 5.0, num_windows)
    noise = np.array([shared, shared + own, shared])
    masks, nll, tokens = sets_with(np.array([3.0, 3.0 + gap, 9.0]), noise)
    found = set_stability(
        masks_MP=masks,
        loss_MN=nll,
        num_tokens_N=tokens,
        corpora=[("a", num_windows)],
        chosen=0,
        seed=1,
    )
    assert found is not None
    assert 0.02 < found.stays_best < 0.98
    assert found.rival == list(removed_players(masks[1]))
    assert found.rival_gap is not None
    np.testing.assert_allclose(found.rival_gap, gap, rtol=1e-9)
    error = own.std(ddof=1) / 4
    assert found.rival_gap_stderr is not None
    np.testing.assert_allclose(found.rival_gap_stderr, error, rtol=0.2)  # of 400 draws
    assert found.windows_needed is not None
    exact = num_windows * (Z90 * found.rival_gap_stderr / gap) ** 2
    assert found.windows_needed == max(num_windows, math.ceil(exact))
    assert found.regret > 0
    text = found.warning(f"{num_windows} windows", "nats per token")
    assert "nats per token behind" in text
    assert f"draws of the {num_windows} windows" in text
    assert f"about {found.windows_needed} windows of this kind" in text
    assert str(found.rival) in text


def test_halves_and_corpora_against_loops(rng):
    masks, nll, tokens = sets_with(rng.uniform(3, 3.1, 6), rng.normal(0, 0.2, (6, 8)))
    chosen = int(np.argmin(nll.sum(axis=1)))
    found = set_stability(
        masks_MP=masks,
        loss_MN=nll,
        num_tokens_N=tokens,
        corpora=[("a", 3), ("b", 5)],
        chosen=chosen,
        seed=2,
    )
    assert found is not None
    for name, part in (("a", slice(0, 3)), ("b", slice(3, 8))):
        best = int(np.argmin(nll[:, part].sum(axis=1)))
        assert found.corpora[name] == list(removed_players(masks[best]))
    assert found.halves_overlap is not None
    assert found.halves_regret is not None
    assert 0 <= found.halves_overlap <= 1
    # all 35 splits of 8 windows, instead of 100 random ones: within 5 standard errors
    regrets = []
    for bits in product([False, True], repeat=8):
        if sum(bits) == 4:
            one, other = np.array(bits), ~np.array(bits)
            a, b = (nll[:, part].sum(axis=1) / tokens[part].sum() for part in (one, other))
            regrets.append(np.expm1(b[np.argmin(a)] - b.min()))
    error = np.std(regrets) / math.sqrt(100)
    assert abs(found.halves_regret - np.mean(regrets)) < 5 * error + 1e-12


def test_equal_sets_are_told_apart_by_nothing(rng):
    noise = np.repeat(rng.normal(0, 0.1, (1, 6)), 2, axis=0)
    masks, nll, tokens = sets_with(np.array([3.0, 3.0]), noise)
    found = set_stability(
        masks_MP=masks, loss_MN=nll, num_tokens_N=tokens, corpora=[("a", 6)], chosen=1, seed=0
    )
    assert found is not None
    assert found.stays_best == 1.0  # ties go to the set that was chosen
    assert (
        set_stability(
            masks_MP=masks,
            loss_MN=nll[:, :1],
            num_tokens_N=tokens[:1],
            corpora=[("a", 1)],
            chosen=0,
            seed=0,
        )
        is None
    )
