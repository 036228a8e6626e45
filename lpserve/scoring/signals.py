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
    """SIGINT and SIGTERM that have come."""

    count: int = 0
    at_work: bool = False
    """From here on the job looks at the count; before, a signal ends the start at once."""

    def come(self, number: int, frame: object) -> None:
        self.count += 1
        if not self.at_work:
            raise RunInterrupted("interrupted before anything was scored")


@contextmanager
def trap_signals() -> Iterator[Signals]:
    """Heed SIGINT and SIGTERM; the handlers before are put back."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signals.come) for number in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
