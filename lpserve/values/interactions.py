"""Pairwise interactions of players: the joint contribution of two beyond their separate ones.

For `sizes = (k_min, k_max)`, sizes before a player joins, the semivalue interaction index (Grabisch
& Roubens 1999; for `(0, P-1)` the Shapley interaction index) is

    I_ij = mean over k = k_min..k_max-1 of the mean over all S without i and j, |S| = k, of
           u(S + ij) - u(S + i) - u(S + j) + u(S)

so that it needs the same coalitions as the values, those with k_min..k_max+1 players. Above 0 the
two are complements, below 0 substitutes. Computed exactly where every mask was scored, else in
closed form from a kernel surrogate, conditioned on all scores.

Notation: M masks, P players.
"""

from __future__ import annotations

import math

import numpy as np

from lpserve.errors import InputError
from lpserve.surrogate import KernelSurrogate
from lpserve.surrogate.kernel import MaskKernel
from lpserve.types import BoolArray, FloatArray
from lpserve.values.semivalue import each_left_out, shares

_CHUNK_MASKS = 512  # masks at once: tables stay in the cache


def exact_interactions(
    masks_MP: BoolArray, utilities_M: FloatArray, sizes: tuple[int, int]
) -> FloatArray:
    """The interaction index by enumeration: symmetric `float64[P, P]`, NaN on the diagonal.

    `masks_MP` holds every mask that keeps k_min..k_max+1 players; others are ignored.

    Raises:
        InputError: `sizes` is a single size, so that no two players can join.
    """
    return _mirrored(_own_parts(masks_MP, np.asarray(utilities_M, dtype=np.float64), sizes))


def kernel_interactions(surrogate: KernelSurrogate, sizes: tuple[int, int]) -> FloatArray:
    """Posterior mean of the index: symmetric `float64[P, P]`, NaN on the diagonal.

    With alpha = K^-1 y it is sum_m alpha_m Cov(I_ij, u(m)). Main effects cancel in the second
    difference; of the kernel's pairs 4 z_i z_j remains, of its product the differences of both
    factors times the mean over coalitions of the other factors, by a recurrence over players with
    two left out (`lpserve.values.semivalue`), P^2 log P / 2 steps: 19,000 for 80 players.

    Raises:
        InputError: see `exact_interactions`.
    """
    kernel, masks_MP = surrogate.kernel, surrogate.masks_MP
    assert kernel is not None
    alpha_M = surrogate.scale * surrogate.alpha_M
    coded_MP = 2.0 * masks_MP - 1.0
    index_PP = 4 * kernel.pairs * (coded_MP * alpha_M[:, None]).T @ coded_MP
    index_PP += _own_parts(masks_MP, alpha_M * kernel.nugget_of(masks_MP), sizes)
    if kernel.product:
        for start in range(0, len(masks_MP), _CHUNK_MASKS):
            part = slice(start, start + _CHUNK_MASKS)
            index_PP += _products(kernel, masks_MP[part], alpha_M[part], sizes)
    if surrogate.empty is not None and sizes[0] == 0:
        # the empty coalition's utility is known and no training point: replaces its prediction
        empty_1P = np.zeros((1, masks_MP.shape[1]), dtype=bool)
        predicted = surrogate.offset + float(kernel.smooth(empty_1P, masks_MP)[0] @ alpha_M)
        index_PP += (surrogate.empty - predicted) / sizes[1]
    return _mirrored(index_PP)


def _products(
    kernel: MaskKernel, part_MP: BoolArray, alpha: FloatArray, sizes: tuple[int, int]
) -> FloatArray:
    """The part from the kernel's product, `float64[P, P]`, above the diagonal."""
    num_players = part_MP.shape[1]
    low, high = num_players - 1 - sizes[1], num_players - 2 - sizes[0]
    growth_P = np.exp(kernel.growth_P)
    apart_P = np.exp(-kernel.decay_P) * growth_P
    if_kept = np.where(part_MP.T, 1.0, apart_P[:, None])
    if_dropped = np.where(part_MP.T, apart_P[:, None], growth_P[:, None] ** 2)
    change = if_kept - if_dropped

    def insert(state: FloatArray, i: int, n: int) -> FloatArray:
        keep, drop = shares(high, n)
        more = keep[:, None] * (state * if_kept[i])
        more[1:] += drop[1:, None] * (state[:-1] * if_dropped[i])
        return more

    index_PP = np.zeros((num_players, num_players))
    before = np.zeros((high + 1, len(part_MP)))  # players 0..i-1 in it
    before[0] = 1.0
    for i in range(num_players - 1):
        weight = kernel.product * alpha * change[i]
        for j, state in each_left_out(range(i + 1, num_players), before, i, insert):
            index_PP[i, j] = (weight * change[j]) @ state[low:].mean(axis=0)
        before = insert(before, i, i + 1)
    return index_PP


def _own_parts(masks_MP: BoolArray, weights_M: FloatArray, sizes: tuple[int, int]) -> FloatArray:
    """sum_m weight_m W_ijm with W_ijm the weight of u(m) in I_ij, `float64[P, P]`.

    W is z_i z_j / (number of sizes * C(P-2, k)), k the kept players besides i and j.
    """
    num_players = masks_MP.shape[1]
    if sizes[1] <= sizes[0]:
        raise InputError(f"interactions need at least two sizes: got {list(sizes)}")
    ways = np.zeros(num_players + 1)
    for k in range(sizes[0], sizes[1]):
        ways[k] = 1.0 / ((sizes[1] - sizes[0]) * math.comb(num_players - 2, k))
    kept_M = masks_MP.sum(axis=1)
    on_MP = masks_MP.astype(np.float64)
    off_MP = 1.0 - on_MP

    def both(left_MP: FloatArray, right_MP: FloatArray, inside: int) -> FloatArray:
        others_M = kept_M - inside
        factor_M = np.where(others_M >= 0, ways[np.maximum(others_M, 0)], 0.0) * weights_M
        return (left_MP * factor_M[:, None]).T @ right_MP

    one_PP = both(on_MP, off_MP, 1)
    return both(on_MP, on_MP, 2) - one_PP - one_PP.T + both(off_MP, off_MP, 0)


def _mirrored(index_PP: FloatArray) -> FloatArray:
    """The symmetric matrix of an upper triangle, NaN on the diagonal."""
    upper_PP = np.triu(index_PP, 1)
    full_PP = upper_PP + upper_PP.T
    np.fill_diagonal(full_PP, np.nan)
    return full_PP
