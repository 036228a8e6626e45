"""Layer games of any depth with exact values, and windows from a known distribution.

Enumeration ends near 20 players; for 80 nothing is known exactly. Here the mean NLL of window n is
a sum of products over players, d = 1 where dropped, plus main effects,

    nll_n(d) = base_n + Re sum_t c_tn (prod_i a_ti^d_i - 1) + sum_i e_in d_i

and the mean of a product over all coalitions of one size is a recurrence over players, so truncated
Shapley values of every window are exact at any P. c, e and base are random over windows with known
means: `population` is the mean of infinitely many windows, as a game of one window.

The terms, each with its reason; l_i is about the loss of dropping player i alone:

* Damage, w (a (1 - q) + (1 - a) (1 - q)^2) with q = exp(-sum_i x_i d_i): each drop costs more than
  the one before, until the NLL levels off. The first layer does most of that alone.
* Waves, c (1 - cos sum_i theta_i d_i), theta smooth over the depth: layers shift the state, and the
  loss of a shift is half its square while it is small. Shifts of near layers add up, so that
  together they cost more than their sum; those of far ones cancel.
* Backups: two neighbours of which one is needed, the more so where layers around them are gone.
* Grain: waves in white directions, most of it a single window's own.
* e_in of variance in proportion to l_i: over T tokens an NLL of mean change l has a variance of
  about 2 l / T. Windows also differ in `base`, and those with a higher one lose less.

The constants were fitted to the enumerated game of the bundled model, P = 12: a random search, then
by hand, on the rows of `game_statistics` (medians over 36 seeds). Of 160 other games the ranges
hold the enumerated game's figure in every row but one: pairs 0.1 to 0.3 of the depth apart add
too much.

Deeper games are a guess, led by what was published for Llama-2. There, as in the bundled model, the
curve of losses keeps its shape over the *share* of layers removed: so losses are multiplied by one
number (`SCALES`; by log P in between), the share of the waves shrinks as 1 / P, and there is one
backup for each 12 layers. The best known sets then cost about what the best in print do
(`PUBLISHED`; scripts/bench/synthetic_games.py prints them). Unlike real games: nothing collapses
beyond the first layer's level, as the bundled model does with no layer left (22 nats); windows are
Gaussian; in its deep games greedy removal comes within 2% of the best, where searches in print
differ by half (12 layers of Llama-2-7B).

Notation: M masks, P players, N windows, T terms, R numbers removed, E dropped others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lpserve.masks import without
from lpserve.types import BoolArray, FloatArray, IntArray
from lpserve.values.semivalue import each_left_out, shares

NUM_TOKENS = 127
"""Scored tokens of a window."""
SCALES = {12: (4.065, 1.0), 32: (math.log(12.19), 0.9), 80: (math.log(5.71), 0.25)}
"""Players -> nats per token of the full model, factor on the losses."""
PUBLISHED = {
    32: {3: (12.19, 14.24), 6: (12.19, 18.87), 9: (12.19, 24.61), 12: (12.19, 38.12)},
    80: {8: (5.71, 6.32), 16: (5.71, 7.31)},
}
"""Players -> removed -> perplexity before and after, the best in print without fine-tuning. 32:
Llama-2-7B, WikiText2, SLEB (3 removed) and arXiv 2602.07804; 80: Llama-2-70B, C4, SLEB (arXiv
2402.09025, table 1)."""

MIDDLE_LOSS, LOSS_SPREAD = 0.047, 0.13  # nats per token; spread of its logarithm
FRONT, BACK, EDGE_LAYERS = 2.4, 1.8, 0.6  # how much more the outer layers cost
FIRST_DAMAGE, FIRST_SHIFT, FIRST_GRAIN, FIRST_NOISY = 2.65, 0.75, 1.07, 2.0
DAMAGE_NATS, DAMAGE_LINEAR = 4.7, 0.167
WAVES, WAVE_NATS, WAVE_SHARE, WAVE_TURNS, WAVE_REACH = 12, 1.5, 0.325, 0.6, 1.6
LAYERS_PER_BACKUP, BACKUP, NEAR, NEAR_LAYERS, FRONT_RELIEF = 12, 6.0, 1.23, 1.73, 0.17
GRAINS, GRAIN_NATS, GRAIN_SCALE = 16, 0.044, 2.15
BASE_SD, GAIN_SD, GAIN_ON_BASE = 0.31, 0.08, 0.95
WAVE_SD, BACKUP_SD, GRAIN_SD, TOKEN_SD = 0.12, 0.73, 0.143, 0.18
_ABSENT = -4.0  # log of a factor that stands for 0
_GAIN = 1e-12  # nats: a swap that gains less is rounding


@dataclass(frozen=True, kw_only=True)
class ProductGame:
    """See the module. Windows have `NUM_TOKENS` tokens each; the utility is `neg_nll`."""

    log_factors_TP: np.ndarray
    """log a, complex128."""
    coefficients_TN: FloatArray
    main_PN: FloatArray
    base_N: FloatArray
    expected_T: FloatArray
    """Mean of `coefficients_TN` over the distribution of windows; that of `main_PN` is 0."""
    expected_base: float

    @property
    def num_players(self) -> int:
        return self.log_factors_TP.shape[1]

    @property
    def tokens_N(self) -> IntArray:
        return np.full(len(self.base_N), NUM_TOKENS)

    @property
    def population(self) -> ProductGame:
        """The mean over infinitely many windows: a game of one window."""
        return replace(
            self,
            coefficients_TN=self.expected_T[:, None],
            base_N=np.array([self.expected_base]),
            main_PN=np.zeros((self.num_players, 1)),
        )

    def nll(self, masks_MP: BoolArray) -> FloatArray:
        """Summed nats of every window, `float64[M, N]`."""
        dropped_MP = 1.0 - masks_MP
        change_MT = np.exp(dropped_MP @ self.log_factors_TP.T) - 1.0
        mean_MN = change_MT.real @ self.coefficients_TN + dropped_MP @ self.main_PN + self.base_N
        return NUM_TOKENS * mean_MN

    def mean_nll(self, masks_MP: BoolArray) -> FloatArray:
        """Nats per token over all windows, `float64[M]`."""
        return self.nll(masks_MP).mean(axis=1) / NUM_TOKENS

    def window_values(self, sizes: tuple[int, int]) -> FloatArray:
        """Exact values (`lpserve.values.shapley`) of every window alone, `float64[P, N]`, utility
        `neg_nll`, sizes before the player joins: with E others dropped, a term gives

            phi_i = mean over E of (mean over sets of E others of prod_j a_j) * (a_i - 1).
        """
        low, high = self.num_players - 1 - sizes[1], self.num_players - 1 - sizes[0]
        factors_PT = self._factors_TP.T
        values_PN = self.main_PN.copy()
        for i, mean in _means_without_each(factors_PT, high):
            term_T = mean[low:].mean(axis=0) * (factors_PT[i] - 1.0)
            values_PN[i] += term_T.real @ self.coefficients_TN
        return values_PN

    def exact(self, sizes: tuple[int, int]) -> FloatArray:
        """Exact values over all windows, `float64[P]`."""
        return self.window_values(sizes).mean(axis=1)

    @cached_property
    def _factors_TP(self) -> np.ndarray:
        return np.exp(self.log_factors_TP)

    @cached_property
    def _mean_T(self) -> FloatArray:
        return self.coefficients_TN.mean(axis=1)

    def swapped(self, removed: IntArray) -> FloatArray:
        """Mean NLL, less a constant, with the r-th removed player put back and player i removed
        instead, `float64[R, P]`: the set itself where i is that player, infinite for the others."""
        state_T = self._mean_T * np.exp(self.log_factors_TP[:, removed].sum(axis=1))
        without = state_T * np.exp(-self.log_factors_TP[:, removed].T)
        main_P = self.main_PN.mean(axis=1)
        mean = (without @ self._factors_TP).real + main_P
        mean += (main_P[removed].sum() - main_P[removed])[:, None]
        itself = mean[np.arange(len(removed)), removed]
        mean[:, removed] = np.inf
        mean[np.arange(len(removed)), removed] = itself
        return mean


def _means_without_each(factors_PT: np.ndarray, high: int) -> Iterator[tuple[int, np.ndarray]]:
    """(i, mean of the product over all sets of E = 0..high players that lack i, `[E, T]`)."""

    def insert(mean: np.ndarray, j: int, n: int) -> np.ndarray:
        lack, have = shares(high, n)
        more = lack[:, None] * mean
        more[1:] += have[1:, None] * factors_PT[j] * mean[:-1]
        return more

    empty = np.zeros((high + 1, factors_PT.shape[1]), dtype=factors_PT.dtype)
    empty[0] = 1.0
    yield from each_left_out(range(len(factors_PT)), empty, 0, insert)


@dataclass(frozen=True)
class _Terms:
    """Terms drawn together: over windows c = mean + spread * z, z standard normal."""

    log_factors_TP: np.ndarray
    mean_T: FloatArray
    spread_T: FloatArray
    shared: bool
    """One z for all terms, or one each."""

    @property
    def num_draws(self) -> int:
        return 1 if self.shared else len(self.mean_T)


def layer_game(
    num_players: int, num_windows: int, *, seed: int, window_seed: int = 0
) -> ProductGame:
    """The game `seed` of P >= 4 players, on the first N windows of the sequence `window_seed`."""
    if num_players < 4:
        raise ValueError(f"a layer game needs 4 players: got {num_players}")
    rng = np.random.default_rng([seed, num_players])
    base, loss_P = _losses(num_players, rng)
    groups = [_damage(loss_P), _waves(loss_P, rng), _backups(loss_P, rng), _grain(loss_P, rng)]
    widths = [g.num_draws for g in groups] + [num_players, 1]
    rng = np.random.default_rng([seed, num_players, window_seed])
    draws = rng.standard_normal((num_windows, sum(widths)))  # more windows hold fewer
    *group_draws, token_draws, base_draws = np.split(draws.T, np.cumsum(widths)[:-1])
    gain_N = group_draws[0][0]
    above_N = math.sqrt(1 - GAIN_ON_BASE**2) * base_draws[0] - GAIN_ON_BASE * gain_N
    return ProductGame(
        log_factors_TP=np.concatenate([g.log_factors_TP for g in groups]).astype(complex),
        coefficients_TN=np.concatenate(
            [
                g.mean_T[:, None] + g.spread_T[:, None] * z
                for g, z in zip(groups, group_draws, strict=True)
            ]
        ),
        main_PN=TOKEN_SD * np.sqrt(np.append(FIRST_NOISY, loss_P[1:]))[:, None] * token_draws,
        base_N=base + BASE_SD * above_N,
        expected_T=np.concatenate([g.mean_T for g in groups]),
        expected_base=base,
    )


def _losses(num_players: int, rng: np.random.Generator) -> tuple[float, FloatArray]:
    """Nats of the full model, and about what each player's drop costs, `float64[P]`."""
    at = np.log(list(SCALES))
    base, scale = (
        float(np.interp(math.log(num_players), at, column))
        for column in np.array(list(SCALES.values())).T
    )
    i_P = np.arange(num_players)
    rough_P, smooth_P = rng.standard_normal(num_players), rng.standard_normal(num_players + 2)
    smooth_P = (smooth_P[:-2] + smooth_P[1:-1] + smooth_P[2:]) / math.sqrt(3)
    edges_P = FRONT * np.exp((1 - i_P) / EDGE_LAYERS)
    edges_P += BACK * np.exp((i_P + 1 - num_players) / EDGE_LAYERS)
    spread_P = LOSS_SPREAD * (rough_P + smooth_P) / math.sqrt(2)
    return base, scale * MIDDLE_LOSS * np.exp(spread_P) * (1 + edges_P)


