"""Several Ray nodes on this machine: engines come and go with nodes, find room, and show figures.

Real raylets (`ray.cluster_utils.Cluster`), real kills. GPUs are resources by name only here, so
what is tested is where engines are placed, not that vLLM runs there.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.masks import keys
from lpserve.runner.run import run
from lpserve.scoring.progress import RunState
from lpserve.scoring.ray.cluster import _left_behind
from lpserve.testing.ray_pools import pool_of, ray_config, score_all, undisturbed
from lpserve.testing.runs import NUM_PLAYERS as P
from lpserve.testing.runs import stored_count, stored_scores
from lpserve.types import Work

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


def wait_until(pool, holds, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{len(pool.processes)} engines take part"
        pool.next(0.2)


def test_auto_engines_follow_the_nodes(cluster, rng):
    masks = np.unique(rng.random((60, P)) < 0.6, axis=0)
    first = cluster.add_node(num_cpus=1)
    told = []
    pool, windows = pool_of(None, log=told.append, delay_s=0.01)
    try:
        assert len(pool.processes) == 1
        second = cluster.add_node(num_cpus=2)
        wait_until(pool, lambda: len(pool.processes) == 3)
        assert len({at.node for at in pool.processes}) == 2
        cluster.remove_node(first, allow_graceful=False)
        wait_until(pool, lambda: len(pool.processes) == 2)
        assert {at.node for at in pool.processes} == {second.node_id}
        scored, given_up = score_all(pool, windows, masks)
        assert set(scored) == set(keys(masks))
        assert not given_up
    finally:
        pool.close()
    assert any("is replaced" in line for line in told)


def test_a_run_outlives_a_killed_raylet(cluster, tmp_path, texts):
    alone, stored = undisturbed(tmp_path, texts)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    config = ray_config(tmp_path, texts, 2, delay_s=0.05)
    path = tmp_path / "run" / "scores.sqlite"

    import threading

    def kill_one() -> None:
        while stored_count(path) < 10:
            time.sleep(0.05)
        cluster.remove_node(nodes[0], allow_graceful=False)

    thread = threading.Thread(target=kill_one)
    thread.start()
    result = run(config)
    thread.join()
    assert stored_scores(path) == stored
    assert result.outcome.plan == alone.outcome.plan


def test_an_engine_larger_than_every_node_is_refused_at_once(cluster):
    cluster.add_node(num_cpus=2, num_gpus=4)
    with pytest.raises(InputError, match="needs 1 CPU and 8 GPUs, and no node") as refused:
        pool_of(1, tensor_parallel_size=8)
    assert "4 GPUs" in str(refused.value)


def test_each_engines_gpus_lie_on_one_node(cluster):
    for _ in range(2):
        cluster.add_node(num_cpus=4, num_gpus=4)
    pool, _ = pool_of(None, tensor_parallel_size=2)
    try:
        wait_until(pool, lambda: len(pool.processes) == 4)
        places = [(at.node, gpu) for at in pool.processes for gpu in at.gpus]
        assert all(len(at.gpus) == 2 for at in pool.processes)
        assert len(set(places)) == 8  # none is shared
    finally:
        pool.close()


def test_an_engine_over_two_nodes_holds_both_and_gives_them_back(cluster):
    import ray

    for _ in range(2):
        cluster.add_node(num_cpus=2, num_gpus=4)
    pool, _ = pool_of(None, tensor_parallel_size=4, pipeline_parallel_size=2)
    try:
        assert len(pool.processes) == 1
        assert ray.available_resources().get("GPU", 0) == 0
    finally:
        pool.close()
    deadline = time.monotonic() + 30
    while ray.available_resources().get("GPU", 0) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_figures_are_seen_at_the_prometheus_endpoint(cluster):
    import ray

    cluster.add_node(num_cpus=1)
    pool, _ = pool_of(1)
    work = Work(layer_forwards=300, skip_layer_forwards=1000)
    state = RunState(done=120, reused=20, total=500, work=work, quarantined=2)
    wanted = {
        "ray_lpserve_masks_scored_total": 100.0,
        "ray_lpserve_layer_forwards_saved_total": 700.0,
        "ray_lpserve_masks_quarantined_total": 2.0,
        "ray_lpserve_engine_restarts_total": 1.0,
        "ray_lpserve_engines": 1.0,
        "ray_lpserve_units_in_flight": 0.0,
    }
    speed = "ray_lpserve_masks_per_second"
    try:
        os.kill(pool.processes[0].pid, signal.SIGKILL)
        wait_until(pool, lambda: pool.restarts and pool.processes)
        pool.publish(RunState())
        time.sleep(0.5)
        pool.publish(state)
        found: dict[str, float] = {}
        deadline = time.monotonic() + 60
        while {k: v for k, v in found.items() if k != speed} != wanted or speed not in found:
            assert time.monotonic() < deadline, found
            time.sleep(1.0)
            for node in ray.nodes():
                found |= figures(node, {*wanted, speed})
        assert 20.0 < found[speed] <= 200.0  # 100 masks in half a second, or somewhat more
    finally:
        pool.close()


def figures(node, names) -> dict[str, float]:
    """Samples of these names at a node's endpoint."""
    if not node["Alive"]:
        return {}
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    samples = [line.partition("{") for line in lines if not line.startswith("#")]
    return {n: float(rest.rpartition(" ")[2]) for n, _, rest in samples if n in names}


@pytest.mark.parametrize("listening", [True, False])
def test_only_an_address_that_nothing_answers_at_is_left_behind(listening, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert not _left_behind()
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not listening:
            server.close()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
        assert _left_behind() is not listening


@pytest.mark.slow
def test_a_cluster_is_started_where_an_earlier_one_left_its_address():
    """In a process of its own, since Ray reads the folder once; sockets need a short path."""
    code = "from lpserve.scoring.ray.cluster import connect; print(connect())"
    with tempfile.TemporaryDirectory(prefix="lp") as folder, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nothing else takes the port, and nothing listens
        address = Path(folder) / "ray" / "ray_current_cluster"
        address.parent.mkdir()
        address.write_text(f"127.0.0.1:{closed.getsockname()[1]}")
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"RAY_TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.stdout.split() == ["True"], done.stderr[-500:]
