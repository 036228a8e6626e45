"""The command line as users meet it: real processes on the bundled model."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from lpserve.testing.reference import window_nll
from lpserve.testing.runs import run_lpserve

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A short demonstration run: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "run"
    flags = ["--budget", 60, "--max-removed", 3, "--heldout-windows", 4, "--progress-s", 1]
    done = run_lpserve("run", "--demo", *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_demo_writes_every_file_and_says_where(demo):
    out, done = demo
    for name in ("plan.json", "shapley.csv", "report.html", "config.json", "events.jsonl"):
        assert (out / name).stat().st_size > 0
    assert str(out / "plan.json") in done.stdout
    assert "60 masks scored" in done.stdout
    lines = done.stderr.strip().splitlines()
    assert all("masks/s" in line for line in lines)


def test_the_exported_checkpoint_scores_what_the_plan_says(demo):
    out, done = demo
    entry = json.loads((out / "plan.json").read_text())["plans"][2]
    model = AutoModelForCausalLM.from_pretrained(out / "pruned-3", dtype="float32").eval()
    assert model.config.num_hidden_layers == 9
    with np.load(out / "windows.npz") as data:
        nll = window_nll(model, data["tokens"], data["scored"])
        ppl = math.exp(nll.sum() / data["scored"].sum())
    assert ppl == pytest.approx(entry["calibration_ppl"], rel=1e-5)
    assert "reloaded in a fresh process" in done.stdout


def test_plan_and_export_work_from_the_finished_run(demo, tmp_path):
    out, _ = demo
    protected = json.loads((out / "plan.json").read_text())["plans"][0]["removed"]
    plan = tmp_path / "other.json"
    done = run_lpserve("plan", out, "--protect", protected[0], "--max-removed", 1, "--out", plan)
    assert done.returncode == 0, done.stderr
    assert json.loads(plan.read_text())["plans"][0]["removed"] != protected
    done = run_lpserve("export", out, "--remove", 1, "--plan", plan, "--out", tmp_path / "pruned")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pruned" / "config.json").exists()
    done = run_lpserve("plan", out, "--alternatives", 2, "--min-distance", 1, "--out", plan)
    assert "alternatives, every two of a size unlike in at least 1 layers:" in done.stdout
    other = json.loads(plan.read_text())["plans"][2]["alternatives"][1]
    target = tmp_path / "second"
    argv = ("export", out, "--remove", 3, "--alternative", 2, "--plan", plan, "--out", target)
    done = run_lpserve(*argv)
    assert done.returncode == 0, done.stderr
    assert f"perplexity {other['calibration_ppl']:.4f}" in done.stdout


def test_scores_travel_through_a_table(demo, tmp_path):
    out, _ = demo
    assert run_lpserve("scores", out, "--out", tmp_path / "s.parquet").returncode == 0
    done = run_lpserve("scores", tmp_path / "copy.sqlite", "--import", tmp_path / "s.parquet")
    assert done.returncode == 0, done.stderr
    again = run_lpserve("scores", tmp_path / "copy.sqlite", "--import", tmp_path / "s.parquet")
    assert again.stdout.startswith("0 new scores")


@pytest.mark.parametrize("command", [[], ["run"], ["plan"], ["export"], ["scores"], ["cost"]])
def test_help_teaches(command):
    done = run_lpserve(*command, "--help")
    assert done.returncode == 0
    assert "lpserve" in done.stdout


def test_starting_the_command_line_loads_no_heavy_library():
    code = (
        "import sys, lpserve.cli.entry; "
        "print([m for m in ('torch', 'transformers', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
