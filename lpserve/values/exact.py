"""Values by enumeration: the definition itself, for games of which every mask was scored.

For `sizes = (k_min, k_max)`, the size of a coalition before player i joins,

    phi_i = mean over k = k_min..k_max of the mean over all S without i, |S| = k, of u(S+i) - u(S)

Notation: M masks, P players, J columns of utilities.
"""

from __future__ import annotations

import math

import numpy as np

from lpserve.types import BoolArray, FloatArray

MAX_EXACT_PLAYERS = 24


def is_enumerated(masks_MP: BoolArray, sizes: tuple[int, int]) -> bool:
    """Whether distinct masks include every mask that keeps k_min..k_max+1 of at most 24 players."""
    num_players = masks_MP.shape[1]
    kept_M = masks_MP.sum(axis=1)
    have = int(((kept_M >= sizes[0]) & (kept_M <= sizes[1] + 1)).sum())
    need = sum(math.comb(num_players, k) for k in range(sizes[0], sizes[1] + 2))
    return num_players <= MAX_EXACT_PLAYERS and have == need


def exact_values(masks_MP: BoolArray, utilities: FloatArray, sizes: tuple[int, int]) -> FloatArray:
    """Values by the definition, for J utilities at once: `float64[P, J]`.

    Args:
        masks_MP: distinct masks, at least every one that keeps k_min..k_max+1 players.
        utilities: their utilities under J games.
        sizes: (k_min, k_max), sizes before the player joins.
    """
    num_players = masks_MP.shape[1]
    code_M = masks_MP @ (1 << np.arange(num_players, dtype=np.int64))
    row_of = np.full(1 << num_players, -1, dtype=np.int64)
    row_of[code_M] = np.arange(len(code_M))
    kept_M = masks_MP.sum(axis=1)
    values = np.empty((num_players, utilities.shape[1]))
    # every coalition of size k without i weighs 1 / (number of sizes * C(P-1, k))
    num_sizes = sizes[1] - sizes[0] + 1
    weight = np.array(
        [1.0 / (num_sizes * math.comb(num_players - 1, k)) for k in range(num_players)]
    )
    in_range_M = (kept_M >= sizes[0]) & (kept_M <= sizes[1])
    for player in range(num_players):
        without = np.flatnonzero(in_range_M & ~masks_MP[:, player])
        joined = row_of[code_M[without] | (1 << player)]
        gain = utilities[joined] - utilities[without]
        values[player] = weight[kept_M[without]] @ gain
    return values


def exact_noise(
    masks_MP: BoolArray, noise_M: FloatArray | None, sizes: tuple[int, int]
) -> FloatArray:
    """Standard error of `exact_values` from independent noise of the utilities, `float64[P]`.

    Every mask enters a value once, with the weight of its coalition size, so that variances add
    with the square of that weight.

    Args:
        noise_M: variance of each utility; None: no noise.
    """
    num_players = masks_MP.shape[1]
    if noise_M is None:
        return np.zeros(num_players)
    kept_M = masks_MP.sum(axis=1)
    num_sizes = sizes[1] - sizes[0] + 1
    variance_P = np.zeros(num_players)
    for player in range(num_players):
        before_M = kept_M - masks_MP[:, player]  # size before the player joins
        inside = (before_M >= sizes[0]) & (before_M <= sizes[1])
        ways_M = np.array([math.comb(num_players - 1, int(k)) for k in before_M[inside]])
        variance_P[player] = (noise_M[inside] / (num_sizes * ways_M.astype(np.float64)) ** 2).sum()
    return np.sqrt(variance_P)
