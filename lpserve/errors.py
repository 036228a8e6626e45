"""Every error lpserve raises on purpose. Each is also a standard-library error and can be pickled.

The command line maps them to exit codes: `InputError` and its kinds to 2, the rest to 1.
"""

LONGEST_TEXT = 1000
"""Characters of an error's text: a file's content that it quotes may have any number."""


class LpserveError(Exception):
    """Base of all errors raised on purpose; its text is one line for the user.

    What cannot be printed (of a file's name, say) is written as an escape, and what is longer than
    `LONGEST_TEXT` loses its middle.
    """

    def __init__(self, text: object = "") -> None:
        line = "".join(c if c.isprintable() else _escaped(c) for c in str(text))
        if len(line) > LONGEST_TEXT:
            line = f"{line[: LONGEST_TEXT - 300]} [...] {line[-290:]}"
        super().__init__(line)


class InputError(LpserveError, ValueError):
    """The user's input cannot be used: what is wrong, where, and what to do about it."""


class StoreBusyError(InputError):
    """Another process holds the store or the run folder."""


class StoreCorruptError(InputError):
    """The store file is not a readable lpserve store. It is left as it is."""


class DiskFullError(InputError):
    """A write failed for lack of space. Everything committed before it is kept."""


class EngineError(LpserveError, RuntimeError):
    """An engine cannot start or cannot score."""


class ExportError(LpserveError, RuntimeError):
    """An exported checkpoint does not score what it should."""


class RunInterrupted(LpserveError):
    """A run was stopped by a signal; everything scored is kept."""


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class DataWarning(UserWarning):
    """Something in the user's data was left out; its text is one line for the user."""


def first_line(error: BaseException) -> str:
    """An exception's message as one line: its first line that is not blank, and the next where that
    ends in a colon; or else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def typed_first_line(error: BaseException) -> str:
    """An exception as one line: its type, and its message's first line if there is one."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"
