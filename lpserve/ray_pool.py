"""Many engines as Ray actors behind one queue. The only module that imports Ray.

Each engine is one actor in a process of its own, with the resources it needs. The pool holds units
until an engine has room (`UNITS_IN_FLIGHT` each), so that an engine that is slow or dies holds back
at most those. What goes wrong is told apart here; what follows from it is the dispatcher's policy:

* an engine that raises: the unit comes back with the error;
* an engine that dies, or overruns a unit's deadline: it is replaced; the unit that it worked on
  comes back as failed, what waited behind it goes to another engine;
* an engine that cannot start: the run ends with the engine's own error when none is left.

The first engine decides path and micro-batches for all. An engine with nothing to do takes over the
oldest unit of a slow one; the first answer counts, the other is dropped. Windows and spec travel
once to each engine.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from lpserve.engine import build_engine
from lpserve.engine.base import Engine
from lpserve.errors import EngineError, InputError, LpserveError
from lpserve.pool import UNITS_IN_FLIGHT, Unit, UnitResult, pinned
from lpserve.types import BoolArray, EngineInfo, EngineSpec, Scores
from lpserve.windows import TokenWindows

FIRST_DEADLINE_S = 3600.0
"""For a unit before any has finished."""
LEAST_DEADLINE_S = 120.0
DEADLINE_FACTOR = 30.0
"""A unit may take this many times the longest that any took for as many masks."""
TAKE_OVER_S = 1.0
"""Age of a unit before an idle engine repeats it."""
MAX_FAILED_STARTS = 3
_POLL_S = 0.2


class EngineActor:
    """One engine in a process of its own. Errors of `open` come back as values: an exception in an
    actor's start reaches the driver as a traceback of its process."""

    _engine: Engine

    def open(self, spec: EngineSpec, windows: TokenWindows) -> EngineInfo | tuple[str, str]:
        try:
            self._engine = build_engine(spec, windows)
        except LpserveError as error:
            return type(error).__name__, str(error)
        return self._engine.info

    def register(self, windows: TokenWindows) -> str:
        return self._engine.register(windows)

    def score(self, masks_MP: BoolArray, windows: str) -> Scores:
        return self._engine.score(masks_MP, windows)

    def pid(self) -> int:
        return os.getpid()


@dataclass(slots=True, eq=False)
class _Task:
    """A unit at an engine."""

    unit: Unit
    answer: Any
    started: float


@dataclass(slots=True, eq=False)
class _Member:
    """An engine of the pool."""

    actor: Any
    opening: Any
    """Its `open` call, until that has answered."""
    tasks: deque[_Task] = field(default_factory=deque)
    """The first is at work, the others wait behind it."""


