"""What a sweep leaves: sets and values as tidy tables (Parquet and CSV), and one HTML page.

sets.parquet, sets.csv      a row for each point and number of removed layers; failed points too
values.parquet, values.csv  a row for each point and layer
sweep.html                  which choices matter, with intervals over seeds; costs; every point

Everything is read off the points' own folders: tables and page say what these say.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as pa_csv
from pyarrow import parquet

from lpserve.plan.plan import Plan, load_plan
from lpserve.report.page import page
from lpserve.report.tracking import Metric, Tracking, log_run
from lpserve.store.files import write_text, write_whole
from lpserve.study.agreement import LEVEL, Choice, Estimate, PointAnswer, choices, tau
from lpserve.study.study import DIMENSIONS
from lpserve.study.sweep import Finished, SweepResult

MOST_IN_MAP = 64
"""Points up to which the page shows how every two of them agree."""
_TEXTS, _WHOLE, _REAL = pa.string(), pa.int64(), pa.float64()
_SETS = pa.schema(
    [
        ("point", _TEXTS),
        *((d, _TEXTS) for d in DIMENSIONS),
        ("status", _TEXTS),
        ("num_removed", _WHOLE),
        ("removed", _TEXTS),
        ("found_by", _TEXTS),
        ("calibration_ppl", _REAL),
        ("heldout_ppl", _REAL),
        ("full_calibration_ppl", _REAL),
        ("full_heldout_ppl", _REAL),
        ("calibration_utility", _REAL),
        ("heldout_utility", _REAL),
        ("full_calibration_utility", _REAL),
        ("full_heldout_utility", _REAL),
        ("masks", _WHOLE),
        ("masks_of", _TEXTS),
        ("scores", _WHOLE),
        ("scores_new", _WHOLE),
        ("layer_forwards", _WHOLE),
        ("seconds", _REAL),
        ("reason", _TEXTS),
    ]
)
_VALUES = pa.schema(
    [
        ("point", _TEXTS),
        *((d, _TEXTS) for d in DIMENSIONS),
        ("layer", _WHOLE),
        ("part", _TEXTS),
        ("value", _REAL),
        ("stderr", _REAL),
        ("low90", _REAL),
        ("high90", _REAL),
    ]
)


def write_sweep(result: SweepResult) -> None:
    """Write the tables and the page into the study's folder, each whole or not at all."""
    out = result.study.out
    plans, values = _read(result)
    sets = [row for run in result.points for row in _set_rows(run, plans, result.study.removed)]
    _write_table(out / "sets", sets, _SETS)
    _write_table(out / "values", [row for rows in values.values() for row in rows], _VALUES)
    write_text(out / "sweep.html", render(result, plans, values))


def _read(result: SweepResult) -> tuple[dict[str, Plan], dict[str, list[dict[str, Any]]]]:
    """Plan and values of every finished point."""
    done = [run for run in result.points if not run.failed]
    plans = {run.point.id: load_plan(run.folder / "plan.json") for run in done}
    return plans, {run.point.id: _values(run) for run in done}


def _set_rows(
    run: Finished, plans: dict[str, Plan], wanted: tuple[int, ...]
) -> list[dict[str, Any]]:
    known: dict[str, Any] = {
        "point": run.point.id,
        **run.point.levels,
        "status": "failed" if run.failed else "done",
        "masks": run.masks,
        "masks_of": run.masks_of,
        "scores": run.scores,
        "scores_new": run.scores_new,
        "layer_forwards": run.layer_forwards,
        "seconds": run.seconds,
        "reason": run.failed,
    }
    if run.failed:
        return [known]
    plan = plans[run.point.id]
    return [
        known
        | {
            "num_removed": entry.num_removed,
            "removed": " ".join(map(str, entry.removed)),
            "found_by": entry.source,
            "calibration_ppl": entry.calibration_ppl,
            "heldout_ppl": entry.heldout_ppl,
            "full_calibration_ppl": plan.full_calibration_ppl,
            "full_heldout_ppl": plan.full_heldout_ppl,
            "calibration_utility": entry.calibration_utility,
            "heldout_utility": entry.heldout_utility,
            "full_calibration_utility": plan.full_calibration_utility,
            "full_heldout_utility": plan.full_heldout_utility,
        }
        for entry in plan.plans
        if not wanted or entry.num_removed in wanted
    ]


