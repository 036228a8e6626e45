"""Values in closed form from a kernel surrogate: exact at any number of players, no sampling.

A value is linear in the game, so that a Gaussian process on masks has a normal posterior of every
value; `lpserve.values.semivalue` computes the covariances that it needs. `value_calibration`
measures how much too narrow that posterior is.

Notation: M masks, P players, J columns of utilities, B draws of the windows or masks of a fold.
"""

from __future__ import annotations

import math

import numpy as np

from lpserve.surrogate import KernelSurrogate
from lpserve.types import BoolArray, FloatArray
from lpserve.values.result import ShapleyValues, spread_over_draws
from lpserve.values.semivalue import empty_weight, value_covariance, value_variance

_CALIBRATION_FOLDS, _CALIBRATION_MASKS = 10, 1000
_FOLD_CORRECTION = 1.15  # unscored masks are farther from the scored ones than a fold's are


def kernel_values(
    surrogate: KernelSurrogate,
    sizes: tuple[int, int],
    resampled: FloatArray | None = None,
    *,
    calibration: float | None = None,
) -> ShapleyValues:
    """Posterior mean and standard deviation of the values under a kernel surrogate.

    Scored masks enter with their scores, not with predictions.

    Args:
        surrogate: fitted.
        sizes: (k_min, k_max), sizes before the player joins.
        resampled: utilities of all masks of the fit under B draws of the windows, for
            `window_stderr_P`.
        calibration: factor on the standard deviations; default: that of leave-one-out residuals,
            at least 1.
    """
    kernel, empty_known = surrogate.kernel, surrogate.empty is not None
    assert kernel is not None
    cross_PM = value_covariance(kernel, surrogate.masks_MP, sizes, empty_known=empty_known)
    half_PM = cross_PM @ surrogate.whiten_MM.T
    weights_PM = half_PM @ surrogate.whiten_MM
    prior_P = value_variance(kernel, sizes, empty_known=empty_known)
    variance_P = np.maximum(prior_P - (half_PM**2).sum(axis=1), 0.0)
    empty = empty_weight(sizes) if empty_known else 0.0

    def values_of(utilities: FloatArray) -> FloatArray:
        """Values of J utilities of all masks, `float64[P, J]`."""
        trained = utilities[surrogate.rows]
        offset = trained.mean(axis=0)
        values = weights_PM @ (trained - offset)
        if empty:
            values += empty * (offset - utilities[surrogate.empty_row])
        return values

    values_P = surrogate.scale * (cross_PM @ surrogate.alpha_M)
    if surrogate.empty is not None:
        values_P += empty * (surrogate.offset - surrogate.empty)
    factor = max(1.0, surrogate.calibration) if calibration is None else calibration
    window_stderr_P = None
    if resampled is not None:
        window_stderr_P = spread_over_draws(values_of(resampled))
    return ShapleyValues(
        values_P=values_P,
        stderr_P=surrogate.scale * factor * np.sqrt(variance_P),
        window_stderr_P=window_stderr_P,
        sizes=sizes,
        estimator=f"{surrogate.name} closed form",
        heldout_error=surrogate.heldout_error,
    )


def value_calibration(surrogate: KernelSurrogate, sizes: tuple[int, int]) -> float:
    """Factor on the posterior standard deviations of the values that makes them calibrated.

    A kernel tuned to the masks that it is conditioned on is overconfident. So for each of 10 folds
    it is tuned to the other masks alone. The change of every value when the fold is added, divided
    by the standard deviation that this kernel predicts for it, should then be standard normal. The
    factor is the root mean square over folds and players, plus 15%, since masks never scored are
    farther from the scored ones than those of a fold. With K the covariance of all masks,
    A = C K^-1 the values' weights, alpha = K^-1 y and B the fold,

        change = A_B (K^-1_BB)^-1 alpha_B,   variance = A_B (K^-1_BB)^-1 A_B'.

    Masks of a stratum of which every mask is scored are in no fold: no such mask is left to
    predict, and the smallest coalitions, whose strata are complete first, are the worst predicted
    (with them in folds, intervals came out a third too wide at 400 masks of 12 players, all sizes).
    """
    num_masks = len(surrogate.masks_MP)
    rows = np.unique(np.linspace(0, num_masks - 1, min(num_masks, _CALIBRATION_MASKS)).astype(int))
    incomplete = np.flatnonzero(_of_incomplete_strata(surrogate.masks_MP)[rows])
    if len(incomplete) < 2 * _CALIBRATION_FOLDS:
        return max(1.0, surrogate.calibration)
    masks_MP, scaled_M = surrogate.masks_MP[rows], surrogate.scaled_M[rows]
    fold_M = np.full(len(rows), -1)
    fold_M[incomplete] = np.random.default_rng(0).permutation(len(incomplete)) % _CALIBRATION_FOLDS
    squares = []
    for fold in range(_CALIBRATION_FOLDS):
        kernel = surrogate.tuned(rows[fold_M != fold])
        inverse = np.linalg.inv(kernel.gram(masks_MP, surrogate.noise_M[rows]))
        empty_known = surrogate.empty is not None
        weights_PM = value_covariance(kernel, masks_MP, sizes, empty_known=empty_known) @ inverse
        out = np.flatnonzero(fold_M == fold)
        weights = weights_PM[:, out]
        solved = np.linalg.solve(inverse[np.ix_(out, out)], weights.T)
        change_P = (inverse @ scaled_M)[out] @ solved
        squares.append(change_P**2 / np.maximum((weights.T * solved).sum(axis=0), 1e-300))
    return _FOLD_CORRECTION * float(np.sqrt(np.mean(squares)))


def _of_incomplete_strata(masks_MP: BoolArray) -> BoolArray:
    """Which of distinct masks belong to a stratum that is not completely among them, `bool[M]`."""
    num_players, kept_M = masks_MP.shape[1], masks_MP.sum(axis=1)
    have = np.bincount(kept_M, minlength=num_players + 1).tolist()
    lacking = np.array([n < math.comb(num_players, k) for k, n in enumerate(have)])
    return lacking[kept_M]
