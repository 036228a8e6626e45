"""Correction of a surrogate's values by its residuals on masks that were drawn at random.

A value is linear in the game, phi_i = sum_m W_im u(m). With the residuals e(m) = u(m) - f(m), f(m)
predicted without m, phi_i(u) = phi_i(f) + sum_m W_im e(m). From masks drawn uniformly within their
strata, n_k of the C(P, k) masks that keep k players, the sum is estimated without bias
(cross-fitting: Chernozhukov et al. 2018; for Shapley values: Witter, Liu & Musco 2025) by

    c_i = sum_k C(P, k) / n_k  sum over drawn m with k kept of W_im e(m)

It adds variance, so cross-validation decides whether it is applied: with c(f) from fold f of the
drawn masks alone and c(-f) from the others, the mean over folds of |c(f)|^2 - |c(-f) - c(f)|^2 is
an unbiased estimate of the reduction of squared error by the correction. It is applied if that is
above 0.

Masks that a surrogate selected are no random sample of their strata and are not used.

Notation: M masks, P players.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lpserve.types import BoolArray, FloatArray, IntArray
from lpserve.values.result import ShapleyValues

_FOLDS = 5
_MIN_MASKS = 20


def corrected(
    values: ShapleyValues, drawn_MP: BoolArray, residual_M: FloatArray, seed: int
) -> ShapleyValues:
    """Values with the correction added if that reduces their error, else with it as an error.

    Unchanged with fewer than 20 drawn masks.

    Args:
        values: the surrogate's values; `stderr_P` is the error of their computation alone.
        drawn_MP: scored masks that were drawn uniformly within their strata.
        residual_M: utility minus the surrogate's prediction without the mask.
        seed: of the folds.
    """
    sizes = values.sizes
    if len(drawn_MP) < _MIN_MASKS:
        return values
    correction_P, variance_P = correction(drawn_MP, residual_M, sizes)
    if _reduces_error(drawn_MP, residual_M, sizes, seed):
        return replace(
            values,
            values_P=values.values_P + correction_P,
            stderr_P=np.sqrt(values.stderr_P**2 + variance_P),
            estimator=f"{values.estimator}, residuals of {len(drawn_MP)} masks added",
        )
    error_P = np.sqrt(values.stderr_P**2 + np.mean(correction_P**2))
    return replace(values, stderr_P=error_P)


def correction(
    drawn_MP: BoolArray, residual_M: FloatArray, sizes: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    """The correction c and its sampling variance, `float64[P]` each.

    Strata without a drawn mask contribute nothing, those with one mask no variance.
    """
    num_players = drawn_MP.shape[1]
    kept_M = drawn_MP.sum(axis=1)
    total_P, variance_P = np.zeros(num_players), np.zeros(num_players)
    for kept in np.unique(kept_M):
        rows = np.flatnonzero(kept_M == kept)
        part_MP = _weights(drawn_MP[rows], int(kept), sizes) * residual_M[rows, None]
        total_P += part_MP.mean(axis=0)
        if len(rows) > 1:
            variance_P += part_MP.var(axis=0, ddof=1) / len(rows)
    return total_P, variance_P


def _weights(masks_MP: BoolArray, kept: int, sizes: tuple[int, int]) -> FloatArray:
    """C(P, k) W_im of masks that keep k players, `float64[M, P]`.

    C(P, k) / C(P-1, k-1) is P / k for those that keep i, C(P, k) / C(P-1, k) is P / (P - k) for the
    others; 0 where the size before i joins is not among `sizes`.
    """
    num_players, num_sizes = masks_MP.shape[1], sizes[1] - sizes[0] + 1
    joined = num_players / kept if sizes[0] <= kept - 1 <= sizes[1] else 0.0
    apart = num_players / (num_players - kept) if sizes[0] <= kept <= sizes[1] else 0.0
    return np.where(masks_MP, joined, -apart) / num_sizes


def _reduces_error(
    drawn_MP: BoolArray, residual_M: FloatArray, sizes: tuple[int, int], seed: int
) -> bool:
    """Whether the correction reduces the squared error by more than its variance adds."""
    gains = []
    for out_M in _stratified_folds(drawn_MP.sum(axis=1), seed):
        one_P, _ = correction(drawn_MP[out_M], residual_M[out_M], sizes)
        rest_P, _ = correction(drawn_MP[~out_M], residual_M[~out_M], sizes)
        gains.append((one_P**2).sum() - ((rest_P - one_P) ** 2).sum())
    return bool(np.mean(gains) > 0)


def _stratified_folds(kept_M: IntArray, seed: int) -> BoolArray:
    """Five random folds, `bool[5, M]`, with every stratum spread evenly over them."""
    rng = np.random.default_rng(seed)
    fold_M = np.empty(len(kept_M), dtype=np.int64)
    for kept in np.unique(kept_M):
        rows = np.flatnonzero(kept_M == kept)
        fold_M[rows] = (rng.permutation(len(rows)) + rng.integers(_FOLDS)) % _FOLDS
    return fold_M == np.arange(_FOLDS)[:, None]
