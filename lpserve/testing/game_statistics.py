"""What a layer game is like: losses, interactions, growth, spread over windows, regret of plans.

A loss is an NLL less the full model's on
the same windows, nats per token. Strata are named by the share of players removed, k/12, so that
games of any depth compare; those with many masks are sampled.

Notation: M masks, P players, N windows, R numbers removed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np

from lpserve.masks import all_masks, draw, drop_one, full_mask, without
from lpserve.types import BoolArray, FloatArray, IntArray
from lpserve.values.exact import exact_values

_LISTED = 5000  # masks of a stratum
_CORRELATED = 200  # masks of a stratum whose losses are correlated over windows


class ValuedGame(Protocol):
    """A game with exact values."""

    @property
    def num_players(self) -> int: ...

    @property
    def tokens_N(self) -> IntArray: ...

    def nll(self, masks_MP: BoolArray) -> FloatArray:
        """Summed nats, `[M, N]`."""
        ...

    def exact(self, sizes: tuple[int, int]) -> FloatArray:
        """Truncated Shapley values, utility `neg_nll`, `float64[P]`."""
        ...


class EnumeratedGame:
    """A game file with every mask's score: `nll_sum[code, window]` (nats; bit i of `code` is player
    i, 1 = kept) and `tokens[window, T]`."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as data:
            self._nll_MN = data["nll_sum"].astype(np.float64)
            self.tokens_N = np.full(self._nll_MN.shape[1], data["tokens"].shape[1] - 1)
        self.num_players = len(self._nll_MN).bit_length() - 1

    def nll(self, masks_MP: BoolArray) -> FloatArray:
        """Summed nats, `float64[M, N]`."""
        return self._nll_MN[masks_MP @ (1 << np.arange(self.num_players))]

    def exact(self, sizes: tuple[int, int]) -> FloatArray:
        """Values over all windows, by enumeration, `float64[P]`."""
        masks_MP = all_masks(self.num_players)
        return exact_values(masks_MP, -self.nll(masks_MP) / self.tokens_N, sizes).mean(axis=1)

    def best(self, max_removed: int) -> BoolArray:
        """The best mask of each number removed 1..R, `bool[R, P]`."""
        strata = [all_masks(self.num_players, self.num_players - 1 - r) for r in range(max_removed)]
        return np.array([some[self.nll(some).sum(axis=1).argmin()] for some in strata])


def losses(game: ValuedGame, masks_MP: BoolArray) -> FloatArray:
    """Losses of every window, `float64[M, N]`."""
    full_1P = full_mask(game.num_players)[None]
    return (game.nll(masks_MP) - game.nll(full_1P)) / game.tokens_N


def statistics(game: ValuedGame, best_MP: BoolArray, seed: int) -> dict[str, float]:
    """Name -> figure, in the order of a table.

    Args:
        best_MP: the best mask known for each number removed 1..R, R >= 6.
        seed: of the masks drawn from strata that are too large to list.
    """
    rng = np.random.default_rng(seed)
    found = _single_rows(game) | _pair_rows(game)
    found |= _growth_rows(game, rng) | _fit_rows(game, rng)
    found |= _plan_rows(game, best_MP) | _window_rows(game, rng)
    return {name: float(value) for name, value in found.items()}


def _mean(game: ValuedGame, masks_MP: BoolArray) -> FloatArray:
    return losses(game, masks_MP).mean(axis=1)


def _single_rows(game: ValuedGame) -> dict[str, float]:
    one_P = _mean(game, drop_one(full_mask(game.num_players)))
    middle = np.sort(one_P[2:-1])
    return {
        "loss of one: first": one_P[0],
        "loss of one: second": one_P[1],
        "loss of one: last": one_P[-1],
        "loss of one: others, least": middle[0],
        "loss of one: others, median": np.median(middle).item(),
        "loss of one: others, most": middle[-1],
    }


def _pair_rows(game: ValuedGame) -> dict[str, float]:
    """Loss of two less the losses of each, as it is and over the root of their product."""
    players = game.num_players
    one_P = _mean(game, drop_one(full_mask(players)))
    i, j = np.triu_indices(players, 1)
    pair_masks_MP = np.ones((len(i), players), dtype=bool)
    pair_masks_MP[np.arange(len(i)), i] = pair_masks_MP[np.arange(len(i)), j] = False
    pair_effects = _mean(game, pair_masks_MP) - one_P[i] - one_P[j]
    share = pair_effects / np.sqrt(np.abs(one_P[i] * one_P[j]))
    later, apart = i > 0, (j - i) / (players - 1)
    found = {"pair/sqrt(l l'): neighbours": np.median(share[later & (j == i + 1)]).item()}
    for low, high in ((0.1, 0.3), (0.3, 0.6), (0.6, 1.0)):
        inside = later & (apart > low) & (apart <= high)
        name = f"pair/sqrt(l l'): {low} to {high} of the depth"
        found[name] = np.median(share[inside]).item()
    first = pair_effects[~later] / np.median(one_P)
    return found | {
        "pairs below 0, share": (pair_effects[later] < 0).mean(),
        "pairs, largest": pair_effects[later].max(),
        "pairs with the first / median l: mean": first.mean(),
        "pairs with the first / median l: spread": first.std(),
    }


