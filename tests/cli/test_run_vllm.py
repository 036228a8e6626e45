"""`lpserve run --engine vllm` on the bundled model, as users meet it: real processes, no GPU.

The run must agree with the transformers engine's: same sets, or sets within 1e-5 of each other's
calibration perplexity, and stored scores within 1e-5 relative.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from lpserve.analysis.record import read_record
from lpserve.masks import keys
from lpserve.testing.runs import run_lpserve

pytestmark = [pytest.mark.vllm, pytest.mark.process]

FLAGS = [
    "--budget",
    40,
    "--max-removed",
    2,
    "--num-windows",
    2,
    "--heldout-windows",
    2,
    "--progress-s",
    1,
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """engine -> (folder, what it printed)."""
    made = {}
    for engine in ("transformers", "vllm"):
        out = tmp_path_factory.mktemp(engine) / "run"
        done = run_lpserve("run", "--demo", *FLAGS, "--engine", engine, "--out", out)
        assert done.returncode == 0, done.stderr
        made[engine] = out, done
    return made


def test_the_plan_is_the_transformers_engines(runs):
    plans = {
        engine: json.loads((out / "plan.json").read_text())["plans"]
        for engine, (out, _) in runs.items()
    }
    for a, b in zip(plans["transformers"], plans["vllm"], strict=True):
        same = a["removed"] == b["removed"]
        assert same or a["calibration_ppl"] == pytest.approx(b["calibration_ppl"], rel=1e-5)
        assert a["calibration_ppl"] == pytest.approx(b["calibration_ppl"], rel=1e-5)


def test_the_scores_are_the_transformers_engines(runs):
    scored = {engine: read_record(out) for engine, (out, _) in runs.items()}
    rows = {key: row for row, key in enumerate(keys(scored["transformers"].masks_MP))}
    common = [(rows[k], i) for i, k in enumerate(keys(scored["vllm"].masks_MP)) if k in rows]
    assert len(common) >= 33  # the same rounds, unless rounding turned a close choice
    a, b = (
        scored[engine].nll_MI[[pair[i] for pair in common]]
        for i, engine in enumerate(("transformers", "vllm"))
    )
    assert np.abs(a / b - 1).max() < 1e-5


def test_the_run_says_which_path_ran_and_why(runs):
    out, done = runs["vllm"]
    engine = json.loads((out / "config.json").read_text())["engine"]
    assert engine["path"] == "vllm/scoring"
    assert "self-check: within" in engine["path_reason"]
    assert engine["noise_nll"] == 0.0
    report = (out / "report.html").read_text()
    assert "vllm/scoring" in report
    assert engine["path_reason"] in report
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_finished_run_is_resumed_by_either_path_and_a_bad_option_is_refused(runs):
    out, _ = runs["vllm"]
    before = (out / "plan.json").read_bytes()
    again = run_lpserve("run", "--demo", *FLAGS, "--engine", "vllm", "--out", out)
    assert again.returncode == 0, again.stderr
    assert (out / "plan.json").read_bytes() == before
    assert "self-check" in json.loads((out / "config.json").read_text())["engine"]["path_reason"]
    for option, words in (
        ("enable_prefix_caching=true", "'enable_prefix_caching' is refused"),
        ("tensor_paralel_size=2", "did you mean 'tensor_parallel_size'?"),
    ):
        bad = run_lpserve(
            "run",
            "--demo",
            "--engine",
            "vllm",
            "--engine-option",
            option,
            "--out",
            out.parent / "bad",
        )
        assert bad.returncode == 2, bad.stderr
        assert words in bad.stderr
        assert len(bad.stderr.strip().splitlines()) == 1
        assert not (out.parent / "bad").exists()
