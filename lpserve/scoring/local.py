"""One engine in this process, on a thread of its own, so that the caller goes on meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from lpserve.data.windows import TokenWindows
from lpserve.engine import build_engine
from lpserve.engine.base import Engine
from lpserve.errors import EngineError, typed_first_line
from lpserve.scoring.pool import UnitResult, WorkUnit, score_on, still_works
from lpserve.scoring.progress import RunState
from lpserve.types import EngineSpec, Scores

_THREAD = "lpserve-engine"


def is_at_work() -> bool:
    """Whether an engine of this process still scores, as after an interruption whose grace time was
    shorter than a unit."""
    return any(thread.name == _THREAD for thread in threading.enumerate())


class LocalPool:
    """One engine in this process; the contract is `lpserve.scoring.pool.EnginePool`.

    An engine that stops working ends the run with an EngineError: it cannot be replaced.

    Raises:
        InputError, EngineError: the engine cannot start.
    """

    engines = MappingProxyType({"local": "local"})

    def __init__(self, spec: EngineSpec, windows: TokenWindows) -> None:
        self._engine = build_engine(spec, windows)
        self.info = self._engine.info
        self._todo: queue.SimpleQueue[WorkUnit | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[UnitResult | EngineError] = queue.SimpleQueue()
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._work, name=_THREAD, daemon=True)
        self._thread.start()

    def register(self, windows: TokenWindows) -> str:
        with self._busy:
            return self._engine.register(windows)

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        self._todo.put(unit)

    def cancel(self, unit: WorkUnit, engine: str) -> None:
        """Does nothing: no other engine would score it."""

    def next(self, timeout_s: float) -> UnitResult | None:
        try:
            result = self._done.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(result, EngineError):
            raise result
        return result

    def with_engine(self, call: Callable[[Engine], Any]) -> Any:
        """Call something on the engine itself, while it scores nothing."""
        with self._busy:
            return call(self._engine)

    def publish(self, state: RunState) -> None:
        """Does nothing: the progress line already shows them."""

    def close(self, timeout_s: float = 1.0) -> None:
        """Stop after the unit at work, waiting for it `timeout_s` at the longest; a thread that
        still runs then ends with the process."""
        self._todo.put(None)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._engine.close()

    def _work(self) -> None:
        while (unit := self._todo.get()) is not None:
            with self._busy:
                self._done.put(self._scored(unit))

    def _score(self, unit: WorkUnit) -> Scores:
        return score_on(self._engine, unit.masks_MP, unit.windows, unit.extra_metrics, unit.overlap)

    def _scored(self, unit: WorkUnit) -> UnitResult | EngineError:
        result = UnitResult(unit=unit, scores=None, engine="local")
        try:
            return replace(result, scores=self._score(unit))
        except Exception as error:  # the failure policy is the dispatcher's
            reason = typed_first_line(error)
        if still_works(self._engine, unit.windows):
            return replace(result, error=reason)
        return EngineError(
            f"the engine stopped working: {reason}; scores are kept: give the same command again"
        )
