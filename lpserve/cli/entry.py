"""The command line. Thin: flags to the API. `evaluate.py` has the commands that compare sets.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpserve.cli.arguments import (
    ENGINE_OPTION_FLAGS,
    add_engine_flags,
    add_task_flags,
    add_tracking_flags,
    add_window_flags,
    engine_options,
    numbers,
    pair,
)
from lpserve.cli.compare import add_baselines
from lpserve.cli.evaluate import add_eval
from lpserve.cli.speed import add_speed
from lpserve.cli.sweep import add_sweep
from lpserve.errors import InputError, LpserveError, RunInterrupted

_RUN_HELP = """\
Score layer masks of a model on a text and find out which layers can go.

A mask says which layers run. The run scores up to --budget masks on the calibration windows
(dropped layers are skipped, shared prefixes computed once), estimates every layer's Shapley value
with its error, searches for the best set to remove for every r = 1..--max-removed, scores those
sets for real and checks them on held-out windows. Everything lands in --out; killing the run loses
nothing, and the same command resumes it. A larger --budget extends a finished run.

  lpserve run --model Llama-2-7b --calibration c4.txt --heldout wiki.txt --max-removed 12 --out run
  lpserve run --config run.toml --budget 2000
  lpserve run --demo                      the bundled model and text, in under a minute

then:

  lpserve plan run --protect 0,1          another plan from the same scores
  lpserve export run --remove 6 --out pruned
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except InputError as error:
        print(f"lpserve: {error}", file=sys.stderr)
        return 2
    except RunInterrupted as error:
        print(f"lpserve: {error}", file=sys.stderr)
        return 130
    except LpserveError as error:
        print(f"lpserve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lpserve: interrupted before anything was scored", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lpserve",
        description="Which layers of this LLM can go?",
        epilog="Start with `lpserve run --demo`, or read `lpserve run --help`.",
    )
    commands = parser.add_subparsers(
        required=True,
        metavar="run | plan | export | eval | baselines | sweep | speed | lm-eval | scores | cost",
    )
    _add_run(commands)
    _add_plan(commands)
    _add_export(commands)
    add_eval(commands)
    add_baselines(commands)
    add_sweep(commands)
    add_speed(commands)
    _add_scores(commands)
    _add_cost(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="score masks, estimate values, choose and check a plan",
        description=_RUN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(run=_run)
    add = run.add_argument
    add("--demo", action="store_true", help="the bundled 12-layer model and texts, export included")
    add("--config", metavar="FILE", help="TOML or YAML with the same keys; flags win over it")
    add("--model", metavar="DIR", help="checkpoint folder: config.json, *.safetensors, tokenizer")
    add_window_flags(run, tasks=True)
    add_task_flags(run)
    add(
        "--screen-windows",
        type=int,
        metavar="N",
        help="score sets that the search wants on the "
        "first N windows of each corpus first (0: on all at once)",
    )
    add("--budget", type=int, help="most masks scored on calibration windows (400)")
    add("--max-removed", type=int, help="plan for 1..N removed layers (3/8 of the layers)")
    add(
        "--sizes",
        metavar="K_MIN,K_MAX",
        type=pair,
        help="Shapley coalition sizes before a layer joins (P - max_removed, P - 1)",
    )
    add(
        "--utility",
        help="what a coalition is worth: neg_nll (default), ppl_ratio (the paper's), "
        "neg_kl or neg_kl_topK (divergence from the whole model), accuracy (of the next token); of "
        "tasks: task_acc, task_acc_norm, task_margin, task_margin_norm",
    )
    add("--surrogate", help="auto (default), gp, ridge, gp+ridge, or paper (with ppl_ratio)")
    add("--goal", help="what masks are chosen for: both (default), plan, or values alone")
    add("--round-size", type=int, help="masks of a search round, at least (number of layers)")
    add(
        "--stop-chance",
        type=float,
        metavar="X",
        help="stop before the budget once no unseen set "
        "has a higher probability than X of beating the plan by more than --stop-gain",
    )
    add("--stop-gain", type=float, metavar="Y", help="share of perplexity (0.001)")
    add(
        "--stop-width",
        type=float,
        metavar="Z",
        help="stop once every value's 90%% interval is within +-Z of the utility",
    )
    add_engine_flags(run)
    add("--seed", type=int, help="seed of the sampled masks (0)")
    add("--store", metavar="FILE", help="score store to share between runs (OUT/scores.sqlite)")
    add("--out", metavar="DIR", help="run folder (run)")
    add_tracking_flags(run)


def _add_plan(commands: Any) -> None:
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


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write the pruned checkpoint and check it in a fresh process",
        description="Write the model without the layers that the plan removes for r. The result is "
        "reloaded with transformers alone in a fresh process and must score what the run scored. "
        "A mergekit recipe of the same pruning lies beside it.",
    )
    export.set_defaults(run=_export)
    export.add_argument("folder", metavar="RUN", help="folder of a finished run")
    export.add_argument("--remove", type=int, required=True, metavar="R", help="how many layers")
    export.add_argument("--out", required=True, metavar="DIR", help="new or empty folder")
    export.add_argument("--plan", metavar="FILE", help="a plan of `lpserve plan` (RUN/plan.json)")
    export.add_argument("--model", metavar="DIR", help="the model, if it moved since the run")
    export.add_argument("--device", default="auto", help="where to check (auto)")
    export.add_argument(
        "--no-verify", action="store_true", help="skip the check; marked unverified"
    )


