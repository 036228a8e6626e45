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
_SHARED = 1.15  # what calibration falls short by: its folds share most masks with all the others


def kernel_values(
    surrogate: KernelSurrogate,
    sizes: tuple[int, int],
    resampled_MB: FloatArray | None = None,
    *,
    calibration: float | None = None,
) -> ShapleyValues:
    """Posterior mean and standard deviation of the values under a kernel surrogate: exact at any
    P, no sampling (`lpserve.values.semivalue`). Scored masks enter as they are.

    Args:
        calibration: factor on the standard deviations; default: that of leave-one-out residuals.
    """
    kernel, known = surrogate.kernel, surrogate.empty is not None
    assert kernel is not None
    cross_PM = value_covariance(kernel, surrogate.masks_MP, sizes, empty_known=known)
    half_PM = cross_PM @ surrogate.whiten_MM.T
    weights_PM = half_PM @ surrogate.whiten_MM
    prior_P = value_variance(kernel, sizes, empty_known=known)
    variance_P = np.maximum(prior_P - (half_PM**2).sum(axis=1), 0.0)
    empty = empty_weight(sizes) if known else 0.0

    def values_of(utilities_MJ: FloatArray) -> FloatArray:
        """Values of J utilities of all masks, `float64[P, J]`."""
        some_MJ = utilities_MJ[surrogate.rows]
        offset_J = some_MJ.mean(axis=0)
        values_PJ = weights_PM @ (some_MJ - offset_J)
        if empty:
            values_PJ += empty * (offset_J - utilities_MJ[surrogate.empty_row])
        return values_PJ

    values_P = surrogate.scale * (cross_PM @ surrogate.alpha_M)
    if surrogate.empty is not None:
        values_P += empty * (surrogate.offset - surrogate.empty)
    factor = max(1.0, surrogate.calibration) if calibration is None else calibration
    window_stderr_P = None
    if resampled_MB is not None:
        window_stderr_P = spread_over_draws(values_of(resampled_MB))
    return ShapleyValues(
        values_P=values_P,
        stderr_P=surrogate.scale * factor * np.sqrt(variance_P),
        window_stderr_P=window_stderr_P,
        sizes=sizes,
        estimator=f"{surrogate.name} closed form",
        heldout=surrogate.heldout,
    )


def value_calibration(surrogate: KernelSurrogate, sizes: tuple[int, int]) -> float:
    """How much too narrow the posterior of the values is: a factor on its standard deviations.

    A kernel tuned to the masks that it explains is too sure of itself. So in each of 10 folds it is
    tuned to the other masks alone, and the change of every value when the fold is added, over the
    standard deviation that this kernel gives the change, should be a standard normal; the factor is
    the root mean square over folds and players, and 15% more: masks never scored lie farther
    from the others than a fold's do. With K the covariance of all masks, A = C K^-1 the values'
    weights, alpha = K^-1 y and B the fold,

        change = A_B (K^-1_BB)^-1 alpha_B,   variance = A_B (K^-1_BB)^-1 A_B'.

    Masks of a size that is scored whole are in no fold: none like them is left to predict, and the
    smallest coalitions, scored whole first, are the worst predicted (with them the folds asked for
    intervals a third too wide at 400 masks of 12 players, all sizes).
    """
    num_masks = len(surrogate.masks_MP)
    rows = np.unique(np.linspace(0, num_masks - 1, min(num_masks, _CALIBRATION_MASKS)).astype(int))
    partly = np.flatnonzero(_of_partly_scored_sizes(surrogate.masks_MP)[rows])
    if len(partly) < 2 * _CALIBRATION_FOLDS:
        return max(1.0, surrogate.calibration)
    masks_MP, scaled_M = surrogate.masks_MP[rows], surrogate.scaled_M[rows]
    fold_M = np.full(len(rows), -1)
    fold_M[partly] = np.random.default_rng(0).permutation(len(partly)) % _CALIBRATION_FOLDS
    squares = []
    for fold in range(_CALIBRATION_FOLDS):
        kernel = surrogate.tuned(rows[fold_M != fold])
        inverse = np.linalg.inv(kernel.gram(masks_MP, surrogate.noise_M[rows]))
        known = surrogate.empty is not None
        weights_PM = value_covariance(kernel, masks_MP, sizes, empty_known=known) @ inverse
        out = np.flatnonzero(fold_M == fold)
        weights_PB = weights_PM[:, out]
        solved = np.linalg.solve(inverse[np.ix_(out, out)], weights_PB.T)
        change_P = (inverse @ scaled_M)[out] @ solved
        squares.append(change_P**2 / np.maximum((weights_PB.T * solved).sum(axis=0), 1e-300))
    return _SHARED * float(np.sqrt(np.mean(squares)))


def _of_partly_scored_sizes(masks_MP: BoolArray) -> BoolArray:
    """Which of distinct masks keep as many players as some mask that is not among them."""
    num_players, kept_M = masks_MP.shape[1], masks_MP.sum(axis=1)
    have_K = np.bincount(kept_M, minlength=num_players + 1).tolist()
    lacking_K = np.array([n < math.comb(num_players, k) for k, n in enumerate(have_K)])
    return lacking_K[kept_M]
