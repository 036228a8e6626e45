"""Engines as Ray actors: a real local cluster, real processes, real kills.

The synthetic game has a known answer, so a lost, doubled or wrong score shows. Final stores must
equal those of an undisturbed run of the local pool, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from lpserve.config import config_from
from lpserve.data.protocols import Protocol
from lpserve.errors import InputError
from lpserve.masks import keys
from lpserve.runner.run import run
from lpserve.testing.ray_pools import pool_of, ray_config, score_all, undisturbed
from lpserve.testing.runs import NUM_PLAYERS as P
from lpserve.testing.runs import run_lpserve, stored_count, stored_scores

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("local_ray"),
]


@pytest.mark.parametrize("engines", [1, 2, 4])
def test_any_number_of_engines_gives_the_local_pools_masks_scores_and_plan(
    engines,
    tmp_path,
    texts,
):
    alone, stored = undisturbed(tmp_path, texts)
    result = run(ray_config(tmp_path, texts, engines))
    assert stored_scores(tmp_path / "run" / "scores.sqlite") == stored
    assert result.outcome.plan == alone.outcome.plan
    assert keys(result.outcome.scored.masks_MP) == keys(alone.outcome.scored.masks_MP)


@pytest.mark.slow
def test_killed_engines_are_replaced_and_nothing_is_lost(tmp_path, texts, monkeypatch):
    import lpserve.scoring.ray.pool

    alone, stored = undisturbed(tmp_path, texts)
    pools = []

    class Watched(lpserve.scoring.ray.pool.RayPool):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            pools.append(self)
            self.kills_left = 3

        def next(self, timeout_s):
            result = super().next(timeout_s)
            if result is not None and self.kills_left and self.processes:
                self.kills_left -= 1
                with suppress(ProcessLookupError):  # killed before, and not noticed yet
                    os.kill(self.processes[0].pid, signal.SIGKILL)
            return result

    monkeypatch.setattr(lpserve.scoring.ray.pool, "RayPool", Watched)
    result = run(ray_config(tmp_path, texts, 2, delay_s=0.01))
    assert pools[0].restarts >= 1
    assert stored_scores(tmp_path / "run" / "scores.sqlite") == stored
    assert result.outcome.plan == alone.outcome.plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [("kill", "died"), ("hang", "did not answer within"), ("poison", "is poisoned")],
)
def test_a_mask_that_ends_engines_is_found_alone_and_the_rest_is_scored(kind, words, rng):
    masks = np.unique(rng.random((60, P)) < 0.6, axis=0)
    bad = masks[int(rng.integers(len(masks)))]
    text = "".join("01"[int(bit)] for bit in bad)
    # overdue units are repeated after about a second, long before the deadline
    options: dict[str, Any] = {kind: [text]}
    pool, windows = pool_of(3, deadline_s=6.0, **options)
    try:
        scored, given_up = score_all(pool, windows, masks)
    finally:
        pool.close()
    assert list(given_up) == keys(bad[None])
    assert words in next(iter(given_up.values()))
    assert set(scored) == set(keys(masks)) - set(given_up)


def test_an_engine_that_cannot_start_says_why_at_once(monkeypatch):
    import lpserve.scoring.ray.pool as ray_pool

    starts = []

    class Watched(ray_pool.EngineFleet):
        def _start(self) -> None:
            starts.append(self)
            super()._start()

    monkeypatch.setattr(ray_pool, "EngineFleet", Watched)
    with pytest.raises(InputError, match="has no option 'colour'"):
        pool_of(2, colour=1)
    assert len(starts) == 2  # none was tried again


@pytest.mark.slow
def test_a_slow_engine_does_not_hold_the_others(tmp_path, rng):
    """One engine never ends a mask; idle ones repeat what it holds, long before its deadline."""
    masks = np.unique(rng.random((40, P)) < 0.6, axis=0)
    slow = {"slow_file": str(tmp_path / "slow"), "slow_s": 3600.0}
    pool, windows = pool_of(3, deadline_s=120.0, delay_s=0.01, **slow)
    try:
        while len(pool.processes) < 3:
            time.sleep(0.2)
            pool.next(0.0)
        scored, given_up = score_all(pool, windows, masks)
    finally:
        pool.close()
    assert set(scored) == set(keys(masks))
    assert not given_up
    assert pool.restarts == 0  # its deadline was not waited for


@pytest.mark.slow
def test_a_run_of_the_ray_pool_resumes_with_the_local_one(tmp_path, texts):
    alone, stored = undisturbed(tmp_path, texts)
    from lpserve.errors import RunInterrupted

    path = tmp_path / "run" / "scores.sqlite"
    config = ray_config(tmp_path, texts, 2, delay_s=0.05)

    def interrupt() -> None:
        while not stored_count(path):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(RunInterrupted):
        run(config)
    thread.join()
    assert 0 < len(stored_scores(path)) < len(stored)
    values = {"pool": "local", "engines": 1}
    from lpserve.config import as_json

    result = run(config_from({**as_json(config), **values}, "test"))
    assert stored_scores(path) == stored
    assert result.outcome.plan == alone.outcome.plan


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_two_real_engines_give_the_local_pools_plan(engine, tmp_path):
    """The bundled model from the command line, engines in processes of their own."""
    flags = ["--demo", "--budget", 60, "--max-removed", 2, "--heldout-windows", 4]
    plans = []
    for name, more in (("local", []), ("ray", ["--pool", "ray", "--engines", 2])):
        out = tmp_path / name
        done = run_lpserve("run", *flags, "--engine", engine, *more, "--out", out)
        assert done.returncode == 0, done.stderr
        plans.append(json.loads((out / "plan.json").read_text())["plans"])
    for a, b in zip(*plans, strict=True):
        assert a["removed"] == b["removed"]
        assert a["calibration_ppl"] == pytest.approx(b["calibration_ppl"], rel=1e-5)


@pytest.mark.slow
def test_evaluations_and_tasks_over_actors_tell_what_one_engine_does(tmp_path):
    """Two actors with the bundled model each. Windows are divided over them, so that sums of
    float32 terms have another order: 1e-6 relative."""
    from lpserve.demo import FOLDER
    from lpserve.evaluation.evaluate import evaluate
    from lpserve.evaluation.settings import EvalConfig
    from lpserve.plan.layer_sets import LayerSet

    model, tasks = str(FOLDER / "model"), str(FOLDER / "tasks")
    text = tmp_path / "text.txt"
    text.write_text((FOLDER / "heldout.txt").read_text()[:20_000])
    told, plans = [], []
    for pool, engines in (("local", 1), ("ray", 2)):
        out = tmp_path / pool
        evaluation = EvalConfig(
            model=model,
            sets=(LayerSet("three", (2, 7, 8)), LayerSet("first", (0,))),
            texts={"novel": str(text)},
            tasks=("dracula_last_word",),
            include_path=tasks,
            limit=20,
            protocol=Protocol(length=128),
            pool=pool,
            engines=engines,
            out=str(out / "eval"),
        )
        told.append(evaluate(evaluation).results)
        values = {
            "model": model,
            "calibration": "task:dracula_last_word",
            "include_path": tasks,
            "utility": "task_margin",
            "num_windows": 6,
            "heldout_windows": 4,
            "budget": 30,
            "max_removed": 2,
            "pool": pool,
            "engines": engines,
            "out": str(out / "run"),
        }
        plans.append(run(config_from(values, "test")).outcome.plan)
    for mine, other in zip(*told, strict=True):
        assert (mine.layer_set, mine.measure) == (other.layer_set, other.measure)
        assert mine.value == pytest.approx(other.value, rel=1e-6)
    for mine, other in zip(plans[0].plans, plans[1].plans, strict=True):
        assert mine.removed == other.removed
        assert mine.calibration_utility == pytest.approx(other.calibration_utility, rel=1e-6)
        assert mine.heldout_utility == pytest.approx(other.heldout_utility, rel=1e-6)
