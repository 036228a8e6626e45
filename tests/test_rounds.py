"""The sequence of rounds on games with a known answer, played as the coordinator plays it.

Round n is proposed when rounds up to n-2 are complete. Scores are exact float32 sums over three
windows; nothing here depends on a tolerance but the sums themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from lpserve.masks import all_masks, drop_one, keys, removed_players, without
from lpserve.plan import best_row, greedy_path
from lpserve.rounds import (
    History,
    RoundPlanner,
    RoundSettings,
    design_strata,
    expected_improvement,
)
from lpserve.surrogate import PaperSurrogate
from lpserve.types import BoolArray, FloatArray

TOKENS = np.array([90.0, 100.0, 110.0])
Game = Callable[[BoolArray], FloatArray]


@pytest.fixture(autouse=True)
def one_thread():
    """As in a run: on matrices this small, threads only wait for each other."""
    with threadpool_limits(1):
        yield


def pair_game(num_players: int, rng: np.random.Generator, pairs: float = 0.05) -> Game:
    """Mask -> mean NLL: a cost for each dropped player and an effect for each dropped pair."""
    main = rng.uniform(0.01, 0.3, num_players)
    effect = np.triu(rng.normal(0, pairs, (num_players, num_players)), 1)

    def mean_nll(masks: BoolArray) -> FloatArray:
        d = 1.0 - masks
        return 3 + d @ main + np.einsum("mi,ij,mj->m", d, effect, d)

    return mean_nll


def nll_of(game: Game, masks: BoolArray) -> np.ndarray:
    """float32[M, N]: what an engine would have stored."""
    return (game(masks)[:, None] * TOKENS * [0.9, 1.0, 1.1]).astype(np.float32)


def neg_nll(nll: np.ndarray) -> FloatArray:
    finite = np.isfinite(nll).all(axis=1)
    total = np.where(finite[:, None], nll, 0).astype(np.float64).sum(axis=1)
    return np.where(finite, -total / TOKENS.sum(), np.nan)


def settings_of(num_players: int, max_removed: int, **changes: object) -> RoundSettings:
    settings = RoundSettings(
        num_players=num_players,
        max_removed=max_removed,
        sizes=(num_players - max_removed, num_players - 1),
        seed=0,
        surrogate="auto",
        round_size=num_players,
        stop_when_stable=False,
    )
    return replace(settings, **changes)  # pyright: ignore[reportArgumentType]


class Played:
    """A whole run: its rounds, its scores, its planner."""

    def __init__(
        self,
        settings: RoundSettings,
        game: Game,
        budget: int,
        utility: Callable[[np.ndarray], FloatArray] = neg_nll,
    ) -> None:
        self.planner = RoundPlanner(settings, utility)
        self.rounds: list[BoolArray] = []
        self.nll: list[np.ndarray] = []
        self.ended = False
        asked = 0
        while asked < budget:
            complete = max(len(self.rounds) - 1, 0)
            history = History(masks=self.rounds[:complete], nll=self.nll[:complete])
            masks = self.planner.propose(len(self.rounds), history)[: budget - asked]
            if not len(masks):
                self.ended = True
                break
            asked += len(masks)
            self.rounds.append(masks)
            self.nll.append(nll_of(game, masks))

    @property
    def masks(self) -> BoolArray:
        return np.concatenate(self.rounds)

    @property
    def utilities(self) -> FloatArray:
        return neg_nll(np.concatenate(self.nll))

    def best(self, num_removed: int) -> tuple[int, ...]:
        rows = np.flatnonzero((~self.masks).sum(axis=1) == num_removed)
        row = best_row(self.masks[rows], self.utilities[rows])
        assert row is not None
        return removed_players(self.masks[rows][row])


def optimum(game: Game, num_players: int, num_removed: int) -> tuple[int, ...]:
    """The best of all sets of a size, as float32 scores rank them."""
    sets = list(combinations(range(num_players), num_removed))
    masks = np.array([without(num_players, s) for s in sets])
    row = best_row(masks, neg_nll(nll_of(game, masks)))
    assert row is not None
    return sets[row]
