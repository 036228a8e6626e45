"""Runs and studies that tests start, and their stores read with plain SQLite."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.config import RunConfig, config_from
from lpserve.data.windows import TokenWindows
from lpserve.demo import FOLDER
from lpserve.engine.synthetic import SyntheticEngine
from lpserve.exhaustive.score import ExhaustiveConfig
from lpserve.types import EngineSpec

NUM_PLAYERS = 8
"""Players of the synthetic game."""
DEMO_TEXTS = {"sherlock": str(FOLDER / "calibration.txt"), "dracula": str(FOLDER / "heldout.txt")}
SMALL_SWEEP = {
    "calibration": {"sherlock": ["sherlock"], "both": ["sherlock", "dracula"]},
    "num_windows": [1, 2],
    "utility": ["neg_nll", "ppl_ratio"],
    "seed": [0, 1],
}


def write_texts(folder: Path, rng: np.random.Generator) -> dict[str, str]:
    """Calibration and held-out windows as .npz: name -> path."""
    paths = {}
    for name, num in (("calibration", 4), ("heldout", 6)):
        paths[name] = str(folder / f"{name}.npz")
        np.savez(paths[name], tokens=rng.integers(0, 50_000, (num, 40)))
    return paths


def make_config(tmp_path: Path, texts: Mapping[str, str], **changes: Any) -> RunConfig:
    """A run of the synthetic game on `texts`, its folder `tmp_path/run`."""
    values = {
        "model": "synthetic",
        "engine": "synthetic",
        "engine_options": {"num_players": NUM_PLAYERS, "game_seed": 3},
        "calibration": texts["calibration"],
        "heldout": texts["heldout"],
        "budget": 90,
        "max_removed": 4,
        "out": str(tmp_path / "run"),
        "progress_s": 100.0,
    }
    return config_from(values | changes, "test")


def exhaustive_config(
    tmp_path: Path, texts: Mapping[str, str], *, max_removed: int, **options: Any
) -> ExhaustiveConfig:
    """An exhaustive game of `make_config`'s model and texts, its folder `tmp_path/game`.

    Args:
        options: of the synthetic engine.
    """
    return ExhaustiveConfig(
        model="synthetic",
        engine="synthetic",
        engine_options={"num_players": NUM_PLAYERS, "game_seed": 3, **options},
        calibration={"calibration": texts["calibration"]},
        heldout={"heldout": texts["heldout"]},
        max_removed=max_removed,
        out=str(tmp_path / "game"),
        progress_s=100.0,
    )


def known_game(texts: Mapping[str, str]) -> SyntheticEngine:
    """The engine of `make_config`, opened here: what scores must be."""
    windows = TokenWindows.from_npz(texts["calibration"])
    options = {"num_players": NUM_PLAYERS, "game_seed": 3}
    return SyntheticEngine(EngineSpec(kind="synthetic", model="", options=options), windows)


def stored_scores(path: Path) -> dict[tuple[bytes, str], float]:
    """(mask, window hash) -> NLL, read with plain SQLite."""
    with sqlite3.connect(path) as db:
        members: dict[int, list[str]] = {}
        query = "SELECT block, hash FROM block_windows JOIN windows ON window = id ORDER BY block, position"  # noqa: E501
        for block, window in db.execute(query):
            members.setdefault(block, []).append(window)
        found = {}
        for block, mask, value in db.execute("SELECT block, mask, value FROM scores"):
            for window, nll in zip(members[block], np.frombuffer(value, "<f4"), strict=True):
                found[bytes(mask), window] = float(nll)
    return found


def stored_count(path: Path) -> int:
    """Rows of scores in a store that another process may be writing; 0 where there is none yet."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
            return db.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def run_lpserve(*argv: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lpserve", *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
    )


def plan_of_another_model() -> str:
    """plan.json of a model with 12 layers, one set, no held-out windows."""
    entry = {
        "num_removed": 1,
        "removed": [3],
        "source": "greedy",
        "calibration_ppl": 2.0,
        "predicted_ppl": None,
        "heldout_ppl": None,
        "candidates": [],
    }
    return json.dumps(
        {
            "format": 1,
            "model": "other",
            "model_hash": "0" * 64,
            "num_players": 12,
            "players": [{"index": i, "layer": i, "part": "layer"} for i in range(12)],
            "utility": "neg_nll",
            "masks_scored": 1,
            "heldout_masks": 0,
            "full_calibration_ppl": 1.0,
            "full_heldout_ppl": None,
            "plans": [entry],
        }
    )


def study_values(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A study of four points on the bundled model, as its file says it."""
    values = {
        "model": str(FOLDER / "model"),
        "calibration": DEMO_TEXTS,
        "length": 32,
        "num_windows": 3,
        "heldout_windows": 4,
        "budget": 60,
        "max_removed": 2,
        "out": str(tmp_path / "study"),
        "sweep": {"utility": ["neg_nll", "ppl_ratio"], "seed": [0, 1]},
    }
    return values | changes


def small_study_values(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A study of sixteen points that takes seconds."""
    sizes = {
        "length": 24,
        "heldout_windows": 2,
        "budget": 45,
        "max_removed": 2,
        "sweep": SMALL_SWEEP,
        "surrogate": "ridge",
        "progress_s": 100.0,
    }
    return study_values(tmp_path, **(sizes | changes))
