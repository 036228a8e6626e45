"""`auto`: whichever surrogate, or stack of them, predicts left-out masks best.

Kernel surrogates come first: they cost little, give values in closed form and say which mask to
score next. While the best of them leaves more than a hundredth of the variance of left-out masks
unexplained, `boosting` and `ensemble` are tried as well: again whenever the masks have grown by
half, and those that have a part in the answer at every fit. Of them and their stack with the best
kernel the one with the smallest held-out error answers, if its error is smaller than that kernel's
by a twentieth; else the kernel does.

Notation: M training masks, Q queried masks, K surrogates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import lpserve.surrogate.boosting as boosting
import lpserve.surrogate.ensemble as ensemble
from lpserve.surrogate.base import HeldOut, Predictor, training_set
from lpserve.surrogate.crossfit import CrossFitted
from lpserve.surrogate.gaussian import TUNING_MASKS, KernelSurrogate
from lpserve.surrogate.kernel import COMPONENTS
from lpserve.surrogate.stack import Stack, left_out
from lpserve.types import BoolArray, FloatArray, IntArray

RIVALS = {"boosting": boosting.train, "ensemble": ensemble.train}
"""Kinds without a kernel."""
_LEAST_MASKS = 60
_ENOUGH_R2 = 0.99
_RETRY_GROWTH = 1.5
_BETTER = 0.95


class AutoSurrogate:
    """See the module. `best` answers, `best_kernel` is the best of the kernel surrogates.

    Args:
        rivals: which of `RIVALS` may answer; none, and neither torch nor scikit-learn is imported.
        tuning_masks: see `KernelSurrogate`.
    """

    def __init__(
        self, seed: int = 0, rivals: Sequence[str] = (), tuning_masks: int = TUNING_MASKS
    ) -> None:
        self._kernels = [KernelSurrogate(kind, tuning_masks) for kind in COMPONENTS]
        self._rivals = [CrossFitted(kind, RIVALS[kind], seed) for kind in rivals]
        self._playing: list[CrossFitted] = []
        """Rivals that have a part in the answer."""
        self._tried_at = 0
        self.best_kernel = self._kernels[0]
        self.best: Predictor = self.best_kernel
        self.name = "auto"

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        """See `base.Surrogate`; raises InputError for what `base.training_set` refuses."""
        masks_MP, utilities_M, noise_M = training_set(masks_MP, utilities_M, noise_M)
        for kernel in self._kernels:
            kernel.fit(masks_MP, utilities_M, noise_M)
        self.best_kernel = min(self._kernels, key=lambda kernel: kernel.heldout.rmse)
        rivals = self._due(len(masks_MP))
        for rival in rivals:
            rival.fit(masks_MP, utilities_M, noise_M)
        self.best = self._winner(rivals, masks_MP, utilities_M) if rivals else self.best_kernel
        members = self.best.members if isinstance(self.best, Stack) else (self.best,)
        self._playing = [rival for rival in rivals if rival in members]
        self.name = f"auto:{self.best.name}"

    def _due(self, num_masks: int) -> list[CrossFitted]:
        """Rivals to fit now."""
        # not >=: R2 is NaN where all utilities are the same
        if num_masks < _LEAST_MASKS or not self.best_kernel.heldout.r2 < _ENOUGH_R2:
            return []
        if num_masks < _RETRY_GROWTH * self._tried_at:
            return self._playing
        self._tried_at = num_masks
        return self._rivals

    def _winner(
        self, rivals: Sequence[CrossFitted], masks_MP: BoolArray, utilities_M: FloatArray
    ) -> Predictor:
        """What answers, once all are fitted."""
        singles = [self.best_kernel, *rivals]
        each = [left_out(single, masks_MP) for single in singles]
        rows = np.flatnonzero(masks_MP.any(axis=1))
        targets_M = utilities_M[rows]
        error_K = [float(np.sqrt(((targets_M - one.mean_M) ** 2).mean())) for one in each]
        stack = Stack(singles, each, rows, targets_M)
        error_K.append(stack.heldout.rmse)
        best = int(np.argmin(error_K))
        if error_K[best] >= _BETTER * error_K[0]:
            return self.best_kernel
        return [*singles, stack][best]

    @property
    def heldout(self) -> HeldOut:
        return self.best.heldout

    @property
    def rows(self) -> IntArray:
        """Training masks of what answers, among those of the last fit."""
        return self.best.rows

    @property
    def left_out_M(self) -> FloatArray:
        return self.best.left_out_M

    def mean(self, masks_QP: BoolArray) -> FloatArray:
        return self.best.mean(masks_QP)

    def predict(self, masks_QP: BoolArray) -> tuple[FloatArray, FloatArray]:
        return self.best.predict(masks_QP)
