"""Values, intervals, plans, time and memory on synthetic games of 32 and 80 players.

    PYTHONPATH=. python scripts/bench/large_games.py --players 32,80 --seeds 5 --out large_games.md

The games are those of `lpserve.testing.layer_games`: exact truncated values by construction,
windows from a known distribution, interactions fitted to a real game's. Rounds are played as a run
plays them (`RoundPlanner`, goal `both`) and cut at each budget.

* Error: of the truncated values of these windows, squared, over the mean square of the exact ones.
* Inside 90%: how often `stderr_P` holds the exact value of these windows, and `total_stderr_P` that
  of the distribution that they come from; mean over players and seeds.
* Regret: perplexity over that of the best known set (multi-start swap descent on the game itself:
  `reference_best`, not proven best), mean and worst over numbers removed, in percent; below it that
  of what greedy and the paper's pipeline with its 8,000 draws score.
* Time: CPU seconds that choosing a round takes, the last and the longest.
* Refits: CPU seconds of fitting the surrogate that selects masks to random masks, for the first
  time and again with one more round of masks.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from played_rounds import played_rounds
from probes import machine_lines, publish
from threadpoolctl import threadpool_limits

import lpserve
from lpserve.analysis.resample import mean_nll, window_weights
from lpserve.masks import StratifiedDesign, full_mask, keys
from lpserve.rivals.greedy import greedy
from lpserve.rivals.paper import PAPER_DRAWS, paper
from lpserve.rivals.proposer import Proposer, drive
from lpserve.rounds.settings import RoundSettings
from lpserve.surrogate import make_surrogate
from lpserve.testing.layer_games import NUM_TOKENS, ProductGame, layer_game, reference_best
from lpserve.types import Z90, BoolArray, FloatArray
from lpserve.utility import utility_named

BUDGETS = {12: (100, 200, 400), 32: (200, 400, 800, 1600), 80: (500, 1000, 2000, 4000)}
REFITS = {12: (), 32: (2000, 8000), 80: (2000, 8000)}
"""Masks of the table of refits."""
NUM_WINDOWS = 10


@dataclass
class Played:
    """A run's masks, and the time that selecting them took."""

    masks_MP: BoolArray
    seconds: list[float] = field(default_factory=list)
    """CPU time of choosing each round."""
    asked: list[int] = field(default_factory=list)
    """Masks asked for up to each round."""


def play(
    game: ProductGame, max_removed: int, sizes: tuple[int, int], seed: int, budget: int
) -> Played:
    """What a run with this budget asks for."""
    settings = RoundSettings(
        num_players=game.num_players,
        max_removed=max_removed,
        sizes=sizes,
        seed=seed,
        surrogate="auto",
        round_size=game.num_players,
    )
    rounds = played_rounds(
        settings,
        lambda masks_MP: game.nll(masks_MP).astype(np.float32),
        utility_named("neg_nll"),
        game.tokens_N,
        budget,
    )
    played = Played(masks_MP=np.empty((0, game.num_players), dtype=bool))
    started = time.process_time()
    for asked in rounds:
        played.seconds.append(time.process_time() - started)
        played.masks_MP = np.concatenate([played.masks_MP, asked.masks_MP])
        played.asked.append(len(played.masks_MP))
        started = time.process_time()
    return played


def everything_asked(game: ProductGame, search: Proposer) -> BoolArray:
    """All masks that a rival search scores, the full model first, `bool[M, P]`."""
    record = drive(search, lambda ask: game.mean_nll(ask.masks_MP), 2**game.num_players)
    asked_MP = np.concatenate([scored.ask.masks_MP for scored in record])
    full_1P = full_mask(game.num_players)[None]
    return np.concatenate([full_1P, asked_MP[~asked_MP.all(axis=1)]])


def value_row(game: ProductGame, masks_MP: BoolArray, sizes: tuple[int, int]) -> list[float]:
    """Error; coverage and width of `stderr_P`; coverage of `total_stderr_P`; CPU seconds."""
    nll_MN = game.nll(masks_MP).astype(np.float32).astype(np.float64)
    tokens_N = game.tokens_N
    weights_BN = window_weights([len(tokens_N)])
    started = time.process_time()
    values = lpserve.shapley_values(
        masks_MP,
        -nll_MN.sum(axis=1) / tokens_N.sum(),
        sizes,
        resampled=-mean_nll(nll_MN, tokens_N, weights_BN),
    )
    seconds = time.process_time() - started
    exact_P, source_P = game.exact(sizes), game.population.exact(sizes)
    error_P = values.values_P - exact_P
    inside = (np.abs(error_P) <= Z90 * values.stderr_P).mean()
    total = (np.abs(values.values_P - source_P) <= Z90 * values.total_stderr_P).mean()
    relative = (error_P**2).sum() / (exact_P**2).sum()
    return [relative, inside, 2 * Z90 * values.stderr_P.mean(), total, seconds]


def regret_R(game: ProductGame, masks_MP: BoolArray, best_MP: BoolArray) -> FloatArray:
    """% of perplexity over the best known set of each size."""
    nll_M, removed_M = game.mean_nll(masks_MP), (~masks_MP).sum(axis=1)
    found_R = np.array(
        [nll_M[removed_M == r].min(initial=np.inf) for r in range(1, len(best_MP) + 1)]
    )
    return 100 * np.expm1(found_R - game.mean_nll(best_MP))