class RayPool:
    """See `lpserve.pool.EnginePool`.

    Args:
        engines: how many; None: as many as the cluster can hold.
        deadline_s: of a unit; None: from how long units take.

    Raises:
        InputError, EngineError: the first engine cannot start, in its own words; or the cluster
            cannot hold one.
    """

    def __init__(
        self,
        spec: EngineSpec,
        windows: TokenWindows,
        engines: int | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self._owns_ray = _connect()
        self._spec = spec
        self._deadline_s = deadline_s
        self._default = ray.put(windows)
        self._windows: dict[str, Any] = {}
        self._members: list[_Member] = []
        self._queue: deque[Unit] = deque()
        self._done: deque[UnitResult] = deque()
        self._longest_s_per_mask = 0.0
        self._failed_starts = 0
        self.restarts = 0
        try:
            self._wanted = engines or _capacity(spec)
            first = self._start()
            self.info = self._opened(first)
            self._spec = pinned(spec, self.info.settings)
            for _ in range(self._wanted - 1):
                self._start()
        except BaseException:
            self.close()
            raise

    @property
    def num_engines(self) -> int:
        return max(1, len(self._members))

    def register(self, windows: TokenWindows) -> str:
        key = windows.content_hash
        if key in self._windows:
            return key
        self._windows[key] = ray.put(windows)
        answers = [
            member.actor.register.remote(self._windows[key])
            for member in self._members
            if member.opening is None
        ]
        try:
            ray.get(answers[:1])  # what the engine has to say about these windows
        except RayTaskError as error:
            raise _own_error(error) from None
        except RayActorError:
            pass  # noticed at its next unit; its successor registers them anew
        return key

    def submit(self, unit: Unit) -> None:
        self._queue.append(unit)
        self._assign()

    def next(self, timeout_s: float) -> UnitResult | None:
        deadline = time.monotonic() + timeout_s
        while not self._done:
            self._assign()
            answers = {task.answer: member for member in self._members for task in member.tasks}
            answers |= {m.opening: m for m in self._members if m.opening is not None}
            wait_s = min(_POLL_S, max(0.0, deadline - time.monotonic()))
            if not answers:
                time.sleep(wait_s)
            else:
                ready, _ = ray.wait(list(answers), timeout=wait_s)
                for answer in ready:
                    self._take(answers[answer], answer)
            self._end_overdue()
            if time.monotonic() >= deadline:
                break
        return self._done.popleft() if self._done else None

    def pids(self) -> list[int]:
        """Process of every engine that is open; waits for the units before it."""
        found = []
        for member in self._members:
            if member.opening is None:
                with suppress(RayActorError):
                    found.append(ray.get(member.actor.pid.remote()))
        return found

    def close(self) -> None:
        for member in self._members:
            ray.kill(member.actor)
        self._members.clear()
        if self._owns_ray:
            ray.shutdown()

    # -- engines ---------------------------------------------------------------------------------

    def _start(self) -> _Member:
        needs = _needs(self._spec)
        actor_class: Any = ray.remote(EngineActor)
        actor = actor_class.options(
            num_cpus=needs["CPU"], num_gpus=needs["GPU"], max_restarts=0, max_task_retries=0
        ).remote()
        member = _Member(actor=actor, opening=actor.open.remote(self._spec, self._default))
        self._members.append(member)
        return member

    def _opened(self, member: _Member) -> EngineInfo:
        """Wait for an engine to open; raises its own error."""
        try:
            answer = ray.get(member.opening)
        except RayActorError as error:
            raise EngineError(f"the engine died while it started: {_line(error)}") from None
        except RayTaskError as error:
            raise _own_error(error) from None
        member.opening = None
        if isinstance(answer, EngineInfo):
            return answer
        kind = InputError if answer[0] == "InputError" else EngineError
        raise kind(answer[1])

    def _joined(self, member: _Member) -> None:
        """A further engine has answered: it takes part, or is given up."""
        try:
            info = self._opened(member)
            if info.game != self.info.game:
                raise EngineError(
                    f"an engine plays another game than the first: {info.path}, {info.dtype}, "
                    f"model {info.model_hash[:12]}"
                )
        except LpserveError:
            self._members.remove(member)
            ray.kill(member.actor)
            self._failed_starts += 1
            if not self._members and self._failed_starts >= MAX_FAILED_STARTS:
                raise
            if not self._members:
                self._start()
            return
        self._failed_starts = 0
        for windows in self._windows.values():
            member.actor.register.remote(windows)

    def _died(self, member: _Member, reason: str) -> None:
        """Replace an engine; blame the unit that it was at work on."""
        self._members.remove(member)
        self.restarts += 1
        for position, task in enumerate(member.tasks):
            if self._holders(task.unit):  # its twin goes on elsewhere
                continue
            if position == 0:
                self._done.append(UnitResult(unit=task.unit, scores=None, error=reason))
            else:
                self._queue.appendleft(task.unit)
        self._start()

    # -- units -----------------------------------------------------------------------------------

    def _assign(self) -> None:
        """Hand units to the engines with most room; let idle ones repeat what slow ones hold."""
        while self._queue:
            open_members = [m for m in self._members if m.opening is None]
            member = min(open_members, key=lambda m: len(m.tasks), default=None)
            if member is None or len(member.tasks) >= UNITS_IN_FLIGHT:
                return
            self._give(member, self._queue.popleft())
        for member in self._members:
            if member.opening is None and not member.tasks:
                late = self._oldest_elsewhere(member)
                if late is not None:
                    self._give(member, late.unit)

    def _give(self, member: _Member, unit: Unit) -> None:
        answer = member.actor.score.remote(unit.masks_MP, unit.windows)
        member.tasks.append(_Task(unit=unit, answer=answer, started=time.monotonic()))

    def _oldest_elsewhere(self, idle: _Member) -> _Task | None:
        """The unit longest at another engine, at one engine only."""
        now = time.monotonic()
        tasks = [
            task
            for member in self._members
            if member is not idle
            for task in member.tasks
            if now - task.started > TAKE_OVER_S and self._holders(task.unit) == 1
        ]
        return min(tasks, key=lambda task: task.started, default=None)

    def _holders(self, unit: Unit) -> int:
        return sum(task.unit is unit for member in self._members for task in member.tasks)

    def _take(self, member: _Member, answer: Any) -> None:
        """An answer has come: of an opening, or of a unit."""
        if answer is member.opening:
            self._joined(member)
            return
        task = next((t for t in member.tasks if t.answer is answer), None)
        if task is None:
            return  # of an engine that was replaced meanwhile
        try:
            scores: Any = ray.get(answer)
            error = None
        except RayActorError as died:
            self._died(member, f"the engine died: {_line(died)}")
            return
        except RayTaskError as raised:
            scores, error = None, _line(raised.cause)
        member.tasks.remove(task)
        now = time.monotonic()
        if error is None:
            per_mask_s = (now - task.started) / len(task.unit.masks_MP)
            self._longest_s_per_mask = max(self._longest_s_per_mask, per_mask_s)
        if member.tasks:
            member.tasks[0].started = now
        for other in self._members:  # an answer of its twin will be dropped
            for twin in [t for t in other.tasks if t.unit is task.unit]:
                ray.cancel(twin.answer, force=False)
                other.tasks.remove(twin)
        self._done.append(UnitResult(unit=task.unit, scores=scores, error=error))

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for member in list(self._members):
            if not member.tasks:
                continue
            task = member.tasks[0]
            allowed_s = self._deadline_s or self._allowed_s(len(task.unit.masks_MP))
            if now - task.started > allowed_s:
                ray.kill(member.actor)
                self._died(member, f"the engine did not answer within {allowed_s:.0f} s")

    def _allowed_s(self, num_masks: int) -> float:
        if not self._longest_s_per_mask:
            return FIRST_DEADLINE_S
        return max(LEAST_DEADLINE_S, DEADLINE_FACTOR * self._longest_s_per_mask * num_masks)


def _connect() -> bool:
    """Join the cluster that `RAY_ADDRESS` or this machine names, else start one here; returns
    whether it is ours to end."""
    if ray.is_initialized():
        return False
    try:
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    return True


def _needs(spec: EngineSpec) -> dict[str, float]:
    """CPUs and GPUs of one engine."""
    ranks = int(spec.options.get("tensor_parallel_size", 1)) * int(
        spec.options.get("pipeline_parallel_size", 1)
    )
    on_gpu = ray.cluster_resources().get("GPU", 0) > 0 and spec.device != "cpu"
    return {"CPU": 1.0, "GPU": float(ranks if on_gpu and spec.kind != "synthetic" else 0)}


def _capacity(spec: EngineSpec) -> int:
    """Engines that the cluster can hold, node by node: an engine's GPUs are on one node."""
    needs = _needs(spec)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = sum(
        int(min(node.get(kind, 0.0) // amount for kind, amount in needs.items() if amount))
        for node in nodes
    )
    if not fitting:
        raise InputError(
            f"no node of the cluster has {needs['GPU']:g} GPUs and {needs['CPU']:g} CPU for an "
            "engine: lower tensor_parallel_size or add nodes"
        )
    return fitting


def _own_error(error: RayTaskError) -> LpserveError:
    cause = error.cause
    return cause if isinstance(cause, LpserveError) else EngineError(_line(cause))


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
