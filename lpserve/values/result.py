"""What an estimator of values returns: values, standard errors, and how they were computed.

Notation: P players, B draws of the windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lpserve.surrogate import HeldOut
from lpserve.types import FloatArray


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapleyValues:
    """Values of every player, with what is known about their errors."""

    values_P: FloatArray
    stderr_P: FloatArray
    """Uncertainty about this game on these windows: masks not scored, and noise of the scores.
    Zero when enumerated without noise."""
    sizes: tuple[int, int]
    """(k_min, k_max), sizes before the player joins, inclusive."""
    estimator: str
    window_stderr_P: FloatArray | None = None
    """What other windows of the same source would change (paired bootstrap); None without them."""
    heldout: HeldOut | None = None
    """Held-out error of the surrogate, where one was used."""

    @property
    def total_stderr_P(self) -> FloatArray:
        """Root of the sum of squares."""
        if self.window_stderr_P is None:
            return self.stderr_P
        return np.hypot(self.stderr_P, self.window_stderr_P)

    @property
    def is_shapley(self) -> bool:
        """Whether these are Shapley values, not a truncated semivalue."""
        return self.sizes == (0, len(self.values_P) - 1)


def spread_over_draws(values_PB: FloatArray) -> FloatArray:
    """Standard deviation over draws of the windows; NaN for a single draw."""
    if values_PB.shape[1] < 2:
        return np.full(len(values_PB), np.nan)
    return values_PB.std(axis=1, ddof=1)
