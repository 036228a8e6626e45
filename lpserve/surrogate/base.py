"""The contract of surrogates: predict a mask's utility from its bits, with uncertainty and error.

Notation: M training masks, Q queried masks, P players.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.stats import rankdata

from lpserve.errors import InputError
from lpserve.types import Z90, BoolArray, FloatArray, IntArray, check_per_mask, scored_masks


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Error on masks that a fit has not seen."""

    r2: float
    spearman: float
    rmse: float
    method: str
    """`leave-one-out`, `5-fold`, ..."""
    num_masks: int
    calibration: float
    """Root mean squared standardised residual: above 1, the deviations are too narrow."""
    inside90: float
    """Share of the scores within 1.645 deviations of what was predicted; 0.9 where honest."""


class Predictor(Protocol):
    """What a fitted surrogate says, about masks and about itself."""

    name: str

    @property
    def heldout(self) -> HeldOut: ...

    @property
    def rows(self) -> IntArray:
        """Training masks among those of the last fit."""
        ...

    @property
    def left_out_M(self) -> FloatArray:
        """What each training mask was predicted to score without it."""
        ...

    def mean(self, masks_QP: BoolArray) -> FloatArray:
        """Predicted utility, `float64[Q]`."""
        ...

    def predict(self, masks_QP: BoolArray) -> tuple[FloatArray, FloatArray]:
        """Predicted utility and its standard deviation, `float64[Q]` each."""
        ...


class Surrogate(Predictor, Protocol):
    """Contract of every surrogate. Fitting again replaces the fit; all are deterministic."""

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        """Fit to distinct masks with finite utilities, M >= 2; `noise_M` is a known variance."""
        ...


def heldout(
    targets_M: FloatArray, predicted_M: FloatArray, method: str, std_M: FloatArray
) -> HeldOut:
    """What predictions of masks that a fit has not seen are worth, and `std_M`, the standard
    deviations of targets from predictions, in the surrogate's own words."""
    residual = targets_M - predicted_M
    spread = float(((targets_M - targets_M.mean()) ** 2).sum())
    ranked = np.ptp(targets_M) > 0 and np.ptp(predicted_M) > 0
    ranks = np.corrcoef(rankdata(targets_M), rankdata(predicted_M)) if ranked else None
    rounding = 1e-12 * float(np.abs(targets_M).max())
    standard_M = residual / np.maximum(std_M, rounding or 1.0)
    return HeldOut(
        r2=1.0 - float((residual**2).sum()) / spread if spread > 0 else float("nan"),
        spearman=float(ranks[0, 1]) if ranks is not None else float("nan"),
        rmse=float(np.sqrt((residual**2).mean())),
        method=method,
        num_masks=len(targets_M),
        calibration=float(np.sqrt((standard_M**2).mean())),
        inside90=float((np.abs(standard_M) <= Z90).mean()),
    )


def training_set(
    masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None
) -> tuple[BoolArray, FloatArray, FloatArray]:
    """What a surrogate is fitted to, checked: masks, utilities, noise (0 for None).

    Raises:
        InputError: an array has another shape, masks repeat or are fewer than 2, a number is not
            finite, or a variance is negative.
    """
    masks, utilities = scored_masks(masks_MP, utilities_M)
    if len(masks) < 2:
        raise InputError(f"a surrogate needs at least 2 masks: got {len(masks)}")
    noise = np.zeros(len(masks)) if noise_M is None else np.asarray(noise_M, dtype=np.float64)
    check_per_mask("noise variances", noise, len(masks))
    if (noise < 0).any():
        raise InputError(f"noise variances must be at least 0: got {noise.min():g}")
    return masks, utilities, noise
