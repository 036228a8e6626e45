"""Deep residual networks: short lists against greedy removal, at equal work.

    PYTHONPATH=. python scripts/bench/deep_games.py --models FOLDER --text a.txt --text b.txt

Formulas fitted to a model of 12 layers say little about depth (`large_games.py`), so these games
are networks: trained for minutes by `scripts/train_demo_model.py` on the texts given, once, into
FOLDER. A mask takes milliseconds. Each game is the mean NLL on 10 x 128 tokens of the bundled
calibration text.

Work is counted as `lpserve compare` counts it: layer-forwards in the trie of each batch, a head as
`HEAD_COST` layers, the overlap of single layers as that of all their heads. Every search is cut
where its work reaches a share of what greedy removal (SLEB) takes to its end. Beside the search of
`lpserve run --goal plan` stands the same search where an engine gives no overlap: greedy's path,
then the surrogate's sets. Its sets' perplexity is shown over that of greedy's set of the same size,
mean and worst over sizes and seeds; below 0 it is lower. `best` is the best of all sets that any
search scored.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from probes import machine_lines, publish

import lpserve
from lpserve.data.tokenizer import load_tokenizer
from lpserve.demo import FOLDER as DEMO
from lpserve.masks import drop_one, full_mask, keys
from lpserve.rivals.accounting import Spent
from lpserve.rivals.greedy import greedy
from lpserve.rivals.ours import ours
from lpserve.rivals.proposer import Ask, Proposer, drive
from lpserve.rounds.acquisition import HEAD_COST
from lpserve.rounds.settings import RoundSettings
from lpserve.types import BoolArray, FloatArray

NUM_WINDOWS, LENGTH = 10, 128
SHARES = (0.15, 0.25, 1 / 3, 0.5, 1.0)
"""Of greedy's work."""
MOST = {"llama-80": 1 / 3}
"""Share to which searches go, where that is not all: surrogates of 80 players take minutes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepModel:
    """How a network is trained, and how many of its layers are removed at most."""

    architecture: str
    layers: int
    width: int
    steps: int
    seed: int
    max_removed: int

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.layers}"

    def trained(self, folder: Path, texts: Sequence[str]) -> Path:
        """Its checkpoint, trained if it is not there."""
        path = folder / self.name
        if not (path / "config.json").exists():
            script = Path(__file__).parents[1] / "train_demo_model.py"
            settings = {
                "architecture": self.architecture,
                "layers": self.layers,
                "width": self.width,
                "vocab": 1024,
                "context": LENGTH,
                "batch": 8,
                "steps": self.steps,
                "seed": self.seed,
                "device": "cpu",
                "threads": 1,
            }
            command = [sys.executable, str(script), "--out", str(path)]
            command += [part for text in texts for part in ("--text", text)]
            command += [
                part for key, value in settings.items() for part in (f"--{key}", str(value))
            ]
            subprocess.run(command, check=True)
        return path


MODELS = (
    DeepModel(architecture="llama", layers=32, width=64, steps=1500, seed=0, max_removed=12),
    DeepModel(architecture="gpt2", layers=48, width=64, steps=1200, seed=1, max_removed=18),
    DeepModel(architecture="llama", layers=80, width=32, steps=1200, seed=2, max_removed=30),
)


@dataclass(slots=True)
class Game:
    """A network's masks, each scored once, and the best set of every size that anyone scored."""

    engine: Any
    max_removed: int
    known: dict[bytes, float] = field(default_factory=dict)

    def score(self, ask: Ask) -> FloatArray:
        """Mean NLLs, `float64[M]`."""
        mask_keys = keys(ask.masks_MP)
        new = [row for row, key in enumerate(mask_keys) if key not in self.known]
        if new:
            nll_M = self.engine.score(ask.masks_MP[new]).mean_nll_M()
            self.known.update(zip((mask_keys[row] for row in new), nll_M.tolist(), strict=True))
        return np.array([self.known[key] for key in mask_keys])

    def overlap(self) -> FloatArray:
        """Of single layers, nats per token."""
        full_P = full_mask(self.engine.info.num_players)
        scores = self.engine.score_overlap(np.concatenate([full_P[None], drop_one(full_P)]))
        return scores.overlap_MM[1:, 1:] / scores.num_tokens_N.sum()

    def best(self, masks: Sequence[BoolArray]) -> FloatArray:
        """The lowest mean NLL of each number removed, `float64[R]`."""
        lowest = np.full(self.max_removed, np.inf)
        for masks_MP in masks:
            removed_M = (~masks_MP).sum(axis=1)
            for r, nll in zip(removed_M.tolist(), self.score(Ask(masks_MP)), strict=True):
                if 1 <= r <= self.max_removed:
                    lowest[r - 1] = min(lowest[r - 1], nll)
        return lowest


