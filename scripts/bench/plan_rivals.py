"""The rivals' searches and ours on an exact game, at equal masks and at equal layer-forwards.

    PYTHONPATH=. python scripts/bench/plan_rivals.py --game demo12.npz --out rivals.md

The rivals are those of `lpserve.rivals.registry` that need no engine. Every search is a list of
batches of masks, in order, and is cut and counted in the same way: see `lpserve.rivals.accounting`.

What a search has found is the best set of each size that it scored on all windows; its regret is
that set's perplexity over the best one's of that size. The paper's pipeline knows its budget and
leaves room for the sets that it scores last, and draws from those of its strata that the game
holds; every other search is cut wherever the budget ends. A search that ended before a budget is
listed once. Game files: `estimators.py`; seeds are 0..N-1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from played_rounds import played_rounds
from probes import machine_lines, publish
from threadpoolctl import threadpool_limits

from lpserve.masks import all_masks, paper_kept_counts
from lpserve.rivals.accounting import Spent, within
from lpserve.rivals.evopress import evolutionary
from lpserve.rivals.paper import PAPER_DRAWS, PAPER_MIN_DRAWS, paper
from lpserve.rivals.proposer import Ask, Proposer, SearchSetting, drive
from lpserve.rivals.registry import RIVALS
from lpserve.rounds.acquisition import HEAD_COST
from lpserve.rounds.settings import RoundSettings
from lpserve.types import BoolArray, FloatArray
from lpserve.utility import utility_named

BUDGETS = (60, 90, 120, 160, 200, 400, 800)


class Game(Protocol):
    """`estimators.ExactGame`."""

    @property
    def tokens_N(self) -> np.ndarray: ...

    @property
    def num_players(self) -> int: ...

    @property
    def least_kept(self) -> int: ...

    def nll_of(self, masks_MP: BoolArray) -> np.ndarray:
        """`float32[M, N]`."""
        ...


@dataclass(frozen=True)
class Arena:
    """A game with its optimum for every number removed."""

    game: Game
    max_removed: int

    @property
    def num_windows(self) -> int:
        return len(self.game.tokens_N)

    def score(self, ask: Ask) -> FloatArray:
        windows = range(self.num_windows) if ask.windows is None else ask.windows
        nll_MN = self.game.nll_of(ask.masks_MP)[:, windows].astype(np.float64)
        return nll_MN.sum(axis=1) / self.game.tokens_N[windows].sum()

    @property
    def paper_strata(self) -> list[int]:
        strata = paper_kept_counts(self.game.num_players)
        return [kept for kept in strata if kept >= self.game.least_kept]

    @cached_property
    def optimum_R(self) -> FloatArray:
        players = self.game.num_players
        strata = range(players - self.max_removed, players)
        return self._lowest(np.concatenate([all_masks(players, kept) for kept in strata]))

    def regret(self, batches: Sequence[Ask]) -> FloatArray:
        """% of perplexity over the best set of each size, r = 1..max_removed; inf: none scored."""
        whole = [ask.masks_MP for ask in batches if ask.windows is None]
        found_R = self._lowest(np.concatenate(whole)) if whole else np.inf
        return 100 * np.expm1(found_R - self.optimum_R)

    def _lowest(self, masks_MP: BoolArray) -> FloatArray:
        nll_M, removed_M = self.score(Ask(masks_MP)), (~masks_MP).sum(axis=1)
        sizes = range(1, self.max_removed + 1)
        return np.array([nll_M[removed_M == r].min(initial=np.inf) for r in sizes])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One search at one budget, all seeds."""

    search: str
    budget: int
    """Masks; where layer-forwards are equal, those that ours took for so many masks."""
    masks_S: np.ndarray
    forwards_S: FloatArray
    regret_SR: FloatArray


def our_batches(game: Game, max_removed: int, seed: int, budget: int) -> list[BoolArray]:
    """The rounds of a run."""
    players = game.num_players
    settings = RoundSettings(
        num_players=players,
        max_removed=max_removed,
        sizes=(players - max_removed, players - 1),
        seed=seed,
        surrogate="auto",
        round_size=players,
    )
    rounds = played_rounds(
        settings,
        game.nll_of,
        utility_named("neg_nll"),
        game.tokens_N,
        budget,
    )
    return [asked.masks_MP for asked in rounds]


def rivals(
    players: int, max_removed: int, num_windows: int
) -> dict[str, Callable[[int], Proposer]]:
    """Seed -> proposer, of the registry's rivals that need neither an engine nor their budget, and
    EvoPress with every selection on all windows."""

    def setting(seed: int) -> SearchSetting:
        return SearchSetting(
            num_players=players,
            max_removed=max_removed,
            num_windows=num_windows,
            budget=2**players,
            seed=seed,
        )

    found: dict[str, Callable[[int], Proposer]] = {
        name: lambda seed, rival=rival: rival.make(setting(seed))
        for name, rival in RIVALS.items()
        if rival.needs is None and not rival.plans_its_budget
    }
    return found | {
        "evopress, all windows": lambda seed: evolutionary(
            players, max_removed, num_windows=num_windows, seed=seed, first_share=1.0
        )
    }