def _values(run: Finished) -> list[dict[str, Any]]:
    with (run.folder / "shapley.csv").open(encoding="utf-8", newline="") as file:
        return [
            {
                "point": run.point.id,
                **run.point.levels,
                "layer": int(row["layer"]),
                "part": row["part"],
                "value": float(row["value"]),
                "stderr": float(row["total_stderr"]),
                "low90": float(row["low90"]),
                "high90": float(row["high90"]),
            }
            for row in csv.DictReader(file)
        ]


def _answers(
    result: SweepResult, plans: dict[str, Plan], values: dict[str, list[dict[str, Any]]]
) -> list[PointAnswer]:
    wanted = result.study.removed
    return [
        PointAnswer(
            id=run.point.id,
            levels=run.point.levels,
            values_P=np.array([row["value"] for row in values[run.point.id]]),
            removed={
                e.num_removed: frozenset(e.removed)
                for e in plans[run.point.id].plans
                if not wanted or e.num_removed in wanted
            },
            heldout_nll={
                e.num_removed: math.log(e.heldout_ppl) if e.heldout_ppl else math.nan
                for e in plans[run.point.id].plans
            },
        )
        for run in result.points
        if not run.failed
    ]


def render(
    result: SweepResult, plans: dict[str, Plan], values: dict[str, list[dict[str, Any]]]
) -> str:
    """The HTML page; needs no network and no script."""
    import lpserve

    study = result.study
    answers = _answers(result, plans, values)
    found = choices(answers, study.varied)
    sizes = sorted(set.intersection(*(set(a.removed) for a in answers))) if answers else []
    return page(
        "sweep.html.j2",
        result=result,
        study=study,
        varied=study.varied,
        constant={d: result.points[0].point.levels[d] for d in DIMENSIONS if d not in study.varied},
        choices=found,
        sizes=_some(sizes, 6),
        few_sizes=_some(sizes, 3),
        plans=plans,
        dots=_dots(found),
        agreement=_map(answers, study.varied),
        level=f"{100 * LEVEL:.0f}%",
        number=_number,
        seconds=sum(run.seconds for run in result.runs),
        version=lpserve.__version__,
        percents=_percents,
    )


def _some(sizes: Sequence[int], most: int) -> list[int]:
    """Sizes from the first to the last, no more than `most` of them."""
    places = np.linspace(0, len(sizes) - 1, most).round().astype(int)
    return list(sizes) if len(sizes) <= most else [sizes[place] for place in places]


def _number(estimate: Estimate, form: str = "%.2f") -> tuple[str, str]:
    """A mean and its interval; "" where there is none."""
    if math.isnan(estimate.mean):
        return "-", ""
    if estimate.low is None or estimate.high is None:
        return form % estimate.mean, ""
    return form % estimate.mean, f"{form % estimate.low} to {form % estimate.high}"


def _percents(difference: Estimate) -> tuple[str, str]:
    """A difference in nats as a change of perplexity in percent."""
    bounds = (difference.mean, difference.low, difference.high)
    percents = [None if b is None else 100 * math.expm1(b) for b in bounds]
    mean, low, high = percents
    return _number(Estimate(mean=math.nan if mean is None else mean, low=low, high=high), "%+.1f")