def _wave_share(num_players: int) -> float:
    """Of a player's loss; as 1 / P, since the number of its near ones grows as P."""
    return WAVE_SHARE * min(1.0, 12 / num_players)


def _damage(loss_P: FloatArray) -> _Terms:
    damage_P = (1 - _wave_share(len(loss_P))) * loss_P / (DAMAGE_NATS * DAMAGE_LINEAR)
    damage_P[0] = FIRST_DAMAGE
    mean_T = DAMAGE_NATS * np.array([DAMAGE_LINEAR - 2, 1 - DAMAGE_LINEAR])
    return _Terms(np.array([-damage_P, -2 * damage_P]), mean_T, GAIN_SD * mean_T, True)


def _waves(loss_P: FloatArray, rng: np.random.Generator) -> _Terms:
    num_players = len(loss_P)
    depth_P = np.arange(num_players) / (num_players - 1)
    apart_PP = np.abs(depth_P[:, None] - depth_P)
    smooth_PP = np.cos(2 * np.pi * WAVE_TURNS * apart_PP) * np.exp(
        -((apart_PP / WAVE_REACH) ** 2) / 2
    )
    root_PP = np.linalg.cholesky(smooth_PP + 1e-9 * np.eye(num_players))
    shift_PT = root_PP @ rng.standard_normal((num_players, WAVES))
    shift_PT /= np.sqrt((shift_PT**2).mean(axis=1, keepdims=True))
    share = _wave_share(num_players)
    angle_PT = np.sqrt(2 * share * loss_P / WAVE_NATS)[:, None] * shift_PT
    angle_PT[0] = FIRST_SHIFT * shift_PT[0]
    mean_T = np.full(WAVES, -WAVE_NATS / WAVES)
    return _Terms(1j * angle_PT.T, mean_T, WAVE_SD * mean_T, False)


