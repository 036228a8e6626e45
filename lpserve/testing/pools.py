"""An engine pool in simulated time: engines of uneven speed that die, hang and restart.

An engine works on its units in order; a hang ends at a deadline, as in the Ray pool. The driver
serves one answer at a time at the costs given. Deterministic for a seed.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.scoring.pool import UnitResult, WorkUnit
from lpserve.scoring.progress import RunState
from lpserve.types import BoolArray, EngineInfo, Scores, Work

TICK_S = 0.2
REQUEST_MASKS = 20_000
"""Masks of one piece of `distinct_masks`."""


@dataclass(frozen=True, kw_only=True)
class SimulationSetting:
    """What is simulated; times in seconds."""

    name: str
    engines: int = 1000
    masks: int
    mask_s: float
    """At an engine of speed 1."""
    round_masks: int
    refit_s: float = 5.0
    failure_h: float | None = None
    """Engine-hours between two failures; None: none."""
    hang_share: float = 0.1
    restart_s: float = 300.0
    unit_cost_s: float
    mask_cost_s: float
    min_deadline_s: float = 120.0
    deadline_factor: float = 30.0
    """A unit that takes longer than this many times what was expected hangs."""
    seed: int = 0


@dataclass(eq=False)
class SimulatedTask:
    """A unit at an engine, its duration, and what the dispatcher expected."""

    unit: WorkUnit
    seconds: float
    expected_s: float | None
    started: float = 0.0


@dataclass(eq=False)
class SimulatedEngine:
    """An engine: its speed, and the units that it has."""

    name: str
    speed: float
    life: int = 0
    """Counts restarts: events of an earlier life are void."""
    up: bool = True
    hangs: bool = False
    tasks: deque[SimulatedTask] = field(default_factory=deque)


class SimulatedPool:
    """See `lpserve.scoring.pool.EnginePool`; time passes in `next` alone."""

    info: EngineInfo

    def __init__(self, setting: SimulationSetting) -> None:
        self._s = setting
        self._rng = np.random.default_rng(setting.seed)
        self.now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, Any, int]] = []
        self._done: deque[UnitResult] = deque()
        self.proposed: deque[int] = deque()
        self.failures = self.submits = 0
        speeds = self._speeds()
        self.speed = sum(speeds)
        self._all = {f"e{i}": SimulatedEngine(f"e{i}", s) for i, s in enumerate(speeds)}
        for engine in self._all.values():
            self._plan_failure(engine)
        self._note_engines()
        self._ticked = False
        self._at(TICK_S, "tick", None, 0)

    def _speeds(self) -> list[float]:
        """Log-normal around 1 by 10%; one in twenty half as fast, one in a hundred a fifth."""
        speed = np.exp(self._rng.normal(0, 0.1, self._s.engines))
        kind = self._rng.random(self._s.engines)
        return np.where(kind < 0.01, speed / 5, np.where(kind < 0.06, speed / 2, speed)).tolist()

    @property
    def engines(self) -> Mapping[str, str]:
        """Name -> name of the engines that are up."""
        return self._engines

    def _note_engines(self) -> None:
        self._engines = {e.name: e.name for e in self._all.values() if e.up}

    def register(self, windows: TokenWindows) -> str:
        """Their hash; scores do not depend on windows."""
        return windows.content_hash

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        """Put a unit in an engine's queue."""
        self.submits += 1
        noise = float(np.exp(self._rng.normal(0, 0.05)))
        where = self._all[engine]
        seconds = len(unit.masks_MP) * self._s.mask_s / where.speed * noise
        where.tasks.append(SimulatedTask(unit=unit, seconds=seconds, expected_s=expected_s))
        if len(where.tasks) == 1:
            self._begin(where)

    def cancel(self, unit: WorkUnit, engine: str) -> None:
        """Take a unit back that its engine has not begun."""
        where = self._all[engine]
        for task in list(where.tasks)[1:]:
            if task.unit is unit:
                where.tasks.remove(task)
                result = UnitResult(unit=unit, scores=None, engine=engine, blamed=False)
                self._done.append(result)

    def publish(self, state: RunState) -> None:
        """Nobody listens."""

    def close(self) -> None:
        """Nothing to free."""

    def propose_at(self, when: float, index: int) -> None:
        """Have `next` return at that time, with `index` in `proposed`."""
        self._at(when, "proposal", index, 0)

    def next(self, timeout_s: float) -> UnitResult | None:
        """The next result; None at a tick, or when a proposal is due (it is in `proposed`)."""
        while not self._done:
            if self.proposed or self._ticked:
                self._ticked = False
                return None
            when, _, kind, what, life = heapq.heappop(self._events)
            self.now = max(self.now, when)
            getattr(self, f"_{kind}")(what, life)
        result = self._done.popleft()
        self.now += self._s.unit_cost_s + self._s.mask_cost_s * len(result.unit.masks_MP)
        return result

    # -- events ----------------------------------------------------------------------------------

    def _at(self, when: float, kind: str, what: Any, life: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, what, life))

    def _proposal(self, index: int, _: int) -> None:
        self.proposed.append(index)

    def _answer(self, engine: SimulatedEngine, life: int) -> None:
        if life != engine.life or engine.hangs:
            return
        task = engine.tasks.popleft()
        if engine.tasks:
            self._begin(engine)
        num_masks = len(task.unit.masks_MP)
        work = Work(masks=num_masks, distinct_masks=num_masks, seconds=task.seconds)
        nll_MN, tokens_N = np.zeros((num_masks, 1)), np.ones(1, dtype=np.int64)
        scores = Scores(nll_MN=nll_MN, num_tokens_N=tokens_N, work=work)
        self._done.append(UnitResult(unit=task.unit, scores=scores, engine=engine.name))

    def _failure(self, engine: SimulatedEngine, life: int) -> None:
        if life != engine.life:
            return
        self.failures += 1
        if engine.tasks and self._rng.random() < self._s.hang_share:
            engine.hangs = True  # a tick ends it at its deadline
        else:
            self._lose(engine)

    def _lose(self, engine: SimulatedEngine) -> None:
        for position, task in enumerate(engine.tasks):
            first = position == 0
            self._done.append(
                UnitResult(
                    unit=task.unit,
                    scores=None,
                    engine=engine.name,
                    error="died",
                    blamed=first,
                    lost=first,
                )
            )
        engine.tasks.clear()
        engine.up, engine.hangs, engine.life = False, False, engine.life + 1
        self._note_engines()
        self._at(self.now + self._s.restart_s, "restart", engine, engine.life)

    def _restart(self, engine: SimulatedEngine, life: int) -> None:
        engine.up = True
        self._note_engines()
        self._plan_failure(engine)

    def _tick(self, _: Any, __: int) -> None:
        self._at(self.now + TICK_S, "tick", None, 0)
        self._ticked = True
        for engine in self._all.values():
            if engine.hangs:
                task = engine.tasks[0]
                expected_s = self._s.deadline_factor * (task.expected_s or 0.0)
                allowed_s = max(self._s.min_deadline_s, expected_s)
                if self.now - task.started > allowed_s:
                    self._lose(engine)

    def _begin(self, engine: SimulatedEngine) -> None:
        engine.tasks[0].started = self.now
        self._at(self.now + engine.tasks[0].seconds, "answer", engine, engine.life)

    def _plan_failure(self, engine: SimulatedEngine) -> None:
        if self._s.failure_h is not None:
            after = float(self._rng.exponential(3600 * self._s.failure_h))
            self._at(self.now + after, "failure", engine, engine.life)


def distinct_masks(count: int) -> Iterator[BoolArray]:
    """Distinct masks of 32 players, `REQUEST_MASKS` at a time.

    An odd multiplier permutes the 32-bit numbers.
    """
    for start in range(0, count, REQUEST_MASKS):
        numbers = np.arange(start, min(start + REQUEST_MASKS, count), dtype=np.uint32) * 2654435761
        words = numbers.astype(">u4").view(np.uint8).reshape(-1, 4)
        yield np.unpackbits(words, axis=1).astype(bool)
