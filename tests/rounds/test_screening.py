"""Estimates from few windows against games whose windows differ in known ways.

Fresh random games. Where the screen says everything the estimate is held to 1e-4 of the utilities'
spread: the surrogate of the difference has a jitter of 1e-10 in variance, and a nugget.
"""

from __future__ import annotations

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.masks import draw
from lpserve.rounds.screening import estimated, screen_rows
from lpserve.types import BoolArray, FloatArray

pytestmark = pytest.mark.usefixtures("one_blas_thread")

P = 10


def masks_of(count: int, rng: np.random.Generator) -> BoolArray:
    drawn = np.concatenate([draw(P, kept, count, rng) for kept in (6, 7, 8, 9)])
    return rng.permutation(np.unique(drawn, axis=0))[:count]


def pair_utility(rng: np.random.Generator, scale: float) -> tuple[FloatArray, FloatArray]:
    main = scale * rng.uniform(0.1, 1, P)
    return main, np.triu(scale * rng.normal(0, 0.2, (P, P)), 1)


def utility(game: tuple[FloatArray, FloatArray], masks: BoolArray) -> FloatArray:
    dropped = 1.0 - masks
    return -dropped @ game[0] - np.einsum("mi,ij,mj->m", dropped, game[1], dropped)


def test_a_screen_that_says_everything_is_believed(rng):
    masks = masks_of(120, rng)
    truth = utility(pair_utility(rng, 0.1), masks)
    few = 0.3 + 1.7 * truth
    whole = np.arange(120) < 40
    value, variance = estimated(masks, np.where(whole, truth, np.nan), few)
    np.testing.assert_array_equal(value[whole], truth[whole])
    assert (variance[whole] == 0).all()
    assert np.abs(value - truth).max() < 1e-4 * truth.std()
    assert np.sqrt(variance.max()) < 1e-2 * truth.std()


def test_what_few_windows_get_wrong_is_learned_and_its_rest_is_honest(statistical_rng):
    """The screen errs alike on like masks, and a little of its own on each."""
    errors, standard = [], []
    for _ in range(4):
        masks = masks_of(160, statistical_rng)
        truth = utility(pair_utility(statistical_rng, 0.1), masks)
        wrong = utility(pair_utility(statistical_rng, 0.04), masks)
        wrong += statistical_rng.normal(0, 0.004, 160)
        whole = np.arange(160) < 80
        value, variance = estimated(masks, np.where(whole, truth, np.nan), truth + wrong)
        error = (value - truth)[~whole]
        errors.append(np.sqrt((error**2).mean()) / (wrong[~whole] - wrong[~whole].mean()).std())
        standard.append(np.sqrt((error**2 / variance[~whole]).mean()))
    assert np.mean(errors) < 0.5  # of what the screen got wrong
    assert 0.5 < np.mean(standard) < 2.0


def test_what_is_not_known_is_not_guessed(rng):
    masks = masks_of(20, rng)
    truth = utility(pair_utility(rng, 0.1), masks)
    all_windows, few = np.full(20, np.nan), truth.copy()
    few[5] = np.nan
    all_windows[:2] = truth[:2]
    value, _ = estimated(masks, all_windows, few)  # two whole masks are too few
    np.testing.assert_array_equal(value, all_windows)
    all_windows[:4] = truth[:4]
    value, variance = estimated(masks, all_windows, few)
    assert np.flatnonzero(np.isnan(value)).tolist() == [5]
    assert (variance[6:] > 0).all()


def test_a_screen_is_the_first_windows_of_every_corpus():
    np.testing.assert_array_equal(screen_rows([("a", 4), ("b", 3)], 2), [0, 1, 4, 5])
    with pytest.raises(InputError, match="below the number of windows of every corpus \\(3 of 'b'"):
        screen_rows([("a", 4), ("b", 3)], 3)
