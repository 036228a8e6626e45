"""`lpserve export`: the pruned checkpoint, checked in a fresh process."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_export(commands: Any) -> None:
    """Define `lpserve export`."""
    export = commands.add_parser(
        "export",
        help="write the pruned checkpoint and check it in a fresh process",
        description="Write the model without the layers that the plan removes for r. The result is "
        "reloaded with transformers alone in a fresh process and must score what the run scored. "
        "A mergekit recipe of the same pruning lies beside it.",
    )
    export.set_defaults(run=_export)
    export.add_argument("folder", metavar="RUN", help="folder of a finished run")
    wanted = export.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--remove", type=int, metavar="R", help="how many layers")
    wanted.add_argument(
        "--target",
        metavar="COST=X",
        help="the share of a cost, such as params=0.8, of a plan by cost",
    )
    export.add_argument(
        "--alternative",
        type=int,
        default=0,
        metavar="N",
        help="the plan's alternative of this number for R, from 1; 0: its best set (0)",
    )
    export.add_argument(
        "--slim",
        action="store_true",
        help="leave out the weights of absent parts of layers, which are zeros otherwise; "
        "transformers loads the result after `import lpserve.hf`, vLLM with lpserve installed",
    )
    export.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    export.add_argument("--plan", metavar="FILE", help="a plan of `lpserve plan` (RUN/plan.json)")
    export.add_argument("--model", metavar="DIR", help="the model, if it moved since the run")
    export.add_argument("--device", default="auto", help="where to check (auto)")
    export.add_argument(
        "--no-verify", action="store_true", help="skip the check; marked unverified"
    )


def _export(arguments: argparse.Namespace) -> int:
    return export_and_report(
        arguments.folder,
        arguments.remove if arguments.target is None else arguments.target,
        arguments.out,
        alternative=arguments.alternative,
        slim=arguments.slim,
        plan_path=arguments.plan,
        model=arguments.model,
        device=arguments.device,
        verify=not arguments.no_verify,
    )


def export_and_report(
    folder: str | Path,
    wanted: int | str,
    out: str | Path,
    *,
    alternative: int = 0,
    slim: bool = False,
    plan_path: str | None = None,
    model: str | None = None,
    device: str = "auto",
    verify: bool = True,
) -> int:
    """Export a run's pruned checkpoint and print what was checked; returns the exit code.

    The arguments are those of `lpserve.export.export.export_run`.
    """
    from lpserve.export.export import export_run
    from lpserve.export.report import SLIM_NOTE, ZEROED_NOTE

    report = export_run(
        folder,
        wanted,
        out,
        alternative=alternative,
        slim=slim,
        plan_path=plan_path,
        model=model,
        device=device,
        verify=verify,
    )
    if not report.verified:
        print(f"exported without {report.what} to {out}, NOT VERIFIED")
        return 0
    print(
        f"exported without {report.what} to {out}; reloaded in a fresh process: "
        f"perplexity {report.ppl:.4f} on {report.num_windows} calibration windows, within "
        f"{report.worst_relative_difference:.1e} of the run's scores"
    )
    if report.zeroed:
        print(ZEROED_NOTE)
    if report.left_out:
        print(SLIM_NOTE)
    return 0
