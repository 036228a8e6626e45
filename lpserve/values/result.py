"""What an estimator of values returns: values, standard errors, and how they were computed.

Notation: P players, B draws of the windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lpserve.surrogate import HeldOutError
from lpserve.types import FloatArray


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapleyValues:
    """Values of every player with their standard errors."""

    values_P: FloatArray
    """In the utility's units; higher: the player matters more."""
    stderr_P: FloatArray
    """Standard error on these windows, from masks not scored and from noise of the scores; 0 when
    enumerated without noise."""
    sizes: tuple[int, int]
    """(k_min, k_max), sizes of the coalition before the player joins, inclusive."""
    estimator: str
    """How they were computed, for people."""
    window_stderr_P: FloatArray | None = None
    """Standard error over other windows of the same source (paired bootstrap); None if not asked
    for."""
    heldout_error: HeldOutError | None = None
    """Held-out error of the kernel surrogate, where one gave the values."""

    @property
    def total_stderr_P(self) -> FloatArray:
        """Standard error from both, the root of the sum of their squares."""
        if self.window_stderr_P is None:
            return self.stderr_P
        return np.hypot(self.stderr_P, self.window_stderr_P)

    @property
    def is_shapley(self) -> bool:
        """Whether these are Shapley values, not a truncated semivalue."""
        return self.sizes == (0, len(self.values_P) - 1)


def spread_over_draws(values: FloatArray) -> FloatArray:
    """Standard deviation of values over draws of the windows, `float64[P]`; NaN for one draw."""
    if values.shape[1] < 2:
        return np.full(len(values), np.nan)
    return values.std(axis=1, ddof=1)
