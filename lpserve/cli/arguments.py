"""Flags that several commands share, and the parsers of their values."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from lpserve.engine.registry import shown_kinds
from lpserve.errors import InputError
from lpserve.inputs.rules import PLAYER_NAME

ENGINE_OPTION_FLAGS = ("state_budget_mb", "micro_batch_tokens", "engine_option")
"""Flags that become `engine_options`."""


def add_engine_flags(command: argparse.ArgumentParser) -> None:
    """Flags for the engines: the keys of `config.EngineConfig`, without the model."""
    add = command.add_argument
    kinds = shown_kinds()
    names = " or ".join([f"{kinds[0].name} (default)", *(kind.name for kind in kinds[1:])])
    add("--engine", help=names)
    option_help = [kind.option_help for kind in kinds]
    add(
        "--engine-option",
        action="append",
        metavar="KEY=VALUE",
        type=option,
        help=" ".join(["of the engine; may be repeated.", *filter(None, option_help)]),
    )
    add("--pool", help="local (default) or ray")
    add("--engines", type=engines, help="number of engines, or auto: what the cluster holds (1)")
    add("--dtype", help="float32 (default), bfloat16, float16")
    add("--device", help="auto (default), cpu, cuda, cuda:1")
    add(
        "--players",
        help="layer (default); half: attention and feed-forward parts apart; groups:FILE: a TOML "
        "or YAML file of names and lists of layers or parts that go together",
    )
    add("--state-budget-mb", type=float, help="memory for hidden states (1/4 of what is free)")
    add("--micro-batch-tokens", type=int, help="most tokens a layer is given at once")
    add("--grace-s", type=float, help="wait for scores in flight when stopped (30)")
    add("--progress-s", type=float, help="seconds between plain progress lines (10)")


def add_window_flags(command: argparse.ArgumentParser, *, tasks: bool = False) -> None:
    """Flags for the windows: the keys that `config.WindowConfig` adds to `config.EngineConfig`.

    Args:
        tasks: whether the command scores questions of tasks, too; changes the help texts.
    """
    add = command.add_argument
    text: dict[str, Any] = {"action": "append", "metavar": "[NAME=]PATH"}
    kinds = "text, JSON, CSV or Parquet (also .gz, .zst), folder of one kind, .npz" + (
        ", or task:NAME of lm-eval" if tasks else ""
    )
    units = "windows of each text, questions of each task" if tasks else "windows of each corpus"
    add("--calibration", **text, help=f"{kinds}; may be repeated")
    add("--heldout", **text, help="the same, for checking (a last fifth of what calibrates)")
    add("--num-windows", type=int, help=f"calibration {units} (10)")
    add("--heldout-windows", type=int, help=f"held-out {units} (64)")
    add("--length", type=int, help="tokens of a window, BOS included (128)")
    add("--bos", action="store_true", default=None, help="begin every window with BOS")
    add("--text-field", help="the field or column that holds a record's text (text)")
    add("--window-seed", type=int, help="seed of the windows (0)")


def add_task_flags(command: argparse.ArgumentParser) -> None:
    """Flags for lm-eval's tasks: where they are found, and examples before a question."""
    add = command.add_argument
    add("--include-path", metavar="DIR", help="folder of task files of your own")
    add("--num-fewshot", type=int, metavar="K", help="examples before each question (the task's)")


def add_alternatives_flags(command: argparse.ArgumentParser) -> None:
    """Flags for sets beside the plan's: `config.RunConfig`'s keys, whose values they are."""
    add = command.add_argument
    add(
        "--alternatives",
        type=int,
        metavar="K",
        help="for every size, list also the K best scored sets that are unlike the plan's and one "
        "another (0)",
    )
    add(
        "--min-distance",
        type=int,
        metavar="D",
        help="with --alternatives: every two sets of a size differ in at least D layers, each "
        "removing D that the other keeps (2)",
    )


def add_tracking_flags(command: argparse.ArgumentParser) -> None:
    """Flags for logging results to MLflow."""
    command.add_argument("--mlflow", metavar="URI", help="log to this MLflow server (nowhere)")
    command.add_argument("--experiment", help="MLflow's experiment (lpserve)")


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The `engine_options` that flags name."""
    return dict(arguments.engine_option or []) | {
        k: getattr(arguments, k)
        for k in ("state_budget_mb", "micro_batch_tokens")
        if getattr(arguments, k) is not None
    }


def engine_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys of `config.EngineConfig` that flags name."""
    keys = ("model", "engine", "pool", "engines", "dtype", "device", "players")
    keys = (*keys, "grace_s", "progress_s")
    values = {k: getattr(arguments, k) for k in keys if getattr(arguments, k) is not None}
    return values | {"engine_options": engine_options(arguments)}


def window_values(arguments: argparse.Namespace, keys: Sequence[str]) -> dict[str, Any]:
    """The keys of `config.WindowConfig` that flags name, the model's among them; with `--demo`
    those of the bundled one.

    Args:
        keys: further keys of the command's own config.

    Raises:
        InputError: no model or no calibration text is named.
    """
    from lpserve.config import corpora

    values: dict[str, Any] = {}
    if arguments.demo:
        from lpserve.demo import demo_values

        demo = demo_values()
        names = ("model", "calibration", "heldout", "num_windows", "heldout_windows", "length")
        values = {name: demo[name] for name in names}
    values |= engine_values(arguments)
    named = ("num_windows", "heldout_windows", "length", "bos", "text_field", "window_seed", *keys)
    values |= {k: getattr(arguments, k) for k in named if getattr(arguments, k) is not None}
    for key in ("calibration", "heldout"):
        if getattr(arguments, key):
            values[key] = corpora(getattr(arguments, key), f"--{key}")
    for key in ("model", "calibration"):
        if not values.get(key):
            raise InputError(f"flags: {key} is missing (--{key})")
    return values


def numbers(text: str) -> list[int]:
    """Integers separated by commas."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"whole numbers separated by commas: got {text!r}"
        ) from None


def layer_names(text: str) -> list[int | str]:
    """Layers' numbers, parts of layers such as `7.attention`, or groups' names, separated by
    commas."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [name for name in names if not name.isdecimal() and not re.match(PLAYER_NAME, name)]
    if wrong:
        raise argparse.ArgumentTypeError(
            "numbers of layers separated by commas, or parts such as 7.attention, or groups: got "
            f"{wrong[0]!r}"
        )
    return [int(name) if name.isdecimal() else name for name in names]


def engines(text: str) -> int | str:
    """An integer, or `auto`."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number or auto: got {text!r}") from None


def option(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as JSON where it is JSON (numbers, true, {...}), else as text."""
    key, found, value = text.partition("=")
    if not found or not key:
        raise argparse.ArgumentTypeError(f"KEY=VALUE: got {text!r}")
    try:
        return key.replace("-", "_"), json.loads(value)
    except ValueError:
        return key.replace("-", "_"), value


def size_range(text: str) -> list[int]:
    """Two integers separated by a comma."""
    both = numbers(text)
    if len(both) != 2:
        raise argparse.ArgumentTypeError(f"two whole numbers, K_MIN,K_MAX: got {text!r}")
    return both
