"""SIGINT and SIGTERM: counted while a run is at work, so that it ends in order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lpserve.errors import RunInterrupted


@dataclass(slots=True)
class Signals:
    """Counts SIGINT and SIGTERM."""

    count: int = 0
    at_work: bool = False
    """Whether the job looks at the count; until then a signal raises RunInterrupted at once."""

    def handle(self, number: int, frame: object) -> None:
        """The signal handler."""
        self.count += 1
        if not self.at_work:
            raise RunInterrupted("interrupted before anything was scored")


@contextmanager
def trap_signals() -> Iterator[Signals]:
    """Count SIGINT and SIGTERM instead of ending the process; the handlers are restored at the end.

    Outside the main thread no signal is trapped.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signals.handle) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
