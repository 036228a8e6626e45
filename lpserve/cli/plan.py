"""`lpserve plan`: another plan from a finished run's scores."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpserve.cli.arguments import add_alternatives_flags, layer_names
from lpserve.errors import InputError

if TYPE_CHECKING:
    from lpserve.analysis.record import RunRecord
    from lpserve.plan.constraint import Constraint
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
        "--protect", metavar="I,J,...", type=layer_names, default=[], help="layers that must stay"
    )
    plan.add_argument(
        "--force", metavar="I,J,...", type=layer_names, default=[], help="layers that must go"
    )
    plan.add_argument("--max-removed", type=int, help="stop at this many removed layers")
    plan.add_argument(
        "--target",
        metavar="COST=X,...",
        help="entries for shares of a cost that sets keep at most, such as params=0.9,0.8 (runs "
        "with --target or --players half record costs)",
    )
    add_alternatives_flags(plan)
    plan.add_argument("--out", metavar="FILE", help="write the plan here, as plan.json is written")


def _plan(arguments: argparse.Namespace) -> int:
    from lpserve.analysis.analyse import analyse
    from lpserve.analysis.build_plan import make_plan
    from lpserve.analysis.record import read_record
    from lpserve.model.players import named_players
    from lpserve.plan.constraint import constraint_of
    from lpserve.store.files import write_text

    scored = _with_alternatives(read_record(arguments.folder), arguments)
    within = constraint_of(
        scored.num_players,
        [*scored.protected, *named_players(scored.players, arguments.protect, "--protect")],
        [*scored.forced, *named_players(scored.players, arguments.force, "--force")],
    )
    plan = make_plan(
        scored,
        analyse(scored),
        max_removed=arguments.max_removed,
        within=within,
        target=arguments.target,
    )
    print_plan(plan)
    if within != scored.within:
        print("\n".join(_scored_within(scored, plan, within)))
    if arguments.out:
        write_text(Path(arguments.out), plan.to_json())
        print(f"written: {arguments.out}")
    return 0


def _with_alternatives(scored: RunRecord, arguments: argparse.Namespace) -> RunRecord:
    """The record, with other alternatives where flags ask for them."""
    flags = {
        key: value
        for key in ("alternatives", "min_distance")
        if (value := getattr(arguments, key)) is not None
    }
    changed = replace(scored, **flags)
    if changed.alternatives < 0:
        raise InputError(f"--alternatives must be at least 0: got {changed.alternatives}")
    if flags and not 1 <= changed.min_distance <= scored.max_removed:
        raise InputError(
            f"--min-distance must be 1..{scored.max_removed}, the most that sets of this run can "
            f"differ in: got {changed.min_distance}"
        )
    if "min_distance" in flags and not changed.alternatives:
        raise InputError("--min-distance is about alternatives: give --alternatives 3, say")
    return changed


def _scored_within(scored: RunRecord, plan: Plan, within: Constraint) -> Iterator[str]:
    """What a plan under constraints was chosen from: sets within, of those that a search without
    them happened to score."""
    masks_MP = scored.masks_MP[scored.scored_M()]
    within_M = within.holds(masks_MP)
    removed_M = (~masks_MP).sum(axis=1)
    if plan.target_cost:
        yield f"chosen among the {int(within_M.sum())} scored sets that {plan.constraint};"
        yield "better ones may be among the others: `lpserve run` with the same flags searches them"
        yield ""
        return
    yield (f"chosen among the sets that the run scored and that {plan.constraint}:")
    all_scored = True
    for entry in plan.plans:
        scored_here = int((within_M & (removed_M == entry.num_removed)).sum())
        there_are = within.count(entry.num_removed)
        all_scored &= scored_here == there_are
        yield f"{entry.num_removed:>6}  {scored_here} of {there_are} that there are"
    if not all_scored:
        yield "better ones may be among the others: `lpserve run` with the same flags searches them"
    yield ""


def _label(entry: Any) -> str:
    """What an entry is for: `5` players removed, `80%` of a cost."""
    return str(entry.num_removed) if entry.target is None else f"{100 * entry.target:g}%"


def print_plan(plan: Any) -> None:
    """Print a plan as a table: a row for each number of removed layers or share of a cost, then its
    alternatives and what to know of it."""
    from lpserve.plan.plan import COST_WORDS

    cost = plan.target_cost or "params"
    kinds = ["utility", "ppl"] if plan.reports_utility else ["ppl"]
    names = {"utility": plan.utility, "ppl": f"perplexity {plan.perplexity_of}".strip()}

    def figures(of: Any, kind: str, prefix: str = "") -> list[float | None]:
        return [getattr(of, f"{prefix}{side}_{kind}") for side in ("calibration", "heldout")]

    def row(label: str, of: Any) -> str:
        values = [value for kind in kinds for value in figures(of, kind)]
        cells = "  ".join(f"{v:>11.4g}" if v is not None else f"{'-':>11}" for v in values)
        left = f"  {plan.share_left(cost, of.removed):>6.1%}" if plan.costs else ""
        return f"{label} {cells}{left}  {plan.names(of.removed)}"

    full = []
    for kind in kinds:
        mine, heldout = figures(plan, kind, "full_")
        held = f", held out {heldout:.4g}" if heldout is not None else ""
        full.append(f"{names[kind]} {mine:.4g}{held}")
    everything = f"all {plan.num_players} {plan.unit}"
    print(f"\n{plan.masks_scored} masks scored; {everything}: {'; '.join(full)}")
    if plan.constraint:
        print(f"sets that {plan.constraint}")
    columns = ["calibration", "held out"]
    if plan.reports_utility:
        print(f"{'':>6}  {plan.utility:^24}  {names['ppl']:^24}".rstrip())
        columns *= 2
    header = "  ".join(f"{name:>11}" for name in columns)
    left = f"  {cost:>6}" if plan.costs else ""
    removed = " removed" if plan.target_cost else ""
    print(f"{'keep' if plan.target_cost else 'remove':>6}  {header}{left}  {plan.unit}{removed}")
    for entry in plan.plans:
        print(row(f"{_label(entry):>6}{'~' if entry.is_open else ' '}", entry))
    if plan.alternatives:
        least = f"at least {plan.min_distance} {plan.unit}"
        print(f"alternatives, every two of a size unlike in {least}:")
    for entry in plan.plans:
        for number, other in enumerate(entry.alternatives, start=1):
            print(row(f"{_label(entry):>3} #{number:<2}", other))
    if plan.costs:
        print(f"{cost}: what is left of {COST_WORDS[cost]}")
    for line in plan.notes:
        print(line)
    print()