def searched(
    game: Game, proposer: Proposer, limit: float, before: float = 0.0
) -> list[tuple[BoolArray, float, int]]:
    """Batches of a search until its work reaches a limit, with work and masks up to each.

    Args:
        before: work that was done for the search beside its masks.
    """
    spent = Spent(NUM_WINDOWS)
    batches: list[tuple[BoolArray, float, int]] = []

    def score(ask: Ask) -> FloatArray:
        spent.add(ask)
        batches.append((ask.masks_MP, before + spent.forwards, spent.masks))
        if before + spent.forwards >= limit:
            raise StopIteration
        return game.score(ask)

    drive(proposer, score, 1 << 30)
    return batches


def rows_of(model: DeepModel, path: Path, seeds: int) -> list[str]:
    """The table of one network."""
    text = (DEMO / "calibration.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(str(path)).encode(text[:200_000])[: NUM_WINDOWS * LENGTH]
    tokens_NT = np.array(ids).reshape(NUM_WINDOWS, LENGTH)
    windows = lpserve.TokenWindows.from_tokens(tokens_NT)
    with lpserve.open_engine(str(path), windows) as engine:
        game = Game(engine, model.max_removed)
        players = engine.info.num_players
        full_P = full_mask(players)
        full = game.score(Ask(full_P[None]))[0]
        started = time.monotonic()
        path_batches = searched(game, greedy(players, model.max_removed), np.inf)
        greedy_R = game.best([masks_MP for masks_MP, *_ in path_batches])
        _, work, masks = path_batches[-1]
        print(f"{model.name}: greedy {masks} masks, {time.monotonic() - started:.0f} s", flush=True)
        overlap_PP = game.overlap()
        found: dict[str, list[list[tuple[BoolArray, float, int]]]] = {}
        for name, overlap, before in (
            ("lpserve", overlap_PP, HEAD_COST * (players + 1)),
            ("without overlap", None, 0.0),
        ):
            for seed in range(seeds):
                settings = RoundSettings(
                    num_players=players,
                    max_removed=model.max_removed,
                    sizes=(players - model.max_removed, players - 1),
                    seed=seed,
                    surrogate="auto",
                    round_size=players,
                    goal="plan",
                )
                limit = MOST.get(model.name, SHARES[-1]) * work
                batches = searched(game, ours(settings, overlap), limit, before)
                found.setdefault(name, []).append(batches)
                print(f"{model.name}: {name}, seed {seed}, {batches[-1][2]} masks", flush=True)
        lines = [
            f"## {model.name}: {players} layers, width {model.width}",
            "",
            f"Perplexity {np.exp(full):.2f}; greedy's sets of "
            + ", ".join(
                f"{r}: {np.exp(greedy_R[r - 1]):.2f}"
                for r in np.unique(np.linspace(1, model.max_removed, 5).astype(int)).tolist()
            )
            + f". Greedy takes {masks} masks and {work:,.0f} layer-forwards.",
            "",
            "| search | share of greedy's work | masks | over greedy's sets, %: mean | worst | "
            "sizes at or below greedy |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        everything = [game_batch for runs in found.values() for run in runs for game_batch in run]
        best_R = np.minimum(greedy_R, game.best([masks_MP for masks_MP, *_ in everything]))
        for name, runs in found.items():
            for share in SHARES:
                if share > MOST.get(model.name, SHARES[-1]) + 1e-9:
                    break
                over, used = [], []
                for run in runs:
                    kept = [b for b in run if b[1] <= share * work] or run[:1]
                    over.append(100 * np.expm1(game.best([b[0] for b in kept]) - greedy_R))
                    used.append(kept[-1][2])
                over_SR = np.array(over)
                lines.append(
                    f"| {name} | {share:.2f} | {np.mean(used):.0f} | {over_SR.mean():.2f} | "
                    f"{over_SR.max():.2f} | {(over_SR < 1e-6).mean():.0%} |"
                )
        gap = 100 * np.expm1(best_R - greedy_R)
        lines += [
            f"| best | | {len(game.known)} | {gap.mean():.2f} | {gap.max():.2f} | 100% |",
            "",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Searches on deep networks, at equal work")
    parser.add_argument("--models", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--text", action="append", default=[], help="what they are trained on")
    parser.add_argument("--only", default="", help="names of networks, with commas between")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = ["# Deep networks", "", *machine_lines(threads=1), ""]
    lines += [
        "Perplexity of the best sets found, in % over greedy's set of the same size (below 0: "
        "lower), for equal work. `scripts/bench/deep_games.py` says what is counted.",
        "",
    ]
    for model in MODELS:
        if not arguments.only or model.name in arguments.only.split(","):
            path = model.trained(arguments.models, arguments.text)
            lines += rows_of(model, path, arguments.seeds)
            print("\n".join(lines), flush=True)
    publish(lines, arguments.out)


if __name__ == "__main__":
    main()
