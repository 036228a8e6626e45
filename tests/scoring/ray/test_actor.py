"""What goes wrong over Ray, with real processes: drivers, engines and vLLM workers killed, engines
that break, NaNs, a full disk, more engines than masks.

After each the store equals that of an undisturbed run of the local pool. Nodes that leave:
test_ray_cluster; masks that kill or hang engines: test_ray_pool; hours of kills: scripts/soak.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import lpserve.scoring.pace
from lpserve.config import as_json, config_from
from lpserve.errors import DiskFullError, EngineError
from lpserve.masks import keys
from lpserve.runner.run import run
from lpserve.scoring.dispatcher import Dispatcher
from lpserve.scoring.local import LocalPool
from lpserve.scoring.pool import UnitResult, WorkUnit
from lpserve.store.connection import StoreConnection
from lpserve.testing.ray_pools import THREE_WINDOWS, pool_of, ray_config, score_all, undisturbed
from lpserve.testing.runs import NUM_PLAYERS as P
from lpserve.testing.runs import make_config, stored_count, stored_scores

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("local_ray"),
]


def start(config) -> subprocess.Popen[str]:
    """The same run in a process of its own, with a Ray of its own."""
    path = Path(config.out).with_suffix(".yaml")
    path.write_text(json.dumps(as_json(config)))  # JSON is YAML
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "lpserve", "run", "--config", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"RAY_ADDRESS": "local"},
    )


def kill_when(process: subprocess.Popen[str], path: Path, scores: int, victims) -> None:
    """SIGKILL what `victims` finds once so many scores are committed."""
    deadline = time.monotonic() + 180
    while not path.exists() or stored_count(path) < scores:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    while not (found := victims()):
        assert process.poll() is None, "the run ended, and nothing to kill was found"
        time.sleep(0.02)
    for victim in found:
        os.kill(victim, signal.SIGKILL)


@pytest.mark.parametrize(
    "then",
    [{"engines": 3}, pytest.param({"pool": "local", "engines": 1}, marks=pytest.mark.slow)],
)
def test_a_killed_driver_resumes_with_another_number_of_engines(then, tmp_path, texts):
    alone, stored = undisturbed(tmp_path, texts)
    path = tmp_path / "run" / "scores.sqlite"
    config = ray_config(tmp_path, texts, 2, delay_s=0.05)
    with start(config) as process:
        kill_when(process, path, 10, lambda: [process.pid])
    before = stored_scores(path)
    assert 0 < len(before) < len(stored)
    result = run(config_from({**as_json(config), **then}, "test"))
    assert stored_scores(path) == stored
    assert result.outcome.plan == alone.outcome.plan


def test_a_signal_while_engines_start_ends_the_run_in_one_line(tmp_path, texts):
    def daemons() -> list[psutil.Process]:
        return [p for p in psutil.Process(process.pid).children() if "raylet" in p.name()]

    with start(ray_config(tmp_path, texts, 2)) as process:
        deadline = time.monotonic() + 60
        while not (found := daemons()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "lpserve: interrupted before anything was scored"
    assert "Traceback" not in output
    psutil.wait_procs(found, timeout=30)
    assert not any(p.is_running() for p in found)
    assert not (tmp_path / "run").exists()


def test_nan_losses_are_stored_as_they_are(tmp_path, texts, rng):
    text = "".join("01"[int(bit)] for bit in rng.permutation([0, 0] + [1] * (P - 2)))
    options = {"num_players": P, "game_seed": 3, "nan": [text]}
    config = make_config(tmp_path, texts, budget=256, engine_options=options)
    alone = run(config)
    config = config_from(
        {**as_json(config), "pool": "ray", "engines": 2, "out": str(tmp_path / "ray")}, "test"
    )
    result = run(config)
    found, expected = (
        stored_scores(Path(folder) / "scores.sqlite") for folder in (result.folder, alone.folder)
    )
    assert found.keys() == expected.keys()
    # a matrix product rounds its last bit by the shape of the batch
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-14)
    assert np.isnan(list(expected.values())).any()
    assert result.outcome.plan == alone.outcome.plan


def test_a_full_disk_stops_the_run_which_goes_on_once_there_is_room(
    tmp_path,
    texts,
    monkeypatch,
):
    """A real SQLITE_FULL, by a page limit set on the run's own connection."""
    np.savez(texts["calibration"], tokens=np.arange(60 * 40).reshape(60, 40))
    alone, stored = undisturbed(tmp_path, texts)
    plain = StoreConnection._prepare

    def limited(self: StoreConnection, *args) -> None:
        plain(self, *args)
        pages = self.db.execute("PRAGMA page_count").fetchone()[0]
        self.db.execute(f"PRAGMA max_page_count = {pages + 9}")

    monkeypatch.setattr(StoreConnection, "_prepare", limited)
    config = ray_config(tmp_path, texts, 2)
    with pytest.raises(DiskFullError, match="free space and give the same command again"):
        run(config)
    monkeypatch.undo()
    path = tmp_path / "run" / "scores.sqlite"
    kept = stored_scores(path)
    assert 0 < len(kept) < len(stored)
    result = run(config)
    assert stored_scores(path) == stored
    assert result.outcome.plan == alone.outcome.plan