def _add_scores(commands: Any) -> None:
    scores = commands.add_parser(
        "scores",
        help="copy a score store to or from Parquet or CSV",
        description="One row for each game, mask and window, with its NLL in nats.",
    )
    scores.set_defaults(run=_scores)
    scores.add_argument("store", metavar="STORE", help="a store file, or a run folder")
    way = scores.add_mutually_exclusive_group(required=True)
    way.add_argument("--out", metavar="FILE", help="write .parquet or .csv")
    way.add_argument("--import", dest="source", metavar="FILE", help="read .parquet or .csv")


def _add_cost(commands: Any) -> None:
    cost = commands.add_parser(
        "cost",
        help="what a run will do, and the time that implies, before a GPU is rented",
        description="Count a run's masks, layer-forwards, FLOP and memory from config.json and "
        "safetensors headers. A time is told for a rate that you assume. Nothing is scored.",
    )
    cost.set_defaults(run=_cost)
    add = cost.add_argument
    add("--model", required=True, metavar="DIR", help="checkpoint folder")
    add("--budget", type=int, help="most masks scored on calibration windows (400)")
    add("--max-removed", type=int, help="plan for 1..N removed layers (3/8 of the layers)")
    add("--num-windows", type=int, help="calibration windows in all (10)")
    add("--heldout-windows", type=int, help="held-out windows in all (64)")
    add("--length", type=int, help="tokens of a window (128)")
    add("--goal", help="what masks are chosen for: both (default), plan, or values alone")
    add("--round-size", type=int, help="masks of a search round, at least (number of layers)")
    add("--seed", type=int, help="seed of the sampled masks (0)")
    add("--dtype", help="float32 (default), bfloat16, float16")
    add("--engines", type=int, help="number of engines (1)")
    add("--gpus-per-engine", type=int, help="tensor x pipeline parallel size (1)")
    add(
        "--tflops-per-gpu",
        type=float,
        metavar="F",
        help="TFLOP/s that you assume a GPU keeps up; without it no time is told",
    )
    add("--gpu-memory-gb", type=float, metavar="GIB", help="warn when a GPU of this memory is full")


def _run(arguments: argparse.Namespace) -> int:
    from lpserve.config import config_from, load_config_file

    values: dict[str, Any] = {}
    if arguments.demo:
        from lpserve.demo import demo_values

        values = demo_values()
    source = "flags"
    if arguments.config:
        source = f"config {arguments.config}"
        values |= load_config_file(arguments.config)
    skipped = {"run", "demo", "config", *ENGINE_OPTION_FLAGS}
    flags = {k: v for k, v in vars(arguments).items() if k not in skipped and v is not None}
    options = engine_options(arguments)
    if options:
        flags["engine_options"] = {**values.get("engine_options", {}), **options}
    config = config_from(values | flags, source)
    from lpserve.runner.coordinator import run

    result = run(config)
    _print_plan(result.outcome.plan)
    print(f"plan, values, report: {result.folder / 'plan.json'}, shapley.csv, report.html")
    if arguments.demo:
        removed = result.outcome.plan.plans[-1].num_removed
        return _demo_export(result.folder, removed)
    print(f"export a pruned model: lpserve export {result.folder} --remove R --out DIR")
    return 0


