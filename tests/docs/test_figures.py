"""Figures in the prose are those of the study that is recorded to the last digit."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.study.agreement import Estimate, PointAnswer, choices
from lpserve.study.study import DIMENSIONS

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "tests" / "gate" / "expected" / "sweep_demo"


def rows(name: str) -> list[dict[str, str]]:
    with (STUDY / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def answers() -> list[PointAnswer]:
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows("values.csv"):
        values[row["point"]].append(float(row["value"]))
    sets: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows("sets.csv"):
        sets[row["point"]].append(row)
    return [
        PointAnswer(
            id=point,
            levels={d: own[0][d] for d in DIMENSIONS},
            values_P=np.array(values[point]),
            removed={
                int(row["num_removed"]): frozenset(map(int, row["removed"].split())) for row in own
            },
            heldout_nll={
                int(row["num_removed"]): math.log(float(row["heldout_ppl"])) for row in own
            },
        )
        for point, own in sets.items()
    ]


def share(value: Any, digits: int = 0) -> str:
    return f"{100 * float(value):.{digits}f}"


def interval(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def test_the_demo_study_is_told_as_it_is():
    found = {choice.dimension: choice for choice in choices(answers(), DIMENSIONS)}
    (novels,) = [
        pair for pair in found["calibration"].pairs if set(pair.levels) == {"sherlock", "dracula"}
    ]
    agree, alike, cost = novels.tau, novels.overlap[6], novels.heldout[6]
    sign = 1 if novels.levels[0] == "sherlock" else -1
    low, high = sorted(math.expm1(sign * bound) for bound in interval(cost))
    text = " ".join((ROOT / "docs" / "guide" / "study.md").read_text(encoding="utf-8").split())
    assert (
        f"share {share(alike.mean)}% of 6 removed layers (90% interval "
        f"{share(interval(alike)[0])} to {share(interval(alike)[1])}%)"
    ) in text
    assert (
        f"agree with tau {agree.mean:.2f} ({interval(agree)[0]:.2f} to {interval(agree)[1]:.2f}), "
        f"while seeds agree with {found['seed'].tau.mean:.2f}"
    ) in text
    assert (
        f"costs {share(math.expm1(sign * cost.mean), 1)}% perplexity on held-out text of both "
        f"({share(low, 1)} to {share(high, 1)}%;"
    ) in text
    counts = json.loads((STUDY / "sweep.json").read_text(encoding="utf-8"))
    told = f"{len(counts['points'])} points took {counts['scores_held']:,} scores of a mask"
    assert told in text
    assert counts["scores_twice"] == 0


def test_every_decoder_is_told_as_the_sweep_found_it():
    """`python scripts/decoders/sweep.py table > docs/engines/decoders.md`, and README's numbers."""
    folder = ROOT / "scripts" / "decoders"
    spec = importlib.util.spec_from_file_location("table", folder / "table.py")
    assert spec is not None
    assert spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    told = (ROOT / "docs" / "engines" / "decoders.md").read_text(encoding="utf-8")
    assert told == table.page(folder / "results")
    assert "| traceback" not in told
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    found = table.counts(folder / "results")
    assert (
        f"{found['scored']} of {found['models']} small models, one or more of every decoder of "
        f"transformers, are scored so, and {found['exported']} of {found['exports']} exported for "
        "every set tried" in readme
    )
