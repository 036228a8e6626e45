"""Covariances of semivalues with masks, and their prior variances, under a `MaskKernel`.

A value is linear in the game: phi_i = sum_m W_im u(m), with W_im = +-1 / (sizes * C(P-1, k)) for
every mask m that is a coalition of k others with (+) or without (-) player i, 0 for the rest. So

    Cov(phi_i, u(m)) = E [k(S + i, m) - k(S, m)],   Var(phi_i) = E E' [second difference of k],

S and S' independent, their size k uniform over `sizes`, each uniform given k. Both are computed
exactly at any P. For the kernel's product part the expectation is a mean over all sets of one size
of a product over players: a recurrence over players for means (sums would overflow), which leaves
every player out in turn by divide and conquer (P log P steps instead of P^2). The other parts have
closed forms.

Notation: M masks, C of them at once, P players, E numbers of dropped others, 0..P-1-k_min.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lpserve.surrogate.kernel import MaskKernel
from lpserve.types import BoolArray, FloatArray

_CHUNK_MASKS = 512  # masks at once: tables stay in the cache


def empty_weight(sizes: tuple[int, int]) -> float:
    """-W of the empty coalition, the same for every player; 0 where `sizes` do not include 0."""
    return 1.0 / (sizes[1] + 1) if sizes[0] == 0 else 0.0


def value_covariance(
    kernel: MaskKernel, masks_MP: BoolArray, sizes: tuple[int, int], *, empty_known: bool = False
) -> FloatArray:
    """Prior covariance Cov(phi_i, u(m)), `float64[P, M]`, the nugget included.

    Args:
        sizes: (k_min, k_max), sizes before the player joins.
        empty_known: leave out the value's term of the empty coalition, -u(empty) / sizes, since
            that utility is known and no training point.
    """
    masks_MP = np.asarray(masks_MP, dtype=bool)
    num_players = masks_MP.shape[1]
    coded_MP = 2.0 * masks_MP - 1.0
    covariance_PM = np.asarray(2 * kernel.linear * coded_MP.T, dtype=np.float64)
    if kernel.pairs:
        others_MP = coded_MP.sum(axis=1, keepdims=True) - coded_MP
        mean = _mean_code(num_players, sizes)
        covariance_PM += 2 * kernel.pairs * mean * (coded_MP * others_MP).T
    if kernel.product:
        for start in range(0, len(masks_MP), _CHUNK_MASKS):
            part = masks_MP[start : start + _CHUNK_MASKS]
            columns = slice(start, start + len(part))
            covariance_PM[:, columns] += _product_covariance(kernel, part, sizes)
    kept_MP = masks_MP.sum(axis=1, keepdims=True) - masks_MP  # size before the player joins
    weight_MP = coded_MP * coalition_weights(num_players, sizes)[kept_MP]
    covariance_PM += weight_MP.T * kernel.nugget_of(masks_MP)
    if empty_known and empty_weight(sizes):
        covariance_PM += empty_weight(sizes) * _with_empty(kernel, masks_MP)
    return covariance_PM


def _with_empty(kernel: MaskKernel, masks_MP: BoolArray) -> FloatArray:
    """Cov(u(empty), u(m)), `float64[M]`."""
    empty_1P = np.zeros((1, masks_MP.shape[1]), dtype=bool)
    own_M = np.where(masks_MP.any(axis=1), 0.0, kernel.nugget_of(masks_MP))
    return kernel.smooth(empty_1P, masks_MP)[0] + own_M


def value_variance(
    kernel: MaskKernel, sizes: tuple[int, int], *, empty_known: bool = False
) -> FloatArray:
    """Prior variance Var(phi_i), `float64[P]`, the nugget included; see `value_covariance`."""
    num_players = len(kernel.decay_P)
    mean = _mean_code(num_players, sizes)
    ridge = 4 * kernel.linear + 4 * kernel.pairs * (num_players - 1) * mean**2
    variance_P = np.full(num_players, ridge)
    if kernel.product:
        variance_P += _product_variance(kernel, sizes)
    variance_P += _own_variance(kernel, sizes)
    weight = empty_weight(sizes)
    if empty_known and weight:
        empty_1P = np.zeros((1, num_players), dtype=bool)
        variance_P += 2 * weight * value_covariance(kernel, empty_1P, sizes)[:, 0]
        variance_P += weight**2 * kernel.variance(empty_1P)[0]
    return variance_P


def _product_covariance(
    kernel: MaskKernel, part_MP: BoolArray, sizes: tuple[int, int]
) -> FloatArray:
    """The part of `value_covariance` from the kernel's product, `float64[P, C]`."""
    num_players = part_MP.shape[1]
    low, high = _dropped_range(num_players, sizes)
    growth_P = np.exp(kernel.growth_P)
    apart_P = np.exp(-kernel.decay_P) * growth_P
    if_kept = np.where(part_MP.T, 1.0, apart_P[:, None])
    if_dropped = np.where(part_MP.T, apart_P[:, None], growth_P[:, None] ** 2)

    def insert(state: FloatArray, i: int, n: int) -> FloatArray:
        keep, drop = shares(high, n)
        more = keep[:, None] * (state * if_kept[i])
        more[1:] += drop[1:, None] * (state[:-1] * if_dropped[i])
        return more

    first = np.zeros((high + 1, len(part_MP)))
    first[0] = 1.0
    covariance = np.empty((num_players, len(part_MP)))
    for i, state in each_left_out(range(num_players), first, 0, insert):
        covariance[i] = (if_kept[i] - if_dropped[i]) * state[low:].mean(axis=0)
    return kernel.product * covariance