def _demo_export(folder: Path, removed: int) -> int:
    target = folder / f"pruned-{removed}"
    if target.exists():
        print(f"exported before: {target}")
        return 0
    return main(["export", str(folder), "--remove", str(removed), "--out", str(target)])


def _plan(arguments: argparse.Namespace) -> int:
    from lpserve.analysis.analyse import analyse, make_plan
    from lpserve.analysis.record import read_record
    from lpserve.store.files import write_text

    scored = read_record(arguments.folder)
    plan = make_plan(
        scored, analyse(scored), max_removed=arguments.max_removed, protected=arguments.protect
    )
    _print_plan(plan)
    if arguments.out:
        write_text(Path(arguments.out), plan.to_json())
        print(f"written: {arguments.out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from lpserve.export.export import export_run

    report = export_run(
        arguments.folder,
        arguments.remove,
        arguments.out,
        plan_path=arguments.plan,
        model=arguments.model,
        device=arguments.device,
        verify=not arguments.no_verify,
    )
    removed = ", ".join(map(str, report.removed))
    if not report.verified:
        print(f"exported without layers {removed} to {arguments.out}, NOT VERIFIED")
        return 0
    print(
        f"exported without layers {removed} to {arguments.out}; reloaded in a fresh process: "
        f"perplexity {report.ppl:.4f} on {report.num_windows} calibration windows, within "
        f"{report.worst_relative_difference:.1e} of the run's scores"
    )
    return 0


def _scores(arguments: argparse.Namespace) -> int:
    from lpserve.store.store import Store
    from lpserve.store.tables import export_scores, import_scores

    path = Path(arguments.store)
    path = path / "scores.sqlite" if path.is_dir() else path
    if arguments.out and not path.exists():
        raise InputError(f"store {path} does not exist")
    with Store(path, holder="lpserve scores") as store:
        if arguments.out:
            print(f"{export_scores(store, arguments.out)} rows written to {arguments.out}")
        else:
            print(f"{import_scores(store, arguments.source)} new scores in {path}")
    return 0


def _cost(arguments: argparse.Namespace) -> int:
    from lpserve.runner.cost import CostSettings, cost, describe

    given = {k: v for k, v in vars(arguments).items() if k != "run" and v is not None}
    print(describe(cost(CostSettings(**given))))
    return 0


def _print_plan(plan: Any) -> None:
    kinds = ["utility", "ppl"] if plan.tells_utility else ["ppl"]
    names = {"utility": plan.utility, "ppl": f"perplexity {plan.perplexity_of}".strip()}

    def figures(of: Any, kind: str, prefix: str = "") -> list[float | None]:
        return [getattr(of, f"{prefix}{side}_{kind}") for side in ("calibration", "heldout")]

    whole = []
    for kind in kinds:
        mine, heldout = figures(plan, kind, "full_")
        held = f", held out {heldout:.4g}" if heldout is not None else ""
        whole.append(f"{names[kind]} {mine:.4g}{held}")
    print(f"\n{plan.masks_scored} masks scored; all {plan.num_players} layers: {'; '.join(whole)}")
    columns = ["calibration", "held out"]
    if plan.tells_utility:
        print(f"{'':>6}  {plan.utility:^24}  {names['ppl']:^24}".rstrip())
        columns *= 2
    header = "  ".join(f"{name:>11}" for name in columns)
    print(f"{'remove':>6}  {header}  layers")
    for entry in plan.plans:
        values = [value for kind in kinds for value in figures(entry, kind)]
        told = "  ".join(f"{v:>11.4g}" if v is not None else f"{'-':>11}" for v in values)
        print(f"{entry.num_removed:>6}  {told}  {', '.join(map(str, entry.removed))}")
        for warning in entry.warnings:
            print(f"{'':>6}  note: {warning}")
    print()


if __name__ == "__main__":
    sys.exit(main())
