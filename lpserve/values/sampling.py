"""Values of any surrogate by sampled coalitions, and the estimator of arXiv 2602.07804.

Notation: P players, Q sampled coalitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lpserve.errors import InputError
from lpserve.masks import draw
from lpserve.types import BoolArray, FloatArray
from lpserve.values.result import ShapleyValues

_TOGGLE_ROWS = 1 << 15  # surrogate rows evaluated at once: keeps the hidden layer in the cache


def monte_carlo_values(
    mean: Callable[[BoolArray], FloatArray],
    num_players: int,
    sizes: tuple[int, int],
    num_coalitions: int,
    seed: int,
) -> ShapleyValues:
    """Values of any surrogate by stratified sampling; `stderr_P` is the sampling error alone.

    An equal number of coalitions of every size k_min..k_max+1 is drawn, and every player of each is
    toggled: dropping a member of a (k+1)-set and adding a player to a k-set both give a marginal
    contribution at size k.

    Args:
        mean: masks `bool[Q, P]` -> predicted utilities `float64[Q]`.
        sizes: (k_min, k_max), sizes before the player joins.
        num_coalitions: how many coalitions are drawn over all sizes.

    Raises:
        InputError: some player has fewer than 2 marginal contributions at some size.
    """
    rng = np.random.default_rng(seed)
    low, high = sizes
    per_size = max(2, -(-num_coalitions // (high - low + 2)))
    shape = (num_players, num_players + 1)
    count, total, square = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for kept in range(low, high + 2):
        sets_MP = draw(num_players, kept, per_size, rng)
        gain_MP = toggle_differences(mean, sets_MP)
        for member, k in ((True, kept - 1), (False, kept)):
            if low <= k <= high:
                chosen = sets_MP == member
                count[:, k] += chosen.sum(axis=0)
                total[:, k] += np.where(chosen, gain_MP, 0.0).sum(axis=0)
                square[:, k] += np.where(chosen, gain_MP**2, 0.0).sum(axis=0)
    use = slice(low, high + 1)
    if (count[:, use] < 2).any():
        raise InputError(f"{num_coalitions} coalitions are too few for {high - low + 1} sizes")
    stratum_mean = total[:, use] / count[:, use]
    stratum_spread = np.maximum(square[:, use] / count[:, use] - stratum_mean**2, 0.0)
    stratum_error = stratum_spread / (count[:, use] - 1)
    return ShapleyValues(
        values_P=stratum_mean.mean(axis=1),
        stderr_P=np.sqrt(stratum_error.sum(axis=1)) / (high - low + 1),
        sizes=sizes,
        estimator=f"Monte Carlo, {per_size * (high - low + 2)} coalitions",
    )


def paper_values(mean: Callable[[BoolArray], FloatArray], masks_MP: BoolArray) -> ShapleyValues:
    """Values of arXiv 2602.07804, stage 2: phi_i = mean over q of f(m_q + i) - f(m_q - i).

    A stratum k mixes marginal contributions at sizes k-1 and k, so that this is not a Shapley
    value; `sizes` of the result is the range of sizes that it mixes. `stderr_P` is the sampling
    error.

    Args:
        mean: masks `bool[Q, P]` -> predicted utilities `float64[Q]`.
        masks_MP: the drawn masks.
    """
    gain_MP = toggle_differences(mean, masks_MP)
    kept = masks_MP.sum(axis=1)
    num_players = masks_MP.shape[1]
    sizes = (max(int(kept.min()) - 1, 0), min(int(kept.max()), num_players - 1))
    return ShapleyValues(
        values_P=gain_MP.mean(axis=0),
        stderr_P=gain_MP.std(axis=0, ddof=1) / math.sqrt(len(gain_MP)),
        sizes=sizes,
        estimator=f"paper, {len(masks_MP)} masks",
    )


def toggle_differences(mean: Callable[[BoolArray], FloatArray], masks_MP: BoolArray) -> FloatArray:
    """Marginal contributions u(m + i) - u(m - i) of every player at every mask, `float64[Q, P]`.

    One of the two masks is m itself, so that P + 1 evaluations suffice for a mask.
    """
    num_masks, num_players = masks_MP.shape
    gain_MP = np.empty((num_masks, num_players))
    step = max(1, _TOGGLE_ROWS // (num_players + 1))
    flips = np.concatenate([np.zeros((1, num_players), bool), np.eye(num_players, dtype=bool)])
    for start in range(0, num_masks, step):
        part = masks_MP[start : start + step]
        rows = (part[:, None, :] ^ flips[None]).reshape(-1, num_players)
        value = mean(rows).reshape(len(part), num_players + 1)
        change = value[:, :1] - value[:, 1:]
        gain_MP[start : start + step] = np.where(part, change, -change)
    return gain_MP
