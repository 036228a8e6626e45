"""`lpserve run`, and `lpserve cost`: what a run will do, counted before anything is scored."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpserve.cli.arguments import (
    ENGINE_OPTION_FLAGS,
    add_alternatives_flags,
    add_engine_flags,
    add_task_flags,
    add_tracking_flags,
    add_window_flags,
    engine_options,
    layer_names,
    size_range,
)
from lpserve.cli.export import export_and_report
from lpserve.cli.plan import print_plan
from lpserve.utility import TASK_UTILITIES, TEXT_UTILITIES, UTILITIES

if TYPE_CHECKING:
    from lpserve.config import RunConfig
    from lpserve.plan.plan import Plan

_HELP = """\
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

  lpserve plan run --protect 0,1          another plan from the same scores (run --protect 0,1
                                          searches such sets)
  lpserve export run --remove 6 --out pruned
"""


def add_run(commands: Any) -> None:
    """Define `lpserve run`."""
    run = commands.add_parser(
        "run",
        help="score masks, estimate values, choose and check a plan",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(run=_run)
    add = run.add_argument
    add("--demo", action="store_true", help="the bundled 12-layer model and texts, export included")
    add("--demo-texts", action="store_true", help="the bundled texts, of a model of your own")
    add("--config", metavar="FILE", help="TOML or YAML with the same keys; flags win over it")
    add(
        "--model",
        metavar="DIR",
        help="checkpoint folder (config.json, *.safetensors, tokenizer), or a .gguf file",
    )
    add_window_flags(run, tasks=True)
    add_task_flags(run)
    add(
        "--screen-windows",
        type=int,
        metavar="N",
        help="score sets that the search wants on the "
        "first N windows of each corpus first (0: on all at once)",
    )
    _add_search_flags(run)
    add_engine_flags(run)
    _add_race_flags(run)
    add("--seed", type=int, help="seed of the sampled masks (0)")
    add("--store", metavar="FILE", help="score store to share between runs (OUT/scores.sqlite)")
    add("--out", metavar="DIR", help="run folder (run)")
    add_tracking_flags(run)


def _add_search_flags(run: argparse.ArgumentParser) -> None:
    """How many masks, for what answers, and when to stop."""
    add = run.add_argument
    add("--budget", type=int, help="most masks scored on calibration windows (400)")
    add("--max-removed", type=int, help="plan for 1..N removed layers (3/8 of the layers)")
    add(
        "--target",
        metavar="COST=X,...",
        help="in its place: plan for sets that keep at most these shares of all layers' params, "
        "flops (of a token) or kv (its keys and values in the cache), such as params=0.9,0.8",
    )
    add("--protect", metavar="I,J,...", type=layer_names, help="layers that stay in every set")
    add("--force", metavar="I,J,...", type=layer_names, help="layers that go in every set")
    add_alternatives_flags(run)
    add(
        "--sizes",
        metavar="K_MIN,K_MAX",
        type=size_range,
        help="Shapley coalition sizes before a layer joins (P - max_removed, P - 1)",
    )
    add(
        "--utility",
        help="what a coalition is worth (neg_nll). Of texts: "
        f"{_utilities(TEXT_UTILITIES)}; neg_kl_topK (neg_kl with all tokens but the full model's K "
        f"likeliest merged into one). Of tasks: {_utilities(TASK_UTILITIES)}",
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


def _add_race_flags(run: argparse.ArgumentParser) -> None:
    """Whether and how the best sets race at the end."""
    add = run.add_argument
    add(
        "--settle",
        type=float,
        metavar="P",
        help="after the search, race the best sets of every size on further windows until the best "
        "of them is known with probability P (0.9, say), or they tie",
    )
    add("--max-windows", type=int, metavar="N", help="with --settle: most windows of each text")
    add(
        "--tie",
        type=float,
        metavar="X",
        help="with --settle: sets that differ by less than this share of perplexity tie (0.005)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from lpserve.config import config_from
    from lpserve.inputs.config_file import load_config_file

    values: dict[str, Any] = {}
    if arguments.demo:
        from lpserve.demo import demo_values

        values = demo_values()
    elif arguments.demo_texts:
        from lpserve.demo import demo_texts

        values = demo_texts()
    source = "flags"
    if arguments.config:
        source = f"config {arguments.config}"
        values |= load_config_file(arguments.config)
    skipped = {"run", "demo", "demo_texts", "config", *ENGINE_OPTION_FLAGS}
    flags = {k: v for k, v in vars(arguments).items() if k not in skipped and v is not None}
    options = engine_options(arguments)
    if options:
        flags["engine_options"] = {**values.get("engine_options", {}), **options}
    for one, other in (("target", "max_removed"), ("max_removed", "target")):
        if one in flags:  # flags win, and of the two only one may be given
            values.pop(other, None)
    config = config_from(values | flags, source)
    config.check_files()  # before seconds of imports
    from lpserve.runner.run import run

    _tell_outlook(config)
    result = run(config)
    print_plan(result.outcome.plan)
    print(f"plan, values, report: {result.folder / 'plan.json'}, shapley.csv, report.html")
    if arguments.demo:
        return _demo_export(result.folder, result.outcome.plan)
    which = f"--target {config.target.partition('=')[0]}=X" if config.target else "--remove R"
    print(f"export a pruned model: lpserve export {result.folder} {which} --out DIR")
    return 0


def _tell_outlook(config: RunConfig) -> None:
    """Say before the budget is spent what no checkpoint can be written of."""
    from lpserve.engine.registry import engine_kind
    from lpserve.export.outlook import export_outlook
    from lpserve.model.checkpoint import read_checkpoint
    from lpserve.runner.setup import check_model

    check_model(config)
    if engine_kind(config.engine).reads_checkpoint:
        for sentence in export_outlook(read_checkpoint(config.model)):
            print(f"note: {sentence}", flush=True)


def _demo_export(folder: Path, plan: Plan) -> int:
    """Export the entry that prunes most."""
    last = plan.plans[-1]
    out = folder / f"pruned-{last.num_removed}"
    if out.exists():
        print(f"exported before: {out}")
        return 0
    wanted = last.num_removed if last.target is None else plan.label(last)
    return export_and_report(folder, wanted, out)


def _utilities(names: Sequence[str]) -> str:
    """Utilities with what they are, for the help."""
    return "; ".join(f"{name} ({UTILITIES[name].about})" for name in names)


def add_cost(commands: Any) -> None:
    """Define `lpserve cost`."""
    cost = commands.add_parser(
        "cost",
        help="what a run will do, and the time that implies, before a GPU is rented",
        description="Count a run's masks, layer-forwards, FLOP and memory from config.json and "
        "safetensors headers. A time is estimated from a rate that you assume. Nothing is scored.",
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
        help="TFLOP/s that you assume a GPU keeps up; without it no time is estimated",
    )
    add("--gpu-memory-gb", type=float, metavar="GIB", help="warn when a GPU of this memory is full")


def _cost(arguments: argparse.Namespace) -> int:
    from lpserve.runner.cost import CostSettings, cost, describe

    given = {k: v for k, v in vars(arguments).items() if k != "run" and v is not None}
    print(describe(cost(CostSettings(**given))))
    return 0
