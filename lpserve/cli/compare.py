"""`lpserve baselines`: the rivals on the same engines and windows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lpserve.cli.arguments import (
    add_engine_flags,
    add_window_flags,
    engine_values,
    window_values,
)
from lpserve.rivals.registry import RIVALS

_HELP = f"""\
The rivals' searches and ours on the same engines and windows, one table: for every number of
removed layers the best set that each found within --budget masks, and what that cost it.

  lpserve baselines --demo
  lpserve baselines --model Llama-2-7b --calibration c4.txt --heldout wiki.txt --max-removed 12
  lpserve baselines --model Llama-2-7b --calibration c4.txt --rivals lpserve,greedy,evopress \\
                    --sets layer_drop_config.txt

rivals: {", ".join(RIVALS)} (all).
"""


def add_baselines(commands: Any) -> None:
    """Define `lpserve baselines`."""
    command = commands.add_parser(
        "baselines",
        help="rivals' searches and ours on the same engines and windows",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_baselines)
    add = command.add_argument
    add("--demo", action="store_true", help="the bundled model and texts")
    add("--model", metavar="DIR", help="checkpoint folder")
    add_window_flags(command)
    add("--rivals", metavar="A,B", help="whom to compare (all)")
    add(
        "--sets",
        action="append",
        default=[],
        metavar="PATH",
        help="sets from elsewhere, as for lpserve eval; may be repeated",
    )
    add("--max-removed", type=int, help="sets of 1..N removed layers (3/8 of the layers)")
    add(
        "--target",
        metavar="COST=X,...",
        help="in its place: the best sets that keep at most these shares of all layers' params, "
        "flops or kv, such as params=0.9,0.8",
    )
    add(
        "--budget",
        type=int,
        help="most masks of each rival, those on few windows by their share (400)",
    )
    add("--seed", type=int, help="seed of random searches (0)")
    add("--out", metavar="DIR", help="scores and results (baselines)")
    add_engine_flags(command)


def _baselines(arguments: argparse.Namespace) -> int:
    from lpserve.config import EngineConfig
    from lpserve.evaluation.evaluate import sets_from
    from lpserve.rivals.compare import CompareConfig, compare

    values = window_values(arguments, ("max_removed", "target", "budget", "seed", "out"))
    if arguments.demo:
        from lpserve.demo import demo_values

        if "target" not in values:
            values.setdefault("max_removed", demo_values()["max_removed"])
    if arguments.rivals:
        values["rivals"] = tuple(r.strip() for r in arguments.rivals.split(",") if r.strip())
    engine = EngineConfig(**{"model": values["model"], **engine_values(arguments)})
    values["sets"] = tuple(sets_from(arguments.sets, engine))
    config = CompareConfig(**values)
    comparison = compare(config)
    print("\n".join(comparison_table(comparison)))
    print()
    for cost in comparison.costs:
        parts = [
            f"{cost.masks:,} masks, {cost.tokens:,} tokens, "
            f"{cost.layer_forwards:,.0f} layer-forwards"
        ] * bool(cost.masks)
        parts += [cost.note] * bool(cost.note)
        print(f"{cost.rival:>9}: {'; '.join(parts)}  [{RIVALS[cost.rival].source}]")
    print(
        f"\n{comparison.masks_scored} masks scored, {comparison.masks_read} read from the store; "
        f"results: {config.out}/results.csv, costs.csv"
    )
    return 0


def comparison_table(comparison: Any) -> list[str]:
    """Lines of a table: a row for each rival, a column for each number of removed layers, or for
    each share of a cost.

    Cells hold the perplexity on calibration windows, held out in brackets; the best of each column
    has a star.
    """
    columns = sorted({_column(f) for f in comparison.found})
    best = {c: min(f.calibration_ppl for f in comparison.found if _column(f) == c) for c in columns}
    by_cost = any(f.target is not None for f in comparison.found)
    named = [f"{-100 * share:g}%" if share else str(number) for share, number in columns]
    rows = [["at most" if by_cost else "removed", *named]]
    names = list(dict.fromkeys(f.rival for f in comparison.found))
    for name in names:
        cells = {
            _column(f): f"{f.calibration_ppl:.4g}"
            + ("*" if f.calibration_ppl <= best[_column(f)] else "")
            + f" ({f.heldout_ppl:.4g})"
            for f in comparison.found
            if f.rival == name
        }
        rows.append([name, *(cells.get(c, "-") for c in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    head = (
        f"perplexity on calibration windows (held out), all layers "
        f"{comparison.full_calibration_ppl:.4g} ({comparison.full_heldout_ppl:.4g}); * best"
    )
    return [head, "", *(_line(row, widths) for row in rows)]


def _column(found: Any) -> tuple[float, int]:
    """Where a set stands: the largest share of a cost first, or the smallest number removed."""
    return (0.0, found.num_removed) if found.target is None else (-found.target, 0)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
