"""Values of kernel surrogates against enumeration of their posterior over all 2^P masks.

Tolerances: what passes through the inverse of a kernel matrix loses up to its condition number on
the way. The random part of `rough_game` keeps that number below 1e6, so 1e-8 of the largest value
is asked for. A mistake in a weight or a sign is worth 1e-2 and more.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from lpserve.masks import all_masks
from lpserve.surrogate import KernelSurrogate
from lpserve.surrogate.kernel import MaskKernel
from lpserve.testing.kernels import (
    KINDS,
    as_dict,
    covariance,
    fitted_kernel,
    masks_with_or_without_empty,
    naive_values,
    pair_game,
    posterior,
    rough_game,
    scored_covariance,
    weight_matrix,
)
from lpserve.values.closed_form import kernel_values, value_calibration

pytestmark = pytest.mark.usefixtures("one_blas_thread")


KERNEL_CASES = [
    (kind, num_players, sizes, with_empty)
    for kind in KINDS
    for num_players, sizes in (
        (3, (0, 2)),
        (6, (0, 5)),
        (6, (2, 3)),
        (8, (5, 7)),
        (7, (6, 6)),
        (6, (0, 0)),
        (7, (0, 3)),
    )
    for with_empty in (False, True)
]


def fitted_to(
    kind: str, num_players: int, with_empty: bool, noisy: bool, rng: np.random.Generator
) -> KernelSurrogate:
    count = min(40, 2**num_players - 3)
    noise = 0.02 * noisy
    return fitted_kernel(kind, num_players, count, rng, with_empty=with_empty, noise=noise)


@pytest.mark.parametrize(("kind", "num_players", "sizes", "with_empty"), KERNEL_CASES)
def test_closed_form_equals_enumerating_the_surrogate(kind, num_players, sizes, with_empty, rng):
    # without noise five masks of three players may be told so well that no nugget is left
    surrogate = fitted_to(kind, num_players, with_empty, num_players == 3, rng)
    every = all_masks(num_players)
    expected = naive_values(as_dict(every, surrogate.mean(every)), num_players, sizes)
    values = kernel_values(surrogate, sizes)
    tolerance = {"rtol": 0, "atol": 1e-8 * np.abs(expected).max()}
    np.testing.assert_allclose(values.values_P, expected, **tolerance)
    by_hand = surrogate.scale * (weight_matrix(num_players, sizes) @ posterior(surrogate, every)[0])
    np.testing.assert_allclose(values.values_P, by_hand, **tolerance)
    assert values.heldout_error is surrogate.heldout_error
    assert values.sizes == sizes


@pytest.mark.parametrize(("kind", "num_players", "sizes", "with_empty"), KERNEL_CASES)
@pytest.mark.parametrize("calibration", [0.5, 2.0])
def test_stderr_equals_the_posterior_deviation_by_brute_force(
    kind, num_players, sizes, with_empty, calibration, rng
):
    surrogate = fitted_to(kind, num_players, with_empty, True, rng)
    every = all_masks(num_players)
    assert surrogate.kernel is not None
    # the posterior of all 2^P utilities at once, in the surrogate's own units
    left = posterior(surrogate, every)[1]
    weights = weight_matrix(num_players, sizes)
    variance = np.einsum("pm,mk,pk->p", weights, left, weights)
    prior = covariance(surrogate.kernel, every, every)
    largest = np.einsum("pm,mk,pk->p", weights, prior, weights).max()
    by_residuals = max(1.0, surrogate.calibration)
    for given, factor in ((None, by_residuals), (calibration, calibration)):
        stderr = kernel_values(surrogate, sizes, calibration=given).stderr_P
        got = (stderr / (surrogate.scale * factor)) ** 2
        # a variance is a small difference of two large numbers: compared to the prior's
        np.testing.assert_allclose(got, np.maximum(variance, 0), rtol=0, atol=1e-8 * largest)
        assert got.max() > 1e-6 * largest
    surrogate.calibration = calibration
    stderr = kernel_values(surrogate, sizes).stderr_P
    ratio = max(1.0, calibration) / calibration
    np.testing.assert_allclose(
        stderr, ratio * kernel_values(surrogate, sizes, calibration=calibration).stderr_P
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "with_empty"), [((1, 4), False), ((0, 5), True), ((0, 3), True)])
def test_window_stderr_equals_values_of_every_draw_one_by_one(kind, sizes, with_empty, rng):
    num_players, num_windows = 6, 5
    every = all_masks(num_players)
    masks = masks_with_or_without_empty(num_players, 30, with_empty, rng)
    base = rough_game(masks, rng)
    columns = base[:, None] + rng.normal(0, 0.05, (30, num_windows))
    surrogate = KernelSurrogate(kind)
    surrogate.fit(masks, base)
    assert surrogate.kernel is not None
    trained = masks.any(axis=1)
    gram = scored_covariance(surrogate.kernel, masks[trained], np.zeros(trained.sum()))
    cross = covariance(surrogate.kernel, every, masks[trained])
    drawn = []
    for window in range(num_windows):
        utilities = columns[trained, window]
        predicted = utilities.mean() + cross @ np.linalg.solve(gram, utilities - utilities.mean())
        if with_empty:
            predicted[0] = columns[~trained, window][0]
        drawn.append(naive_values(as_dict(every, predicted), num_players, sizes))
    expected = np.array(drawn).std(axis=0, ddof=1)
    values = kernel_values(surrogate, sizes, columns)
    assert values.window_stderr_P is not None
    np.testing.assert_allclose(values.window_stderr_P, expected, rtol=1e-6)
    np.testing.assert_allclose(
        values.total_stderr_P, np.sqrt(values.stderr_P**2 + expected**2), rtol=1e-6
    )


def test_window_stderr_follows_the_rows_that_a_large_fit_trained_on(rng, monkeypatch):
    monkeypatch.setattr("lpserve.surrogate.gaussian.MAX_TRAINING_MASKS", 20)
    masks = masks_with_or_without_empty(7, 60, False, rng)
    utilities = pair_game(7, rng)(masks)
    columns = utilities[:, None] + rng.normal(0, 0.1, (60, 4))
    surrogate = KernelSurrogate("gp")
    surrogate.fit(masks, utilities)
    assert len(surrogate.rows) == 20
    small = KernelSurrogate("gp")
    small.fit(masks[surrogate.rows], utilities[surrogate.rows])
    got = kernel_values(surrogate, (0, 6), columns)
    expected = kernel_values(small, (0, 6), columns[surrogate.rows])
    np.testing.assert_array_equal(got.values_P, expected.values_P)
    np.testing.assert_array_equal(got.window_stderr_P, expected.window_stderr_P)


def values_and_variances(
    kernel: MaskKernel, surrogate: KernelSurrogate, rows: np.ndarray, sizes: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior of the values given some training masks alone, by sums over all masks, in the
    surrogate's own units and without the known term of a scored empty coalition."""
    every = all_masks(surrogate.masks_MP.shape[1])
    weights = weight_matrix(every.shape[1], sizes)
    if surrogate.empty is not None:
        weights[:, 0] = 0.0
    cross = covariance(kernel, every, surrogate.masks_MP[rows])
    gram = scored_covariance(kernel, surrogate.masks_MP, surrogate.noise_M)[np.ix_(rows, rows)]
    mean = cross @ np.linalg.solve(gram, surrogate.scaled_M[rows])
    left = covariance(kernel, every, every) - cross @ np.linalg.solve(gram, cross.T)
    return weights @ mean, np.einsum("pm,mk,pk->p", weights, left, weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sizes", "with_empty"), [((0, 5), False), ((0, 5), True), ((2, 4), True)])
def test_value_calibration_equals_really_leaving_every_fold_out(kind, sizes, with_empty, rng):
    every = all_masks(6)
    drawn = masks_with_or_without_empty(6, 40, with_empty, rng)
    five_or_six = every[every.sum(axis=1) >= 5]
    masks = rng.permutation(np.unique(np.concatenate([drawn, five_or_six]), axis=0))
    surrogate = KernelSurrogate(kind)
    surrogate.fit(masks, rough_game(masks, rng), rng.uniform(0, 0.02, len(masks)))
    num_masks = len(surrogate.masks_MP)
    everything = np.arange(num_masks)
    kept = surrogate.masks_MP.sum(axis=1).tolist()
    # sizes scored whole stay in every fold
    partly = [row for row in everything if kept.count(kept[row]) < math.comb(6, kept[row])]
    assert len(partly) <= num_masks - 7
    fold_of = np.full(num_masks, -1)
    fold_of[partly] = np.random.default_rng(0).permutation(len(partly)) % 10
    squares = []
    for fold in range(10):
        rest = everything[fold_of != fold]
        kernel = surrogate.tuned(rest)
        with_fold, variance_with = values_and_variances(kernel, surrogate, everything, sizes)
        without, variance_without = values_and_variances(kernel, surrogate, rest, sizes)
        squares.append((with_fold - without) ** 2 / (variance_without - variance_with))
    expected = 1.15 * np.sqrt(np.mean(squares))  # folds fall short by that on real games
    # a fold that hardly says anything leaves a small difference of variances
    np.testing.assert_allclose(value_calibration(surrogate, sizes), expected, rtol=1e-4)


def test_value_calibration_takes_evenly_spaced_masks_of_many(rng, monkeypatch):
    monkeypatch.setattr("lpserve.values.closed_form._CALIBRATION_MASKS", 30)
    every = all_masks(7)
    masks = rng.permutation(every[np.isin(every.sum(axis=1), [3, 4])])[:40]
    surrogate = KernelSurrogate("ridge")
    surrogate.fit(masks, rough_game(masks, rng), rng.uniform(0, 0.02, 40))
    rows = np.linspace(0, 39, 30).astype(int)
    asked = []

    def tuned(rows: np.ndarray) -> MaskKernel:
        asked.append(set(rows.tolist()))
        return KernelSurrogate.tuned(surrogate, rows)

    monkeypatch.setattr(surrogate, "tuned", tuned)
    assert value_calibration(surrogate, (0, 6)) > 0
    assert len(asked) == 10
    assert [len(some) for some in asked] == [27] * 10
    left_out = [set(rows.tolist()) - some for some in asked]
    assert set.union(*left_out) == set(rows.tolist())


def test_too_few_masks_are_calibrated_by_leaving_one_out(rng):
    masks = masks_with_or_without_empty(6, 19, False, rng)
    surrogate = KernelSurrogate("gp")
    surrogate.fit(masks, rough_game(masks, rng))
    every = all_masks(6)
    whole = KernelSurrogate("gp")  # none but 18 masks of sizes that are scored in part
    few = [every[every.sum(axis=1) == 3][:18], every[np.isin(every.sum(axis=1), [1, 2, 5, 6])]]
    masks = np.concatenate(few)
    whole.fit(masks, rough_game(masks, rng))
    for one in (surrogate, whole):
        for calibration in (0.3, 2.5):
            one.calibration = calibration
            assert value_calibration(one, (0, 5)) == max(1.0, calibration)