def _backups(loss_P: FloatArray, rng: np.random.Generator) -> _Terms:
    num_players = len(loss_P)
    count = max(1, round(num_players / LAYERS_PER_BACKUP))
    others = 1 + rng.permutation(num_players - 3)[: count - 1]
    log_factors, mean = [], []
    for j in (num_players - 2, *others):
        size = BACKUP * math.sqrt(loss_P[j] * loss_P[j + 1]) * rng.uniform(0.5, 1.5)
        near_P = NEAR * np.exp(-np.abs(np.arange(num_players) - j - 0.5) / NEAR_LAYERS)
        near_P[0], near_P[1] = -FIRST_DAMAGE, min(near_P[1], -FRONT_RELIEF)
        for sign, absent in ((1, []), (-1, [j]), (-1, [j + 1]), (1, [j, j + 1])):
            factor_P = near_P.copy()
            factor_P[[j, j + 1]] = 0.0
            factor_P[absent] = _ABSENT
            log_factors.append(factor_P)
            mean.append(sign * size)
    mean_T = np.array(mean)
    return _Terms(np.array(log_factors), mean_T, BACKUP_SD * mean_T, shared=True)


def _grain(loss_P: FloatArray, rng: np.random.Generator) -> _Terms:
    angle_PT = rng.standard_normal((len(loss_P), GRAINS))
    angle_PT[1:] *= np.sqrt(GRAIN_SCALE * loss_P[1:])[:, None]
    angle_PT[0] *= FIRST_GRAIN
    mean_T = GRAIN_NATS / math.sqrt(GRAINS) * rng.standard_normal(GRAINS)
    return _Terms(1j * angle_PT.T, mean_T, np.full(GRAINS, GRAIN_SD / math.sqrt(GRAINS)), False)


