"""Kill something at random every few seconds for minutes; the store must equal an undisturbed one.

    PYTHONPATH=. python scripts/soak.py --minutes 10

A run of the synthetic game on a Ray cluster of several nodes on this machine (a head without
engines, nodes with two each), the driver a process of its own. Every few seconds one of these dies
by SIGKILL: an engine's process, a node's raylet (a new node joins some seconds later), or the
driver (the same command is given again, with another number of engines). What it prints: every
kill, what the driver said, and at the end the comparison with a local run that nothing disturbed:
same keys, same values bit for bit, no score twice, nothing that was committed at a kill gone, same
plan; and how many masks the engines scored beyond those of the store.

Exits 1 when one of these does not hold. `--seed` repeats the sequence of choices, not their timing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # Ray on the deaths of its daemons
import ray
from ray.cluster_utils import Cluster

NUM_PLAYERS, NUM_WINDOWS = 14, 6
ENGINES_A_NODE = 2


@dataclass
class Soak:
    """A cluster, the driver at work on it, and what has been killed."""

    folder: Path
    args: argparse.Namespace
    rng: random.Random
    cluster: Cluster = field(init=False)
    nodes: list[Any] = field(default_factory=list)
    driver: subprocess.Popen[bytes] | None = None
    committed: dict[tuple[bytes, int], bytes] = field(default_factory=dict)
    kills: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    # -- cluster and driver ----------------------------------------------------------------------

    def begin(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        ray.init(self.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        for _ in range(self.args.nodes):
            self.add_node()

    def add_node(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=ENGINES_A_NODE))

    def start_driver(self) -> None:
        engines = self.rng.choice(["auto", "1", "2", "3"])
        environment = os.environ | {"RAY_ADDRESS": str(self.cluster.address)}
        log = (self.folder / "driver.log").open("ab")
        self.driver = subprocess.Popen(
            [*self.soaked_command(), "--pool", "ray", "--engines", engines],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        self.say(f"driver started with --engines {engines}")

    def soaked_command(self) -> list[str]:
        out, tally = self.folder / "soaked", self.folder / "tally"
        options = {"delay_s": self.args.mask_s, "tally": tally}
        return command(out, self.folder, self.args, options)

    def engine_processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if any("EngineActor" in word for word in process.info["cmdline"] or []):
                found.append(process)
        return found

    # -- killing ---------------------------------------------------------------------------------

    def kill_something(self) -> None:
        kind = self.rng.choices(["engine", "raylet", "driver"], weights=[6, 2, 1])[0]
        assert self.driver is not None
        self.note_committed()
        if kind == "engine":
            alive = self.engine_processes()
            if not alive:
                return
            victim = self.rng.choice(alive)
            self.say(f"SIGKILL engine, pid {victim.pid}")
            os.kill(victim.pid, signal.SIGKILL)
        elif kind == "raylet" and len(self.nodes) > 1:
            node = self.nodes.pop(self.rng.randrange(len(self.nodes)))
            self.say(f"SIGKILL raylet of node {node.node_id[:8]}")
            self.cluster.remove_node(node, allow_graceful=False)
        elif kind == "driver":
            self.say(f"SIGKILL driver, pid {self.driver.pid}")
            self.driver.kill()
            self.driver.wait()
        else:
            return
        self.kills[kind] = self.kills.get(kind, 0) + 1

    def note_committed(self) -> None:
        """Every score that is committed now must be there, unchanged, ever after."""
        now = scores(self.folder / "soaked" / "scores.sqlite")
        lost = [key for key, value in self.committed.items() if now.get(key) != value]
        if lost:
            sys.exit(f"{len(lost)} committed scores are gone or changed")
        self.committed = now

    def go(self) -> None:
        deadline = self.started + 60 * self.args.minutes
        self.start_driver()
        while time.monotonic() < deadline:
            time.sleep(self.rng.uniform(0.5, 1.5) * self.args.every_s)
            assert self.driver is not None
            if self.driver.poll() is None:
                self.kill_something()
            elif self.driver.returncode == 0:
                self.say("the run has finished")
                return
            if self.driver.poll() is not None:
                self.say(f"driver ended with {self.driver.returncode}; the same command again")
                self.start_driver()
            if len(self.nodes) < self.args.nodes:
                self.add_node()
                self.say(f"a new node joins: {self.nodes[-1].node_id[:8]}")
        self.say("time is up; the run goes on undisturbed to its end")
        while (code := self.wait_for_driver()) != 0:
            self.say(f"driver ended with {code}; the same command again")
            self.start_driver()

    def wait_for_driver(self) -> int:
        assert self.driver is not None
        return self.driver.wait()

    def end(self) -> None:
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
        ray.shutdown()
        self.cluster.shutdown()


def command(
    out: Path, folder: Path, args: argparse.Namespace, more: dict[str, object]
) -> list[str]:
    """The run; engines differ, the game is the same."""
    options = {"num_players": NUM_PLAYERS, "game_seed": 3, **more}
    flags = [f for k, v in options.items() for f in ("--engine-option", f"{k}={v}")]
    return [
        sys.executable,
        "-m",
        "lpserve",
        "run",
        "--engine",
        "synthetic",
        "--model",
        "synthetic",
        "--calibration",
        str(folder / "text.npz"),
        "--heldout",
        str(folder / "heldout.npz"),
        "--num-windows",
        str(NUM_WINDOWS),
        "--budget",
        str(args.budget),
        "--max-removed",
        "6",
        "--round-size",
        "60",
        "--progress-s",
        "10",
        "--out",
        str(out),
        *flags,
    ]


def scores(path: Path) -> dict[tuple[bytes, int], bytes]:
    """(mask, block) -> NLLs as stored, read with plain SQLite."""
    if not path.exists():
        return {}
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30) as db:
        try:
            rows = db.execute("SELECT mask, block, value FROM scores").fetchall()
        except sqlite3.OperationalError:  # the tables are not there yet
            return {}
    found = {(bytes(mask), block): bytes(value) for mask, block, value in rows}
    assert len(found) == len(rows), "a score is stored twice"
    return found


def sets_of(out: Path) -> list[list[int]]:
    plan = json.loads((out / "plan.json").read_text())
    return [entry["removed"] for entry in plan["plans"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every-s", type=float, default=4.0, help="between kills, on average")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--budget", type=int, default=1500)
    parser.add_argument("--mask-s", type=float, default=0.3, help="an engine's time for a mask")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = np.random.default_rng(args.seed).integers(0, 1000, (2 * NUM_WINDOWS, 64))
        np.savez(folder / "text.npz", tokens=tokens[:NUM_WINDOWS])
        np.savez(folder / "heldout.npz", tokens=tokens[NUM_WINDOWS:])
        soak = Soak(folder, args, random.Random(args.seed))
        soak.begin()
        try:
            soak.go()
            soak.note_committed()
        finally:
            soak.end()
            print(said(folder / "driver.log"))
        alone = folder / "alone"
        subprocess.run(command(alone, folder, args, {}), check=True, capture_output=True)
        return compare(soak, folder / "soaked", alone)


def said(log: Path) -> str:
    """What the drivers told their users, progress left out."""
    lines = log.read_text().splitlines() if log.exists() else []
    told = [line for line in lines if line and "masks/s" not in line]
    return "\n".join(["-- what the drivers said --", *told[:200], "--"])


def compare(soak: Soak, soaked: Path, alone: Path) -> int:
    got, expected = scores(soaked / "scores.sqlite"), scores(alone / "scores.sqlite")
    checks = {
        "same keys": got.keys() == expected.keys(),
        "same values, bit for bit": got == expected,
        "nothing committed was lost": all(got.get(k) == v for k, v in soak.committed.items()),
        "same plan": sets_of(soaked) == sets_of(alone),
    }
    kills = ", ".join(f"{count} x {kind}" for kind, count in sorted(soak.kills.items()))
    tallied = sum(int(line) for line in (soak.folder / "tally").read_text().split())
    print(f"killed: {kills}")
    print(
        f"stored: {len(got)} scores; engines scored {tallied} ({tallied / len(got) - 1:.1%} more)"
    )
    for name, holds in checks.items():
        print(f"{'yes' if holds else 'NO ':4} {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
