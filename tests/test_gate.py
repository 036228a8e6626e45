"""Results that no change of structure may change: exact equality with recorded files.

See `tests/gate/cases.py` for what is recorded and how to record anew. Runs read recorded scores, so
that they also show that stores of earlier versions are still read: not one score is made anew.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest

from lpserve.export.export import export_checkpoint
from lpserve.testing.reference import save_model, small_config
from tests.gate.cases import CASES, EXPECTED, arithmetic, command, run_case

EXPORTED = ("llama", "qwen3", "mistral-window", "gemma2", "gemma3", "gpt2", "gpt-neox", "mixtral")
REMOVED = [1, 4]


@pytest.fixture(scope="session")
def same_arithmetic() -> bool:
    """Whether this machine repeats the recorded digits; x86-64 with AVX2 does."""
    return arithmetic() == (EXPECTED / "arithmetic.txt").read_text().strip()


@pytest.mark.process
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CASES],
)
def test_results_stay_the_same_to_the_last_digit(case, same_arithmetic, tmp_path):
    found = run_case(case, tmp_path / "out")
    for name, text in found.items():
        expected = (EXPECTED / case.name / name).read_text(encoding="utf-8")
        if same_arithmetic:
            assert text == expected, f"{case.name}/{name} is not what was recorded"
        else:  # another processor rounds otherwise: structure and six digits must hold
            assert_alike(pieces(text), pieces(expected), f"{case.name}/{name}")
    if case.recorded_scores and case.arguments[0] == "run":
        copied = tmp_path / "scores.parquet"
        command("scores", str(tmp_path / "out.sqlite"), "--out", str(copied))
        recorded = parquet.read_metadata(EXPECTED / case.name / "scores.parquet").num_rows
        assert parquet.read_metadata(copied).num_rows == recorded


def pieces(text: str) -> list[float | str]:
    """Words and numbers of a text."""
    found: list[float | str] = []
    for word in text.replace(",", " ").replace('"', " ").split():
        try:
            found.append(float(word))
        except ValueError:
            found.append(word)
    return found


def assert_alike(found: list[Any], expected: list[Any], where: str) -> None:
    assert len(found) == len(expected), where
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, float) and isinstance(other, float):
            assert math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9), where
        else:
            assert one == other, where


@pytest.mark.parametrize("family", EXPORTED)
def test_exports_write_the_same_config_and_index(family, tmp_path):
    path = save_model(small_config(family), tmp_path / "model", 0, max_shard_size="60KB")
    export_checkpoint(path, REMOVED, tmp_path / "out", verify=False)
    assert exported(tmp_path / "out") == json.loads((EXPECTED / "exports.json").read_text())[family]


def exported(out: Path) -> dict[str, Any]:
    """Config, index and recipe of an exported checkpoint, versions and paths left out."""
    found: dict[str, Any] = {}
    for path in [*sorted(out.glob("*.json")), out / "mergekit.yaml"]:
        text = path.read_text(encoding="utf-8").replace(str(out.parent), "PARENT")
        lines = [line for line in text.splitlines() if not re.search("version|hash", line)]
        found[path.name] = lines
    return found