def reference_best(
    game: ProductGame, max_removed: int, *, seed: int, starts: int = 100
) -> BoolArray:
    """For each number removed r = 1..R the best mask found, `bool[R, P]`: row r - 1.

    Best known, not proven: steepest descent over all single swaps until none helps, from the best
    smaller set plus a player, the best larger one less a player, and `starts` others, half of them
    random and half the best so far with a third of it exchanged. Every swap is scored exactly, so
    a set is at least as good as all its neighbours. 1 <= R <= P.
    """
    rng = np.random.default_rng(seed)
    best: list[IntArray] = [np.empty(0, dtype=np.int64)]
    for r in range(1, max_removed + 1):
        found = _descend(game, _and_one(game, best[-1]))
        for start in range(starts):
            core = rng.permutation(found)[: 2 * r // 3 if start % 2 else 0]
            others = rng.permutation(np.setdiff1d(np.arange(game.num_players), core))
            other = _descend(game, np.append(core, others[: r - len(core)]))
            found = _least(game, [found, other])
        best.append(found)
    for r in range(max_removed - 1, 0, -1):
        fewer = _least(game, [np.delete(best[r + 1], out) for out in range(r + 1)])
        best[r] = _least(game, [best[r], _descend(game, fewer)])
    return np.array([without(game.num_players, one.tolist()) for one in best[1:]])


def _descend(game: ProductGame, removed: IntArray) -> IntArray:
    """Steepest descent over single swaps."""
    removed = removed.copy()
    while True:
        mean = game.swapped(removed)
        out, put = divmod(int(mean.argmin()), game.num_players)
        if mean[out, put] > mean[0, removed[0]] - _GAIN:
            return removed
        removed[out] = put


def _least(game: ProductGame, sets: Sequence[IntArray]) -> IntArray:
    """The first of the sets with the least mean NLL."""
    masks_MP = np.array([without(game.num_players, one.tolist()) for one in sets])
    return sets[int(game.mean_nll(masks_MP).argmin())]


def _and_one(game: ProductGame, removed: IntArray) -> IntArray:
    """The best set that removes one more."""
    others = np.setdiff1d(np.arange(game.num_players), removed)
    return _least(game, [np.append(removed, i) for i in others])
