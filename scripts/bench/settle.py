"""What races are worth: sets chosen on few windows, on more for all masks, and by racing.

    PYTHONPATH=. python scripts/bench/settle.py --seeds 10 --out scripts/bench/results/settle.md

Games with a known distribution of windows (`lpserve.testing.layer_games`, fitted to a real game's
spread over windows), so that a set's loss on infinitely many windows is exact. For each game the
masks of a run are those that `lpserve run` asks for on 10 windows. Its sets are then chosen

* on these 10 windows;
* by a race of the best 8 of each size on further windows (`--settle 0.9`);
* on more windows, the same for every mask of the run: as many as take the tokens of run and race.

Regret: perplexity on infinitely many windows over that of the best set that the run scored, in
percent; mean over sizes and seeds. Two races on disjoint windows agree on a size where each one's
set is, or ties with, the other's.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from played_rounds import played_rounds
from probes import machine_lines, publish
from threadpoolctl import threadpool_limits

from lpserve.plan.race import MAX_CONTENDERS, RaceRule, look_sizes, standing
from lpserve.rounds.settings import RoundSettings
from lpserve.testing.layer_games import NUM_TOKENS, ProductGame, layer_game
from lpserve.types import BoolArray, FloatArray
from lpserve.utility import utility_named

FIRST = 10
SETTINGS = ((12, 6, 200), (32, 12, 400))
"""Players, largest set, masks of a run."""


@dataclass(frozen=True, slots=True)
class Raced:
    """How a race ended."""

    chosen: int
    left: frozenset[int]
    mask_windows: int
    """Windows times masks that it scored."""


def race(loss_MN: FloatArray, error: float, tie: float) -> Raced:
    """A race on windows that come in the order of the columns."""
    looks = look_sizes(FIRST, loss_MN.shape[1])
    rule = RaceRule(error=error, tie=math.log1p(tie), looks=len(looks))
    alive_M = np.ones(len(loss_MN), dtype=bool)
    used = before = 0
    last = None
    for size in looks:
        used += int(alive_M.sum()) * (size - before)
        before = size
        last = standing(loss_MN[:, :size], np.full(size, NUM_TOKENS), alive_M, rule)
        alive_M = last.alive_M
        if last.decided:
            break
    assert last is not None
    return Raced(last.leader, frozenset(np.flatnonzero(alive_M).tolist()), used)


def asked_masks(game: ProductGame, max_removed: int, budget: int, seed: int) -> BoolArray:
    """What a run asks for on the game's windows."""
    players = game.num_players
    settings = RoundSettings(
        num_players=players,
        max_removed=max_removed,
        sizes=(players - max_removed, players - 1),
        seed=seed,
        surrogate="gp",
        round_size=players,
        goal="plan",
    )
    rounds = played_rounds(
        settings,
        lambda masks_MP: game.nll(masks_MP).astype(np.float32),
        utility_named("neg_nll"),
        game.tokens_N,
        budget,
    )
    return np.concatenate([asked.masks_MP for asked in rounds])


def results(
    players: int, max_removed: int, budget: int, max_windows: int, seeds: Sequence[int]
) -> list[float]:
    """Regrets of the three, share of sizes on which two races agree, windows of a race, and the
    windows that every mask could have had instead."""
    regrets: list[list[float]] = []
    agree, windows, instead = [], [], []
    for seed in seeds:
        pools = 2 * (max_windows - FIRST)
        game = layer_game(players, FIRST + pools, seed=seed)
        few = layer_game(players, FIRST, seed=seed)
        masks_MP = asked_masks(few, max_removed, budget, seed)
        everything_MN = game.nll(masks_MP)
        truth_M = game.population.mean_nll(masks_MP)
        removed_M = (~masks_MP).sum(axis=1)
        raced: dict[int, list[Raced]] = {}
        rows_of: dict[int, np.ndarray] = {}
        for r in range(1, max_removed + 1):
            rows = np.flatnonzero(removed_M == r)
            first_M = everything_MN[rows, :FIRST].sum(axis=1)
            rows_of[r] = rows[np.argsort(first_M, kind="stable")[:MAX_CONTENDERS]]
            raced[r] = [
                race(everything_MN[rows_of[r], FIRST + half : FIRST + pools : 2], 0.1, 0.005)
                for half in (0, 1)
            ]
        spent = FIRST * len(masks_MP) + sum(one.mask_windows for one, _ in raced.values())
        more = spent // len(masks_MP)
        for r in range(1, max_removed + 1):
            rows = np.flatnonzero(removed_M == r)
            best = truth_M[rows].min()
            one, other = raced[r]
            choices = (
                rows_of[r][0],
                rows_of[r][one.chosen],
                rows[everything_MN[rows, :more].sum(axis=1).argmin()],
            )
            regrets.append([100 * math.expm1(truth_M[row] - best) for row in choices])
            agree.append(one.chosen in other.left and other.chosen in one.left)
            windows.append(one.mask_windows / len(rows_of[r]))
        instead.append(more)
    mean = np.mean(regrets, axis=0).tolist()
    return [*mean, float(np.mean(agree)), float(np.mean(windows)), float(np.mean(instead))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Sets chosen on few windows, more, and by races")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--max-windows", default="50,100,200,400")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = ["# Plans that are settled", "", *machine_lines(threads=1), ""]
    lines += [
        "Regret on infinitely many windows, % of perplexity, mean over sizes and seeds. "
        "`scripts/bench/settle.py` says what is compared.",
        "",
        "| layers | masks | max windows | chosen on 10 windows | raced | same tokens, all masks | "
        "windows of all masks then | windows of a contender | two races agree |",
        "|---|" + "---:|" * 8,
    ]
    with threadpool_limits(1):
        for players, max_removed, budget in SETTINGS:
            for most in map(int, arguments.max_windows.split(",")):
                few, raced, more, agree, windows, instead = results(
                    players, max_removed, budget, most, range(arguments.seeds)
                )
                lines.append(
                    f"| {players} | {budget} | {most} | {few:.3f} | {raced:.3f} | {more:.3f} | "
                    f"{instead:.0f} | {windows:.0f} | {agree:.0%} |"
                )
                print(lines[-1], flush=True)
    publish([*lines, ""], arguments.out)


if __name__ == "__main__":
    main()