def rival_rows(
    game: Game, max_removed: int, budgets: Sequence[int], ours: Sequence[Sequence[BoolArray]]
) -> tuple[list[Row], list[Row]]:
    """Rows at equal masks, and at the layer-forwards that ours took for so many masks.

    Args:
        ours: for each seed the batches of our own search, in order, to the largest budget.
    """
    arena = Arena(game, max_removed)
    seeds, windows = range(len(ours)), arena.num_windows
    searches = {"lpserve": [[Ask(masks_MP) for masks_MP in batches] for batches in ours]}
    for name, make in rivals(game.num_players, max_removed, windows).items():
        searches[name] = [
            [s.ask for s in drive(make(seed), arena.score, 2**game.num_players)] for seed in seeds
        ]
    forwards = {
        b: [within(batches, windows, masks=b)[1].forwards for batches in searches["lpserve"]]
        for b in budgets
    }
    by_masks, by_forwards = [], []
    for name, found in searches.items():
        for b in budgets:
            cut = [within(batches, windows, masks=b) for batches in found]
            _append(by_masks, _row(arena, name, b, cut))
            cut = [
                within(batches, windows, forwards=most)
                for batches, most in zip(found, forwards[b], strict=True)
            ]
            _append(by_forwards, _row(arena, name, b, cut))
    for b in budgets:
        cut = [_paper(arena, b, seed) for seed in seeds]
        _append(by_masks, _row(arena, "the paper's pipeline", b, cut))
        cut = [
            _paper(arena, _paper_budget(arena, most, seed), seed)
            for seed, most in zip(seeds, forwards[b], strict=True)
        ]
        _append(by_forwards, _row(arena, "the paper's pipeline", b, cut))
    everything = 2**game.num_players
    cut = [_paper(arena, everything, seed) for seed in seeds]
    by_masks.append(_row(arena, f"the paper's pipeline, {PAPER_DRAWS} draws", everything, cut))
    return by_masks, by_forwards


def _paper(arena: Arena, budget: int, seed: int) -> tuple[list[Ask], Spent]:
    if budget < 1 + PAPER_MIN_DRAWS + arena.max_removed:
        return [], Spent(arena.num_windows)
    proposer = paper(
        arena.game.num_players,
        arena.max_removed,
        budget=budget,
        seed=seed,
        strata=arena.paper_strata,
    )
    return within([s.ask for s in drive(proposer, arena.score, budget)], arena.num_windows)


def _paper_budget(arena: Arena, forwards: float, seed: int) -> int:
    """Masks that it can pay for: as many of its draws as leave enough for the sets of its ranking,
    should none of them be drawn."""
    players, most = arena.game.num_players, arena.max_removed
    draws = next(
        paper(players, most, budget=PAPER_DRAWS + 1 + most, seed=seed, strata=arena.paper_strata)
    )
    last = sum(players - r + HEAD_COST for r in range(1, most + 1))
    return within([draws], arena.num_windows, forwards=forwards - last)[1].masks + most


def _row(arena: Arena, search: str, budget: int, cut: list[tuple[list[Ask], Spent]]) -> Row:
    return Row(
        search=search,
        budget=budget,
        masks_S=np.array([spent.masks for _, spent in cut]),
        forwards_S=np.array([spent.forwards for _, spent in cut], dtype=np.float64),
        regret_SR=np.array([arena.regret(batches) for batches, _ in cut], dtype=np.float64),
    )


def _append(rows: list[Row], row: Row) -> None:
    """Add a row unless it repeats the last one: the search had ended."""
    last = rows[-1] if rows and rows[-1].search == row.search else None
    if last is None or not (
        np.array_equal(last.masks_S, row.masks_S)
        and np.array_equal(last.forwards_S, row.forwards_S)
    ):
        rows.append(row)


def table_lines(rows: Sequence[Row]) -> list[str]:
    """A Markdown table: the worst regret of all seeds, the mean in brackets."""
    most = rows[0].regret_SR.shape[1]
    lines = [
        "| search | budget | masks | layer-forwards | "
        + " | ".join(f"r={r}" for r in range(1, most + 1))
        + " | seeds at optimum |",
        "| --- | ---: | ---: | ---: |" + " --- |" * most + " ---: |",
    ]
    for row in rows:
        solved = int((row.regret_SR.max(axis=1) < 1e-6).sum())
        lines.append(
            f"| {row.search} | {row.budget} | {np.median(row.masks_S):.0f} | "
            f"{np.median(row.forwards_S):.0f} | {' | '.join(map(_cell, row.regret_SR.T))} | "
            f"{solved} of {len(row.regret_SR)} |"
        )
    return lines


def _cell(regret_S: FloatArray) -> str:
    if not np.isfinite(regret_S).all():
        return "-"
    return f"{regret_S.max():.2f} ({regret_S.mean():.2f})"


def rival_lines(
    game: Game, max_removed: int, budgets: Sequence[int], ours: Sequence[Sequence[BoolArray]]
) -> list[str]:
    """Both tables with their headings."""
    by_masks, by_forwards = rival_rows(game, max_removed, budgets, ours)
    return [
        "## Searches: regret in % of perplexity over the best set, worst of all seeds (mean)",
        "",
        "At equal numbers of distinct masks (`-`: a seed has no set of that size scored on all "
        "windows yet):",
        "",
        *table_lines(by_masks),
        "",
        "At the layer-forwards that lpserve took for so many masks (medians over seeds):",
        "",
        *table_lines(by_forwards),
        "",
    ]


def main() -> None:
    from estimators import read_game

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--game", type=Path, required=True, help="an exact game")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--max-removed", type=int, default=None, help="default: half the players")
    parser.add_argument("--most", type=int, default=max(BUDGETS), help="largest budget")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    game = read_game(args.game)
    most = args.max_removed or game.num_players // 2
    budgets = [b for b in BUDGETS if b <= args.most]
    started = time.perf_counter()
    lines = ["# Searches for sets of layers", "", *machine_lines(1), ""]
    with threadpool_limits(1):
        ours = [our_batches(game, most, seed, max(budgets)) for seed in range(args.seeds)]
        lines += rival_lines(game, most, budgets, ours)
    publish([*lines, f"Took {time.perf_counter() - started:.0f} s."], args.out)


if __name__ == "__main__":
    main()
