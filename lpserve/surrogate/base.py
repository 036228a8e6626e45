"""The contract of surrogates: predict a mask's utility from its bits, with uncertainty and error.

Notation: M training masks, Q queried masks, P players.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.stats import rankdata

from lpserve.types import BoolArray, FloatArray


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Error on masks that a fit has not seen."""

    r2: float
    spearman: float
    rmse: float
    method: str
    """`leave-one-out` or `5-fold`."""
    num_masks: int


class Surrogate(Protocol):
    """Contract of every surrogate. Fitting again replaces the fit; all are deterministic."""

    name: str

    @property
    def heldout(self) -> HeldOut: ...

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        """Fit to distinct masks with finite utilities, M >= 2; `noise_M` is a known variance."""
        ...

    def mean(self, masks_QP: BoolArray) -> FloatArray:
        """Predicted utility, `float64[Q]`."""
        ...

    def predict(self, masks_QP: BoolArray) -> tuple[FloatArray, FloatArray]:
        """Predicted utility and its standard deviation, `float64[Q]` each."""
        ...


def heldout(targets_M: FloatArray, predicted_M: FloatArray, method: str) -> HeldOut:
    """What predictions of masks that a fit has not seen are worth."""
    residual = targets_M - predicted_M
    spread = float(((targets_M - targets_M.mean()) ** 2).sum())
    ranked = np.ptp(targets_M) > 0 and np.ptp(predicted_M) > 0
    ranks = np.corrcoef(rankdata(targets_M), rankdata(predicted_M)) if ranked else None
    return HeldOut(
        r2=1.0 - float((residual**2).sum()) / spread if spread > 0 else float("nan"),
        spearman=float(ranks[0, 1]) if ranks is not None else float("nan"),
        rmse=float(np.sqrt((residual**2).mean())),
        method=method,
        num_masks=len(targets_M),
    )