def reach(players: int) -> tuple[int, tuple[int, int]]:
    """The largest number removed, and the sizes of the values."""
    max_removed = 3 * players // 8
    return max_removed, (players - max_removed, players - 1)


def lines_of(players: int, seeds: int, most: int | None) -> list[str]:
    max_removed, sizes = reach(players)
    budgets = [b for b in BUDGETS[players] if most is None or b <= most]
    rows: dict[int, list[list[float]]] = {b: [] for b in budgets}
    published = 1 + PAPER_DRAWS + max_removed
    rival_rows: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        game = layer_game(players, NUM_WINDOWS, seed=seed)
        best_MP = reference_best(game, max_removed, seed=seed)
        for name, search in (
            ("greedy", greedy(players, max_removed)),
            ("the paper's pipeline", paper(players, max_removed, budget=published, seed=seed)),
        ):
            scored_MP = everything_asked(game, search)
            behind_R = regret_R(game, scored_MP, best_MP)
            rival_rows.setdefault(name, []).append(
                [behind_R.mean(), behind_R.max(), len(scored_MP)]
            )
        played = play(game, max_removed, sizes, seed, budgets[-1])
        for budget in budgets:
            some = played.masks_MP[:budget]
            last = max(n for n, asked in enumerate(played.asked) if asked <= budget)
            regret = regret_R(game, some, best_MP)
            rows[budget].append(
                [
                    *value_row(game, some, sizes),
                    regret.mean(),
                    regret.max(),
                    played.seconds[last],
                    max(played.seconds[: last + 1]),
                ]
            )
        assert len(set(keys(played.masks_MP))) == len(played.masks_MP)
    lines = [
        f"## {players} players, up to {max_removed} removed, sizes {sizes}, {seeds} games",
        "",
        "| masks | error, median [least, most] | inside 90% | width | total inside 90% | regret, "
        "mean (worst) | a round is chosen in | the longest | values in |",
        "| ---: | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for budget, found in rows.items():
        table = np.array(found)
        error = table[:, 0]
        mean = table.mean(axis=0)
        lines.append(
            f"| {budget} | {np.median(error):.1e} [{error.min():.1e}, {error.max():.1e}] | "
            f"{mean[1]:.0%} | {mean[2]:.2g} | {mean[3]:.0%} | {mean[5]:.2f}% "
            f"({table[:, 6].max():.2f}%) | {mean[7]:.1f} s | {table[:, 8].max():.1f} s | "
            f"{mean[4]:.1f} s |"
        )
    for name, found in rival_rows.items():
        table = np.array(found)
        lines.append(
            f"| {name}: {np.median(table[:, 2]):.0f} | | | | | {table[:, 0].mean():.2f}% "
            f"({table[:, 1].max():.2f}%) | | | |"
        )
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def refit_lines(players: int) -> list[str]:
    """Time and memory of fitting the surrogate that selects masks."""
    _, sizes = reach(players)
    most = max(REFITS[players]) + players
    game = layer_game(players, NUM_WINDOWS, seed=0)
    design = StratifiedDesign(players, list(range(sizes[1], sizes[0] - 1, -1)), seed=0)
    masks_MP = design.take(most)
    utilities_M = -game.mean_nll(masks_MP)
    lines = [
        f"Refits with {players} players:",
        "",
        "| masks | first fit | with a round more | peak memory |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for count in REFITS[players]:
        surrogate = make_surrogate("auto", quick=True)
        seconds = []
        for some in (count, count + players):
            started = time.process_time()
            surrogate.fit(masks_MP[:some], utilities_M[:some])
            seconds.append(time.process_time() - started)
        lines.append(
            f"| {count} | {seconds[0]:.1f} s | {seconds[1]:.1f} s | {peak_memory():.0f} MiB |"
        )
    print("\n".join(lines), flush=True)
    return [*lines, ""]


def peak_memory() -> float:
    """Peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--players", default="32,80")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--most", type=int, help="largest budget")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    sizes = [int(players) for players in args.players.split(",")]
    least = max(BUDGETS[players][0] for players in sizes)
    if args.most is not None and args.most < least:
        parser.error(f"--most must be at least {least}, the smallest budget of these games")
    started = time.perf_counter()
    lines = [
        "# Large synthetic games",
        "",
        f"`PYTHONPATH=. python scripts/bench/large_games.py --players {args.players} --seeds "
        f"{args.seeds}`; {NUM_WINDOWS} windows of {NUM_TOKENS} tokens; seeds 0 to "
        f"{args.seeds - 1}.",
        "",
        *machine_lines(1),
        "",
    ]
    with threadpool_limits(1):
        for players in sizes:
            lines += lines_of(players, args.seeds, args.most)
            if REFITS[players]:
                lines += refit_lines(players)
    lines.append(
        f"Times are CPU seconds of one thread. Peak memory of the process {peak_memory():.0f} MiB. "
        f"Took {time.perf_counter() - started:.0f} s."
    )
    publish(lines, args.out)


if __name__ == "__main__":
    main()
