"""`ray job submit -- lpserve run ...` on a real cluster with dashboard and token authentication."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lpserve.runner.run import run
from lpserve.testing.runs import make_config, stored_count, stored_scores

pytestmark = [pytest.mark.ray, pytest.mark.process]

RAY = str(Path(sys.executable).with_name("ray"))
CONFIG = """\
model = "synthetic"
engine = "synthetic"
calibration = "{calibration}"
heldout = "{heldout}"
budget = 90
max_removed = 4
pool = "ray"
engines = 2
progress_s = 0.5
out = "{out}"
[engine_options]
num_players = 8
game_seed = 3
delay_s = 0.15
"""


def free_ports(rng: np.random.Generator, count: int) -> list[int]:
    """Ports that nothing listens on, outside of those that Ray gives its workers."""
    found: list[int] = []
    while len(found) < count:
        port = int(rng.integers(20_000, 32_000))
        with socket.socket() as probe:
            if port not in found and probe.connect_ex(("127.0.0.1", port)):
                found.append(port)
    return found


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, module_rng):
    """A head node with a dashboard; returns a function that runs `ray job ...` against it."""
    port, dashboard, client, agent = free_ports(module_rng, 4)
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(module_rng.bytes(16).hex())
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        "--num-cpus",
        "2",
        "--port",
        str(port),
        "--dashboard-port",
        str(dashboard),
        "--ray-client-server-port",
        str(client),
        "--dashboard-agent-listen-port",
        str(agent),
        "--disable-usage-stats",
    ]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as head:
        address = f"http://127.0.0.1:{dashboard}"

        def job(action: str, *words: str) -> str:
            done = subprocess.run(
                [RAY, "job", action, "--address", address, *words],
                capture_output=True,
                text=True,
                env=environment,
                check=False,
            )
            return re.sub(r"\x1b\[[0-9]*m", "", done.stdout + done.stderr)

        wait_for(lambda: "JobDetails" in job("list") or "[]" in job("list"), "no dashboard")
        yield job
        head.terminate()


def wait_for(holds, otherwise: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


def test_a_job_is_stopped_midway_and_the_next_one_goes_on(jobs, tmp_path, texts):
    alone = run(make_config(tmp_path, texts, out=str(tmp_path / "alone")))
    stored = stored_scores(tmp_path / "alone" / "scores.sqlite")
    path = tmp_path / "out" / "scores.sqlite"
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(out=tmp_path / "out", **texts))
    entry = ["--", "lpserve", "run", "--config", str(config)]

    jobs("submit", "--submission-id", "first", "--no-wait", *entry)
    wait_for(lambda: stored_count(path) > 15, "nothing was scored")
    jobs("stop", "first")
    log = jobs("logs", "first")
    assert re.search(r"scoring: \d+/90 masks \| [\d.]+ masks/s", log), log
    assert "give the same command again to resume" in log
    assert "Job 'first' was stopped" in jobs("status", "first")
    before = stored_scores(path)
    assert 0 < len(before) < len(stored)

    log = jobs("submit", "--submission-id", "second", *entry)  # follows the log to its end
    assert re.search(r"[1-9]\d*/90 masks \([1-9]\d* from the store\)", log), log
    assert "Job 'second' succeeded" in log
    assert stored_scores(path) == stored
    assert all(stored[key] == value for key, value in before.items())
    told = re.search(r"(\d+) masks scored; all 8 layers", log)
    assert told
    assert int(told[1]) == alone.outcome.plan.masks_scored
    assert "Traceback" not in log


def test_a_mistake_in_a_job_is_one_line_in_its_log(jobs, tmp_path, texts):
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(out=tmp_path / "out", **texts) + "colour = 1\n")
    log = jobs("submit", "--submission-id", "bad", "--", "lpserve", "run", "--config", str(config))
    assert "lpserve: engine 'synthetic' has no option 'colour'" in log
    assert "Traceback" not in log
    assert "Job 'bad' failed" in log
