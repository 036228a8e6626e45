"""`lpserve sweep`: a study of many runs, as one job."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lpserve.cli.arguments import add_engine_flags, add_tracking_flags, engine_values
from lpserve.errors import InputError

_HELP = """\
Run a study: models x calibration mixtures x window counts and lengths x utilities x sizes x
surrogates x budgets x seeds, without scoring anything twice, and say which choices matter.

  lpserve sweep --demo
  lpserve sweep study.yaml --out study
  ray job submit --address ... -- lpserve sweep study.yaml --pool ray --engines auto --yes

A study file holds the keys of `lpserve run` and a table of keys with several levels:

  model: path/to/model
  calibration: {web: c4.txt, wiki: wiki.txt}
  heldout: wiki-test.txt
  budget: 400
  max_removed: 8
  removed: [4, 8]                  # sparsities in the tables (all of 1 to max_removed)
  sweep:
    calibration: {web: [web], wiki: [wiki], both: [web, wiki]}
    num_windows: [16, 64]
    utility: [neg_nll, ppl_ratio]
    seed: [0, 1, 2]

The same command goes on where it was stopped and tries failed points again.
"""


def add_sweep(commands: Any) -> None:
    """Define `lpserve sweep`."""
    command = commands.add_parser(
        "sweep",
        help="a study of many runs: which choices matter",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_sweep)
    add = command.add_argument
    add("study", nargs="?", metavar="STUDY", help="a .yaml or .toml file")
    add("--demo", action="store_true", help="a study of the bundled model and texts: 36 points")
    add("--out", metavar="DIR", help="points, scores and tables (study)")
    add(
        "--masks",
        help="shared (default): points that can read each other's scores share masks; "
        "own: every point chooses its own, as lpserve run would",
    )
    add("--yes", action="store_true", help="begin, however much work it is")
    add("--dry-run", action="store_true", help="print the points and the work, and stop")
    add("--model", metavar="DIR", help="checkpoint folder, if the file names none")
    add_tracking_flags(command)
    add_engine_flags(command)


def _sweep(arguments: argparse.Namespace) -> int:
    from lpserve.inputs.config_file import load_config_file
    from lpserve.report.tracking import Tracking
    from lpserve.study.cost import ASK_ABOVE_PFLOP, study_cost
    from lpserve.study.output import log_sweep, summary, write_sweep, write_sweep_record
    from lpserve.study.parse import study_of
    from lpserve.study.sweep import sweep
    from lpserve.study.windows import all_windows

    if bool(arguments.study) == arguments.demo:
        raise InputError("name a study file, or --demo")
    values: dict[str, Any] = {}
    source = "the demo study"
    if arguments.demo:
        from lpserve.demo import demo_study

        values = demo_study()
    else:
        source = f"study {arguments.study}"
        values = load_config_file(arguments.study)
    flags = engine_values(arguments)
    flags["engine_options"] = {**(values.get("engine_options") or {}), **flags["engine_options"]}
    values |= flags
    values |= {
        k: getattr(arguments, k)
        for k in ("out", "masks", "mlflow", "experiment")
        if getattr(arguments, k)
    }
    study = study_of(values, source)
    windows = all_windows(study)
    bounds = study_cost(study, windows)
    print(bounds.describe(), file=sys.stderr)
    if arguments.dry_run:
        for point in study.points:
            levels = ", ".join(f"{d} {point.levels[d]}" for d in study.varied)
            print(f"{point.id}: {levels}")
        return 0
    if bounds.ask and not arguments.yes:
        work = f"more than {ASK_ABOVE_PFLOP:g} PFLOP of work" if bounds.pflop else "unknown work"
        raise InputError(f"{source}: {work}; say --yes to begin, or --dry-run to see the points")
    tracking = None
    if study.base.mlflow:
        tracking = Tracking(study.base.mlflow, study.base.experiment)
    result = sweep(study, windows, log=lambda line: print(line, file=sys.stderr))
    write_sweep(result)
    write_sweep_record(result)
    if tracking is not None:
        try:
            log_sweep(result, tracking)
        except InputError as error:
            print(f"{error}; give the same command again to log the study", file=sys.stderr)
    print("\n".join(summary(result)))
    print(f"which choices matter: {study.out}/sweep.html; tables: sets.csv, values.csv, .parquet")
    if not result.failed:
        return 0
    failed = f"{len(result.failed)} of {len(result.points)} points failed, as told above"
    print(f"lpserve: {failed}; the same command tries them again", file=sys.stderr)
    return 1