def test_an_engine_that_breaks_is_replaced_and_no_mask_is_given_up(rng):
    """The breaking mask itself is given up; masks that failed on the broken engine are not."""
    masks = np.unique(rng.random((60, P)) < 0.6, axis=0)
    bad = masks[int(rng.integers(len(masks)))]
    text = "".join("01"[int(bit)] for bit in bad)
    told: list[str] = []
    breaking: dict[str, Any] = {"break": [text]}
    pool, windows = pool_of(2, log=told.append, **breaking)
    try:
        scored, given_up = score_all(pool, windows, masks)
    finally:
        pool.close()
    assert list(given_up) == keys(bad[None])
    assert set(scored) == set(keys(masks)) - set(given_up)
    assert any("it scores nothing any more" in line for line in told)


def test_a_local_engine_that_breaks_ends_the_run_and_says_so(tmp_path, texts, rng):
    text = "".join("01"[int(bit)] for bit in rng.permutation([0] + [1] * (P - 1)))
    options = {"num_players": P, "game_seed": 3}
    config = make_config(tmp_path, texts, engine_options={**options, "break": [text]})
    with pytest.raises(EngineError, match="stopped working: EngineError: nothing works any more"):
        run(config)
    alone = run(make_config(tmp_path, texts, out=str(tmp_path / "alone")))
    result = run(make_config(tmp_path, texts))  # the same game, mended
    assert result.outcome.plan == alone.outcome.plan


@pytest.mark.slow  # one process after another
def test_engines_that_die_on_every_mask_end_the_run_with_the_reason():
    masks = np.ones((40, P), dtype=bool)
    masks[np.arange(40), np.arange(40) % P] = False
    texts_ = ["".join("01"[int(bit)] for bit in mask) for mask in np.unique(masks, axis=0)]
    pool, windows = pool_of(1, kill=texts_)
    try:
        with pytest.raises(EngineError, match=r"engines were lost in a row.*its process died"):
            score_all(pool, windows, masks)
    finally:
        pool.close()


class Recording:
    """A pool that notes which units went where."""

    def __init__(self, pool) -> None:
        self.pool, self.units = pool, []

    def __getattr__(self, name):
        return getattr(self.pool, name)

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        self.units.append((unit, engine))
        self.pool.submit(unit, engine, expected_s)


