"""Values, intervals and plans from few scored masks, against an exact game.

    PYTHONPATH=. python scripts/bench/estimators.py --game demo12.npz --out estimators.md
    PYTHONPATH=. python scripts/bench/estimators.py             # scores its own game first: minutes
    PYTHONPATH=. python scripts/bench/estimators.py --model DIR --text FILE --max-removed 6 \
                                                    --save game.npz --most 400

A game file holds every mask's score: `nll_sum[row, window]` (nats) and `tokens[window, T]`; bit i
of a mask's code is layer i, 1 = kept. Row and code are the same, or `codes[row]` says which masks
were scored: all that keep at least P - max_removed layers. Such a game has truncated values only.
The rounds of a run are played on it as the coordinator plays them (round n from complete rounds up
to n-2) and cut at each budget; everything that a budget gives is computed from those masks alone.

* Values: mean squared error over the mean square of the exact values; medians over seeds, min
  and max in brackets. Coverage: how often a 90% interval (`stderr_P`) holds the exact value on the
  same windows, mean over players and seeds, and its mean width. Twice: from masks that were chosen
  for the values alone (`lpserve.rounds.acquisition`; each batch P masks, or a tenth of those
  before), and from those of a run, which walks the greedy path and searches sets as well.
* The paper's network (arXiv 2602.07804) on its 8,000 draws stands under the tables of its utility,
  `ppl_ratio`.
* Plans: the best scored set of each size against the best of all.
* With `--shapiq PYTHON` (an interpreter that has shapiq 1.8, Python 3.12 or newer): its
  approximators on the same game, utility and budgets, the empty and the full coalition among them.

Seeds are 0..N-1, none chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from played_rounds import played_rounds
from probes import machine_lines, publish
from threadpoolctl import threadpool_limits

import lpserve
from lpserve.masks import (
    StratifiedDesign,
    all_masks,
    drop_one,
    keys,
    paper_kept_counts,
    trie_layer_forwards,
)
from lpserve.rivals.paper import PAPER_COALITIONS, PAPER_DRAWS, paper_draws
from lpserve.rounds.acquisition import HEAD_COST, candidate_pool, select_for_values
from lpserve.rounds.settings import RoundSettings
from lpserve.surrogate import QUICK_TUNING_MASKS, AutoSurrogate, PaperSurrogate
from lpserve.types import Z90, BoolArray, FloatArray
from lpserve.utility import TEXT_UTILITIES, utility_named
from lpserve.values.exact import exact_values
from lpserve.values.sampling import monte_carlo_values

BUDGETS = (60, 100, 200, 400, 800)
PLAN_BUDGETS = (60, 90, 120, 160, 200, 300)


@dataclass(frozen=True, kw_only=True)
class ExactGame:
    """The NLL of every mask that keeps at least `least_kept` players."""

    name: str
    num_players: int
    nll_MN: np.ndarray
    row_of: np.ndarray
    """Code -> row, -1 where not scored."""
    tokens_N: np.ndarray
    least_kept: int

    def nll_of(self, masks_MP: BoolArray) -> np.ndarray:
        rows_M = self.row_of[masks_MP @ (1 << np.arange(self.num_players))]
        if (rows_M < 0).any():
            raise ValueError(f"{self.name} holds masks of at least {self.least_kept} layers alone")
        return self.nll_MN[rows_M]

    def known_masks(self) -> BoolArray:
        """Every mask of the game, `bool[M, P]`."""
        strata = range(self.least_kept, self.num_players + 1)
        return np.concatenate([all_masks(self.num_players, kept) for kept in strata])

    def utility(self, name: str, nll_MN: np.ndarray) -> FloatArray:
        full_N = self.nll_MN[self.row_of[-1]].astype(np.float64)
        return utility_named(name).of(nll_MN.astype(np.float64), self.tokens_N, full_N)

    def exact(self, name: str, sizes: tuple[int, int]) -> FloatArray:
        masks_MP = self.known_masks()
        utility_M = self.utility(name, self.nll_of(masks_MP))
        return exact_values(masks_MP, utility_M[:, None], sizes)[:, 0]


def read_game(path: Path) -> ExactGame:
    with np.load(path, allow_pickle=False) as data:
        nll_MN, tokens = data["nll_sum"], data["tokens"]
        codes = data["codes"] if "codes" in data else np.arange(len(nll_MN))
    players = int(codes.max()).bit_length()
    row_of = np.full(1 << players, -1)
    row_of[codes] = np.arange(len(codes))
    kept_C = ((codes[:, None] >> np.arange(players)) & 1).sum(axis=1)
    least = int(kept_C.min())
    expected = sum(math.comb(players, kept) for kept in range(least, players + 1))
    if len(np.unique(codes)) != expected or len(nll_MN) != expected:
        sys.exit(f"{path}: {len(nll_MN)} rows, but {expected} masks keep {least} or more layers")
    return ExactGame(
        name=path.stem,
        num_players=players,
        nll_MN=nll_MN.astype(np.float32),
        row_of=row_of,
        tokens_N=np.full(nll_MN.shape[1], tokens.shape[1] - 1),
        least_kept=least,
    )


def score_game(model: Path, text: Path, most_removed: int | None, path: Path) -> ExactGame:
    """Every mask of a small model (that keeps enough layers), 16 windows of 128 tokens."""
    windows = lpserve.TokenWindows.from_file(text, tokenizer=model, num_windows=16, length=128)
    with lpserve.open_engine(str(model), windows, dtype="float32") as engine:
        players = engine.info.num_players
        least = 0 if most_removed is None else players - most_removed
        strata = [all_masks(players, kept) for kept in range(least, players + 1)]
        masks_CP = np.concatenate(strata)
        nll_MN = engine.score(masks_CP).nll_MN.astype(np.float32)
    codes = masks_CP @ (1 << np.arange(players))
    np.savez_compressed(path, nll_sum=nll_MN, tokens=windows.tokens_NT, codes=codes)
    return read_game(path)


def play(
    game: ExactGame, utility: str, sizes: tuple[int, int], max_removed: int, seed: int, budget: int
) -> BoolArray:
    """The masks that a run asks for, in order."""
    settings = RoundSettings(
        num_players=game.num_players,
        max_removed=max_removed,
        sizes=sizes,
        seed=seed,
        surrogate="auto",
        round_size=game.num_players,
    )

    rounds = played_rounds(settings, game.nll_of, utility_named(utility), game.tokens_N, budget)
    return np.concatenate([asked.masks_MP for asked in rounds])


def for_values(
    game: ExactGame, utility: str, sizes: tuple[int, int], seed: int, budget: int
) -> BoolArray:
    """Masks chosen for the values alone: all kept, single players dropped, none kept where it is
    needed, a few random ones, then batches selected for the values."""
    players = game.num_players
    full = np.ones(players, dtype=bool)
    chosen = [full, *drop_one(full), *([~full] if sizes[0] == 0 else [])]
    strata = range(sizes[1] + 1, sizes[0] - 1, -1)
    design = StratifiedDesign(players, list(strata), seed)
    seen = set(keys(np.array(chosen)))
    while len(chosen) < 4 * players:
        for mask_P in design.take(1):
            if keys(mask_P[None])[0] not in seen:
                seen.update(keys(mask_P[None]))
                chosen.append(mask_P)
    surrogate = AutoSurrogate(tuning_masks=QUICK_TUNING_MASKS)
    batch = 0
    while len(chosen) < budget:
        masks_MP = np.array(chosen)
        surrogate.fit(masks_MP, game.utility(utility, game.nll_of(masks_MP)))
        pool_QP = candidate_pool(players, sizes, np.random.default_rng([seed, batch]))
        pool_QP = pool_QP[[key not in seen for key in keys(pool_QP)]]
        picks = select_for_values(
            surrogate.best_kernel,
            sizes,
            pool_QP,
            max(players, len(chosen) // 10),
            pending_MP=np.empty((0, players), dtype=bool),
            head_cost=HEAD_COST,
        )
        seen.update(keys(picks))
        chosen += list(picks)
        batch += 1
    return np.array(chosen[:budget])


def value_lines(game: ExactGame, args: argparse.Namespace) -> list[str]:
    players = game.num_players
    lines = []
    for utility in args.utility or TEXT_UTILITIES:
        for low in (players - args.max_removed, 0):
            if low < game.least_kept:
                continue
            sizes = (low, players - 1)
            exact_P = game.exact(utility, sizes)
            budgets = [b for b in BUDGETS if b <= args.most and b < len(game.nll_MN)]
            kind = "Shapley values" if low == 0 else "Truncated values"
            lines += [f"## {kind}, sizes {sizes}, utility {utility}", ""]
            for chosen in ("for the values alone", "by a run"):
                most = max(budgets)
                tables = [
                    for_values(game, utility, sizes, seed, most)
                    if chosen == "for the values alone"
                    else play(game, utility, sizes, args.max_removed, seed, most)
                    for seed in range(args.seeds)
                ]
                lines += score_values(game, utility, sizes, exact_P, budgets, tables, chosen)
            if utility == "ppl_ratio":
                lines += paper_lines(game, sizes, exact_P, args.seeds)
            if args.shapiq and low == 0 and utility == "neg_nll":
                lines += rival_lines(game, utility, exact_P, budgets, args)
            lines.append("")
    return lines


def score_values(
    game: ExactGame,
    utility: str,
    sizes: tuple[int, int],
    exact_P: FloatArray,
    budgets: list[int],
    tables: list[BoolArray],
    chosen: str,
) -> list[str]:
    """Errors and coverage of the values from the first masks of each seed's table."""
    lines = [
        f"Masks chosen {chosen}:",
        "",
        "| masks | error, median [least, most] | layer-forwards | inside 90% | mean width |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for budget in budgets:
        rows = []
        for masks_MP in tables:
            some = masks_MP[:budget]
            utility_M = game.utility(utility, game.nll_of(some))
            values = lpserve.shapley_values(some, utility_M, sizes)
            error_P = values.values_P - exact_P
            inside = (np.abs(error_P) <= Z90 * values.stderr_P).mean()
            forwards, width = trie_layer_forwards(some), 2 * Z90 * values.stderr_P.mean()
            rows.append(((error_P**2).sum() / (exact_P**2).sum(), forwards, inside, width))
        error, forwards, inside, width = np.array(rows, dtype=np.float64).T
        lines.append(
            f"| {budget} | {np.median(error):.1e} [{error.min():.1e}, {error.max():.1e}] | "
            f"{np.median(forwards):.0f} | {inside.mean():.0%} | {width.mean():.2g} |"
        )
    lines.append("")
    print("\n".join(lines), flush=True)
    return lines


def paper_lines(
    game: ExactGame, sizes: tuple[int, int], exact_P: FloatArray, seeds: int
) -> list[str]:
    """The network of arXiv 2602.07804 on its 8,000 draws, its values over the same sizes."""
    players = game.num_players
    if min(paper_kept_counts(players)) < game.least_kept:
        return []
    errors, distinct = [], []
    for seed in range(seeds):
        draws_DP = paper_draws(players, PAPER_DRAWS, np.random.default_rng(seed))
        surrogate = PaperSurrogate(seed)
        surrogate.train(draws_DP, game.utility("ppl_ratio", game.nll_of(draws_DP)))
        values = monte_carlo_values(surrogate.mean, players, sizes, PAPER_COALITIONS, seed)
        errors.append(((values.values_P - exact_P) ** 2).sum() / (exact_P**2).sum())
        distinct.append(len(np.unique(draws_DP, axis=0)))
    lines = [
        f"The paper's network, {PAPER_DRAWS} draws ({np.median(distinct):.0f} distinct masks), "
        f"{PAPER_COALITIONS} coalitions: error {np.median(errors):.1e} [{min(errors):.1e}, "
        f"{max(errors):.1e}].",
        "",
    ]
    print("\n".join(lines), flush=True)
    return lines


def rival_lines(
    game: ExactGame, utility: str, exact_P: FloatArray, budgets: list[int], args: argparse.Namespace
) -> list[str]:
    """shapiq's approximators, run by another interpreter on a saved table."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "utilities.npy"
        codes = np.arange(2**game.num_players)[:, None] >> np.arange(game.num_players) & 1
        np.save(table, game.utility(utility, game.nll_of(codes.astype(bool))))
        script = Path(__file__).with_name("shapiq_rivals.py")
        done = subprocess.run(
            [
                args.shapiq,
                str(script),
                str(table),
                "--budgets",
                ",".join(map(str, budgets)),
                "--seeds",
                str(args.seeds),
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    lines = ["", f"shapiq {answer['version']}, the same game and budgets, median error:", ""]
    names = list(answer["values"])
    lines += [f"| masks | {' | '.join(names)} |", "| ---: |" + " ---: |" * len(names)]
    for budget in budgets:
        cells = []
        for name in names:
            found = answer["values"][name].get(str(budget))
            if not found:
                cells.append("-")
                continue
            error = ((np.array(found) - exact_P) ** 2).sum(axis=1) / (exact_P**2).sum()
            cells.append(f"{np.median(error):.1e}")
        lines.append(f"| {budget} | {' | '.join(cells)} |")
    return lines


def plan_lines(game: ExactGame, args: argparse.Namespace) -> list[str]:
    players, most = game.num_players, args.max_removed
    every_MP = game.known_masks()
    ppl_M = np.exp(-game.utility("neg_nll", game.nll_of(every_MP)))
    removed_M = (~every_MP).sum(axis=1)
    best = [float(ppl_M[removed_M == r].min()) for r in range(1, most + 1)]
    lines = [
        "## Plans: regret in % of perplexity over the best set, worst of all seeds (mean)",
        "",
        "| masks | " + " | ".join(f"r={r}" for r in range(1, most + 1)) + " | seeds at optimum |",
        "| ---: |" + " --- |" * most + " ---: |",
    ]
    sizes = (players - most, players - 1)
    budgets = [b for b in PLAN_BUDGETS if b <= args.most]
    regret: dict[int, list[list[float]]] = {b: [] for b in budgets}
    for seed in range(args.seeds):
        masks_MP = play(game, "neg_nll", sizes, most, seed, max(budgets))
        found_M = np.exp(-game.utility("neg_nll", game.nll_of(masks_MP)))
        count_M = (~masks_MP).sum(axis=1)
        for budget in budgets:
            rows = [
                found_M[:budget][count_M[:budget] == r].min(initial=math.inf)
                for r in range(1, most + 1)
            ]
            regret[budget].append(
                [100 * (ppl / least - 1) for ppl, least in zip(rows, best, strict=True)]
            )
    for budget, rows in regret.items():
        table = np.array(rows)
        cells = [f"{table[:, r].max():.2f} ({table[:, r].mean():.2f})" for r in range(most)]
        solved = int((table.max(axis=1) < 1e-6).sum())
        lines.append(f"| {budget} | {' | '.join(cells)} | {solved} of {args.seeds} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--game", type=Path, help="an exact game (default: the bundled model's)")
    parser.add_argument("--model", type=Path, help="a checkpoint to score a game of")
    parser.add_argument("--text", type=Path, help="its calibration text")
    parser.add_argument("--save", type=Path, help="keep the scored game")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--max-removed", type=int, default=None, help="default: half the players")
    parser.add_argument("--utility", action="append", choices=TEXT_UTILITIES, help="default: all")
    parser.add_argument("--most", type=int, default=800, help="largest budget")
    parser.add_argument("--shapiq", help="python with shapiq, for its approximators")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        if args.game is None:
            from lpserve.demo import FOLDER

            model, text = args.model or FOLDER / "model", args.text or FOLDER / "calibration.txt"
            most = args.max_removed if args.model else None
            game = score_game(model, text, most, args.save or Path(folder) / f"{model.name}.npz")
        else:
            game = read_game(args.game)
        args.max_removed = args.max_removed or game.num_players // 2
        started = time.perf_counter()
        lines = [
            "# Values and plans from few masks",
            "",
            f"`PYTHONPATH=. python scripts/bench/estimators.py --seeds {args.seeds}`; game "
            f"{game.name}: {game.num_players} players, {len(game.tokens_N)} windows; seeds 0 to "
            f"{args.seeds - 1}.",
            "",
            *machine_lines(1),
            "",
        ]
        lines += plan_lines(game, args)
        print("\n".join(lines), flush=True)
        lines += value_lines(game, args)
        lines.append(f"Took {time.perf_counter() - started:.0f} s.")
    publish(lines, args.out)


if __name__ == "__main__":
    main()
