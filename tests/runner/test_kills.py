"""SIGKILL at random moments: nothing stored is lost, nothing is scored twice, the plan is the same.

Real processes, the real bundled model, the real store. Equal stores: the same (mask, window) keys,
values within 1e-5 relative (float32); same plan: the same sets.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lpserve.demo import FOLDER
from lpserve.testing.runs import stored_count, stored_scores

pytestmark = pytest.mark.process

FEW, MANY = 48, 240  # masks of the short and the long test


def command(out: Path, budget: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "lpserve",
        "run",
        "--model",
        str(FOLDER / "model"),
        "--calibration",
        str(FOLDER / "calibration.txt"),
        "--heldout",
        str(FOLDER / "heldout.txt"),
        "--num-windows",
        "8",
        "--heldout-windows",
        "8",
        "--length",
        "64",
        "--budget",
        str(budget),
        "--max-removed",
        "6",
        "--out",
        str(out),
    ]


def kill_after_a_commit(out: Path, budget: int, wait_s: float) -> int:
    """Run until this life has committed something and `wait_s` more have passed, then SIGKILL.

    Returns the scores committed by then, as a reader of the file sees them.
    """
    store = out / "scores.sqlite"
    before = stored_count(store) if store.exists() else 0
    with subprocess.Popen(
        command(out, budget), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if stored_count(store) > before:
                break
            time.sleep(0.01)
        time.sleep(wait_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return stored_count(store)


def chosen_sets(out: Path) -> list[list[int]]:
    plan = json.loads((out / "plan.json").read_text())
    return [entry["removed"] for entry in plan["plans"]]


def check_kills(tmp_path: Path, rng, num_kills: int, budget: int, capsys) -> list[int]:
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    counts = []
    for _ in range(num_kills):
        counts.append(kill_after_a_commit(killed, budget, float(rng.uniform(0.0, 0.6))))
    for out in (killed, undisturbed):
        done = subprocess.run(command(out, budget), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\nscores committed at each kill: {counts}")  # noqa: T201
    assert counts == sorted(counts)  # nothing that was committed is ever gone
    got, expected = (
        stored_scores(killed / "scores.sqlite"),
        stored_scores(undisturbed / "scores.sqlite"),
    )
    assert got.keys() == expected.keys()
    assert max(abs(got[k] - expected[k]) / expected[k] for k in expected) < 1e-5
    assert chosen_sets(killed) == chosen_sets(undisturbed)
    with sqlite3.connect(killed / "scores.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    return counts


def test_a_run_survives_kills(tmp_path, rng, capsys):
    counts = check_kills(tmp_path, rng, 2, FEW, capsys)
    assert len(set(counts)) == 2


@pytest.mark.slow
def test_a_run_survives_twenty_kills(tmp_path, rng, capsys):
    counts = check_kills(tmp_path, rng, 20, MANY, capsys)
    inside = [count for count in set(counts) if 0 < count < MANY]
    assert len(inside) >= 15
