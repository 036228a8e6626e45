"""Gaussian processes on masks (`lpserve.surrogate.kernel`): `gp`, `ridge` and `gp+ridge`.

All three share the posterior, the leave-one-out formula and the closed form of values
(`lpserve.values.semivalue`). The game is deterministic: predictions reproduce scored masks (but for
a jitter of 1e-10 of their variance); for unseen masks the part of a score that no neighbour shares
remains as uncertainty.

Notation: M training masks, Q queried masks, P players.
"""

from __future__ import annotations

import numpy as np

from lpserve.masks import keys
from lpserve.surrogate.base import HeldOutError, heldout_error
from lpserve.surrogate.kernel import MaskKernel, tune, whitening
from lpserve.types import BoolArray, FloatArray, IntArray

MAX_TRAINING_MASKS = 3000
"""Fitting costs M^3; with more masks than this, training uses an evenly spaced subset."""
TUNING_MASKS, QUICK_TUNING_MASKS = 500, 250
"""Masks that hyperparameters are tuned to, evenly spaced: for final values, and to choose masks. On
synthetic games of 32 layers, 800 masks, 500 halved the error of the values and took 3 times as
long."""
_TUNING_PER_PLAYER = 16  # more hardly help: there are two hyperparameters a player
_QUERY_MASKS = 2048  # at once: bounds the memory
_RETUNE_GROWTH = 1.25
_FRESH_MASKS = 150
"""Up to so many masks hyperparameters are tuned anew by every fit, which takes tenths of a second:
those of single players are no start for sets. (Sets of 1 to 12 layers of a 30-layer LLM that a
search found at half of greedy's work, mean over greedy's: 0.06 nats by kernels tuned further from
those of fewer masks, 0.01 below 0 by fresh ones.)"""


