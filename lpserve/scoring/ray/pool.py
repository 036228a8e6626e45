"""Many engines as Ray actors behind one queue.

Each engine is one actor in a process of its own, with the resources that it needs. Answers arrive
as events, never by asking every engine in turn, so the work for a unit does not grow with the
number of engines. Kinds of failure are distinguished here (`lpserve.scoring.ray.fleet`); what
follows is the dispatcher's policy:

* an engine raises: the unit comes back with the error; if the engine cannot score the full model
  any more either, it is replaced;
* an engine dies, or overruns a unit's deadline: it is replaced; the unit that it worked on comes
  back as failed, what waited behind it, or came when it was dead already, without blame;
* a node leaves or cannot be reached: its engines are replaced, and no unit is blamed;
* an engine cannot start: tried again, later each time, while others work; its own error ends the
  run when none is left.

All engines start at once; the first that is ready decides path and micro-batches, and one that
decided otherwise is started again. With a number of engines, so many are kept alive as nodes come
and go; with none, as many as the nodes that are there can hold. Windows and spec travel once to
each engine.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import ray.exceptions

from lpserve.data.windows import TokenWindows
from lpserve.errors import EngineError
from lpserve.scoring.pool import UnitResult, WorkUnit
from lpserve.scoring.progress import RunState
from lpserve.scoring.ray.actor import Failure, Whereabouts
from lpserve.scoring.ray.cluster import connect
from lpserve.scoring.ray.fleet import EngineFleet, EngineTask, Member, cause_of_death
from lpserve.scoring.ray.metrics import RunMetrics
from lpserve.types import EngineInfo, EngineSpec

PING_S = 10.0
"""Between two calls to engines that have nothing to do."""
_TICK_S = 0.2


class RayPool:
    """One engine for each actor; the contract is `lpserve.scoring.pool.EnginePool`.

    Args:
        engines: how many; None: as many as the cluster can hold.
        deadline_s: of a unit; None: from how long it should take.
        log: takes a line for the user when engines come, go or fail.

    Raises:
        InputError, EngineError: no engine can start, in its own words; or the cluster cannot hold
            one.
    """

    info: EngineInfo

    def __init__(
        self,
        spec: EngineSpec,
        windows: TokenWindows,
        engines: int | None = None,
        deadline_s: float | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._windows: dict[str, Any] = {}
        """Hash of windows -> Ray's reference to them."""
        self._done: deque[UnitResult] = deque()
        self._next_tick = self._next_ping = 0.0
        with ExitStack() as stack:
            if connect():
                stack.callback(ray.shutdown)
            self._fleet = EngineFleet(
                spec,
                windows,
                wanted=engines,
                deadline_s=deadline_s,
                log=log,
                lost=self._give_back_units,
            )
            stack.callback(self._fleet.close)
            self._fleet.open()
            self.info = self._fleet.info
            self._metrics = RunMetrics(self.info.model)
            self._stack = stack.pop_all()

    @property
    def engines(self) -> Mapping[str, str]:
        return self._fleet.engines

    @property
    def processes(self) -> list[Whereabouts]:
        """Where the engines that take part run."""
        return [m.at for m in self._fleet.members.values() if m.ready and m.at]

    @property
    def restarts(self) -> int:
        """Engines that were lost and replaced."""
        return self._fleet.restarts

    def register(self, windows: TokenWindows) -> str:
        key = windows.content_hash
        if key not in self._windows:
            self._windows[key] = ray.put(windows)
        return key

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        member = self._fleet.members[engine]
        if not member.tasks:
            self._fleet.ping(member)
        if unit.windows not in member.windows:
            member.windows.add(unit.windows)
            member.actor.register.remote(self._windows[unit.windows])
        answer = member.actor.score.remote(
            unit.masks_MP, unit.windows, unit.extra_metrics, unit.overlap
        )
        task = EngineTask(unit, answer, expected_s, time.monotonic())
        member.tasks.append(task)
        self._fleet.when_done(answer, lambda f: self._answered(member, task, f))

    def cancel(self, unit: WorkUnit, engine: str) -> None:
        member = self._fleet.members.get(engine)
        for task in list(member.tasks)[1:] if member else ():
            if task.unit is unit:
                ray.cancel(task.answer, force=False)

    def next(self, timeout_s: float) -> UnitResult | None:
        deadline = time.monotonic() + timeout_s
        events = self._fleet.events
        while True:
            while not events.empty():
                events.get()()
            now = time.monotonic()
            if now >= self._next_tick:
                self._next_tick = now + _TICK_S
                self._tick(now)
            if self._done:
                return self._done.popleft()
            if now >= deadline:
                return None
            try:
                event = events.get(timeout=min(_TICK_S, deadline - now))
            except queue.Empty:
                continue
            event()

    def publish(self, state: RunState) -> None:
        units = sum(len(member.tasks) for member in self._fleet.members.values())
        engines, restarts = len(self.engines), self.restarts
        self._metrics.publish(state, engines=engines, units=units, restarts=restarts)

    def close(self) -> None:
        self._stack.close()

    def _give_back_units(self, member: Member, reason: str, blame: bool) -> None:
        """Return the units of an engine that was lost; blame the one that it worked on, if any."""
        for position, task in enumerate(member.tasks):
            first = position == 0
            self._done.append(
                UnitResult(
                    unit=task.unit,
                    scores=None,
                    engine=member.name,
                    error=reason,
                    blamed=blame and first and task.reached,
                    lost=first,
                )
            )

    def _answered(self, member: Member, task: EngineTask, answer: Any) -> None:
        if member.gone:
            return
        result = UnitResult(unit=task.unit, scores=None, engine=member.name)
        error = answer.exception()
        if isinstance(error, ray.exceptions.TaskCancelledError):
            result = replace(result, error="cancelled", blamed=False)
        elif error is not None:
            reason, blame = cause_of_death(error)
            self._fleet.replace(member, reason, blame=blame)
            return
        else:
            scores = answer.result()
            if isinstance(scores, Failure) and scores.refused:
                raise EngineError(f"the engine refuses windows: {scores.line}")
            if not isinstance(scores, Failure):
                result = replace(result, scores=scores)
            elif scores.broken:
                self._fleet.replace(member, f"it scores nothing any more: {scores.line}")
                return
            else:
                result = replace(result, error=scores.line)
        was_first = member.tasks[0] is task
        member.tasks.remove(task)
        if was_first and member.tasks:
            member.tasks[0].started = time.monotonic()
            member.tasks[0].reached = True
        self._done.append(result)

    def _tick(self, now: float) -> None:
        self._fleet.end_overdue(now)
        self._fleet.keep_alive()
        self._fleet.log_waiting(now)
        if now >= self._next_ping:
            self._next_ping = now + PING_S
            for member in self._fleet.members.values():
                if member.ready and not member.tasks:
                    self._fleet.ping(member)
