"""cluster/lpserve.sbatch for real: real Ray nodes and a real run; Slurm's own commands stand in.

`srun` starts its command as often as it is asked to on this machine, `scontrol` names hosts and
writes down what it is told. Only processes that a test started are ended.

Not covered here: Slurm itself, several machines, GPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lpserve.runner.run import run
from lpserve.testing.runs import make_config, stored_scores

pytestmark = [pytest.mark.ray, pytest.mark.process]

ROOT = Path(__file__).parents[2]
SRUN = """#!/usr/bin/env bash
tasks=1
while [ "$#" -gt 0 ]; do
  case "$1" in
    --ntasks=*) tasks="${1#--ntasks=}" ;;
    --*) ;;
    *) break ;;
  esac
  shift
done
pids=()
for ((i = 0; i < tasks; i++)); do "$@" & pids+=("$!"); done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
wait
wait
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
  show) printf '%s\\n' node0 node1 ;;
  *) echo "$@" >> "$SCONTROL_LOG" ;;
esac
"""


@pytest.fixture
def allocation(tmp_path):
    """Environment of a batch script, with stand-ins for Slurm's commands on its path."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    python = bin_dir / "lpserve"
    python.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -m lpserve "$@"\n')
    python.chmod(0o755)
    job = 500_000 + os.getpid() % 9_000
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    yield kept | {
        "PATH": f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_CPUS_PER_TASK": "1",
        "LPSERVE_HEAD_IP": "127.0.0.1",
        "LPSERVE_RAY_PORT": str(21_000 + os.getpid() % 9_000),
        "LPSERVE_HEAD_ARGS": "--include-dashboard=false "
        f"--ray-client-server-port={30_000 + os.getpid() % 2_000}",
        "LPSERVE_RAY_ARGS": "--object-store-memory=100000000 --dashboard-agent-listen-port=0",
        "LPSERVE_JOIN_S": "120",
    }
    shutil.rmtree(f"/tmp/ray-{job}", ignore_errors=True)


def flags(tmp_path: Path, texts: dict[str, str], delay_s: float) -> list[str]:
    options = {"num_players": 8, "game_seed": 3, "delay_s": delay_s}
    argv = ["--engine", "synthetic", "--model", "synthetic", "--budget", "90"]
    argv += ["--max-removed", "4", "--progress-s", "1", "--out", str(tmp_path / "run")]
    argv += ["--calibration", texts["calibration"], "--heldout", texts["heldout"]]
    for key, value in options.items():
        argv += ["--engine-option", f"{key}={value}"]
    return argv


def start(environment: dict[str, str], nodes: int, argv: list[str], log: Path) -> subprocess.Popen:
    with log.open("ab") as file:
        return subprocess.Popen(
            ["bash", str(ROOT / "cluster" / "lpserve.sbatch"), *argv],
            env=environment | {"SLURM_JOB_NUM_NODES": str(nodes)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, log: Path) -> int:
    """Wait for the script; on failure end what it started, by its process tree."""
    try:
        return process.wait(150)
    except subprocess.TimeoutExpired:
        tree = psutil.Process(process.pid)
        for child in [*tree.children(recursive=True), tree]:
            child.kill()
        pytest.fail(f"the script did not end:\n{log.read_text()}")


def some_scores(store: Path) -> bool:
    """Whether a run has stored a score; it may be at work on the file."""
    if not store.exists():
        return False
    try:
        return bool(stored_scores(store))
    except sqlite3.Error:
        return False


def ray_processes(environment: dict[str, str]) -> list[str]:
    """Command lines of Ray processes of this job's session."""
    mark = f"/tmp/ray-{environment['SLURM_JOB_ID']}"
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if mark in line:
            found.append(line)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_runs_on_all_nodes_and_leaves_no_ray_behind(tmp_path, texts, allocation, nodes):
    log = tmp_path / "job.log"
    code = finish(start(allocation, nodes, flags(tmp_path, texts, 0.02), log), log)
    text = log.read_text()
    assert code == 0, text
    assert f"{nodes} nodes have joined" in text
    assert "masks/s" in text
    assert (tmp_path / "run" / "plan.json").exists()
    alone = make_config(tmp_path, texts, out=str(tmp_path / "alone"))
    run(alone)
    stored = stored_scores(tmp_path / "alone" / "scores.sqlite")
    assert stored_scores(tmp_path / "run" / "scores.sqlite") == stored
    assert ray_processes(allocation) == []
    assert not Path(allocation["SCONTROL_LOG"]).exists()


@pytest.mark.slow
def test_a_job_stopped_at_its_time_limit_is_requeued_and_resumes(tmp_path, texts, allocation):
    log = tmp_path / "job.log"
    process = start(allocation, 1, flags(tmp_path, texts, 0.3), log)
    events, store = tmp_path / "run" / "events.jsonl", tmp_path / "run" / "scores.sqlite"
    deadline = time.monotonic() + 120
    while process.poll() is None and not some_scores(store) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGUSR1)
    assert finish(process, log) == 130, log.read_text()
    asked = Path(allocation["SCONTROL_LOG"]).read_text().split()
    assert asked == ["requeue", allocation["SLURM_JOB_ID"]]
    before = stored_scores(tmp_path / "run" / "scores.sqlite")
    assert before
    assert ray_processes(allocation) == []
    again = start(allocation, 1, flags(tmp_path, texts, 0.3), log)
    assert finish(again, log) == 0, log.read_text()
    after = stored_scores(tmp_path / "run" / "scores.sqlite")
    assert before.items() <= after.items()
    names = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert "interrupted" in names
    assert names[-1] == "finished"


@pytest.mark.slow
def test_a_job_whose_ray_does_not_start_ends_with_its_log(tmp_path, texts, allocation):
    allocation |= {"LPSERVE_RAY_ARGS": "--no-such-argument"}
    log = tmp_path / "job.log"
    code = finish(start(allocation, 1, flags(tmp_path, texts, 0.0), log), log)
    assert code == 1
    assert "Ray did not start" in log.read_text()
    assert not (tmp_path / "run").exists()