def _growth_rows(game: ValuedGame, rng: np.random.Generator) -> dict[str, float]:
    found = {}
    for part, first_kept in (("all", False), ("first kept", True)):
        for k in range(1, 7):
            loss_M = _mean(game, _stratum(game, k, first_kept, _LISTED, rng)[0])
            found[f"loss, {k}/12 removed, {part}: mean"] = loss_M.mean()
            found[f"loss, {k}/12 removed, {part}: spread"] = loss_M.std()
    return found


def _fit_rows(game: ValuedGame, rng: np.random.Generator) -> dict[str, float]:
    """R2 of least squares inside a stratum; the first player kept, else it is all the variance."""
    found = {}
    i, j = np.triu_indices(game.num_players - 1, 1)
    for k in (3, 6):
        masks_MP, listed = _stratum(game, k, True, game.num_players**2, rng)
        loss_M = _mean(game, masks_MP)
        dropped_MP = (~masks_MP[:, 1:]).astype(np.float64)
        # as many are dropped in all masks: no intercept, and pairs hold the main effects
        for name, features in (("main effects", dropped_MP), ("pairs", None)):
            if features is None:
                features = dropped_MP[:, i] * dropped_MP[:, j]
            weights = np.linalg.solve(features.T @ features, features.T @ loss_M)
            unexplained = (loss_M - features @ weights).var() / loss_M.var()
            if not listed:  # least squares fits part of the sample's own noise
                unexplained *= (len(loss_M) - 1) / (len(loss_M) - len(weights))
            found[f"R2 of {name}, {k}/12, first kept"] = 1 - unexplained
    return found


def _plan_rows(game: ValuedGame, best_MP: BoolArray) -> dict[str, float]:
    """Regret in % of perplexity over the best known sets: of ranking by exact truncated values, and
    of removing the player that costs least, one after another."""
    players, most = game.num_players, len(best_MP)
    order = np.argsort(game.exact((players - most, players - 1)))
    ranked_MP = np.array([without(players, order[:r].tolist()) for r in range(1, most + 1)])
    greedy = [full_mask(players)]
    for _ in range(most):
        fewer_MP = drop_one(greedy[-1])
        greedy.append(fewer_MP[_mean(game, fewer_MP).argmin()])
    best = _mean(game, best_MP)
    found = {f"best known, {r} removed": best[r - 1] for r in range(1, 7)}
    for name, masks_MP in (("exact ranking", ranked_MP), ("greedy", np.array(greedy[1:]))):
        regret = 100 * np.expm1(_mean(game, masks_MP) - best)
        found[f"regret %, {name}: mean"] = regret.mean()
        found[f"regret %, {name}: worst"] = regret.max()
    return found


def _window_rows(game: ValuedGame, rng: np.random.Generator) -> dict[str, float]:
    found = {}
    for k in (1, 3, 6):
        loss_MN = losses(game, _stratum(game, k, True, _CORRELATED, rng)[0])
        correlation_MM = np.corrcoef(loss_MN)
        part = f"windows, {k}/12 removed, first kept"
        found[f"{part}: spread"] = np.median(loss_MN.std(axis=1, ddof=1)).item()
        apart = np.triu_indices(len(loss_MN), 1)
        found[f"{part}: correlation of two masks"] = correlation_MM[apart].mean()
    full_P = full_mask(game.num_players)
    first_N = losses(game, drop_one(full_P)[:1])[0]
    base_N = game.nll(full_P[None])[0] / game.tokens_N
    found["windows, first dropped: spread"] = first_N.std(ddof=1)
    found["windows, first dropped: correlation with base"] = np.corrcoef(first_N, base_N)[0, 1]
    return found


def _stratum(
    game: ValuedGame, k: int, first_kept: bool, at_most: int, rng: np.random.Generator
) -> tuple[BoolArray, bool]:
    """Masks that remove k/12 of the players, and whether these are all of them."""
    players = game.num_players - first_kept
    kept = players - max(1, round(game.num_players * k / 12))
    listed = math.comb(players, kept) <= at_most
    masks_MP = all_masks(players, kept) if listed else draw(players, kept, at_most, rng)
    return np.pad(masks_MP, ((0, 0), (int(first_kept), 0)), constant_values=True), listed
