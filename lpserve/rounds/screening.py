"""What scores on a few windows say about all of them.

Sets that may be good are first scored on a few windows (the *screen*), and only those that may
still be the best on the others, too. A screened mask is then an observation with noise, from the
autoregressive model of Kennedy & O'Hagan (2000) with constant rho:

    u_all(S) = rho u_few(S) + delta(S)

rho by least squares over the masks that were scored on all windows, delta a Gaussian process on
masks, fitted to what rho leaves of those. Few windows err alike on like sets, which is what delta
learns: the noise of a screened score is what remains uncertain of it.

Notation: M masks, P players.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpserve.errors import InputError
from lpserve.surrogate import KernelSurrogate
from lpserve.types import BoolArray, FloatArray, IntArray

_MIN_FULLY_SCORED = 3  # masks scored on all windows: with fewer nothing is said about the others


def screen_rows(corpora: Sequence[tuple[str, int]], num_windows: int) -> IntArray:
    """The screen: rows of the first windows of each corpus, of those that follow one another.

    Args:
        corpora: name and number of windows of each, in order.

    Raises:
        InputError: a corpus has no more windows than its part of the screen.
    """
    rows, start = [], 0
    for name, count in corpora:
        if num_windows >= count:
            raise InputError(
                f"screen_windows must be below the number of windows of every corpus ({count} of "
                f"{name!r}): got {num_windows}"
            )
        rows.append(np.arange(start, start + num_windows))
        start += count
    return np.concatenate(rows)


def estimated(
    masks_MP: BoolArray, all_M: FloatArray, few_M: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Utilities on all windows and their variances, `float64[M]` each.

    As scored, with variance 0, where they are known; estimated where only the screen is; NaN where
    neither is, and everywhere but the known while fewer than 3 masks are scored on all windows.

    Args:
        all_M: utility on all windows, NaN where a mask was not scored on all.
        few_M: the same utility on the screen alone, NaN where it is not finite.
    """
    value_M, variance_M = all_M.copy(), np.zeros(len(all_M))
    full = np.flatnonzero(np.isfinite(all_M) & np.isfinite(few_M))
    screened = np.flatnonzero(~np.isfinite(all_M) & np.isfinite(few_M))
    if not len(screened) or len(full) < _MIN_FULLY_SCORED:
        return value_M, variance_M
    few_known, all_known = few_M[full], all_M[full]
    spread = float(((few_known - few_known.mean()) ** 2).sum())
    rho = (
        float((few_known - few_known.mean()) @ (all_known - all_known.mean())) / spread
        if spread
        else 1.0
    )
    delta = KernelSurrogate("gp")
    delta.fit(masks_MP[full], all_known - rho * few_known)
    mean, std = delta.predict(masks_MP[screened])
    value_M[screened] = rho * few_M[screened] + mean
    variance_M[screened] = std**2
    return value_M, variance_M
