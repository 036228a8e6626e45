"""Every set of a few layers: what a mask costs in time and on disk, beside a store of SQLite.

    PYTHONPATH=. python scripts/bench/exhaustive.py --out exhaustive.md

A synthetic game, whose engine takes no time, is scored by `lpserve.exhaustive` into Parquet
segments; the same masks through a scoring session into SQLite alone, the baseline. Both are read
back. With `--model` and `--text` a real model is scored too, into `--folder`, which may hold a part
of it or all: its rows say what was done now.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from probes import machine_lines, publish

from lpserve.config import EngineConfig
from lpserve.data.windows import TokenWindows
from lpserve.exhaustive.game import NEAR, optima, read_exhaustive
from lpserve.exhaustive.score import ExhaustiveConfig, exhaustive
from lpserve.scoring.session import ScoringSession

PLAYERS, REMOVED, WINDOWS, LENGTH = 40, 4, 4, 128


def texts(folder: Path, seed: int) -> dict[str, str]:
    """Random windows as .npz: calibration and held-out ones."""
    rng, found = np.random.default_rng(seed), {}
    for name in ("calibration", "heldout"):
        found[name] = str(folder / f"{name}.npz")
        np.savez(found[name], tokens=rng.integers(0, 50_000, (WINDOWS, LENGTH)))
    return found


def synthetic(folder: Path) -> list[str]:
    """Rows of the synthetic game: Parquet segments, and SQLite."""
    found = texts(folder, 0)
    common = {
        "model": "synthetic",
        "engine": "synthetic",
        "engine_options": {"num_players": PLAYERS},
        "progress_s": 60.0,
    }
    config = ExhaustiveConfig(
        **common,
        calibration={"calibration": found["calibration"]},
        heldout={"heldout": found["heldout"]},
        max_removed=REMOVED,
        out=str(folder / "game"),
    )
    started, cpu = time.perf_counter(), time.process_time()
    result = exhaustive(config)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    size = sum(path.stat().st_size for path in (folder / "game" / "segments").iterdir())
    started = time.perf_counter()
    game = read_exhaustive(folder / "game")
    reading = time.perf_counter() - started
    count = len(game.masks_MP)
    rows = [_row("segments", count, wall, cpu, size, reading)]
    assert result.masks_new == count
    windows = TokenWindows.from_npz(found["calibration"])
    started, cpu = time.perf_counter(), time.process_time()
    store = folder / "scores.sqlite"
    with ScoringSession(EngineConfig(**common), windows, store=store) as session:
        nll_MN = session.score(game.masks_MP, windows)["nll"]
        wall, cpu = time.perf_counter() - started, time.process_time() - cpu
        started = time.perf_counter()
        again_MN, _ = session.store.get(session.game, windows, game.masks_MP)
        reading = time.perf_counter() - started
    assert np.array_equal(nll_MN, game.values["nll"])
    assert np.array_equal(again_MN, nll_MN)
    rows.append(_row("SQLite", count, wall, cpu, store.stat().st_size, reading))
    shared = result.family.skip_layer_forwards / result.family.layer_forwards
    head = (
        f"Synthetic game: {PLAYERS} players, sets of up to {REMOVED}, {count:,} masks, {WINDOWS} "
        f"windows; one trie takes {shared:.1f} times fewer layer-forwards than one mask at a time."
    )
    table = "| kept in | s | masks/s | us of CPU a mask | bytes a mask | read, s |"
    return [head, "", table, "|---|---:|---:|---:|---:|---:|", *rows, ""]


def _row(name: str, count: int, wall: float, cpu: float, size: int, reading: float) -> str:
    return (
        f"| {name} | {wall:.1f} | {count / wall:,.0f} | {1e6 * cpu / count:.0f} | "
        f"{size / count:.1f} | {reading:.2f} |"
    )


def real(model: Path, text: Path, heldout: Path, max_removed: int, folder: Path) -> list[str]:
    """Lines about a real model's game."""
    config = ExhaustiveConfig(
        model=str(model),
        calibration={text.stem: str(text)},
        heldout={heldout.stem: str(heldout)},
        num_windows=WINDOWS,
        heldout_windows=WINDOWS,
        length=LENGTH,
        max_removed=max_removed,
        out=str(folder),
        progress_s=60.0,
    )
    started = time.perf_counter()
    result = exhaustive(config)
    wall = time.perf_counter() - started
    size = sum(path.stat().st_size for path in (folder / "segments").iterdir())
    family, work = result.family, result.work
    lines = [
        f"{model.name}: sets of up to {max_removed} of {family.num_players} layers, "
        f"{family.count:,} masks, {WINDOWS} windows of {LENGTH} tokens of {text.stem}: "
        f"{size:,} bytes. Scored now: {result.masks_new:,} masks in {wall:.0f} s, "
        f"{work.layer_forwards:,} layer-forwards (one trie over all masks: "
        f"{family.layer_forwards:,}; one by one: {family.skip_layer_forwards:,}).",
        "",
        f"| removed | sets | lowest perplexity | layers | sets within {NEAR:.0%} |",
        "|---:|---:|---:|---|---:|",
    ]
    for best in optima(folder):
        assert best.sets == math.comb(family.num_players, best.num_removed)
        lines.append(
            f"| {best.num_removed} | {best.sets:,} | {best.ppl:.4g} | "
            f"{', '.join(map(str, best.removed))} | {best.near} |"
        )
    return lines


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Every set of a few layers: time and size of a mask.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, help="a checkpoint folder, scored too")
    add("--text", type=Path, help="its calibration text")
    add("--heldout", type=Path, help="the text of held-out windows, which are not scored")
    add("--max-removed", type=int, default=3, help="of the real model, every set of so many layers")
    add("--folder", type=Path, help="folder of the real model's game")
    add("--out", type=Path, help="markdown file to write to")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    head = ["# Every set scored", "", f"- date: {date.today()}", *machine_lines(1), ""]
    with tempfile.TemporaryDirectory() as name:
        lines = synthetic(Path(name))
    if args.model:
        lines += real(args.model, args.text, args.heldout, args.max_removed, args.folder)
    publish([*head, *lines], args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