def _dots(found: Sequence[Choice]) -> dict[str, Any]:
    """Kendall's tau of every dimension on one axis from -1 to 1, in pixels."""
    width, left, right, step = 640, 130, 20, 28

    def x(value: float) -> float:
        return round(left + (max(-1.0, min(1.0, value)) + 1) / 2 * (width - left - right), 1)

    rows = [
        {
            "name": c.dimension,
            "y": 20 + step * i,
            "x": x(c.tau.mean),
            "low": None if c.tau.low is None else x(c.tau.low),
            "high": None if c.tau.high is None else x(c.tau.high),
            "text": " ".join(_number(c.tau)),
        }
        for i, c in enumerate(found)
        if not math.isnan(c.tau.mean)
    ]
    return {
        "rows": rows,
        "width": width,
        "height": 20 + step * len(rows) + 20,
        "left": left,
        "ticks": [(x(v), f"{v:g}") for v in (-1, -0.5, 0, 0.5, 1)],
    }


def _map(answers: Sequence[PointAnswer], varied: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of Kendall's tau between every two points of a model, the points in table order."""
    models = {a.levels["model"] for a in answers}
    if not 2 <= len(answers) <= MOST_IN_MAP or len(models) > 1:
        return []
    return [
        {
            "name": ", ".join(a.levels[d] for d in varied),
            "id": a.id,
            "cells": [tau(a, b) for b in answers],
        }
        for a in answers
    ]


def log_sweep(result: SweepResult, tracking: Tracking) -> None:
    """Log a study, and every point as a run inside it; raises InputError."""
    study, out = result.study, result.study.out
    plans, values = _read(result)
    counts = {
        "points": len(result.points),
        "points_failed": len(result.failed),
        "scores_held": result.scores_held,
        "scores_new": result.scores_new,
        "scores_read": result.scores_read,
        "seconds": sum(run.seconds for run in result.runs),
    }
    metrics = [Metric(name=name, value=float(count)) for name, count in counts.items()]
    metrics += [
        Metric(name=f"tau.{choice.dimension}", value=choice.tau.mean)
        for choice in choices(_answers(result, plans, values), study.varied)
    ]
    levels = {d: ", ".join(dict.fromkeys(p.levels[d] for p in study.points)) for d in DIMENSIONS}
    names = ("sweep.html", "sweep.json", "sets.csv", "values.csv", "sets.parquet", "values.parquet")
    parent = tracking.log(
        out,
        params={"masks": study.masks},
        metrics=metrics,
        files=[out / name for name in names],
        tags=levels,
    )
    for run in result.points:
        if not run.failed:
            rows = values[run.point.id]
            log_run(
                tracking,
                run.point.levels,
                run.folder,
                plans[run.point.id],
                [row["value"] for row in rows],
                [row["stderr"] for row in rows],
                parent,
            )


def summary(result: SweepResult) -> list[str]:
    """What a terminal is told at the end."""
    done = len(result.points) - len(result.failed)
    lines = [
        f"{done} of {len(result.points)} points done; {result.scores_held:,} scores of a mask on a "
        f"window were needed and are held, {_times(result.scores_twice)}; points read "
        f"{result.scores_read:,} that others, or they before, had made"
    ]
    lines += [f"failed: {run.point.id}: {run.failed}" for run in result.failed]
    return lines


def _times(twice: int) -> str:
    return f"{twice:,} of them made again" if twice else "each made once"


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    table = pa.Table.from_pylist(rows, schema=schema)
    for suffix, write in ((".parquet", parquet.write_table), (".csv", pa_csv.write_csv)):
        write_whole(path.with_suffix(suffix), partial(write, table))


def write_record(result: SweepResult) -> None:
    """sweep.json: the study as it was run, and its counts."""
    import lpserve

    study = result.study
    record = {
        "format": 1,
        "masks": study.masks,
        "removed": list(study.removed),
        "points": [
            {
                "point": r.point.id,
                "levels": r.point.levels,
                "masks_of": r.masks_of,
                "failed": r.failed,
            }
            for r in result.points
        ],
        "scores_held": result.scores_held,
        "scores_twice": result.scores_twice,
        "scores_new": result.scores_new,
        "scores_read": result.scores_read,
        "versions": {"lpserve": lpserve.__version__},
    }
    write_text(study.out / "sweep.json", json.dumps(record, indent=1) + "\n")
