"""Choice of masks against a greedy search that conditions the covariance of all 2^P masks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lpserve.masks import all_masks, draw, keys, trie_layer_forwards
from lpserve.rounds.acquisition import _branches, _new_layers, candidate_pool, select_for_values
from lpserve.surrogate import KernelSurrogate
from lpserve.testing.kernels import (
    KINDS,
    fitted_kernel,
    masks_with_or_without_empty,
    posterior,
    rough_game,
    weight_matrix,
)

pytestmark = pytest.mark.usefixtures("one_blas_thread")


POOLS = [(1, (0, 0)), (6, (0, 5)), (12, (3, 9)), (40, (20, 39)), (80, (0, 79)), (33, (32, 32))]


@pytest.mark.parametrize(("num_players", "sizes"), POOLS)
@pytest.mark.parametrize("count", [1, 60, 700])
def test_a_pool_holds_distinct_masks_of_the_sizes_that_values_need(num_players, sizes, count, rng):
    pool = candidate_pool(num_players, sizes, rng, count)
    assert pool.dtype == bool
    assert pool.shape[1] == num_players
    assert 1 <= len(pool) <= max(count, 1)
    assert len(set(keys(pool))) == len(pool)
    kept = pool.sum(axis=1)
    assert kept.min() >= sizes[0]
    assert kept.max() <= sizes[1] + 1
    strata = range(sizes[0], sizes[1] + 2)
    for stratum in strata:
        have, size = int((kept == stratum).sum()), math.comb(num_players, stratum)
        if size <= count // len(strata):
            assert have == size
        elif count >= len(strata):
            assert have >= 1


@pytest.mark.parametrize(("num_players", "sizes"), POOLS[2:5])
def test_a_pool_is_the_same_for_the_same_seed(num_players, sizes, rng):
    seed = int(rng.integers(1 << 30))
    one, other, unlike = (
        candidate_pool(num_players, sizes, np.random.default_rng(s), 300)
        for s in (seed, seed, seed + 1)
    )
    np.testing.assert_array_equal(one, other)
    assert one.shape != unlike.shape or (one != unlike).any()


def test_a_pool_shares_prefixes_that_independent_masks_do_not(statistical_rng):
    pool = candidate_pool(64, (31, 31), statistical_rng, 600)
    alone = np.concatenate([draw(64, kept, 300, statistical_rng) for kept in (31, 32)])
    # half the masks run half of their layers again at a mean cut: a quarter is shared
    layers = trie_layer_forwards(pool) / len(pool)
    assert layers < 0.87 * trie_layer_forwards(alone) / len(alone)


def test_branches_keep_their_size_and_the_players_before_the_cut(rng):
    seed = int(rng.integers(1 << 30))
    masks = rng.random((400, 17)) < rng.random((400, 1))
    branches = _branches(masks, np.random.default_rng(seed))
    np.testing.assert_array_equal(branches.sum(axis=1), masks.sum(axis=1))
    cuts = np.random.default_rng(seed).integers(1, 18, size=400)  # drawn first
    assert set(cuts) == set(range(1, 18))
    for mask, branch, cut in zip(masks, branches, cuts, strict=True):
        np.testing.assert_array_equal(branch[:cut], mask[:cut])
    assert (branches != masks).any(axis=1).mean() > 0.4


def test_players_behind_the_cut_are_shuffled_evenly(rng):
    num_players, num = 6, 30_000
    seed = int(rng.integers(1 << 30))
    mask = np.array([True, False, True, True, False, False])
    branches = _branches(np.repeat(mask[None], num, axis=0), np.random.default_rng(seed))
    cuts = np.random.default_rng(seed).integers(1, num_players + 1, size=num)
    for cut in range(1, num_players):
        some = branches[cuts == cut]
        share = mask[cut:].mean()
        error = np.sqrt(share * (1 - share) / len(some))
        # 15 shares in all: one beyond 5 standard errors has probability 1e-5
        assert (np.abs(some[:, cut:].mean(axis=0) - share) <= 5 * error).all()


def test_new_layers_are_what_the_trie_grows_by(rng):
    for num_players in (1, 5, 20):
        masks = np.unique(rng.random((40, num_players)) < rng.random((40, 1)), axis=0)
        run, others = masks[0], masks[1:]
        if not len(others):
            continue
        expected = [
            trie_layer_forwards(np.stack([run, mask])) - trie_layer_forwards(run[None])
            for mask in others
        ]
        np.testing.assert_array_equal(_new_layers(others, run), expected)


def slow_gains(
    prior: np.ndarray,
    weights: np.ndarray,
    given: list[int],
    candidates: list[int],
) -> np.ndarray:
    """By how much each candidate's score would lower the sum of the values' variances.

    `prior`: covariance of all masks given the scored ones.
    """

    def left(known: list[int]) -> float:
        cross = prior[:, known]
        explained = cross @ np.linalg.solve(prior[np.ix_(known, known)], cross.T)
        return float(np.einsum("pm,mk,pk->", weights, prior - explained, weights))

    before = left(given)
    return np.array([before - left([*given, row]) for row in candidates])


def trie_costs(every: np.ndarray, picked: list[int], candidates: list[int], head: float):
    run = trie_layer_forwards(every[picked])
    grown = [trie_layer_forwards(every[[*picked, row]]) - run for row in candidates]
    return np.array(grown) + head


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(0, 5), (2, 4), (0, 2)])
@pytest.mark.parametrize(
    ("with_empty", "noisy", "num_pending"),
    [
        (False, False, 0),
        (True, False, 3),
        (False, True, 4),
        (True, True, 0),
    ],
)
def test_picks_are_those_of_a_slow_greedy_search(kind, sizes, with_empty, noisy, num_pending, rng):
    surrogate = fitted_kernel(kind, 6, 18, rng, with_empty=with_empty, noise=0.01 * noisy)
    every = all_masks(6)
    row_of = {key: row for row, key in enumerate(keys(every))}
    scored = {row_of[key] for key in keys(surrogate.masks_MP)} | ({0} if with_empty else set())
    free = [row for row in rng.permutation(64).tolist() if row not in scored]
    pending, pool = free[:num_pending], free[num_pending:-4]  # four are not in the pool
    head = float(rng.uniform(0.3, 3))
    got = select_for_values(
        surrogate, sizes, every[pool], 5, pending_MP=every[pending], head_cost=head
    )
    assert got.shape == (5, 6)
    rows = [row_of[key] for key in keys(got)]
    assert len(set(rows)) == 5
    assert set(rows) <= set(pool)
    prior = posterior(surrogate, every)[1]
    weights = weight_matrix(6, sizes)
    picked: list[int] = []
    for row in rows:
        candidates = [r for r in pool if r not in picked]
        gains = slow_gains(prior, weights, pending + picked, candidates)
        rates = gains / trie_costs(every, picked, candidates, head)
        # the best, or as good as the best but for rounding in a difference of variances
        total = np.einsum("pm,mk,pk->", weights, prior, weights)
        assert rates[candidates.index(row)] >= rates.max() - 1e-9 * total / head
        assert picked or rates.max() > 1e-6 * total
        picked.append(row)


def test_what_is_pending_is_never_picked_and_a_small_pool_is_picked_whole(rng):
    surrogate = fitted_kernel("gp", 6, 18, rng)
    known = set(keys(surrogate.masks_MP))
    every = all_masks(6)
    free = every[[key not in known for key in keys(every)]]
    pending, pool = free[:30], free[30:37]
    got = select_for_values(surrogate, (0, 5), pool, 20, pending_MP=pending, head_cost=1.0)
    assert sorted(keys(got)) == sorted(keys(pool))
    none = select_for_values(surrogate, (0, 5), pool[:0], 4, pending_MP=pending, head_cost=1.0)
    assert none.shape == (0, 6)


def test_an_expensive_head_makes_all_masks_cost_the_same(rng):
    """With a head beyond all layers the most informative mask is first, with a cheap one the best
    for its layers."""
    for _ in range(3):
        surrogate = fitted_kernel("gp+ridge", 6, 18, rng)
        every = all_masks(6)
        known = set(keys(surrogate.masks_MP))
        free = [row for row, key in enumerate(keys(every)) if row and key not in known]
        prior, weights = posterior(surrogate, every)[1], weight_matrix(6, (0, 5))
        gains = slow_gains(prior, weights, [], free)
        for head in (1e-3, 1e9):
            pick = select_for_values(
                surrogate, (0, 5), every[free], 1, pending_MP=every[:0], head_cost=head
            )
            cost = every[free].sum(axis=1) + head
            np.testing.assert_array_equal(pick[0], every[free][np.argmax(gains / cost)])


def test_picks_lower_the_variance_of_the_values_faster_than_random_masks(rng):
    """Per mask, with a head that outweighs layers; over eight games of 7 players."""
    better = 0
    for _ in range(8):
        masks = masks_with_or_without_empty(7, 20, False, rng)
        surrogate = KernelSurrogate("gp+ridge")
        surrogate.fit(masks, rough_game(masks, rng))
        every = all_masks(7)
        known = set(keys(masks))
        free = [row for row, key in enumerate(keys(every)) if key not in known]
        prior, weights = posterior(surrogate, every)[1], weight_matrix(7, (2, 6))
        row_of = {key: row for row, key in enumerate(keys(every))}
        picks = select_for_values(
            surrogate, (2, 6), every[free], 8, pending_MP=every[:0], head_cost=1e6
        )
        chosen = [row_of[key] for key in keys(picks)]
        random = rng.choice(free, 8, replace=False).tolist()
        better += total_gain(prior, weights, chosen) > total_gain(prior, weights, random)
    assert better >= 7


def total_gain(prior: np.ndarray, weights: np.ndarray, rows: list[int]) -> float:
    cross = weights @ prior[:, rows]
    return float((cross * np.linalg.solve(prior[np.ix_(rows, rows)], cross.T).T).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_picks_are_deterministic(kind, rng):
    surrogate = fitted_kernel(kind, 6, 18, rng, with_empty=True)
    known = set(keys(surrogate.masks_MP))
    every = all_masks(6)[1:]
    free = every[[key not in known for key in keys(every)]]
    one, other = (
        select_for_values(surrogate, (0, 5), free[4:], 6, pending_MP=free[:4], head_cost=0.5)
        for _ in range(2)
    )
    np.testing.assert_array_equal(one, other)
