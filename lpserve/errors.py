"""Every error lpserve raises on purpose. Each is also a standard-library error and can be pickled.

The command line maps them to exit codes: `InputError` and its kinds to 2, the rest to 1.
"""


class LpserveError(Exception):
    """Base of all errors raised on purpose; its text is one line for the user."""


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
