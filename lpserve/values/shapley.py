"""Shapley values and truncated semivalues of the layer game, with standard errors.

For `sizes = (k_min, k_max)`, the size of a coalition *before* player i joins:

    phi_i = mean over k = k_min..k_max of the mean over all S without i, |S| = k, of u(S+i) - u(S)

`(0, P-1)` is the Shapley value (Shapley 1953); anything narrower is a truncated semivalue, what
arXiv 2602.07804 estimates with its strata. `shapley_values` chooses the estimator: enumeration
(`lpserve.values.exact`) where every mask was scored, else the closed form of a kernel surrogate
(`lpserve.values.closed_form`). `lpserve.values.sampling` serves surrogates without one.

Notation: M masks, P players, B draws of the windows.
"""

from __future__ import annotations

import numpy as np

from lpserve.errors import InputError
from lpserve.surrogate import AutoSurrogate
from lpserve.types import BoolArray, FloatArray, scored_masks
from lpserve.values.closed_form import kernel_values, value_calibration
from lpserve.values.exact import exact_noise, exact_values, is_enumerated
from lpserve.values.result import ShapleyValues, spread_over_draws


def shapley_values(
    masks_MP: BoolArray,
    utilities_M: FloatArray,
    sizes: tuple[int, int] | None = None,
    *,
    noise_M: FloatArray | None = None,
    resampled: FloatArray | None = None,
) -> ShapleyValues:
    """Values from scored masks: exact if every mask needed is there, else by a kernel surrogate.

    Deterministic. The kernel surrogate with the smallest leave-one-out error gives the values in
    closed form, conditioned on all scores.

    Args:
        masks_MP: distinct masks, bool [M, P], True = kept.
        utilities_M: float [M], finite, higher is better.
        sizes: (k_min, k_max), sizes before the player joins; default (0, P-1).
        noise_M: variance of each utility, if it is noisy.
        resampled: the utilities under B >= 2 draws of the windows (`lpserve.analysis.resample`),
            for `window_stderr_P`.

    Raises:
        InputError: masks repeat, utilities are not finite, an array has another shape, sizes are
            out of range, or there are fewer than 3 masks and they do not enumerate the game.
    """
    masks_MP, utilities_M, sizes = check_game(masks_MP, utilities_M, sizes)
    for name, array, ndim in (("noise", noise_M, 1), ("resampled", resampled, 2)):
        if array is not None and (np.ndim(array) != ndim or len(array) != len(masks_MP)):
            raise InputError(
                f"{name} values must have {ndim} dimensions and a row for each of {len(masks_MP)} "
                f"masks: got {list(np.shape(array))}"
            )
    if is_enumerated(masks_MP, sizes):
        columns = utilities_M[:, None]
        if resampled is not None:
            columns = np.concatenate([columns, resampled], axis=1)
        values = exact_values(masks_MP, columns, sizes)
        window_stderr_P = None
        if resampled is not None:
            window_stderr_P = spread_over_draws(values[:, 1:])
        return ShapleyValues(
            values_P=values[:, 0],
            stderr_P=exact_noise(masks_MP, noise_M, sizes),
            window_stderr_P=window_stderr_P,
            sizes=sizes,
            estimator="exact",
        )
    if len(masks_MP) < 3:
        raise InputError(f"{len(masks_MP)} masks are too few to estimate values: score more")
    surrogate = AutoSurrogate()
    surrogate.fit(masks_MP, utilities_M, noise_M)
    best = surrogate.best_kernel
    calibration = value_calibration(best, sizes)
    return kernel_values(best, sizes, resampled, calibration=calibration)


def check_game(
    masks_MP: BoolArray, utilities_M: FloatArray, sizes: tuple[int, int] | None
) -> tuple[BoolArray, FloatArray, tuple[int, int]]:
    """Checked masks `bool[M, P]`, utilities `float64[M]` and sizes (default: all).

    Raises:
        InputError: see `shapley_values`.
    """
    masks, utilities = scored_masks(masks_MP, utilities_M)
    num_players = masks.shape[1]
    low, high = sizes if sizes is not None else (0, num_players - 1)
    if not 0 <= low <= high <= num_players - 1:
        raise InputError(
            f"sizes must be 0 <= k_min <= k_max <= {num_players - 1}: got ({low}, {high})"
        )
    return masks, utilities, (int(low), int(high))
