"""`lpserve eval` and `lpserve lm-eval`: what sets of layers do to a model."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from lpserve.cli.arguments import (
    add_engine_flags,
    add_task_flags,
    engine_values,
    layer_names,
    numbers,
)
from lpserve.errors import InputError, LpserveError, typed_first_line

_EVAL_HELP = """\
Perplexity and lm-evaluation-harness tasks of the full model and of sets of layers removed from it,
all at once: masks are scored without exporting, prefixes shared, every score kept in --out.

  lpserve eval --model Llama-2-7b --sets run --text wikitext2=wiki.test.jsonl --protocol gptq-2048
  lpserve eval --model Llama-2-7b --sets run --remove 3,6 --tasks arc_easy,lambada_openai
  lpserve eval --model Llama-2-7b --sets layer_drop_config.txt --removed 21,22 --text wiki.txt
  lpserve eval --model pruned --text wiki.txt          an exported checkpoint

--sets takes a run folder, a plan.json, EvoPress' layer_drop_config.txt, a mergekit recipe, or lists
of layer numbers, one set a line (a name and a colon before them if you like).
"""


def add_eval(commands: Any) -> None:
    """Define `lpserve eval` and `lpserve lm-eval`."""
    command = commands.add_parser(
        "eval",
        help="perplexity and lm-eval tasks of plans and other sets of layers",
        description=_EVAL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=_eval)
    add = command.add_argument
    add("--demo", action="store_true", help="the bundled model, text and tasks")
    add("--model", metavar="DIR", help="checkpoint folder")
    add("--sets", action="append", default=[], metavar="PATH", help="may be repeated; see above")
    add(
        "--remove",
        type=numbers,
        default=[],
        metavar="R,...",
        help="of --sets, only sets of so many layers",
    )
    add(
        "--removed",
        action="append",
        type=layer_names,
        default=[],
        metavar="I,J,...",
        help="a set of layers to remove, or of parts such as 7.attention; may be repeated",
    )
    add(
        "--mask",
        action="append",
        default=[],
        metavar="0110...",
        help="a set as a mask, 0 = removed; may be repeated",
    )
    add(
        "--text",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="text, JSON, CSV or Parquet for perplexity; may be repeated",
    )
    add("--protocol", metavar="NAME", help="gptq-2048 (default), llm-pruner-128, sliding-1024-512")
    add("--length", type=int, help="tokens of a window, instead of the protocol's")
    add("--stride", type=int, help="how far windows advance (their length)")
    add("--bos", help="none, once or each, instead of the protocol's")
    add(
        "--text-field", default="text", help="the field or column that holds a record's text (text)"
    )
    add("--tasks", default="", metavar="A,B", help="lm-eval tasks")
    add_task_flags(command)
    add("--limit", type=int, help="most documents of each task")
    add("--max-length", type=int, help="tokens of a request (one less than the model's positions)")
    add("--out", default="eval", metavar="DIR", help="scores and results (eval)")
    add_engine_flags(command)
    _add_lm_eval(commands)


def _add_lm_eval(commands: Any) -> None:
    through = commands.add_parser(
        "lm-eval",
        help="lm-eval's own command line, where --model lpserve is known",
        add_help=False,
        prefix_chars="\0",  # every flag is lm-eval's
    )
    through.set_defaults(run=_lm_eval)
    through.add_argument("rest", nargs="*")


def _eval(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; ours is the progress
    from dataclasses import replace

    from lpserve.config import EngineConfig, corpora
    from lpserve.data.protocols import PROTOCOLS, other_texts
    from lpserve.evaluation.evaluate import evaluate, sets_from
    from lpserve.evaluation.settings import EvalConfig
    from lpserve.model.players import num_layers_of
    from lpserve.plan.layer_sets import layer_set, mask_set, set_name
    from lpserve.scoring.open import players_of

    if arguments.demo:
        _fill_demo(arguments)
    if not arguments.model:
        raise InputError("flags: model is missing (--model)")
    name = arguments.protocol or "gptq-2048"
    if name not in PROTOCOLS:
        raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}: got {name!r}")
    changes = {k: getattr(arguments, k) for k in ("length", "stride", "bos")}
    if arguments.length is not None and arguments.stride is None:
        changes["stride"] = arguments.length  # disjoint, unless a stride is asked for
    protocol = replace(PROTOCOLS[name], **{k: v for k, v in changes.items() if v is not None})
    engine = EngineConfig(**engine_values(arguments))
    num_players = num_layers_of(players_of(engine))
    sets = sets_from(arguments.sets, engine, arguments.remove)
    sets += [layer_set(set_name(r), r, num_players, "--removed") for r in arguments.removed]
    sets += [mask_set(mask, num_players, "--mask") for mask in arguments.mask]
    values = engine_values(arguments)
    if any(found.has_parts for found in sets):
        values.setdefault("players", "half")
    config = EvalConfig(
        **values,
        sets=tuple(sets),
        texts=corpora(arguments.text, "--text"),
        protocol=protocol,
        text_field=arguments.text_field,
        tasks=tuple(t.strip() for t in arguments.tasks.split(",") if t.strip()),
        include_path=arguments.include_path,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        max_length=arguments.max_length,
        out=arguments.out,
    )
    evaluation = evaluate(config)
    for text, described in evaluation.protocols.items():
        print(f"ppl {text}: {described}")
    for text in other_texts(name, config.texts) if protocol == PROTOCOLS[name] else ():
        print(
            f"note: figures that are published for {name} are of a data set's rows, joined by "
            f"blank lines (give its rows as .jsonl or Parquet); {text} is a plain text, and differs"
        )
    print("\n".join(evaluation_table(evaluation.results)))
    saved = evaluation.skip_layer_forwards - evaluation.layer_forwards
    print(
        f"\n{evaluation.masks_scored} masks scored, {evaluation.masks_read} read from the store, "
        f"{saved} of {evaluation.skip_layer_forwards} layer-forwards saved; results: "
        f"{arguments.out}/results.csv"
    )
    return 0


def _fill_demo(arguments: argparse.Namespace) -> None:
    from lpserve.demo import FOLDER

    arguments.model = arguments.model or str(FOLDER / "model")
    if not arguments.text and not arguments.tasks:
        arguments.text = [f"dracula={FOLDER / 'heldout.txt'}"]
        arguments.protocol = arguments.protocol or "llm-pruner-128"
        arguments.tasks = "dracula_continuation,dracula_last_word"
    arguments.include_path = arguments.include_path or str(FOLDER / "tasks")


def evaluation_table(results: Sequence[Any]) -> list[str]:
    """Lines of a table: a row for each set, a column for each measure."""
    measures = list(dict.fromkeys(r.measure for r in results))
    sets = list(dict.fromkeys((r.layer_set, r.removed) for r in results))
    cells = {
        (r.layer_set, r.measure): f"{r.value:.4g}" + (f" +- {r.stderr:.2g}" if r.stderr else "")
        for r in results
    }
    rows = [["set", "layers removed", *measures]]
    rows += [
        [name, " ".join(map(str, removed)) or "-", *(cells.get((name, m), "-") for m in measures)]
        for name, removed in sets
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _lm_eval(arguments: argparse.Namespace) -> int:
    """lm-eval finds no models by itself in other packages: this registers ours first."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import lpserve.evaluation.lm_eval_model  # noqa: F401
    except ImportError as error:
        raise InputError(f"lm-eval is missing ({error}): install lpserve[eval]") from None
    sys.argv = ["lm-eval", *arguments.rest]
    try:
        cli_evaluate()
    except LpserveError:
        raise
    except Exception as error:  # lm-eval's own, of an unknown task, say
        raise LpserveError(f"lm-eval: {typed_first_line(error)}") from error
    return 0
