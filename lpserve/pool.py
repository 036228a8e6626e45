"""Pools: many engines behind one queue, and the failure policy, written once.

`EnginePool` is the contract: submit a unit of work, take the next finished one. `LocalPool` runs
one engine in this process on a thread of its own, so that the coordinator refits meanwhile.

`Dispatcher` turns masks into units and owns the failure policy: a unit that fails is tried again;
one that fails twice is bisected until the mask that cannot be scored is alone, and that mask is
given up with its reason. Non-finite scores are results, not failures.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lpserve.engine import build_engine
from lpserve.masks import sort_distinct
from lpserve.store import Block
from lpserve.types import BoolArray, EngineInfo, EngineSpec, Scores
from lpserve.windows import TokenWindows

UNITS_IN_FLIGHT = 2
"""Units submitted for each engine: one runs, one waits, so that none starves."""
TARGET_UNIT_S = 2.0
_FIRST_UNIT_MASKS = 8


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Unit:
    """Masks to score on the windows of one block."""

    masks_MP: BoolArray
    block: Block
    windows: str
    """Hash under which the engines know the block's windows."""
    failures: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitResult:
    """What became of a unit: scores, or the error that it ended with."""

    unit: Unit
    scores: Scores | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenUp:
    """A mask that no engine could score, alone in its unit, twice."""

    unit: Unit
    reason: str


def pinned(spec: EngineSpec, settings: Mapping[str, Any]) -> EngineSpec:
    """A spec with the path, micro-batch and memory settings that an engine of it resolved: what
    every engine of a run uses, and a resumed run again."""
    options = dict(spec.options)
    if "state_budget_bytes" in settings:
        options["state_budget_mb"] = settings["state_budget_bytes"] / 2**20
    if settings.get("pack_states"):
        options["micro_batch_tokens"] = settings["micro_batch_tokens"]
    if "path" in settings:  # half precision: scores of two paths do not mix
        options["path"] = settings["path"]
    return replace(spec, options=options)


class EnginePool(Protocol):
    """Engines behind one queue."""

    info: EngineInfo

    @property
    def num_engines(self) -> int:
        """Engines that units are sized for; may change during a run."""
        ...

    def register(self, windows: TokenWindows) -> str:
        """Make windows known to every engine; returns their hash."""
        ...

    def submit(self, unit: Unit) -> None: ...

    def next(self, timeout_s: float) -> UnitResult | None:
        """The next finished unit, in any order; None after the timeout."""
        ...

    def close(self) -> None: ...


class LocalPool:
    """One engine in this process. An engine that cannot start raises its own error here."""

    num_engines = 1

    def __init__(self, spec: EngineSpec, windows: TokenWindows) -> None:
        self._engine = build_engine(spec, windows)
        self.info = self._engine.info
        self._todo: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[UnitResult] = queue.SimpleQueue()
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="lpserve-engine", daemon=True)
        self._thread.start()

    def register(self, windows: TokenWindows) -> str:
        with self._busy:
            return self._engine.register(windows)

    def submit(self, unit: Unit) -> None:
        self._todo.put(unit)

    def next(self, timeout_s: float) -> UnitResult | None:
        try:
            return self._done.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self, timeout_s: float = 1.0) -> None:
        """Stop after the unit in hand, waiting for it at most `timeout_s`; the thread dies with
        the process."""
        self._todo.put(None)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            self._engine.close()

    def _work(self) -> None:
        while (unit := self._todo.get()) is not None:
            try:
                with self._busy:
                    scores = self._engine.score(unit.masks_MP, unit.windows)
                self._done.put(UnitResult(unit=unit, scores=scores))
            except Exception as error:  # the failure policy is the dispatcher's
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                self._done.put(UnitResult(unit=unit, scores=None, error=text))


class Dispatcher:
    """Feeds a pool with units of about `TARGET_UNIT_S` and applies the failure policy."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._waiting: deque[Unit] = deque()
        self._in_flight = 0
        self._started: float | None = None
        self._masks_per_s: dict[str, float] = {}
        self.closed = False

    def add(self, masks_MP: BoolArray, block: Block, windows: str) -> None:
        """Queue masks; neighbours in key order stay together, since they share prefixes."""
        sorted_DP, _ = sort_distinct(masks_MP)
        self._waiting.append(Unit(masks_MP=sorted_DP, block=block, windows=windows))
        self._pump()

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._in_flight

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def stop(self) -> None:
        """Submit nothing more; units in flight still arrive."""
        self.closed = True

    def next(self, timeout_s: float) -> UnitResult | GivenUp | None:
        """The next scored unit or given-up mask; None when none came in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._pump()
            result = self._pool.next(max(0.0, deadline - time.monotonic()))
            if result is None:
                return None
            self._in_flight -= 1
            if result.scores is not None:
                self._learn_speed(result)
                self._pump()
                return result
            given_up = self._failed(result)
            if given_up is not None:
                return given_up

    def _failed(self, result: UnitResult) -> GivenUp | None:
        unit = result.unit
        failures = unit.failures + 1
        if failures < 2:
            parts = [unit.masks_MP]
        elif len(unit.masks_MP) == 1:
            return GivenUp(unit=unit, reason=result.error or "failed")
        else:
            # each half has one failure behind it: failing again bisects it at once
            half = len(unit.masks_MP) // 2
            parts, failures = [unit.masks_MP[:half], unit.masks_MP[half:]], 1
        for part in reversed(parts):
            self._waiting.appendleft(
                Unit(masks_MP=part, block=unit.block, windows=unit.windows, failures=failures)
            )
        return None

    def _pump(self) -> None:
        most = UNITS_IN_FLIGHT * self._pool.num_engines
        while self._waiting and self._in_flight < most and not self.closed:
            unit = self._waiting.popleft()
            size = self._unit_masks(unit.windows)
            if not unit.failures and len(unit.masks_MP) > size:
                rest = Unit(masks_MP=unit.masks_MP[size:], block=unit.block, windows=unit.windows)
                self._waiting.appendleft(rest)
                unit = Unit(masks_MP=unit.masks_MP[:size], block=unit.block, windows=unit.windows)
            self._pool.submit(unit)
            self._in_flight += 1

    def _unit_masks(self, windows: str) -> int:
        speed = self._masks_per_s.get(windows)
        return _FIRST_UNIT_MASKS if speed is None else max(1, int(speed * TARGET_UNIT_S))

    def _learn_speed(self, result: UnitResult) -> None:
        assert result.scores is not None
        if result.scores.work.seconds > 0:
            speed = len(result.unit.masks_MP) / result.scores.work.seconds
            self._masks_per_s[result.unit.windows] = speed
