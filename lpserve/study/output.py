"""What a sweep leaves: tables, one HTML page, sweep.json, its runs in MLflow, a summary to print.

Everything is read from the points' own folders: tables and page say what these say.
"""

from __future__ import annotations

import json

from lpserve.report.tracking import Metric, Tracking, log_run
from lpserve.store.files import write_text
from lpserve.study.agreement import choices
from lpserve.study.finished import SweepResult
from lpserve.study.page import point_answers, sweep_page
from lpserve.study.study import DIMENSIONS
from lpserve.study.tables import PointResults, write_tables


def write_sweep(result: SweepResult) -> None:
    """Write the tables and sweep.html into the study's folder, each completely or not at all."""
    found = PointResults.read(result)
    write_tables(result, found)
    write_text(result.study.out / "sweep.html", sweep_page(result, found))


def write_sweep_record(result: SweepResult) -> None:
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


def log_sweep(result: SweepResult, tracking: Tracking) -> None:
    """Log a study, and every point as a run inside it; raises InputError."""
    study, out = result.study, result.study.out
    found = PointResults.read(result)
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
        for choice in choices(point_answers(result, found), study.varied)
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
            rows = found.values[run.point.id]
            log_run(
                tracking,
                config=run.point.levels,
                folder=run.folder,
                plan=found.plans[run.point.id],
                values_P=[row["value"] for row in rows],
                stderr_P=[row["stderr"] for row in rows],
                parent=parent,
            )


def summary(result: SweepResult) -> list[str]:
    """The lines that the command line prints at the end."""
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
