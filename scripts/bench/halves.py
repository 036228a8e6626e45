"""Layers against halves of layers, at equal shares of the layers' parameters.

    PYTHONPATH=. python scripts/bench/halves.py --out scripts/bench/results/halves.md

On the bundled model, with engine transformers: `lpserve baselines` over layers and over halves,
with lpserve, greedy (over halves: BlockPruner) and EvoPress. For each target a search answers with
the best set that it scored, of any number of players, that leaves at most that share of the layers'
parameters; chosen on calibration windows, held-out ones are reported. lpserve searches for the
targets, the others for numbers of players, as they were published. Then the same masks of whole
layers are timed as masks of layers and as masks of halves, in turn. Other models, texts and numbers
by flags.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from probes import machine_lines, publish

import lpserve
from lpserve.demo import FOLDER as DEMO
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.costs import player_costs
from lpserve.rivals.compare import CompareConfig, Comparison, compare
from lpserve.types import FloatArray

RIVALS = ("lpserve", "greedy", "evopress")
PLURAL = {"layer": "layers", "half": "halves"}
NAMED = {("half", "greedy"): "greedy over halves (BlockPruner)"}


def share_left(costs_P: FloatArray, removed: Sequence[int]) -> float:
    return float(1 - costs_P[list(removed)].sum() / costs_P.sum())


def parameters(model: Path, length: int) -> dict[str, FloatArray]:
    """Kind of players -> the parameters of each."""
    checkpoint = read_checkpoint(model)
    probe = lpserve.TokenWindows.from_tokens(np.arange(2, 2 + length)[None])
    found = {}
    for kind in ("layer", "half"):
        with lpserve.open_engine(str(model), probe, players=kind) as engine:
            info = engine.info
        costs = player_costs(checkpoint, info.players, length, info.settings["modules"])
        found[kind] = costs.params_P.astype(np.float64)
    return found


def table(
    found: dict[str, Comparison], costs: dict[str, FloatArray], targets: Sequence[float]
) -> list[str]:
    lines = []
    for side, whole in (("calibration", "full_calibration_ppl"), ("heldout", "full_heldout_ppl")):
        lines += [
            f"Perplexity, {'held out' if side == 'heldout' else side}; whole model "
            f"{getattr(found['half'], whole):.4g}. In brackets the parameters really left.",
            "",
            f"| search | {' | '.join(f'at most {t:.0%}' for t in targets)} |",
            "|---|" + "---:|" * len(targets),
        ]
        for kind in ("layer", "half"):
            for rival in RIVALS:
                sets = {f.target: f for f in found[kind].found if f.rival == rival}
                cells = [
                    f"{getattr(sets[t], f'{side}_ppl'):.4g} "
                    f"({share_left(costs[kind], sets[t].removed):.1%})"
                    if t in sets
                    else "-"
                    for t in targets
                ]
                name = NAMED.get((kind, rival), f"{rival} over {PLURAL[kind]}")
                lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def cost_lines(found: dict[str, Comparison]) -> list[str]:
    lines = ["| search | masks | tokens |", "|---|---:|---:|"]
    for kind, comparison in found.items():
        for cost in comparison.costs:
            lines.append(f"| {cost.rival}, players {kind} | {cost.masks:,.0f} | {cost.tokens:,} |")
    return lines


def speed(model: Path, length: int, masks: int, repeats: int, seed: int) -> list[str]:
    """Seconds for the same masks of layers either way, in turn, and their ratio."""
    rng = np.random.default_rng(seed)
    windows = lpserve.TokenWindows.from_tokens(rng.integers(2, 200, (10, length)))
    seconds: dict[str, list[float]] = {"layer": [], "half": []}
    with ExitStack() as stack:
        engines = {
            kind: stack.enter_context(lpserve.open_engine(str(model), windows, players=kind))
            for kind in seconds
        }
        layers = engines["layer"].info.num_players
        masks_ML = np.unique(rng.random((masks, layers)) < 0.75, axis=0)
        given = {"layer": masks_ML, "half": np.repeat(masks_ML, 2, axis=1)}
        for _ in range(repeats):
            for kind, engine in engines.items():
                started = time.perf_counter()
                engine.score(given[kind])
                seconds[kind].append(time.perf_counter() - started)
    ratios = np.array(seconds["half"]) / np.array(seconds["layer"])
    return [
        f"{len(masks_ML)} random masks of whole layers, 10 windows of {length} tokens: "
        f"{np.median(seconds['layer']):.2f} s as masks of layers, "
        f"{np.median(seconds['half']):.2f} s as masks of halves (medians of {repeats}, in turn); "
        f"ratio {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f}).",
        "",
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Layers against halves of layers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO / "model")
    add("--calibration", type=Path, default=DEMO / "calibration.txt")
    add("--heldout", type=Path, default=DEMO / "heldout.txt")
    add("--num-windows", type=int, default=10)
    add("--heldout-windows", type=int, default=64)
    add("--length", type=int, default=128)
    add("--targets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    add("--budget", type=int, default=400, help="masks of each search")
    add("--seed", type=int, default=0)
    add("--timed-masks", type=int, default=200)
    add("--repeats", type=int, default=7)
    add(
        "--folder",
        type=Path,
        default=Path("models/halves"),
        help="scores, which a second call reads",
    )
    add("--out", type=Path, help="markdown file to write to")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    common: dict[str, Any] = {
        "model": str(args.model),
        "calibration": {"calibration": str(args.calibration)},
        "heldout": {"heldout": str(args.heldout)},
        "num_windows": args.num_windows,
        "heldout_windows": args.heldout_windows,
        "length": args.length,
        "budget": args.budget,
        "seed": args.seed,
        "rivals": RIVALS,
    }
    target = "params=" + ",".join(f"{share:g}" for share in args.targets)
    found = {
        kind: compare(
            CompareConfig(**common, players=kind, target=target, out=str(args.folder / kind))
        )
        for kind in ("layer", "half")
    }
    costs = parameters(args.model, args.length)
    head = ["# Layers and halves of layers", "", f"- date: {date.today()}", *machine_lines(1)]
    bundled = args.model == DEMO / "model"
    about = (
        f"{'The bundled model' if bundled else args.model.name}: {args.num_windows} calibration "
        f"windows and {args.heldout_windows} held-out ones of {args.length} tokens, at most "
        f"{args.budget} masks for each search, "
        f"seed {args.seed}."
    )
    body = [*table(found, costs, args.targets), *cost_lines(found), ""]
    body += speed(args.model, args.length, args.timed_masks, args.repeats, args.seed)
    publish([*head, "", about, "", *body], args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
