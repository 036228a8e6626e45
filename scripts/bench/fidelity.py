"""What scoring sets on a few windows first saves, and what it costs, on an exact game.

    PYTHONPATH=. python scripts/bench/fidelity.py --game demo12.npz --out fidelity.md

Every run plays the same rounds with the same budget of masks, on all windows or with a screen of
the first n (`lpserve.rounds.screening`); seeds are 0..N-1. What a run spends:

* Mask-windows: scores of one mask on one window, over those of a run without a screen.
* Layer-forwards: those that the trie of each round takes on the screen's and on the other windows
  (prefixes are shared inside a round alone), `HEAD_COST` for each mask, weighted by windows; over
  those without a screen.

Regret: the best set of each size that was scored on all windows, in % of perplexity over the best
one of that size. Budgets are separate runs: each ends with its own promotions.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from estimators import ExactGame, read_game
from plan_rivals import Arena
from played_rounds import played_rounds
from probes import machine_lines, publish
from threadpoolctl import threadpool_limits

from lpserve.rivals.accounting import Spent
from lpserve.rivals.proposer import Ask
from lpserve.rounds.settings import RoundSettings
from lpserve.types import BoolArray, FloatArray
from lpserve.utility import utility_named

BUDGETS = (90, 120, 160, 200, 300)


@dataclass(frozen=True, kw_only=True)
class Spending:
    """One run."""

    regret: FloatArray
    mask_windows: int
    forwards: float
    screened: int
    """Masks that ended with a score on the screen alone."""


def spend(
    arena: Arena, game: ExactGame, screen: int, seed: int, budget: int, goal: str
) -> Spending:
    """A run with a screen of the first windows; 0: none."""
    players, most = game.num_players, arena.max_removed
    settings = RoundSettings(
        num_players=players,
        max_removed=most,
        sizes=(players - most, players - 1),
        seed=seed,
        surrogate="auto",
        round_size=players,
        goal=goal,
    )
    few, others = range(screen), range(screen, arena.num_windows)
    rounds = played_rounds(
        settings,
        game.nll_of,
        utility_named("neg_nll"),
        game.tokens_N,
        budget,
        screen=np.array(few) if screen else None,
    )
    spent = Spent(arena.num_windows)
    whole: list[BoolArray] = []
    masks = mask_windows = 0
    for asked in rounds:
        new_whole_MP = np.concatenate([asked.masks_MP[asked.full_M], asked.promoted_MP])
        masks += len(asked)
        whole.append(new_whole_MP)
        for masks_MP, windows in ((asked.masks_MP, few), (new_whole_MP, others)):
            mask_windows += len(masks_MP) * len(windows)
            if len(masks_MP) and len(windows):
                spent.add(Ask(masks_MP, windows))
    done_MP = np.concatenate(whole)
    return Spending(
        regret=arena.regret([Ask(done_MP)]),
        mask_windows=mask_windows,
        forwards=spent.forwards,
        screened=masks - len(done_MP),
    )


def table_lines(
    arena: Arena, game: ExactGame, screens: list[int], budgets: list[int], seeds: int, goal: str
) -> list[str]:
    most = arena.max_removed
    lines = [
        "| masks | screen | on it alone | mask-windows | layer-forwards | "
        + " | ".join(f"r={r}" for r in range(1, most + 1))
        + " | mean of all | seeds at optimum |",
        "| ---: | ---: | ---: | ---: | ---: |" + " --- |" * (most + 1) + " ---: |",
    ]
    print("\n".join(lines), flush=True)
    for budget in budgets:
        base: list[Spending] = []
        for screen in (0, *screens):
            found = [spend(arena, game, screen, seed, budget, goal) for seed in range(seeds)]
            base = base or found
            regret_SR = np.array([one.regret for one in found])
            cells = [f"{r_S.max():.2f} ({r_S.mean():.2f})" for r_S in regret_SR.T]
            windows = sum(o.mask_windows for o in found) / sum(o.mask_windows for o in base)
            forwards = sum(o.forwards for o in found) / sum(o.forwards for o in base)
            lines.append(
                f"| {budget} | {screen or 'none'} | "
                f"{np.mean([one.screened for one in found]) / budget:.0%} | {windows:.0%} | "
                f"{forwards:.0%} | {' | '.join(cells)} | {regret_SR.mean():.3f} | "
                f"{int((regret_SR.max(axis=1) < 1e-6).sum())} of {seeds} |"
            )
            print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--game", type=Path, required=True, help="an exact game")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--max-removed", type=int, default=None, help="default: half the players")
    parser.add_argument("--screens", default="2,4,8", help="windows of a screen")
    parser.add_argument("--goals", default="both,plan")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    game = read_game(args.game)
    arena = Arena(game, args.max_removed or game.num_players // 2)
    started = time.perf_counter()
    lines = [
        "# Sets on a few windows first",
        "",
        f"Game {game.name}: {game.num_players} players, {len(game.tokens_N)} windows; seeds 0 to "
        f"{args.seeds - 1}. Regret: worst of all seeds (mean).",
        "",
        *machine_lines(1),
        "",
    ]
    with threadpool_limits(1):
        screens, budgets = (
            [int(n) for n in one.split(",")] for one in (args.screens, args.budgets)
        )
        for goal in args.goals.split(","):
            lines += [f"## Goal `{goal}`", ""]
            lines += table_lines(arena, game, screens, budgets, args.seeds, goal)
    publish([*lines, f"Took {time.perf_counter() - started:.0f} s."], args.out)


if __name__ == "__main__":
    main()
