"""Cross-fitted ensembles: ten members, each trained without a fifth of the masks.

Two random partitions into 5 folds, one member for each fold: every mask is left out by two members,
and their mean is its held-out prediction (5-fold cross-validation, twice), at no further training.
A member is a ridge regression on main effects and a model of what they leave (`boosting`,
`ensemble`); the prediction is the mean of the members.

Standard deviations, with v(m) the members' variance at mask m, v its mean over left-out masks (of
the two members that left each out), share s and factor c:

    std(m)^2 = c (1 - s + s v(m) / v)

s is the one of 0, 1/4, 1/2 and 3/4 that maximises the likelihood of the left-out residuals. c makes
their mean square equal std(m)^2 + (1/2 - 1/E) v(m) + noise: a mean of two members varies more than
one of all. For a scored mask the prediction from the other masks and the score are averaged by
precision, so that a score without noise is returned as it is.

Notation: M training masks, Q queried masks, P players, E members, F features (a constant, players).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from lpserve.masks import keys
from lpserve.surrogate.base import HeldOutError, heldout_error, training_set
from lpserve.types import BoolArray, FloatArray, IntArray

FOLDS, PARTITIONS = 5, 2
_PENALTIES = (1e-7, 1e-5, 1e-3, 1e-1)
"""Ridge penalties on squared main effects, for standardised utilities and a mean over masks."""
_SHARES = (0.0, 0.25, 0.5, 0.75)
_MIN_REST = 1e-6  # of the utilities' standard deviation: main effects explain everything
_MIN_VARIANCE = 1e-16
_QUERY_MASKS = 4096  # at once: bounds the memory

Members = Callable[[BoolArray], FloatArray]
"""Predictions of all members: masks `bool[Q, P]` -> `float64[E, Q]`."""
Train = Callable[[BoolArray, FloatArray, FloatArray, int], Members]
"""Trains all members: (masks_MP, targets_EM, member_weights, seed) -> their predictions.

A weight is 0 where a member leaves a mask out; these masks serve for early stopping. Targets have
about unit variance."""


class CrossFitted:
    """Cross-fitted members of one kind, see the module.

    A noisy score has the weight var / (var + noise), with var the variance of all utilities. As in
    `gaussian`, the empty coalition is no training point and is returned as it was scored. Members
    run on one thread, since engines need the others.
    """

    def __init__(self, kind: str, train: Train, seed: int = 0) -> None:
        self.name = kind
        self.heldout_error: HeldOutError
        self._train = train
        self._seed = seed

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        """See `base.Surrogate`."""
        masks_MP, utilities_M, noise_M = training_set(masks_MP, utilities_M, noise_M)
        self.rows: IntArray = np.flatnonzero(masks_MP.any(axis=1) | (len(masks_MP) <= 2))
        """Rows of the training masks among the masks of the last fit."""
        trained_MP, targets_M = masks_MP[self.rows], utilities_M[self.rows]
        self._offset = float(targets_M.mean())
        self._scale = float(targets_M.std()) if np.ptp(targets_M) > 0 else 1.0
        scaled_M = (targets_M - self._offset) / self._scale
        noise_M = noise_M[self.rows] / self._scale**2
        out = left_out_by(len(self.rows), self._seed)
        with threadpool_limits(1, user_api="openmp"):
            self._fit_members(trained_MP, scaled_M, np.where(out, 0.0, 1.0 / (1.0 + noise_M)))
            each = self._members(trained_MP)
        mean_M = each.sum(axis=0, where=out) / out.sum(axis=0)
        varies_M = each.var(axis=0, ddof=1, where=out)
        residual_M = scaled_M - mean_M
        excess_M = noise_M + (0.5 - 1 / len(out)) * varies_M
        self._deviation = Deviation.fitted(residual_M, varies_M, excess_M)
        honest_M = _from_other_folds(residual_M, varies_M, excess_M, out[: len(out) // 2])
        self.left_out_M = self._offset + self._scale * mean_M
        """Utility of each training mask as predicted by the members that left it out."""
        self.left_out_std_M = self._scale * np.sqrt(honest_M + excess_M)
        """Standard deviation of these predictions, with c and s from the other folds."""
        self.heldout_error = heldout_error(
            targets_M, self.left_out_M, "5-fold, twice", self.left_out_std_M
        )
        variance_M = self._deviation.variance(varies_M)
        trust_M = variance_M / (variance_M + noise_M)
        known_M = self.left_out_M + trust_M * (targets_M - self.left_out_M)
        std_M = self._scale * np.sqrt(trust_M * noise_M)
        self._known = dict(zip(keys(trained_MP), zip(known_M, std_M, strict=True), strict=True))
        for row in np.flatnonzero(np.isin(np.arange(len(masks_MP)), self.rows, invert=True)):
            self._known[keys(masks_MP[row : row + 1])[0]] = (utilities_M[row], 0.0)

    def _fit_members(
        self, masks_MP: BoolArray, scaled_M: FloatArray, member_weights: FloatArray
    ) -> None:
        self._main = main_effects(masks_MP, scaled_M, member_weights)
        rest = scaled_M - self._main @ _features(masks_MP).T
        self._rest_scale = float(np.sqrt((member_weights * rest**2).sum() / member_weights.sum()))
        self._rest: Members | None = None
        if self._rest_scale > _MIN_REST:
            self._rest = self._train(masks_MP, rest / self._rest_scale, member_weights, self._seed)

    def _members(self, queried_MP: BoolArray) -> FloatArray:
        """Scaled utility by every member, `float64[E, Q]`."""
        scaled = self._main @ _features(queried_MP).T
        if self._rest is not None:
            scaled += self._rest_scale * self._rest(queried_MP)
        return scaled

    def mean(self, queried_MP: BoolArray) -> FloatArray:
        """See `base.Predictor`."""
        return self.predict(queried_MP)[0]

    def predict(self, queried_MP: BoolArray) -> tuple[FloatArray, FloatArray]:
        """See `base.Predictor`."""
        queried_MP = np.asarray(queried_MP, dtype=bool)
        mean, std = np.empty(len(queried_MP)), np.empty(len(queried_MP))
        with threadpool_limits(1, user_api="openmp"):
            for start in range(0, len(queried_MP), _QUERY_MASKS):
                some = slice(start, start + _QUERY_MASKS)
                each = self._members(queried_MP[some])
                mean[some] = self._offset + self._scale * each.mean(axis=0)
                variance = self._deviation.variance(each.var(axis=0, ddof=1))
                std[some] = self._scale * np.sqrt(variance)
        for row, key in enumerate(keys(queried_MP)):
            if key in self._known:
                mean[row], std[row] = self._known[key]
        return mean, std


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """Predictive variance as a function of the members' variance, see the module."""

    factor: float
    """c."""
    share: float
    """s."""
    mean_variance: float
    """v."""

    @classmethod
    def fitted(
        cls, residual_M: FloatArray, varies_M: FloatArray, excess_M: FloatArray
    ) -> Deviation:
        """The share of maximum likelihood for normal residuals, and its factor.

        Args:
            residual_M: left-out residuals.
            varies_M: the members' variance at each mask.
            excess_M: the part of each residual's variance that is not the predictive variance.
        """
        mean = float(varies_M.mean())
        best, max_likelihood = cls(factor=_MIN_VARIANCE, share=0.0, mean_variance=1.0), -np.inf
        for share in _SHARES if mean > _MIN_VARIANCE else _SHARES[:1]:
            one = cls(factor=1.0, share=share, mean_variance=max(mean, _MIN_VARIANCE))
            shape_M = one.variance(varies_M)
            factor = float(((residual_M**2 - excess_M) / shape_M).mean())
            factor = max(factor, _MIN_VARIANCE)
            total_M = factor * shape_M + excess_M
            likelihood = -float((np.log(total_M) + residual_M**2 / total_M).sum())
            if likelihood > max_likelihood:
                max_likelihood = likelihood
                best = cls(factor=factor, share=share, mean_variance=one.mean_variance)
        return best

    def variance(self, varies: FloatArray) -> FloatArray:
        """Predictive variance, `float64[Q]`, from the members' variances."""
        return self.factor * (1 - self.share + self.share * varies / self.mean_variance)


