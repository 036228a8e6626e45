"""Many engines as Ray actors behind one queue. Nothing else in lpserve imports Ray.

Each engine is one actor in a process of its own, with the resources that it needs. Answers arrive
as events, never by asking every engine in turn, so the work for a unit does not grow with the
number of engines. What goes wrong is told apart here; what follows is the dispatcher's policy:

* an engine raises: the unit comes back with the error; if the engine cannot score the whole model
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

import os
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# Ray prints what its daemons say about dead workers on the driver's standard output, over the run's
# own lines; it reads this when it is imported
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")

import ray.exceptions

from lpserve.data.windows import TokenWindows
from lpserve.engine.registry import engine_kind
from lpserve.errors import EngineError, InputError, typed_first_line
from lpserve.scoring.pool import UnitResult, WorkUnit
from lpserve.scoring.progress import RunState
from lpserve.scoring.ray.actor import EngineActor, Failure, Whereabouts
from lpserve.scoring.ray.cluster import (
    Place,
    Watcher,
    capacity,
    check_room,
    connect,
    needs_of,
)
from lpserve.scoring.ray.metrics import RunMetrics
from lpserve.types import EngineInfo, EngineSpec

FIRST_DEADLINE_S = 3600.0
"""For a unit whose time is not known yet, and for an engine to be ready."""
LEAST_DEADLINE_S = 120.0
DEADLINE_FACTOR = 30.0
"""A unit may take this many times what it should."""
RETRY_S, DIED_RETRY_S = 10.0, 1.0
MOST_RETRY_S, LONELY_RETRY_S = 600.0, 30.0
"""Wait before engines that could not start are tried again: after an error of their own, after
their processes died; doubles up to the most, which is less while no engine takes part."""
PING_S = 10.0
"""Between two calls to engines that have nothing to do."""
MOST_REFUSALS, MOST_DEATHS = 3, 6
"""Starts in a row that fail so before a run without engines ends."""
NO_ROOM_S = 30.0
"""Silence after which a run says that it waits for room in the cluster."""
_TICK_S = 0.2


@dataclass(slots=True, eq=False)
class _Task:
    """A unit at an engine."""

    unit: WorkUnit
    answer: Any
    expected_s: float | None
    started: float
    reached: bool = False
    """Whether the engine was alive when the unit's turn came: else its death is not the unit's."""


@dataclass(slots=True, eq=False)
class _Member:
    """An engine of the pool."""

    name: str
    actor: Any
    place: Place
    started: float
    pinned: bool
    """Whether it was started with what the first had decided."""
    at: Whereabouts | None = None
    ready: bool = False
    gone: bool = False
    tasks: deque[_Task] = field(default_factory=deque)
    """The first is at work, the others wait behind it."""
    windows: set[str] = field(default_factory=set)
    """Hashes of the windows that were sent to it."""


class RayPool:
    """See `lpserve.scoring.pool.EnginePool`.

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
        self._owns_ray = connect()
        self._tell = log
        self._deadline_s = deadline_s
        self._windows: dict[str, Any] = {}
        self._members: dict[str, _Member] = {}
        self._engines: Mapping[str, str] = {}
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._done: deque[UnitResult] = deque()
        self._next_tick = self._next_ping = self._retry_at = 0.0
        self._failed_starts = self._names = self.restarts = 0
        self._pinned = False
        self._roomless_since: float | None = None
        self._watcher: Watcher | None = None
        try:
            self._needs = needs_of(spec)
            check_room(self._needs)
            self._spec = engine_kind(spec.kind).over_nodes(spec) if self._needs.spread else spec
            self._wanted = engines
            self._capacity = capacity(self._needs)
            self._default = ray.put(windows)
            self._keep_alive()
            self._wait_for_the_first()
            self._metrics = RunMetrics(self.info.model)
            self._watcher = Watcher(self._needs, self._nodes_changed)
        except BaseException:
            self.close()
            raise

    @property
    def engines(self) -> Mapping[str, str]:
        return self._engines

    @property
    def processes(self) -> list[Whereabouts]:
        """Where the engines that take part run."""
        return [m.at for m in self._members.values() if m.ready and m.at]

    def register(self, windows: TokenWindows) -> str:
        key = windows.content_hash
        if key not in self._windows:
            self._windows[key] = ray.put(windows)
        return key

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        member = self._members[engine]
        if not member.tasks:
            self._ping(member)
        if unit.windows not in member.windows:
            member.windows.add(unit.windows)
            member.actor.register.remote(self._windows[unit.windows])
        answer = member.actor.score.remote(unit.masks_MP, unit.windows, unit.extra_metrics)
        task = _Task(unit, answer, expected_s, time.monotonic())
        member.tasks.append(task)
        self._when_done(answer, lambda f: self._answered(member, task, f))

    def cancel(self, unit: WorkUnit, engine: str) -> None:
        member = self._members.get(engine)
        for task in list(member.tasks)[1:] if member else ():
            if task.unit is unit:
                ray.cancel(task.answer, force=False)

    def next(self, timeout_s: float) -> UnitResult | None:
        deadline = time.monotonic() + timeout_s
        while True:
            while not self._events.empty():
                self._events.get()()
            now = time.monotonic()
            if now >= self._next_tick:
                self._next_tick = now + _TICK_S
                self._tick(now)
            if self._done:
                return self._done.popleft()
            if now >= deadline:
                return None
            try:
                event = self._events.get(timeout=min(_TICK_S, deadline - now))
            except queue.Empty:
                continue
            event()

    def publish(self, state: RunState) -> None:
        units = sum(len(member.tasks) for member in self._members.values())
        engines, restarts = len(self._engines), self.restarts
        self._metrics.publish(state, engines=engines, units=units, restarts=restarts)

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
        for member in list(self._members.values()):
            self._remove(member)
        if self._owns_ray:
            ray.shutdown()

    # -- engines ---------------------------------------------------------------------------------

    def _keep_alive(self) -> None:
        """Start engines up to the number wanted."""
        wanted = self._capacity if self._wanted is None else self._wanted
        if time.monotonic() >= self._retry_at:
            for _ in range(wanted - len(self._members)):
                self._start()
        surplus = len(self._members) - wanted
        for member in [m for m in self._members.values() if m.at is None][: max(0, surplus)]:
            self._remove(member)  # its node left, and nothing else has room for it

    def _start(self) -> None:
        place = Place(self._needs)
        actor_class: Any = ray.remote(EngineActor)
        actor = actor_class.options(max_restarts=0, max_task_retries=0, **place.options).remote()
        self._names += 1
        name = f"engine {self._names}"
        member = _Member(name, actor, place, time.monotonic(), self._pinned)
        self._members[member.name] = member
        self._when_done(actor.where.remote(), lambda f: self._placed(member, f))
        opening = actor.open.remote(self._spec, self._default)
        self._when_done(opening, lambda f: self._opened(member, f))

    def _when_done(self, answer: Any, then: Callable[[Any], None]) -> None:
        """Have `then` called, by whoever waits in `next`, with the answer's future."""
        answer.future().add_done_callback(lambda f: self._events.put(lambda: then(f)))

    def _placed(self, member: _Member, answer: Any) -> None:
        if member.gone or answer.exception() is not None:
            return
        member.at = answer.result()
        member.started = time.monotonic()
        self._note_engines()
        nodes = member.place.num_nodes()
        if nodes > self._needs.nodes:
            line = f"its GPUs would lie on {nodes} nodes: a pipeline stage stays on one"
            self._cannot_start(member, Failure("EngineError", line))

    def _wait_for_the_first(self) -> None:
        while not self._pinned:
            try:
                self._events.get(timeout=_TICK_S)()
            except queue.Empty:
                now = time.monotonic()
                self._end_overdue(now)
                self._keep_alive()
                self._log_waiting(now)

    def _opened(self, member: _Member, answer: Any) -> None:
        """An engine is ready and takes part, or cannot start."""
        if member.gone:
            return
        error = answer.exception()
        if error is not None:
            self._cannot_start(member, Failure("EngineError", _death(error)[0]), died=True)
            return
        info = answer.result()
        if isinstance(info, Failure):
            self._cannot_start(member, info)
            return
        if not self._pinned:
            self._pinned = True
            self.info = info
            self._spec = engine_kind(self._spec.kind).pinned(self._spec, info.settings)
        elif info.game != self.info.game:
            if member.pinned:
                line = f"it plays another game ({info.path}, model {info.model_hash[:12]})"
                self._cannot_start(member, Failure("EngineError", line))
            else:  # it chose before the first had chosen for all
                self._remove(member)
                self._start()
            return
        elif info.versions != self.info.versions:
            line = f"it runs {_difference(info.versions, self.info.versions)}"
            self._cannot_start(member, Failure("EngineError", line))
            return
        self._failed_starts = 0
        member.ready = True
        self._note_engines()

    def _cannot_start(self, member: _Member, failure: Failure, *, died: bool = False) -> None:
        """Try again later; end the run where no engine is left and it is the engine's own error,
        or its process died again and again."""
        where = f" on {member.at.address}" if member.at else ""
        self._remove(member)
        now = time.monotonic()
        if now >= self._retry_at:  # engines that fail together have failed once
            self._failed_starts += 1
        alone = not any(m.at for m in self._members.values())
        if failure.kind == "InputError" and not self._pinned:
            raise InputError(failure.line)  # the user's mistake, not one node's trouble
        tries = MOST_DEATHS if died else MOST_REFUSALS if self._pinned else 1
        if alone and self._failed_starts >= tries:
            raise EngineError(f"no engine can start: {failure.line}")
        first_s = DIED_RETRY_S if died else RETRY_S
        wait_s = first_s * 2.0 ** min(10, max(0, self._failed_starts - 1))
        wait_s = min(wait_s, MOST_RETRY_S if self._engines else LONELY_RETRY_S)
        self._retry_at = now + wait_s
        self._tell(f"an engine{where} cannot start: {failure.line}; again in {wait_s:.0f} s")

    def _remove(self, member: _Member) -> None:
        member.gone = True
        self._members.pop(member.name, None)
        self._note_engines()
        ray.kill(member.actor)
        member.place.release()

    def _lost(self, member: _Member, reason: str, *, blame: bool = True) -> None:
        """Replace an engine; blame the unit that it was at work on, if any."""
        self._remove(member)
        self.restarts += 1
        where = f" on {member.at.address}" if member.at else ""
        self._tell(f"{member.name}{where} is replaced: {reason}")
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
        if len(self._members) < (self._capacity if self._wanted is None else self._wanted):
            self._start()  # its own replacement, whatever keeps others from starting

    def _ping(self, member: _Member) -> None:
        """Find out whether an engine without work is alive still."""
        self._when_done(member.actor.where.remote(), lambda f: self._pinged(member, f))

    def _pinged(self, member: _Member, answer: Any) -> None:
        if member.gone:
            return
        error = answer.exception()
        if error is not None:
            self._lost(member, _death(error)[0], blame=False)
        elif member.tasks:
            member.tasks[0].reached = True

    def _note_engines(self) -> None:
        members = self._members.values()
        self._engines = {m.name: m.at.place for m in members if m.ready and m.at}

    def _nodes_changed(self, nodes: frozenset[str], engines: int) -> None:
        """Called by the watcher's thread."""

        def changed() -> None:
            self._capacity = engines
            for member in list(self._members.values()):
                if member.at and member.at.node not in nodes:
                    if member.ready:
                        self._lost(member, "its node left", blame=False)
                    else:
                        self._remove(member)
            self._keep_alive()

        self._events.put(changed)

    # -- units -----------------------------------------------------------------------------------

    def _answered(self, member: _Member, task: _Task, answer: Any) -> None:
        if member.gone:
            return
        result = UnitResult(unit=task.unit, scores=None, engine=member.name)
        error = answer.exception()
        if isinstance(error, ray.exceptions.TaskCancelledError):
            result = replace(result, error="cancelled", blamed=False)
        elif error is not None:
            reason, blame = _death(error)
            self._lost(member, reason, blame=blame)
            return
        else:
            scores = answer.result()
            if isinstance(scores, Failure) and scores.refused:
                raise EngineError(f"the engine refuses windows: {scores.line}")
            if not isinstance(scores, Failure):
                result = replace(result, scores=scores)
            elif scores.broken:
                self._lost(member, f"it scores nothing any more: {scores.line}")
                return
            else:
                result = replace(result, error=scores.line)
        was_first = member.tasks[0] is task
        member.tasks.remove(task)
        if was_first and member.tasks:
            member.tasks[0].started = time.monotonic()
            member.tasks[0].reached = True
        self._done.append(result)

    # -- time ------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        self._end_overdue(now)
        self._keep_alive()
        self._log_waiting(now)
        if now >= self._next_ping:
            self._next_ping = now + PING_S
            for member in self._members.values():
                if member.ready and not member.tasks:
                    self._ping(member)

    def _log_waiting(self, now: float) -> None:
        """Say it once when no engine has had room for a while."""
        if any(member.at for member in self._members.values()):
            self._roomless_since = None
        elif self._roomless_since is None:
            self._roomless_since = now
        elif now - self._roomless_since > NO_ROOM_S:
            self._roomless_since = float("inf")
            self._tell(f"waiting for room in the Ray cluster: an engine needs {self._needs}")

    def _end_overdue(self, now: float) -> None:
        for member in list(self._members.values()):
            if member.tasks:
                task = member.tasks[0]
                allowed_s = self._deadline_s or _allowed_s(task.expected_s)
                since = task.started
            elif member.at and not member.ready:
                allowed_s, since = FIRST_DEADLINE_S, member.started
            else:
                continue
            if now - since <= allowed_s:
                continue
            reason = f"it did not answer within {allowed_s:.0f} s"
            if member.ready:
                self._lost(member, reason)
            else:
                self._cannot_start(member, Failure("EngineError", reason))


def _allowed_s(expected_s: float | None) -> float:
    if expected_s is None:
        return FIRST_DEADLINE_S
    return max(LEAST_DEADLINE_S, DEADLINE_FACTOR * expected_s)


def _death(error: BaseException) -> tuple[str, bool]:
    """Why an actor no longer answers, in one line, and whether what it worked on may be why."""
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "its node cannot be reached", False
    if isinstance(error, ray.exceptions.ActorDiedError):
        if "its node has died" in str(error):
            return "its node died", False
        if "creation task" in str(error):  # its class could not be loaded there: Ray's last line
            return str(error).strip().splitlines()[-1].strip(), True
        return "its process died (killed, out of memory or crashed)", True
    return typed_first_line(getattr(error, "cause", None) or error), True


def _difference(ours: Any, firsts: Any) -> str:
    """The first library whose version differs."""
    name = next(n for n in {**firsts, **ours} if ours.get(n) != firsts.get(n))
    return f"{name} {ours.get(name)}, the other engines {firsts.get(name)}"
