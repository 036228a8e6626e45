"""The entry point of the command line: assembles the parser, runs a command, names its exit code.

Each command's flags and action are in a file of its own in this folder; the actions import what
they need when they run, so that starting the command line loads no numeric library.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lpserve.cli.compare import add_baselines
from lpserve.cli.cost import add_cost
from lpserve.cli.evaluate import add_eval
from lpserve.cli.export import add_export
from lpserve.cli.plan import add_plan
from lpserve.cli.run import add_run
from lpserve.cli.scores import add_scores
from lpserve.cli.speed import add_speed
from lpserve.cli.sweep import add_sweep
from lpserve.errors import InputError, LpserveError, RunInterrupted

COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_run,
    add_plan,
    add_export,
    add_eval,
    add_baselines,
    add_sweep,
    add_speed,
    add_scores,
    add_cost,
)
"""Each adds its command to the subparsers it is given, in the order of `lpserve --help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = make_parser().parse_args(argv)
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


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; the parsed `run` is the command's action."""
    parser = argparse.ArgumentParser(
        prog="lpserve",
        description="Which layers of this LLM can go?",
        epilog="Start with `lpserve run --demo`, or read `lpserve run --help`.",
    )
    commands = parser.add_subparsers(
        required=True,
        metavar="run | plan | export | eval | baselines | sweep | speed | lm-eval | scores | cost",
    )
    for add_command in COMMANDS:
        add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
