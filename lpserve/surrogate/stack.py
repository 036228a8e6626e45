"""Stacking: a weighted mean of surrogates, weights by their errors on left-out masks.

With R[m, k] the error of surrogate k on mask m, predicted without m, the weights minimise the mean
of (R w)^2 over w >= 0 that sum to 1 (Breiman 1996, Stacked regressions). Leave-one-out errors of a
kernel whose hyperparameters were tuned to all masks are too small, the more so the fewer masks
there are: up to 1,000 masks the kernel is tuned again without each of 5 folds.

Notation: M training masks (the empty coalition is none), K surrogates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from lpserve.surrogate.base import HeldOutError, Predictor, heldout_error
from lpserve.surrogate.crossfit import CrossFitted
from lpserve.surrogate.gaussian import KernelSurrogate
from lpserve.surrogate.kernel import whitening
from lpserve.types import BoolArray, FloatArray, IntArray

FOLDS = 5
_MAX_RETUNED = 1000
_MIN_WEIGHT = 0.01


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LeftOutPredictions:
    """Cross-validated predictions of a surrogate's training masks, `float64[M]` each."""

    mean_M: FloatArray
    """Predicted utility."""
    std_M: FloatArray
    """Predictive standard deviation of the score, the score's noise included."""


def left_out_predictions(surrogate: Predictor, masks_MP: BoolArray) -> LeftOutPredictions:
    """Cross-validated predictions by a fitted surrogate.

    Args:
        surrogate: a `CrossFitted` or a `KernelSurrogate`.
        masks_MP: the masks of its last fit; the empty coalition is left out of the result.
    """
    if isinstance(surrogate, CrossFitted):
        return LeftOutPredictions(mean_M=surrogate.left_out_M, std_M=surrogate.left_out_std_M)
    assert isinstance(surrogate, KernelSurrogate)
    if len(surrogate.rows) <= _MAX_RETUNED:
        return _retuned(surrogate)
    rows = np.flatnonzero(masks_MP.any(axis=1))
    mean_M, std_M = surrogate.predict(masks_MP[rows])  # where it was not trained
    trained = np.isin(rows, surrogate.rows)
    variance_M = 1.0 / (surrogate.whiten_MM**2).sum(axis=0)
    mean_M[trained] = surrogate.left_out_M
    std_M[trained] = surrogate.scale * max(1.0, surrogate.calibration) * np.sqrt(variance_M)
    return LeftOutPredictions(mean_M=mean_M, std_M=std_M)


def _retuned(surrogate: KernelSurrogate) -> LeftOutPredictions:
    """Predictions of every fold by a kernel that was tuned to the other folds."""
    masks_MP, noise_M = surrogate.masks_MP, surrogate.noise_M
    mean_M, variance_M = np.empty(len(masks_MP)), np.empty(len(masks_MP))
    for out_M in _folds(len(masks_MP)):
        out, rest = np.flatnonzero(out_M), np.flatnonzero(~out_M)
        kernel = surrogate.tuned(rest)
        whiten = whitening(kernel.gram(masks_MP[rest], noise_M[rest]))
        half = whiten @ kernel.smooth(masks_MP[rest], masks_MP[out])
        mean_M[out] = half.T @ (whiten @ surrogate.scaled_M[rest])
        variance_M[out] = kernel.variance(masks_MP[out]) - (half**2).sum(axis=0) + noise_M[out]
    factor = surrogate.scale * max(1.0, surrogate.calibration)
    return LeftOutPredictions(
        mean_M=surrogate.offset + surrogate.scale * mean_M,
        std_M=factor * np.sqrt(np.maximum(variance_M, 0.0)),
    )


def stack_weights(errors: FloatArray) -> FloatArray:
    """Stacking weights (see the module), `float64[K]`, by non-negative least squares.

    The sum of w need not be a constraint: for x = t w with t > 0, |R x|^2 + (sum x - 1)^2 has
    its minimum over t, q / (1 + q) with q = |R w|^2, which grows with q.
    """
    # in units of the smallest error, so that none is lost beside the row of ones
    scaled = errors / (float(np.sqrt((errors**2).sum(axis=0).min())) or 1.0)
    system = np.concatenate([scaled, np.ones((1, errors.shape[1]))])
    share, _ = nnls(system, np.concatenate([np.zeros(len(errors)), [1.0]]))
    return share / share.sum()


class Stack:
    """Weighted mean of fitted surrogates, a `base.Predictor`.

    Standard deviations assume that the members' errors are fully correlated: the weighted mean of
    the members' standard deviations, times a factor that calibrates it on left-out masks.
    """

    def __init__(
        self,
        members: Sequence[Predictor],
        left_out: Sequence[LeftOutPredictions],
        rows: IntArray,
        targets_M: FloatArray,
    ) -> None:
        """Weigh surrogates that were fitted to the same masks.

        The held-out error of every fold is with weights and factor of the other 4 folds.

        Args:
            members: the fitted surrogates.
            left_out: cross-validated predictions of each.
            rows: rows of the predicted masks among those of the fit (all but the empty coalition).
            targets_M: scored utilities of these rows.
        """
        mean = np.stack([one.mean_M for one in left_out], axis=1)
        std = np.stack([one.std_M for one in left_out], axis=1)
        weights, self._factor = _weigh(targets_M, mean, std)
        used = np.flatnonzero(weights >= _MIN_WEIGHT)
        self.members = tuple(members[k] for k in used)
        self.weights = weights[used] / weights[used].sum()
        self.rows = rows
        self.left_out_M = np.empty(len(targets_M))
        std_M = np.empty(len(targets_M))
        for out_M in _folds(len(targets_M)):
            rest, factor = _weigh(targets_M[~out_M], mean[~out_M], std[~out_M])
            self.left_out_M[out_M] = mean[out_M] @ rest
            std_M[out_M] = factor * (std[out_M] @ rest)
        self.heldout_error: HeldOutError = heldout_error(
            targets_M, self.left_out_M, f"{FOLDS}-fold", std_M
        )
        parts = zip(self.weights, self.members, strict=True)
        self.name = ", ".join(f"{weight:.0%} {member.name}" for weight, member in parts)

    def mean(self, queried_MP: BoolArray) -> FloatArray:
        """See `base.Predictor`."""
        mean = np.stack([member.mean(queried_MP) for member in self.members])
        return self.weights @ mean

    def predict(self, queried_MP: BoolArray) -> tuple[FloatArray, FloatArray]:
        """See `base.Predictor`."""
        each = [member.predict(queried_MP) for member in self.members]
        mean, std = (np.stack(part) for part in zip(*each, strict=True))
        return self.weights @ mean, self._factor * (self.weights @ std)


def _weigh(targets_M: FloatArray, mean: FloatArray, std: FloatArray) -> tuple[FloatArray, float]:
    """Weights `float64[K]`, and the factor that calibrates the weighted standard deviations."""
    weights = stack_weights(mean - targets_M[:, None])
    residual_M = targets_M - mean @ weights
    std_M = np.maximum(std @ weights, 1e-300)
    return weights, float(np.sqrt(((residual_M / std_M) ** 2).mean()))


def _folds(num_masks: int) -> BoolArray:
    """A random partition of the masks, `bool[folds, M]`."""
    fold_M = np.random.default_rng(0).permutation(num_masks) % FOLDS
    return fold_M == np.arange(FOLDS)[:, None]
