"""Interaction indices against their definition, summed over all coalitions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.masks import all_masks
from lpserve.surrogate import KernelSurrogate
from lpserve.testing.kernels import (
    KINDS,
    as_dict,
    masks_with_or_without_empty,
    pair_game,
    posterior,
)
from lpserve.values.interactions import exact_interactions, kernel_interactions

pytestmark = pytest.mark.usefixtures("one_blas_thread")


def by_definition(game: dict, num_players: int, sizes: tuple[int, int]) -> np.ndarray:
    index = np.full((num_players, num_players), np.nan)
    for i, j in combinations(range(num_players), 2):
        others = [p for p in range(num_players) if p not in (i, j)]
        means = []
        for k in range(sizes[0], sizes[1]):
            terms = []
            for chosen in combinations(others, k):
                s = frozenset(chosen)
                terms.append(game[s | {i, j}] - game[s | {i}] - game[s | {j}] + game[s])
            means.append(np.mean(terms))
        index[i, j] = index[j, i] = np.mean(means)
    return index


@pytest.mark.parametrize("sizes", [(0, 5), (2, 4), (4, 5), (0, 1)])
def test_enumerated_games_have_the_index_of_the_definition(sizes, rng):
    masks = rng.permutation(all_masks(6))
    utilities = rng.normal(size=64)
    kept = masks.sum(axis=1)
    needed = (kept >= sizes[0]) & (kept <= sizes[1] + 1)
    got = exact_interactions(masks[needed], utilities[needed], sizes)
    expected = by_definition(as_dict(masks, utilities), 6, sizes)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_additive_games_have_none_and_pairs_theirs(rng):
    masks = all_masks(7)
    main, pairs = rng.normal(size=7), np.triu(rng.normal(size=(7, 7)), 1)
    on = masks * 1.0
    utilities = on @ main + np.einsum("mi,ij,mj->m", on, pairs, on)
    got = exact_interactions(masks, utilities, (0, 6))
    expected = pairs + pairs.T
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "with_empty"), [((1, 5), False), ((0, 6), True), ((0, 3), True)])
def test_kernel_interactions_are_those_of_the_posterior_mean(kind, sizes, with_empty, rng):
    """Scored masks keep their own parts; 1e-6 of the largest: a solve against a whitening."""
    masks = masks_with_or_without_empty(7, 50, with_empty, rng)
    utilities = pair_game(7, rng, triples=0.1)(masks)
    surrogate = KernelSurrogate(kind)
    surrogate.fit(masks, utilities)
    every = all_masks(7)
    mean, _ = posterior(surrogate, every)
    predicted = surrogate.offset + surrogate.scale * mean
    expected = by_definition(as_dict(every, predicted), 7, sizes)
    got = kernel_interactions(surrogate, sizes)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.nanmax(np.abs(expected)))


def test_a_single_size_is_refused(rng):
    with pytest.raises(InputError, match="two sizes"):
        exact_interactions(all_masks(4), rng.normal(size=16), (2, 2))
