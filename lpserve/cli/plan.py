"""`lpserve plan`: another plan from a finished run's scores."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpserve.cli.arguments import numbers

if TYPE_CHECKING:
    from lpserve.analysis.record import RunRecord
    from lpserve.plan.plan import Plan


def add_plan(commands: Any) -> None:
    """Define `lpserve plan`."""
    plan = commands.add_parser(
        "plan",
        help="another plan from a finished run's scores, without scoring",
        description="Choose again from the sets that a run scored, under constraints. Prints the "
        "plan; --out writes it as JSON. Nothing is scored.",
    )
    plan.set_defaults(run=_plan)
    plan.add_argument("folder", metavar="RUN", help="folder of a finished run")
    plan.add_argument(
        "--protect", metavar="I,J,...", type=numbers, default=[], help="layers that must stay"
    )
    plan.add_argument("--max-removed", type=int, help="stop at this many removed layers")
    plan.add_argument("--out", metavar="FILE", help="write the plan here, as plan.json is written")


def _plan(arguments: argparse.Namespace) -> int:
    from lpserve.analysis.analyse import analyse
    from lpserve.analysis.build_plan import make_plan
    from lpserve.analysis.record import read_record
    from lpserve.store.files import write_text

    scored = read_record(arguments.folder)
    plan = make_plan(
        scored, analyse(scored), max_removed=arguments.max_removed, protected=arguments.protect
    )
    print_plan(plan)
    if arguments.protect:
        print("\n".join(_scored_within(scored, plan)))
    if arguments.out:
        write_text(Path(arguments.out), plan.to_json())
        print(f"written: {arguments.out}")
    return 0


def _scored_within(scored: RunRecord, plan: Plan) -> Iterator[str]:
    """What a plan under constraints was chosen from: sets that keep the protected layers, of those
    that a search without constraints happened to score."""
    masks_MP = scored.masks_MP[scored.scored_M()]
    within_M = masks_MP[:, list(plan.protected)].all(axis=1)
    removed_M = (~masks_MP).sum(axis=1)
    kept = ", ".join(map(str, plan.protected))
    yield f"chosen among the sets that the run scored and that keep {kept}:"
    free = plan.num_players - len(plan.protected)
    for entry in plan.plans:
        scored_here = int((within_M & (removed_M == entry.num_removed)).sum())
        there_are = math.comb(free, entry.num_removed)
        more = "" if scored_here == there_are else "; a better one may be among the others"
        yield f"{entry.num_removed:>6}  {scored_here} of {there_are} that there are{more}"
    yield ""


def print_plan(plan: Any) -> None:
    """Print a plan as a table: a row for each number of removed layers, with its warnings."""
    kinds = ["utility", "ppl"] if plan.reports_utility else ["ppl"]
    names = {"utility": plan.utility, "ppl": f"perplexity {plan.perplexity_of}".strip()}

    def figures(of: Any, kind: str, prefix: str = "") -> list[float | None]:
        return [getattr(of, f"{prefix}{side}_{kind}") for side in ("calibration", "heldout")]

    full = []
    for kind in kinds:
        mine, heldout = figures(plan, kind, "full_")
        held = f", held out {heldout:.4g}" if heldout is not None else ""
        full.append(f"{names[kind]} {mine:.4g}{held}")
    print(f"\n{plan.masks_scored} masks scored; all {plan.num_players} layers: {'; '.join(full)}")
    columns = ["calibration", "held out"]
    if plan.reports_utility:
        print(f"{'':>6}  {plan.utility:^24}  {names['ppl']:^24}".rstrip())
        columns *= 2
    header = "  ".join(f"{name:>11}" for name in columns)
    print(f"{'remove':>6}  {header}  layers")
    for entry in plan.plans:
        values = [value for kind in kinds for value in figures(entry, kind)]
        cells = "  ".join(f"{v:>11.4g}" if v is not None else f"{'-':>11}" for v in values)
        print(f"{entry.num_removed:>6}  {cells}  {', '.join(map(str, entry.removed))}")
        for warning in entry.warnings:
            print(f"{'':>6}  note: {warning}")
    print()