def test_a_mask_is_split_over_windows_when_engines_outnumber_masks(rng, monkeypatch):
    monkeypatch.setattr(lpserve.scoring.pace, "MIN_UNIT_S", 0.05)
    masks = np.unique(rng.random((20, P)) < 0.6, axis=0)
    plain, windows = pool_of(4, delay_s=0.3)
    pool: Any = Recording(plain)
    try:
        while len(plain.processes) < 4:
            plain.next(0.2)
        dispatcher = Dispatcher(pool)
        key = dispatcher.register(windows)
        known = dict.fromkeys(plain.engines, 0.3 / (3 * 16))
        dispatcher.paces.seconds_per_token.update(known)
        dispatcher.add(masks[-2:], THREE_WINDOWS, key)
        results = []
        while not dispatcher.idle:
            results.append(dispatcher.next(1.0))
    finally:
        plain.close()
    parts = [(unit, engine) for unit, engine in pool.units if unit.windows != key]
    assert len({engine for _, engine in parts}) > 2
    expected, _ = whole_scores(windows, masks[-2:])
    done = [result for result in results if isinstance(result, UnitResult)]
    found = {keys(r.unit.masks_MP)[0]: r.scores.nll_MN[0] for r in done if r.scores}
    assert set(found) == set(keys(masks[-2:]))
    for key_, nll_N in expected.items():
        # a matrix product rounds its last bit by the shape of the batch
        np.testing.assert_allclose(found[key_], nll_N, rtol=1e-14)


def whole_scores(windows, masks):
    """The same masks through a local pool."""
    from lpserve.types import EngineSpec

    spec = EngineSpec(kind="synthetic", model="", options={"num_players": P})
    pool = LocalPool(spec, windows)
    try:
        return score_all(pool, windows, masks)
    finally:
        pool.close()


def test_units_are_sized_by_each_engines_own_pace(tmp_path, rng):
    """One engine is twenty times slower: its units are smaller, the round ends with the others."""
    masks = np.unique(rng.random((200, P)) < 0.6, axis=0)
    plain, windows = pool_of(2, slow_file=str(tmp_path / "slow"), slow_s=0.2, delay_s=0.01)
    pool: Any = Recording(plain)
    try:
        while len(plain.processes) < 2:
            plain.next(0.2)
        scored, _ = score_all(pool, windows, masks)
    finally:
        plain.close()
    assert set(scored) == set(keys(masks))
    sizes: dict[str, list[int]] = {}
    for unit, engine in pool.units:
        sizes.setdefault(engine, []).append(len(unit.masks_MP))
    slow, fast = sorted(sizes.values(), key=sum)
    assert sum(slow) < sum(fast) / 2
    assert max(slow) <= 16  # 2 s at its pace are 10, and 16 share most of their prefixes
    assert max(fast) > 16


@pytest.mark.vllm
@pytest.mark.slow
def test_a_vllm_worker_killed_under_its_engine_costs_the_engine_and_nothing_else(tmp_path):
    """Two ranks: the engine's process lives on when one of its workers dies."""
    from lpserve.demo import FOLDER

    values = {
        "model": str(FOLDER / "model"),
        "calibration": str(FOLDER / "calibration.txt"),
        "heldout": str(FOLDER / "heldout.txt"),
        "num_windows": 2,
        "heldout_windows": 2,
        "budget": 90,
        "max_removed": 2,
        "progress_s": 1.0,
    }
    alone = run(config_from({**values, "out": str(tmp_path / "alone")}, "test"))
    ray_values = {
        "engine": "vllm",
        "pool": "ray",
        "engines": 1,
        "out": str(tmp_path / "run"),
        "engine_options": {"tensor_parallel_size": 2},
    }
    config = config_from({**values, **ray_values}, "test")
    path = tmp_path / "run" / "scores.sqlite"

    def workers() -> list[int]:
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it ended while it was looked at
                if "VLLM::Worker" in " ".join(child.cmdline()):
                    return [child.pid]
        return []

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    try:
        with start(config) as process:
            kill_when(process, path, 4, workers)
            output = process.communicate(timeout=900)[0]
    finally:
        del os.environ["VLLM_CPU_OMP_THREADS_BIND"]
    assert process.returncode == 0, output
    assert "is replaced" in output, output
    got, expected = stored_scores(path), stored_scores(tmp_path / "alone" / "scores.sqlite")
    assert got.keys() == expected.keys()
    assert max(abs(got[k] - expected[k]) / expected[k] for k in expected) < 1e-5
    plans = [
        [
            entry["removed"]
            for entry in json.loads((tmp_path / n / "plan.json").read_text())["plans"]
        ]
        for n in ("run", "alone")
    ]
    assert plans[0] == plans[1] == [entry.removed for entry in alone.outcome.plan.plans]