def _product_variance(kernel: MaskKernel, sizes: tuple[int, int]) -> FloatArray:
    """The part of `value_variance` from the kernel's product: over two independent sets at once."""
    num_players = len(kernel.decay_P)
    low, high = _dropped_range(num_players, sizes)
    growth_P = np.exp(kernel.growth_P)
    apart_P = np.exp(-kernel.decay_P) * growth_P

    def insert(state: FloatArray, i: int, n: int) -> FloatArray:
        keep, drop = shares(high, n)
        kept = keep[:, None] * state
        dropped = np.zeros_like(state)
        dropped[1:] = drop[1:, None] * state[:-1]
        more = keep * (kept + apart_P[i] * dropped)
        other = apart_P[i] * kept + growth_P[i] ** 2 * dropped
        more[:, 1:] += drop[1:] * other[:, :-1]
        return more

    first = np.zeros((high + 1, high + 1))
    first[0, 0] = 1.0
    mean_P = np.empty(num_players)
    for i, state in each_left_out(range(num_players), first, 0, insert):
        mean_P[i] = state[low:, low:].mean()
    return kernel.product * (1 - 2 * apart_P + growth_P**2) * mean_P


def _own_variance(kernel: MaskKernel, sizes: tuple[int, int]) -> FloatArray:
    """The nugget's part of `value_variance`: every mask enters a value once, with weight W."""
    num_players = len(kernel.growth_P)
    low, high = _dropped_range(num_players, sizes)
    squared_P = np.exp(2 * kernel.growth_P)
    dropped = np.arange(low, high + 1)
    ways = np.array([math.comb(num_players - 1, e) for e in dropped], dtype=np.float64)

    def insert(state: FloatArray, i: int, n: int) -> FloatArray:
        keep, drop = shares(high, n)
        more = keep * state
        more[1:] += drop[1:] * squared_P[i] * state[:-1]
        return more

    first = np.zeros(high + 1)
    first[0] = 1.0
    variance_P = np.empty(num_players)
    for i, state in each_left_out(range(num_players), first, 0, insert):
        variance_P[i] = (1 + squared_P[i]) * (state[low:] / ways).sum()
    return kernel.nugget * variance_P / len(dropped) ** 2


def each_left_out(
    todo: Sequence[int],
    state: FloatArray,
    num_in: int,
    insert: Callable[[FloatArray, int, int], FloatArray],
) -> Iterator[tuple[int, FloatArray]]:
    """(i, state without player i) for each i of `todo`, by divide and conquer.

    Args:
        todo: players to insert but one; at least one.
        state: the recurrence's state with `num_in` other players inserted.
        insert: (state, i, n) -> the state after player i is inserted as the n-th.
    """
    if len(todo) == 1:
        yield todo[0], state
        return
    half = len(todo) // 2
    for part, others in ((todo[:half], todo[half:]), (todo[half:], todo[:half])):
        inner = state
        for count, i in enumerate(others, num_in + 1):
            inner = insert(inner, i, count)
        yield from each_left_out(part, inner, num_in + len(others), insert)


def shares(max_dropped: int, n: int) -> tuple[FloatArray, FloatArray]:
    """Shares of the sets dropping e of n players that keep, and that drop, the n-th player.

    `float64[E]` each, for e = 0..max_dropped.
    """
    dropped = np.arange(max_dropped + 1)
    return np.maximum(n - dropped, 0) / n, np.minimum(dropped, n) / n


def _dropped_range(num_players: int, sizes: tuple[int, int]) -> tuple[int, int]:
    """Range (min, max) of the number of others dropped before the player joins."""
    return num_players - 1 - sizes[1], num_players - 1 - sizes[0]


def _mean_code(num_players: int, sizes: tuple[int, int]) -> float:
    """Expectation of z_j for another player j, z = +1 kept, -1 dropped."""
    return (sizes[0] + sizes[1]) / (num_players - 1) - 1.0 if num_players > 1 else 0.0


def coalition_weights(num_players: int, sizes: tuple[int, int]) -> FloatArray:
    """|W| of a mask by the number of other players that it keeps, `float64[P + 1]`."""
    num_sizes = sizes[1] - sizes[0] + 1
    weight = np.zeros(num_players + 1)
    for k in range(sizes[0], sizes[1] + 1):
        weight[k] = 1.0 / (num_sizes * math.comb(num_players - 1, k))
    return weight
