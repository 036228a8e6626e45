"""Sets and values of a study as tidy tables, in Parquet and CSV.

sets.parquet, sets.csv      a row for each point and number of removed layers; failed points too
values.parquet, values.csv  a row for each point and layer

Everything is read from the points' own folders (`PointResults.read`).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv as pa_csv
from pyarrow import parquet

from lpserve.plan.plan import Plan, load_plan
from lpserve.report.csv_rows import literal
from lpserve.store.files import write_whole
from lpserve.study.finished import Finished, SweepResult
from lpserve.study.study import DIMENSIONS

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


@dataclass(frozen=True, kw_only=True, slots=True)
class PointResults:
    """What the finished points of a study found, by the points' ids."""

    plans: Mapping[str, Plan]
    values: Mapping[str, list[dict[str, Any]]]
    """The rows of `values.csv`, in the order of the players."""

    @classmethod
    def read(cls, result: SweepResult) -> PointResults:
        """Read plan.json and shapley.csv of every finished point."""
        done = [run for run in result.points if not run.failed]
        return cls(
            plans={run.point.id: load_plan(run.folder / "plan.json") for run in done},
            values={run.point.id: _values(run) for run in done},
        )


def write_tables(result: SweepResult, found: PointResults) -> None:
    """Write both tables into the study's folder, each file completely or not at all."""
    out, wanted = result.study.out, result.study.removed
    sets = [row for run in result.points for row in _set_rows(run, found.plans, wanted)]
    _write_table(out / "sets", sets, _SETS)
    _write_table(out / "values", [row for rows in found.values.values() for row in rows], _VALUES)


def _set_rows(
    run: Finished, plans: Mapping[str, Plan], wanted: tuple[int, ...]
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
            "removed": plan.names(entry.removed).replace(",", ""),
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


def _write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    table = pa.Table.from_pylist(rows, schema=schema)
    write_whole(path.with_suffix(".parquet"), partial(parquet.write_table, table))
    safe = [{k: literal(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    table = pa.Table.from_pylist(safe, schema=schema)
    write_whole(path.with_suffix(".csv"), partial(pa_csv.write_csv, table))
