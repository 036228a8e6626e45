"""Shapley values and truncated semivalues of the layer game, with standard errors.

For `sizes = (k_min, k_max)`, the size of a coalition *before* player i joins:

    phi_i = mean over k = k_min..k_max of the mean over all S without i, |S| = k, of u(S+i) - u(S)

`(0, P-1)` is the Shapley value (Shapley 1953); anything narrower is a truncated semivalue, what
arXiv 2602.07804 estimates with its strata. Estimators: `exact_values` by enumeration,
`kernel_values` in closed form from a kernel surrogate, `monte_carlo_values` from any surrogate,
`paper_values` as published. Imports no torch.

Notation: M masks, P players, J columns of utilities, Q sampled coalitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lpserve.errors import InputError
from lpserve.masks import draw
from lpserve.surrogate import AutoSurrogate, HeldOut, KernelSurrogate
from lpserve.types import BoolArray, FloatArray, scored_masks
from lpserve.values.semivalue import empty_weight, value_covariance, value_variance

MAX_EXACT_PLAYERS = 24
_CALIBRATION_FOLDS, _CALIBRATION_MASKS = 10, 1000
_SHARED = 1.15  # what calibration falls short by: its folds share most masks with all the others
_TOGGLE_ROWS = 1 << 15  # surrogate rows evaluated at once: keeps the hidden layer in the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapleyValues:
    """Values of every player, with what is known about their errors."""

    values_P: FloatArray
    stderr_P: FloatArray
    """Uncertainty about this game on these windows: masks not scored, and noise of the scores.
    Zero when enumerated without noise."""
    sizes: tuple[int, int]
    """(k_min, k_max), sizes before the player joins, inclusive."""
    estimator: str
    window_stderr_P: FloatArray | None = None
    """What other windows of the same source would change (paired bootstrap); None without them."""
    heldout: HeldOut | None = None
    """Held-out error of the surrogate, where one was used."""

    @property
    def total_stderr_P(self) -> FloatArray:
        """Root of the sum of squares."""
        if self.window_stderr_P is None:
            return self.stderr_P
        return np.hypot(self.stderr_P, self.window_stderr_P)

    @property
    def is_shapley(self) -> bool:
        """Whether these are Shapley values, not a truncated semivalue."""
        return self.sizes == (0, len(self.values_P) - 1)


def shapley_values(
    masks_MP: BoolArray,
    utilities_M: FloatArray,
    sizes: tuple[int, int] | None = None,
    *,
    noise_M: FloatArray | None = None,
    resampled_MB: FloatArray | None = None,
) -> ShapleyValues:
    """Values from scored masks: exact when every mask needed is there, else by kernel surrogate.

    Deterministic. Of the kernel surrogates the one with the smallest leave-one-out error gives the
    values, in closed form; known scores are part of its posterior.

    Args:
        masks_MP: distinct masks, bool [M, P], True = kept.
        utilities_M: float [M], finite, higher is better.
        sizes: (k_min, k_max), sizes before the player joins; default (0, P-1).
        noise_M: variance of each utility, if it is noisy.
        resampled_MB: the utilities under B >= 2 draws of the windows (`lpserve.analysis.resample`),
            for `window_stderr_P`.

    Raises:
        InputError: masks repeat, utilities are not finite, an array has another shape, sizes are
            out of range, or there are fewer than 3 masks and they do not enumerate the game.
    """
    masks_MP, utilities_M, sizes = check_game(masks_MP, utilities_M, sizes)
    for name, array, ndim in (("noise", noise_M, 1), ("resampled", resampled_MB, 2)):
        if array is not None and (np.ndim(array) != ndim or len(array) != len(masks_MP)):
            raise InputError(
                f"{name} values must have {ndim} dimensions and a row for each of {len(masks_MP)} "
                f"masks: got {list(np.shape(array))}"
            )
    if is_enumerated(masks_MP, sizes):
        columns = utilities_M[:, None]
        if resampled_MB is not None:
            columns = np.concatenate([columns, resampled_MB], axis=1)
        values_PJ = exact_values(masks_MP, columns, sizes)
        return ShapleyValues(
            values_P=values_PJ[:, 0],
            stderr_P=exact_noise(masks_MP, noise_M, sizes),
            window_stderr_P=_spread(values_PJ[:, 1:]) if resampled_MB is not None else None,
            sizes=sizes,
            estimator="exact",
        )
    if len(masks_MP) < 3:
        raise InputError(f"{len(masks_MP)} masks are too few to estimate values: score more")
    surrogate = AutoSurrogate()
    surrogate.fit(masks_MP, utilities_M, noise_M)
    best = surrogate.best_kernel
    calibration = value_calibration(best, sizes)
    return kernel_values(best, sizes, resampled_MB, calibration=calibration)


def check_game(
    masks_MP: BoolArray, utilities_M: FloatArray, sizes: tuple[int, int] | None
) -> tuple[BoolArray, FloatArray, tuple[int, int]]:
    """Validated masks, utilities and sizes; raises InputError."""
    masks, utilities = scored_masks(masks_MP, utilities_M)
    num_players = masks.shape[1]
    low, high = sizes if sizes is not None else (0, num_players - 1)
    if not 0 <= low <= high <= num_players - 1:
        raise InputError(
            f"sizes must be 0 <= k_min <= k_max <= {num_players - 1}: got ({low}, {high})"
        )
    return masks, utilities, (int(low), int(high))


def is_enumerated(masks_MP: BoolArray, sizes: tuple[int, int]) -> bool:
    """Whether distinct masks hold every mask with k_min..k_max+1 kept."""
    num_players = masks_MP.shape[1]
    kept_M = masks_MP.sum(axis=1)
    have = int(((kept_M >= sizes[0]) & (kept_M <= sizes[1] + 1)).sum())
    need = sum(math.comb(num_players, k) for k in range(sizes[0], sizes[1] + 2))
    return num_players <= MAX_EXACT_PLAYERS and have == need


def exact_values(
    masks_MP: BoolArray, utilities_MJ: FloatArray, sizes: tuple[int, int]
) -> FloatArray:
    """The definition, by enumeration, for J utilities at once: `float64[P, J]`."""
    num_players = masks_MP.shape[1]
    code_M = masks_MP @ (1 << np.arange(num_players, dtype=np.int64))
    row_of = np.full(1 << num_players, -1, dtype=np.int64)
    row_of[code_M] = np.arange(len(code_M))
    kept_M = masks_MP.sum(axis=1)
    values_PJ = np.empty((num_players, utilities_MJ.shape[1]))
    # every coalition of size k without i weighs 1 / (number of sizes * C(P-1, k))
    num_sizes = sizes[1] - sizes[0] + 1
    weight_K = np.array(
        [1.0 / (num_sizes * math.comb(num_players - 1, k)) for k in range(num_players)]
    )
    in_range_M = (kept_M >= sizes[0]) & (kept_M <= sizes[1])
    for player in range(num_players):
        without = np.flatnonzero(in_range_M & ~masks_MP[:, player])
        joined = row_of[code_M[without] | (1 << player)]
        gain = utilities_MJ[joined] - utilities_MJ[without]
        values_PJ[player] = weight_K[kept_M[without]] @ gain
    return values_PJ


def exact_noise(
    masks_MP: BoolArray, noise_M: FloatArray | None, sizes: tuple[int, int]
) -> FloatArray:
    """Standard error of `exact_values` from independent noise of variance `noise_M`: every mask
    enters a value once, with the weight of its coalition size, so variances add with its square."""
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


def kernel_values(
    surrogate: KernelSurrogate,
    sizes: tuple[int, int],
    resampled_MB: FloatArray | None = None,
    *,
    calibration: float | None = None,
) -> ShapleyValues:
    """Posterior mean and standard deviation of the values under a kernel surrogate: exact at any
    P, no sampling (`lpserve.values.semivalue`). Scored masks enter as they are.

    Args:
        calibration: factor on the standard deviations; default: that of leave-one-out residuals.
    """
    kernel, known = surrogate.kernel, surrogate.empty is not None
    assert kernel is not None
    cross_PM = value_covariance(kernel, surrogate.masks_MP, sizes, empty_known=known)
    half_PM = cross_PM @ surrogate.whiten_MM.T
    weights_PM = half_PM @ surrogate.whiten_MM
    prior_P = value_variance(kernel, sizes, empty_known=known)
    variance_P = np.maximum(prior_P - (half_PM**2).sum(axis=1), 0.0)
    empty = empty_weight(sizes) if known else 0.0

    def values_of(utilities_MJ: FloatArray) -> FloatArray:
        """Values of J utilities of all masks, `float64[P, J]`."""
        some_MJ = utilities_MJ[surrogate.rows]
        offset_J = some_MJ.mean(axis=0)
        values_PJ = weights_PM @ (some_MJ - offset_J)
        if empty:
            values_PJ += empty * (offset_J - utilities_MJ[surrogate.empty_row])
        return values_PJ

    values_P = surrogate.scale * (cross_PM @ surrogate.alpha_M)
    if surrogate.empty is not None:
        values_P += empty * (surrogate.offset - surrogate.empty)
    factor = max(1.0, surrogate.calibration) if calibration is None else calibration
    window_stderr_P = None
    if resampled_MB is not None:
        window_stderr_P = _spread(values_of(resampled_MB))
    return ShapleyValues(
        values_P=values_P,
        stderr_P=surrogate.scale * factor * np.sqrt(variance_P),
        window_stderr_P=window_stderr_P,
        sizes=sizes,
        estimator=f"{surrogate.name} closed form",
        heldout=surrogate.heldout,
    )


def value_calibration(surrogate: KernelSurrogate, sizes: tuple[int, int]) -> float:
    """How much too narrow the posterior of the values is: a factor on its standard deviations.

    A kernel tuned to the masks that it explains is too sure of itself. So in each of 10 folds it is
    tuned to the other masks alone, and the change of every value when the fold is added, over the
    standard deviation that this kernel gives the change, should be a standard normal; the factor is
    the root mean square over folds and players, and 15% more: masks never scored lie farther
    from the others than a fold's do. With K the covariance of all masks, A = C K^-1 the values'
    weights, alpha = K^-1 y and B the fold,

        change = A_B (K^-1_BB)^-1 alpha_B,   variance = A_B (K^-1_BB)^-1 A_B'.

    Masks of a size that is scored whole are in no fold: none like them is left to predict, and the
    smallest coalitions, scored whole first, are the worst predicted (with them the folds asked for
    intervals a third too wide at 400 masks of 12 players, all sizes).
    """
    num_masks = len(surrogate.masks_MP)
    rows = np.unique(np.linspace(0, num_masks - 1, min(num_masks, _CALIBRATION_MASKS)).astype(int))
    partly = np.flatnonzero(_of_partly_scored_sizes(surrogate.masks_MP)[rows])
    if len(partly) < 2 * _CALIBRATION_FOLDS:
        return max(1.0, surrogate.calibration)
    masks_MP, scaled_M = surrogate.masks_MP[rows], surrogate.scaled_M[rows]
    fold_M = np.full(len(rows), -1)
    fold_M[partly] = np.random.default_rng(0).permutation(len(partly)) % _CALIBRATION_FOLDS
    squares = []
    for fold in range(_CALIBRATION_FOLDS):
        kernel = surrogate.tuned(rows[fold_M != fold])
        inverse = np.linalg.inv(kernel.gram(masks_MP, surrogate.noise_M[rows]))
        known = surrogate.empty is not None
        weights_PM = value_covariance(kernel, masks_MP, sizes, empty_known=known) @ inverse
        out = np.flatnonzero(fold_M == fold)
        weights_PB = weights_PM[:, out]
        solved = np.linalg.solve(inverse[np.ix_(out, out)], weights_PB.T)
        change_P = (inverse @ scaled_M)[out] @ solved
        squares.append(change_P**2 / np.maximum((weights_PB.T * solved).sum(axis=0), 1e-300))
    return _SHARED * float(np.sqrt(np.mean(squares)))


def _of_partly_scored_sizes(masks_MP: BoolArray) -> BoolArray:
    """Which of distinct masks keep as many players as some mask that is not among them."""
    num_players, kept_M = masks_MP.shape[1], masks_MP.sum(axis=1)
    have_K = np.bincount(kept_M, minlength=num_players + 1).tolist()
    lacking_K = np.array([n < math.comb(num_players, k) for k, n in enumerate(have_K)])
    return lacking_K[kept_M]


def monte_carlo_values(
    mean: Callable[[BoolArray], FloatArray],
    num_players: int,
    sizes: tuple[int, int],
    num_coalitions: int,
    seed: int,
) -> ShapleyValues:
    """Values of any surrogate by stratified sampling; `stderr_P` is the sampling error.

    For every k, `num_coalitions` / (number of sizes) sets of size k+1 or k are toggled at every
    player: dropping a member of a (k+1)-set and adding to a k-set both estimate size k.
    """
    rng = np.random.default_rng(seed)
    low, high = sizes
    per_size = max(2, -(-num_coalitions // (high - low + 2)))
    shape = (num_players, num_players + 1)
    count, total, square = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for kept in range(low, high + 2):
        sets_QP = draw(num_players, kept, per_size, rng)
        gain_QP = toggle_differences(mean, sets_QP)
        for member, k in ((True, kept - 1), (False, kept)):
            if low <= k <= high:
                chosen = sets_QP == member
                count[:, k] += chosen.sum(axis=0)
                total[:, k] += np.where(chosen, gain_QP, 0.0).sum(axis=0)
                square[:, k] += np.where(chosen, gain_QP**2, 0.0).sum(axis=0)
    use = slice(low, high + 1)
    if (count[:, use] < 2).any():
        raise InputError(f"{num_coalitions} coalitions are too few for {high - low + 1} sizes")
    mean_PK = total[:, use] / count[:, use]
    spread_PK = np.maximum(square[:, use] / count[:, use] - mean_PK**2, 0.0)
    error_PK = spread_PK / (count[:, use] - 1)
    return ShapleyValues(
        values_P=mean_PK.mean(axis=1),
        stderr_P=np.sqrt(error_PK.sum(axis=1)) / (high - low + 1),
        sizes=sizes,
        estimator=f"Monte Carlo, {per_size * (high - low + 2)} coalitions",
    )


def paper_values(mean: Callable[[BoolArray], FloatArray], masks_QP: BoolArray) -> ShapleyValues:
    """arXiv 2602.07804, stage 2: phi_i = mean over q of f(m_q + i) - f(m_q - i).

    The masks weigh sizes k-1 and k of each stratum k alike; it is not a Shapley value, and its
    `sizes` say which coalition sizes it mixes. `stderr_P` is the sampling error.
    """
    gain_QP = toggle_differences(mean, masks_QP)
    kept = masks_QP.sum(axis=1)
    num_players = masks_QP.shape[1]
    sizes = (max(int(kept.min()) - 1, 0), min(int(kept.max()), num_players - 1))
    return ShapleyValues(
        values_P=gain_QP.mean(axis=0),
        stderr_P=gain_QP.std(axis=0, ddof=1) / math.sqrt(len(gain_QP)),
        sizes=sizes,
        estimator=f"paper, {len(masks_QP)} masks",
    )


def toggle_differences(mean: Callable[[BoolArray], FloatArray], masks_QP: BoolArray) -> FloatArray:
    """u(m + i) - u(m - i) for every mask and player, `float64[Q, P]`.

    One of the two is the mask itself, so P + 1 evaluations answer for 2P.
    """
    num_masks, num_players = masks_QP.shape
    gain_QP = np.empty((num_masks, num_players))
    step = max(1, _TOGGLE_ROWS // (num_players + 1))
    flips = np.concatenate([np.zeros((1, num_players), bool), np.eye(num_players, dtype=bool)])
    for start in range(0, num_masks, step):
        part = masks_QP[start : start + step]
        rows = (part[:, None, :] ^ flips[None]).reshape(-1, num_players)
        value = mean(rows).reshape(len(part), num_players + 1)
        change = value[:, :1] - value[:, 1:]
        gain_QP[start : start + step] = np.where(part, change, -change)
    return gain_QP


def _spread(values_PB: FloatArray) -> FloatArray:
    """Standard deviation over draws of the windows; NaN for a single draw."""
    if values_PB.shape[1] < 2:
        return np.full(len(values_PB), np.nan)
    return values_PB.std(axis=1, ddof=1)
