"""`auto`: model selection by held-out error among the surrogates and their stack.

Kernel surrogates are always fitted: they are cheap, give values in closed form and serve as the
acquisition model. While the best of them leaves more than a hundredth of the variance of left-out
masks unexplained, the candidate models `boosting` and `ensemble` are fitted as well: all of them
whenever the number of masks has grown by half, and at every fit those that contribute to the
selected model. The model with the smallest held-out error among them, the best kernel and their
stack is selected, if its error is below the best kernel's by a twentieth; else the best kernel is.

Notation: M training masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import lpserve.surrogate.boosting as boosting
import lpserve.surrogate.ensemble as ensemble
from lpserve.surrogate.base import HeldOutError, Predictor, training_set
from lpserve.surrogate.crossfit import CrossFitted
from lpserve.surrogate.gaussian import QUICK_TUNING_MASKS, TUNING_MASKS, KernelSurrogate
from lpserve.surrogate.kernel import COMPONENTS
from lpserve.surrogate.stack import Stack, left_out_predictions
from lpserve.types import BoolArray, FloatArray, IntArray

CANDIDATES = {"boosting": boosting.train, "ensemble": ensemble.train}
"""Candidate models without a kernel: kind -> how its members are trained."""
_MIN_MASKS = 60
_ENOUGH_R2 = 0.99
_RETRY_GROWTH = 1.5
_MAX_ERROR_RATIO = 0.95


class AutoSurrogate:
    """Surrogate that selects among models, see the module.

    `best` is the selected model, which predicts; `best_kernel` the best kernel surrogate.

    Args:
        candidates: which of `CANDIDATES` may be selected; with none, neither torch nor scikit-learn
            is imported.
        tuning_masks: see `KernelSurrogate`.
    """

    def __init__(
        self, seed: int = 0, candidates: Sequence[str] = (), tuning_masks: int = TUNING_MASKS
    ) -> None:
        self._kernels = [KernelSurrogate(kind, tuning_masks) for kind in COMPONENTS]
        self._candidates = [CrossFitted(kind, CANDIDATES[kind], seed) for kind in candidates]
        self._selected: list[CrossFitted] = []
        """Candidates that contribute to the selected model."""
        self._num_masks_tried = 0
        """Number of masks when all candidates were fitted last."""
        self.best_kernel = self._kernels[0]
        self.best: Predictor = self.best_kernel
        self.name = "auto"

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        """See `base.Surrogate`; raises InputError as `base.training_set` does."""
        masks_MP, utilities_M, noise_M = training_set(masks_MP, utilities_M, noise_M)
        for kernel in self._kernels:
            kernel.fit(masks_MP, utilities_M, noise_M)
        self.best_kernel = min(self._kernels, key=lambda kernel: kernel.heldout_error.rmse)
        due = self._due(len(masks_MP))
        for candidate in due:
            candidate.fit(masks_MP, utilities_M, noise_M)
        self.best = self._select(due, masks_MP, utilities_M) if due else self.best_kernel
        members = self.best.members if isinstance(self.best, Stack) else (self.best,)
        self._selected = [candidate for candidate in due if candidate in members]
        self.name = f"auto:{self.best.name}"

    def _due(self, num_masks: int) -> list[CrossFitted]:
        """Candidates to fit now."""
        # not >=: R2 is NaN where all utilities are the same
        if num_masks < _MIN_MASKS or not self.best_kernel.heldout_error.r2 < _ENOUGH_R2:
            return []
        if num_masks < _RETRY_GROWTH * self._num_masks_tried:
            return self._selected
        self._num_masks_tried = num_masks
        return self._candidates

    def _select(
        self, candidates: Sequence[CrossFitted], masks_MP: BoolArray, utilities_M: FloatArray
    ) -> Predictor:
        """The selected model, given fitted candidates."""
        singles = [self.best_kernel, *candidates]
        each = [left_out_predictions(single, masks_MP) for single in singles]
        rows = np.flatnonzero(masks_MP.any(axis=1))
        targets_M = utilities_M[rows]
        error = [float(np.sqrt(((targets_M - one.mean_M) ** 2).mean())) for one in each]
        stack = Stack(singles, each, rows, targets_M)
        error.append(stack.heldout_error.rmse)
        best = int(np.argmin(error))
        if error[best] >= _MAX_ERROR_RATIO * error[0]:
            return self.best_kernel
        return [*singles, stack][best]

    @property
    def heldout_error(self) -> HeldOutError:
        """Of the selected model."""
        return self.best.heldout_error

    @property
    def rows(self) -> IntArray:
        """Rows of the selected model's training masks among the masks of the last fit."""
        return self.best.rows

    @property
    def left_out_M(self) -> FloatArray:
        """Utility of each of them as predicted without it, by the selected model."""
        return self.best.left_out_M

    def mean(self, queried_MP: BoolArray) -> FloatArray:
        """See `base.Predictor`."""
        return self.best.mean(queried_MP)

    def predict(self, queried_MP: BoolArray) -> tuple[FloatArray, FloatArray]:
        """See `base.Predictor`."""
        return self.best.predict(queried_MP)


def build(kind: str, seed: int, *, quick: bool) -> AutoSurrogate:
    """See `lpserve.surrogate.make_surrogate`.

    Quick fits have no candidates beside the kernels: those take seconds to fit and found no better
    sets (`scripts/bench/results/large_games.md`).
    """
    assert kind == "auto"
    if quick:
        return AutoSurrogate(seed, tuning_masks=QUICK_TUNING_MASKS)
    return AutoSurrogate(seed, tuple(CANDIDATES))
