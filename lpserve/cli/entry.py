"""The entry point of the command line: assembles the parser, runs a command, names its exit code.

Each command's flags and action are in a file of its own in this folder; the actions import what
they need when they run, so that starting the command line loads no numeric library.

Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import select
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lpserve.cli.compare import add_baselines
from lpserve.cli.evaluate import add_eval
from lpserve.cli.exhaustive import add_exhaustive
from lpserve.cli.export import add_export
from lpserve.cli.plan import add_plan
from lpserve.cli.run import add_cost, add_run
from lpserve.cli.scores import add_scores
from lpserve.cli.speed import add_speed
from lpserve.cli.sweep import add_sweep
from lpserve.errors import (
    DataWarning,
    InputError,
    LpserveError,
    RunInterrupted,
    first_line,
    typed_first_line,
)
from lpserve.redact import redact

COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_run,
    add_plan,
    add_export,
    add_eval,
    add_baselines,
    add_exhaustive,
    add_sweep,
    add_speed,
    add_scores,
    add_cost,
)
"""Each adds its command to the subparsers it is given, in the order of `lpserve --help`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    warnings.showwarning = _show_warning
    try:
        code = int(arguments.run(arguments) or 0)
        sys.stdout.flush()
        return code
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
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            return 1
        # the machine's: no permission, no space, a device that fails
        about = f"{error.filename}: " if error.filename is not None else ""
        print(f"lpserve: {about}{error.strerror or first_line(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        print(
            f"lpserve: unexpected {redact(typed_first_line(error))}; this is a fault of lpserve's: "
            f"please report it, with the traceback {_keep_traceback()}",
            file=sys.stderr,
        )
        return 1


def script() -> NoReturn:
    """The command line as a process of its own: leaves with `main`'s exit code."""
    code = main()
    local = sys.modules.get("lpserve.scoring.local")
    if local is not None and local.is_at_work():
        # Python's own end would stop the engine's thread inside a library, which aborts the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _show_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """What was left out of the user's data is told as errors are; other warnings as Python does."""
    if issubclass(category, DataWarning):
        print(f"lpserve: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, *place[:2]), end="", file=sys.stderr)


def _output_is_closed() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; it then goes nowhere."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file, as in a notebook
        return False
    pipe = select.poll()
    pipe.register(output, 0)  # an error is reported unasked
    closed = any(event & select.POLLERR for _, event in pipe.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed


def _keep_traceback() -> str:
    """Where the traceback of the exception at hand is kept, or the traceback itself.

    A file of a new name that its owner alone can read, without what is secret in addresses.
    """
    text = redact(traceback.format_exc())
    try:
        descriptor, path = tempfile.mkstemp(prefix="lpserve-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return f"that follows\n{text}"
    return f"in {path}"


class _Parser(argparse.ArgumentParser):
    """Refuses as the rest of the command line does: one line, with the nearest flag there is."""

    def __init__(self, **settings: Any) -> None:
        # a shortened flag could mean another one in a later version
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; refuses unknown flags itself, since it knows the flags there are."""
        parsed, rest = super().parse_known_args(args, namespace or argparse.Namespace())
        flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
        if flags:
            near = difflib.get_close_matches(flags[0], self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": see {self.prog} --help"
            self.error(f"unknown flag {flags[0]}{hint}")
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2; of an unknown command the nearest is named in place of all."""
        if match := re.match(r".*: invalid choice: '(.*)' \(choose from (.*)\)$", message):
            known = [word.strip(" '") for word in match[2].split(",")]
            near = difflib.get_close_matches(match[1], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            message = f"no command {match[1]!r}: {hint}"
        self.exit(2, f"{self.prog}: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; the parsed `run` is the command's action."""
    parser = _Parser(
        prog="lpserve",
        description="Which layers of this LLM can go?",
        epilog="Start with `lpserve run --demo`, or read `lpserve run --help`.",
    )
    commands = parser.add_subparsers(
        required=True,
        parser_class=_Parser,
        metavar="run | plan | export | eval | baselines | exhaustive | sweep | speed | lm-eval | "
        "scores | cost",
    )
    for add_command in COMMANDS:
        add_command(commands)
    return parser


if __name__ == "__main__":
    script()