class KernelSurrogate:
    """Gaussian process of one kind of `kernel.COMPONENTS`.

    Hyperparameters are tuned by every fit to few masks, then again, from where they were, whenever
    the number of masks has grown by a quarter. The empty
    coalition is no training point: a model without any layer resembles no other, however few layers
    that has (26.6 nats against at most 10.3 with one layer, on the bundled model). Where its score
    is known it is returned as it is.
    """

    def __init__(self, kind: str, tuning_masks: int = TUNING_MASKS) -> None:
        self.name = kind
        self._tuning_masks = tuning_masks
        self.heldout_error: HeldOutError
        self.kernel: MaskKernel | None = None
        self._tuned_at = 0

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        """See `base.Surrogate`."""
        masks_MP = np.asarray(masks_MP, dtype=bool)
        targets_M = np.asarray(utilities_M, dtype=np.float64)
        noise_M = np.zeros(len(masks_MP)) if noise_M is None else np.asarray(noise_M)
        empty = np.flatnonzero(~masks_MP.any(axis=1))
        self.empty_row = int(empty[0]) if len(empty) and len(masks_MP) > 2 else None
        """Row of the empty coalition among the masks of the last fit; None: not scored."""
        trained = np.flatnonzero(np.arange(len(masks_MP)) != self.empty_row)
        self.rows = trained[_spaced(len(trained), MAX_TRAINING_MASKS)]
        """Rows of the training masks among the masks of the last fit."""
        self.empty = float(targets_M[empty[0]]) if self.empty_row is not None else None
        self.masks_MP = masks_MP[self.rows]
        targets_M = targets_M[self.rows]
        self.offset = float(targets_M.mean())
        self.scale = float(targets_M.std()) if np.ptp(targets_M) > 0 else 1.0
        self.scaled_M = (targets_M - self.offset) / self.scale
        self.noise_M = noise_M[self.rows] / self.scale**2
        few = len(masks_MP) <= _FRESH_MASKS
        if self.kernel is None or few or len(masks_MP) >= _RETUNE_GROWTH * self._tuned_at:
            self.kernel = None if few else self.kernel
            self.kernel = self.tuned(np.arange(len(self.rows)))
            self._tuned_at = len(masks_MP)
        self.whiten_MM = whitening(self.kernel.gram(self.masks_MP, self.noise_M))
        """W with W K W' = 1, K the training masks' covariance."""
        self.alpha_M = self.whiten_MM.T @ (self.whiten_MM @ self.scaled_M)
        # Gaussian-process leave-one-out in closed form (Rasmussen & Williams 2006, eq. 5.12)
        variance_M = 1.0 / (self.whiten_MM**2).sum(axis=0)
        residual_M = self.alpha_M * variance_M
        self.calibration = float(np.sqrt(np.mean(residual_M**2 / variance_M)))
        """Root mean squared leave-one-out residual in standard deviations. Above 1, those are too
        small, and predictions multiply theirs by it."""
        self.left_out_M = targets_M - self.scale * residual_M
        """Utility of each training mask as predicted from all the others."""
        std_M = self.scale * max(1.0, self.calibration) * np.sqrt(variance_M)
        self.heldout_error = heldout_error(targets_M, self.left_out_M, "leave-one-out", std_M)

    def tuned(self, rows: IntArray) -> MaskKernel:
        """The kernel of maximum posterior given some rows of the training masks alone."""
        enough = max(QUICK_TUNING_MASKS, _TUNING_PER_PLAYER * self.masks_MP.shape[1])
        some = rows[_spaced(len(rows), min(self._tuning_masks, enough))]
        return tune(
            self.name, self.masks_MP[some], self.scaled_M[some], self.noise_M[some], self.kernel
        )

    def mean(self, queried_MP: BoolArray) -> FloatArray:
        """See `base.Predictor`."""
        queried_MP = np.asarray(queried_MP, dtype=bool)
        parts = [
            self._cross(queried_MP[start : start + _QUERY_MASKS]) @ self.alpha_M
            for start in range(0, len(queried_MP), _QUERY_MASKS)
        ]
        return self._or_empty(queried_MP, np.concatenate([np.empty(0), *parts]))

    def predict(self, queried_MP: BoolArray) -> tuple[FloatArray, FloatArray]:
        """See `base.Predictor`."""
        assert self.kernel is not None
        queried_MP = np.asarray(queried_MP, dtype=bool)
        cross = self._cross(queried_MP)
        half = self.whiten_MM @ cross.T
        variance = self.kernel.variance(queried_MP) - (half**2).sum(axis=0)
        if self.empty is not None:
            variance *= queried_MP.any(axis=1)
        std = self.scale * max(1.0, self.calibration) * np.sqrt(np.maximum(variance, 0.0))
        return self._or_empty(queried_MP, cross @ self.alpha_M), std

    def joint(self, queried_MP: BoolArray) -> tuple[FloatArray, FloatArray]:
        """Predicted utilities `float64[Q]` and their posterior covariance `float64[Q, Q]`.

        The covariance is scaled by the same calibration as the standard deviations of `predict`.

        Args:
            queried_MP: masks not scored, or scored with noise; without the empty coalition.
        """
        assert self.kernel is not None
        cross = self._cross(queried_MP)
        half = self.whiten_MM @ cross.T
        covariance = self.kernel.smooth(queried_MP, queried_MP) - half.T @ half
        covariance[np.diag_indices_from(covariance)] += self.kernel.nugget_of(queried_MP)
        covariance *= (self.scale * max(1.0, self.calibration)) ** 2
        return self.offset + self.scale * (cross @ self.alpha_M), covariance

    def swap_means(self, mask_P: BoolArray) -> FloatArray:
        """Predicted utility of every swap of a kept for a dropped player, `float64[kept, dropped]`.

        Without the nugget's part, which only swaps that were scored have. A swap changes two
        factors of the kernel's product and two terms of its inner product, so that all swaps take a
        few products of matrices, [kept, M] by [M, dropped].
        """
        kernel = self.kernel
        assert kernel is not None
        kept, dropped = np.flatnonzero(mask_P), np.flatnonzero(~mask_P)
        coded_MP = 2.0 * self.masks_MP - 1.0
        inner_M = coded_MP @ (2.0 * mask_P - 1.0)
        alpha_M = self.alpha_M
        # dropping i changes the inner product by -2 z_i, bringing j back by 2 z_j
        out, back = -2.0 * coded_MP[:, kept], 2.0 * coded_MP[:, dropped]
        pairs = 0.5 * kernel.pairs
        ridge_M = kernel.constant + kernel.linear * inner_M
        ridge_M += pairs * (inner_M**2 - len(mask_P) + 8.0)  # + 8: two squared changes of 4
        slope_M = alpha_M * (kernel.linear + 2.0 * pairs * inner_M)
        mean_by_draw = np.full((len(kept), len(dropped)), float(alpha_M @ ridge_M))
        mean_by_draw += (slope_M @ out)[:, None] + slope_M @ back
        if pairs:
            mean_by_draw += 2.0 * pairs * ((out * alpha_M[:, None]).T @ back)
        if kernel.product:
            here_M = kernel.products(mask_P[None], self.masks_MP)[0]
            # dropping i: exp(g_i + lambda_i) where the other mask drops it too, else g_i - lambda_i
            change_MP = np.exp(kernel.growth_P - coded_MP * kernel.decay_P)
            weighted = change_MP[:, kept] * (alpha_M * here_M)[:, None]
            mean_by_draw += weighted.T @ (1.0 / change_MP[:, dropped])
        return self.offset + self.scale * mean_by_draw

    def _or_empty(self, queried_MP: BoolArray, scaled: FloatArray) -> FloatArray:
        """Utilities from scaled ones; the empty coalition's as it was scored."""
        mean = self.offset + self.scale * scaled
        if self.empty is not None:
            mean[~queried_MP.any(axis=1)] = self.empty
        return mean

    def _cross(self, queried_MP: BoolArray) -> FloatArray:
        """Covariance with the training masks; a training mask's own part included, `[Q, M]`."""
        assert self.kernel is not None
        cross = self.kernel.smooth(queried_MP, self.masks_MP)
        row_of = {key: row for row, key in enumerate(keys(self.masks_MP))}
        known = [(q, row_of[key]) for q, key in enumerate(keys(queried_MP)) if key in row_of]
        if known:
            rows, rows_M = np.array(known).T
            cross[rows, rows_M] += self.kernel.nugget_of(self.masks_MP[rows_M])
        return cross


def _spaced(num_rows: int, limit: int) -> np.ndarray:
    """At most `limit` of the rows 0..num_rows-1, evenly spaced."""
    if num_rows <= limit:
        return np.arange(num_rows)
    return np.linspace(0, num_rows - 1, limit).astype(np.int64)


def build(kind: str, seed: int, *, quick: bool) -> KernelSurrogate:
    """See `lpserve.surrogate.make_surrogate`; nothing here is random."""
    return KernelSurrogate(kind, QUICK_TUNING_MASKS if quick else TUNING_MASKS)