def _from_other_folds(
    residual_M: FloatArray, varies_M: FloatArray, excess_M: FloatArray, fold: BoolArray
) -> FloatArray:
    """Variance of each left-out prediction, `float64[M]`, fitted to the other folds' residuals."""
    variance_M = np.empty(len(residual_M))
    for out_M in fold:
        rest = Deviation.fitted(residual_M[~out_M], varies_M[~out_M], excess_M[~out_M])
        variance_M[out_M] = rest.variance(varies_M[out_M])
    return variance_M


def left_out_by(num_masks: int, seed: int) -> BoolArray:
    """Which masks each member leaves out, `bool[E, M]`: a fold of one of two random partitions."""
    folds = min(FOLDS, num_masks)
    rng = np.random.default_rng(seed)
    fold_M = [rng.permutation(num_masks) % folds for _ in range(PARTITIONS)]
    return np.concatenate([fold[None] == np.arange(folds)[:, None] for fold in fold_M])


def main_effects(
    masks_MP: BoolArray, scaled_M: FloatArray, member_weights: FloatArray
) -> FloatArray:
    """Every member's constant and effects of dropped players, `float64[E, F]`.

    Ridge regression, with the penalty of the smallest error on the masks that members left out.
    """
    features = _features(masks_MP)
    share = member_weights / member_weights.sum(axis=1, keepdims=True)
    gram = np.stack([(features.T * share_M) @ features for share_M in share])
    right = share @ (features * scaled_M[:, None])
    penalised = np.arange(features.shape[1]) > 0
    best, min_error = np.zeros(right.shape), np.inf
    for penalty in _PENALTIES:
        solved = np.linalg.solve(gram + penalty * np.diag(penalised), right[..., None])
        main = np.asarray(solved[..., 0], dtype=np.float64)
        error = float(((scaled_M - main @ features.T) ** 2).sum(where=member_weights == 0))
        if error < min_error:
            best, min_error = main, error
    return best


def _features(queried_MP: BoolArray) -> FloatArray:
    dropped_MP = np.asarray(~queried_MP, dtype=np.float64)
    return np.concatenate([np.ones((len(queried_MP), 1)), dropped_MP], axis=1)
