"""Runs and studies logged to a real MLflow server, and what becomes of a run when there is none."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

import lpserve
from lpserve.cli.entry import main
from lpserve.errors import InputError
from lpserve.report.tracking import FOLDER_TAG, Metric, Tracking
from lpserve.runner.run import run
from lpserve.scoring.progress import Progress
from lpserve.testing.runs import make_config, small_study_values

pytestmark = pytest.mark.filterwarnings("ignore")  # mlflow's own


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An MLflow server with a database and a folder of artefacts of its own."""
    with serving(tmp_path_factory.mktemp("mlflow"), free_port()) as uri:
        yield uri


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(folder: Path, port: int):
    uri = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, cwd=folder
        )
        try:
            wait_for(f"{uri}/health", process, folder / "log")
            yield uri
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def ask(server: str, path: str, **values):
    """MLflow's REST API, without its client."""
    body = json.dumps(values).encode()
    request = urllib.request.Request(
        f"{server}/api/2.0/mlflow/{path}", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def runs_of(server: str, experiment: str) -> list[dict]:
    found = urllib.request.urlopen(
        f"{server}/api/2.0/mlflow/experiments/get-by-name?experiment_name={experiment}", timeout=30
    )
    number = json.load(found)["experiment"]["experiment_id"]
    return ask(server, "runs/search", experiment_ids=[number]).get("runs", [])


def history(server: str, run_id: str, metric: str) -> dict[int, float]:
    """step -> the value that was logged last."""
    url = f"{server}/api/2.0/mlflow/metrics/get-history?run_id={run_id}&metric_key={metric}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        rows = json.load(answer)["metrics"]
    return {int(row.get("step", 0)): row["value"] for row in rows}


def artefacts(server: str, run_id: str) -> set[str]:
    url = f"{server}/api/2.0/mlflow/artifacts/list?run_id={run_id}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        return {file["path"] for file in json.load(answer)["files"]}


def named(entries: list[dict]) -> dict[str, str]:
    return {entry["key"]: entry["value"] for entry in entries}


@pytest.mark.process
def test_a_run_is_logged_once_and_brought_up_to_date(server, tmp_path, texts):
    config = make_config(tmp_path, texts, mlflow=server, experiment="one")
    plan = run(config).outcome.plan
    (logged,) = runs_of(server, "one")
    assert logged["info"]["status"] == "FINISHED"
    params = named(logged["data"]["params"])
    assert params["budget"] == "90"
    assert params["engine_options.num_players"] == str(plan.num_players)
    assert named(logged["data"]["tags"])[FOLDER_TAG].endswith(str(tmp_path / "run"))
    run_id = logged["info"]["run_id"]
    ppl = history(server, run_id, "calibration_ppl")
    expected = {0: plan.full_calibration_ppl}
    expected |= {e.num_removed: e.calibration_ppl for e in plan.plans}
    assert ppl == pytest.approx(expected)
    assert set(history(server, run_id, "value")) == set(range(plan.num_players))
    files = {"plan.json", "shapley.csv", "report.html", "config.json", "interactions.csv"}
    assert artefacts(server, run_id) == files
    more = run(make_config(tmp_path, texts, mlflow=server, experiment="one", budget=110))
    (again,) = runs_of(server, "one")
    assert again["info"]["run_id"] == run_id
    masks = history(server, run_id, "masks_scored")
    assert masks == {0: more.outcome.plan.masks_scored}
    assert masks[0] > plan.masks_scored


@pytest.mark.process
@pytest.mark.slow
def test_a_study_is_a_run_with_its_points_inside(server, tmp_path, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump(small_study_values(tmp_path, sweep={"utility": ["neg_nll", "ppl_ratio"]}))
    )
    parent, points, tags = "", [], {}
    for _ in range(2):  # the second time changes nothing
        assert main(["sweep", str(path), "--mlflow", server, "--experiment", "two"]) == 0
        logged = {r["info"]["run_id"]: r for r in runs_of(server, "two")}
        tags = {run_id: named(r["data"]["tags"]) for run_id, r in logged.items()}
        (parent,) = [run_id for run_id, own in tags.items() if "mlflow.parentRunId" not in own]
        points = [run_id for run_id in logged if run_id != parent]
        assert len(points) == 2
        assert {tags[run_id]["mlflow.parentRunId"] for run_id in points} == {parent}
        utilities = {named(logged[run_id]["data"]["params"])["utility"] for run_id in points}
        assert utilities == {"neg_nll", "ppl_ratio"}
    assert history(server, parent, "points") == {0: 2.0}
    assert set(history(server, parent, "tau.utility")) == {0}
    assert {"sweep.html", "sets.parquet", "values.csv"} <= artefacts(server, parent)
    for run_id in points:
        folder = Path(tags[run_id][FOLDER_TAG].partition(":")[2])
        plan = lpserve.load_plan(folder / "plan.json")
        ppl = history(server, run_id, "heldout_ppl")
        assert ppl[2] == pytest.approx(plan.plans[1].heldout_ppl)


def test_a_server_that_is_not_there_is_refused_before_anything_begins(
    tmp_path, texts, capsys, monkeypatch
):
    from urllib3.util import connection

    attempts, connect = [], connection.create_connection
    monkeypatch.setattr(
        connection, "create_connection",
        lambda address, *a, **k: attempts.append(address) or connect(address, *a, **k),
    )  # fmt: skip
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = taken.getsockname()
        uri = f"http://127.0.0.1:{address[1]}"
        with pytest.raises(InputError, match=f"mlflow {uri} cannot be used: ") as error:
            run(make_config(tmp_path, texts, mlflow=uri))
    assert attempts == [address] * 2  # and not MLflow's eight
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert main(["run", "--demo", "--mlflow", "nonsense://x", "--out", str(tmp_path / "r")]) == 2
    assert "mlflow nonsense://x cannot be used: " in capsys.readouterr().err


class Leaving(Progress):
    """Has the server killed once held-out windows are scored."""

    def __init__(self, leave) -> None:
        super().__init__(interval_s=100.0)
        self._leave = leave

    def begin(self, stage: str, total: int) -> None:
        super().begin(stage, total)
        if stage == "held-out":
            self._leave()


@pytest.mark.process
@pytest.mark.slow  # two servers of its own
def test_a_server_that_goes_away_costs_the_log_and_not_the_run(tmp_path, texts, capsys):
    (tmp_path / "mlflow").mkdir()
    port = free_port()
    with ExitStack() as stack:
        uri = stack.enter_context(serving(tmp_path / "mlflow", port))
        config = make_config(tmp_path, texts, mlflow=uri, experiment="three")
        result = run(config, Leaving(stack.close))
    assert (result.folder / "plan.json").exists()
    assert "give the same command again to log it" in capsys.readouterr().err
    with serving(tmp_path / "mlflow", port):
        run(config)
        assert len(runs_of(uri, "three")) == 1


@pytest.mark.process
def test_many_numbers_and_long_texts_fit(server, tmp_path):
    """More than MLflow takes in a call: 150 parameters, 2,500 metrics, a text of 9,000 letters."""
    params = {f"p{i}": i for i in range(150)} | {"long": "x" * 9000, "c4 (1)&x": "odd"}
    tmp_path = tmp_path / "it's here"
    tmp_path.mkdir()
    metrics = [Metric(name="m", value=float(i), step=i) for i in range(2500)]
    metrics.append(Metric(name="lost", value=float("nan")))
    tracking = Tracking(server, "four")
    run_id = tracking.log(tmp_path, params=params, metrics=metrics, files=[tmp_path / "gone"])
    (logged,) = runs_of(server, "four")
    assert len(logged["data"]["params"]) == 152
    assert tracking.log(tmp_path, params={}, metrics=[], files=[]) == run_id
    assert len(history(server, run_id, "m")) == 2500
    assert "lost" not in named(logged["data"]["metrics"])


@pytest.mark.process
def test_mlflow_is_not_loaded_unless_asked(tmp_path, texts):
    code = (
        "import sys; from lpserve.testing.runs import make_config; from pathlib import Path\n"
        "from lpserve.runner.run import run\n"
        f"run(make_config(Path({str(tmp_path)!r}), {texts!r}))\n"
        "assert not any(name.split('.')[0] == 'mlflow' for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
