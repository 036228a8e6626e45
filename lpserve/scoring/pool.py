"""Pools: many engines behind one queue. `EnginePool` is the contract; `LocalPool` runs one engine
in this process on a thread of its own, so that the coordinator goes on meanwhile.

Which unit goes to whom, and what follows when one fails, is the dispatcher's.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.engine import build_engine
from lpserve.engine.base import Engine
from lpserve.errors import EngineError
from lpserve.scoring.progress import RunState
from lpserve.store.store import WindowBlock
from lpserve.types import BoolArray, EngineInfo, EngineSpec, Scores


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WorkUnit:
    """Masks to score on the windows of a block, or one mask on some of them. Known by identity."""

    masks_MP: BoolArray
    block: WindowBlock
    windows: str
    """Hash under which the engines know the windows."""
    extra_metrics: tuple[str, ...] = ()
    """Metrics beside the NLL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitResult:
    """What became of a unit: scores, or the error that it ended with."""

    unit: WorkUnit
    scores: Scores | None
    engine: str
    error: str | None = None
    blamed: bool = True
    """Whether the unit may be the cause of the error: not when its turn had not come, or when a
    node left."""
    lost: bool = False
    """Whether the engine was lost while it worked on the unit."""


def first_line(error: BaseException) -> str:
    """An error in one line: its type and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def still_works(engine: Engine, windows: str) -> bool:
    """Whether an engine that just raised can score the whole model: after some errors (a device's,
    a lost worker's) nothing works any more, and no mask is to blame."""
    try:
        engine.score(np.ones((1, engine.info.num_players), dtype=bool), windows)
    except Exception:
        return False
    return True


class EnginePool(Protocol):
    """Engines behind one queue."""

    info: EngineInfo

    @property
    def engines(self) -> Mapping[str, str]:
        """Engines that take part: name -> the hardware it runs on. A new mapping whenever one has
        come or gone."""
        ...

    def register(self, windows: TokenWindows) -> str:
        """Make windows known to every engine; returns their hash."""
        ...

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        """Hand a unit to an engine; it comes back from `next` once. Units of an engine are scored
        in the order of their coming.

        Args:
            expected_s: how long it should take; None: not known.
        """
        ...

    def cancel(self, unit: WorkUnit, engine: str) -> None:
        """Have a unit come back without being scored, if it waits behind another."""
        ...

    def next(self, timeout_s: float) -> UnitResult | None:
        """The next finished unit, in any order; None after the timeout."""
        ...

    def publish(self, state: RunState) -> None:
        """Show a run's figures to whoever watches the pool."""
        ...

    def close(self) -> None: ...


class LocalPool:
    """One engine in this process. An engine that cannot start raises its own error here; one that
    stops working ends the run, since it cannot be replaced.
    """

    engines = MappingProxyType({"local": "local"})

    def __init__(self, spec: EngineSpec, windows: TokenWindows) -> None:
        self._engine = build_engine(spec, windows)
        self.info = self._engine.info
        self._todo: queue.SimpleQueue[WorkUnit | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[UnitResult | EngineError] = queue.SimpleQueue()
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="lpserve-engine", daemon=True)
        self._thread.start()

    def register(self, windows: TokenWindows) -> str:
        with self._busy:
            return self._engine.register(windows)

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        self._todo.put(unit)

    def cancel(self, unit: WorkUnit, engine: str) -> None:
        """Nobody else would score it."""

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
        """The progress line is all there is."""

    def close(self, timeout_s: float = 1.0) -> None:
        """Stop after the unit in hand, waiting for it at most `timeout_s`; the thread dies with
        the process."""
        self._todo.put(None)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._engine.close()

    def _work(self) -> None:
        while (unit := self._todo.get()) is not None:
            with self._busy:
                self._done.put(self._scored(unit))

    def _score(self, unit: WorkUnit) -> Scores:
        return self._engine.score(unit.masks_MP, unit.windows, unit.extra_metrics)

    def _scored(self, unit: WorkUnit) -> UnitResult | EngineError:
        result = UnitResult(unit=unit, scores=None, engine="local")
        try:
            return replace(result, scores=self._score(unit))
        except Exception as error:  # the failure policy is the dispatcher's
            reason = first_line(error)
        if still_works(self._engine, unit.windows):
            return replace(result, error=reason)
        return EngineError(
            f"the engine stopped working: {reason}; scores are kept: give the same command again"
        )
