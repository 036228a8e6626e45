"""The contract of surrogates: models that predict a mask's utility from its bits.

Every surrogate predicts with a standard deviation and reports its error on masks that a fit has not
seen.

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
class HeldOutError:
    """Error of a surrogate's predictions of masks that the fit behind each has not seen."""

    r2: float
    """Coefficient of determination; NaN where all utilities are the same."""
    spearman: float
    """Rank correlation; NaN where utilities or predictions are all the same."""
    rmse: float
    """Root mean squared error, in the utility's units."""
    method: str
    """`leave-one-out`, `5-fold`, ..."""
    num_masks: int
    """Masks that were predicted so."""
    calibration: float
    """Root mean squared residual in predicted standard deviations; above 1, those are too small."""
    inside90: float
    """Share of scores within 1.645 standard deviations of the prediction; calibrated: 0.9."""


class Predictor(Protocol):
    """A fitted surrogate: predictions of masks, and its own held-out error."""

    name: str
    """The kind by which it was made, and for `auto` what predicts."""

    @property
    def heldout_error(self) -> HeldOutError:
        """Error of the predictions `left_out_M`."""
        ...

    @property
    def rows(self) -> IntArray:
        """Rows of the training masks among the masks of the last fit, `int64[<=M]`."""
        ...

    @property
    def left_out_M(self) -> FloatArray:
        """Utility of each training mask as predicted without it, in the order of `rows`."""
        ...

    def mean(self, queried_MP: BoolArray) -> FloatArray:
        """Predicted utility, `float64[Q]`."""
        ...

    def predict(self, queried_MP: BoolArray) -> tuple[FloatArray, FloatArray]:
        """Predicted utility and its standard deviation, `float64[Q]` each."""
        ...


class Surrogate(Predictor, Protocol):
    """Contract of every surrogate. Fitting again replaces the fit; all are deterministic.

    A surrogate of one's own is one module with a function
    `build(kind: str, seed: int, *, quick: bool) -> Surrogate` and one entry, its name and the
    module's, in `lpserve.config.SURROGATES`. `quick` asks for a cheap fit, to choose masks.
    """

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        """Fit to distinct masks with finite utilities, M >= 2; higher is better.

        Args:
            noise_M: known variance of each utility; None: exact.

        Raises:
            InputError: see `training_set`.
        """
        ...


def heldout_error(
    targets_M: FloatArray, predicted_M: FloatArray, method: str, std_M: FloatArray
) -> HeldOutError:
    """Error statistics of cross-validated predictions.

    Args:
        targets_M: scored utilities.
        predicted_M: the predictions, each from a fit without that mask.
        method: name of the cross-validation.
        std_M: the surrogate's own predictive standard deviations.
    """
    residual = targets_M - predicted_M
    spread = float(((targets_M - targets_M.mean()) ** 2).sum())
    ranked = np.ptp(targets_M) > 0 and np.ptp(predicted_M) > 0
    ranks = np.corrcoef(rankdata(targets_M), rankdata(predicted_M)) if ranked else None
    rounding = 1e-12 * float(np.abs(targets_M).max())
    standard_M = residual / np.maximum(std_M, rounding or 1.0)
    return HeldOutError(
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
    """Checked training data as (masks, utilities, noise variances, 0 where none were given).

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
