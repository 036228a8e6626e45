"""The sweep over every decoder of transformers: it serves as many as its recorded results say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "scripts" / "decoders" / "sweep.py"
STAGES = ("score", "halves", "export", "vllm")


def statuses(folder: Path, stage: str) -> Counter[str]:
    records = json.loads((folder / f"{stage}.json").read_text())["records"]
    return Counter(record["status"] for record in records.values())


def sweep(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, str(SWEEP), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_page_is_that_of_the_recorded_results():
    page = (ROOT / "docs" / "engines" / "decoders.md").read_text(encoding="utf-8")
    assert sweep("table") == page


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_recorded_is_served_wrong(stage):
    found = statuses(SWEEP.with_name("results"), stage)
    assert set(found) <= {"served", "refused", "not built"}
    assert found["served"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["score", "halves"])
def test_as_many_decoders_are_served_as_recorded(stage, tmp_path):
    """Half an hour each. Models that this transformers cannot build are none of ours to lose."""
    sweep(stage, "--out", str(tmp_path))
    recorded, found = statuses(SWEEP.with_name("results"), stage), statuses(tmp_path, stage)
    assert set(found) <= {"served", "refused", "not built"}
    assert found["served"] >= recorded["served"] - max(found["not built"] - 1, 0)
