"""The engines of a Ray pool: started, kept alive and replaced as nodes come and go.

Everything runs in the thread that calls `RayPool.next`: Ray's answers and the node watcher put
calls into the queue of events, which that thread takes out.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray.exceptions

from lpserve.data.windows import TokenWindows
from lpserve.engine.registry import engine_kind
from lpserve.errors import EngineError, InputError, typed_first_line
from lpserve.scoring.pool import WorkUnit
from lpserve.scoring.ray.actor import EngineActor, Failure, Whereabouts
from lpserve.scoring.ray.cluster import Place, Watcher, capacity, check_room, needs_of
from lpserve.types import EngineInfo, EngineSpec

FIRST_DEADLINE_S = 3600.0
"""For a unit whose time is not known yet, and for an engine to be ready."""
MIN_DEADLINE_S = 120.0
DEADLINE_FACTOR = 30.0
"""A unit may take this many times the expected time, and at least `MIN_DEADLINE_S`."""
RETRY_S, DIED_RETRY_S = 10.0, 1.0
"""Wait before engines are started again: after an error of their own, after their processes died.
It doubles with each failed start in a row."""
MAX_RETRY_S, LONELY_RETRY_S = 600.0, 30.0
"""The longest such wait: while engines take part, while none does."""
MAX_REFUSALS, MAX_DEATHS = 3, 6
"""Failed starts in a row, of either kind, after which a run without engines ends."""
NO_ROOM_S = 30.0
"""Time without room for any engine after which the a run says so once."""
_TICK_S = 0.2


@dataclass(slots=True, eq=False)
class EngineTask:
    """A unit at an engine."""

    unit: WorkUnit
    answer: Any
    """Ray's reference to the scores to come."""
    expected_s: float | None
    started: float
    reached: bool = False
    """Whether the engine was alive when the unit's turn came: else its death is not the unit's."""


@dataclass(slots=True, eq=False)
class Member:
    """An engine of the pool."""

    name: str
    actor: Any
    place: Place
    started: float
    pinned: bool
    """Whether it was started with the settings that the first engine had resolved."""
    at: Whereabouts | None = None
    ready: bool = False
    gone: bool = False
    tasks: deque[EngineTask] = field(default_factory=deque)
    """The first is at work, the others wait behind it."""
    windows: set[str] = field(default_factory=set)
    """Hashes of the windows that were sent to it."""


class EngineFleet:
    """The engines of one spec in the cluster that is joined.

    Args:
        windows: what the engines are opened with.
        wanted: how many; None: as many as the cluster can hold.
        deadline_s: of a unit; None: from how long it should take.
        log: takes a line for the user when engines come, go or fail.
        lost: called with an engine that is being replaced, the reason, and whether the unit that
            it worked on may be to blame: its units must go elsewhere.
    """

    info: EngineInfo

    def __init__(
        self,
        spec: EngineSpec,
        windows: TokenWindows,
        *,
        wanted: int | None,
        deadline_s: float | None,
        log: Callable[[str], None],
        lost: Callable[[Member, str, bool], None],
    ) -> None:
        self._log, self._units_lost = log, lost
        self._deadline_s = deadline_s
        self.members: dict[str, Member] = {}
        """Every engine by name, those that are starting included."""
        self.engines: Mapping[str, str] = {}
        """Engines that take part: name -> the hardware it runs on."""
        self.events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """Calls that the pool's thread is to make."""
        self._retry_at = 0.0
        self._failed_starts = self._names = self.restarts = 0
        self._pinned = False
        self._roomless_since: float | None = None
        self._watcher: Watcher | None = None
        self._needs = needs_of(spec)
        check_room(self._needs)
        self._spec = engine_kind(spec.kind).over_nodes(spec) if self._needs.spread else spec
        self._wanted = wanted
        self._capacity = capacity(self._needs)
        self._default = ray.put(windows)

    def open(self) -> None:
        """Start the engines and return once the first is ready.

        Raises:
            InputError, EngineError: no engine can start.
        """
        self.keep_alive()
        self._wait_for_first()
        self._watcher = Watcher(self._needs, self._nodes_changed)

    def close(self) -> None:
        """End every engine."""
        if self._watcher is not None:
            self._watcher.close()
        for member in list(self.members.values()):
            self.remove(member)

    def keep_alive(self) -> None:
        """Start engines up to the number wanted."""
        wanted = self._capacity if self._wanted is None else self._wanted
        if time.monotonic() >= self._retry_at:
            for _ in range(wanted - len(self.members)):
                self._start()
        surplus = len(self.members) - wanted
        for member in [m for m in self.members.values() if m.at is None][: max(0, surplus)]:
            self.remove(member)  # its node left, and nothing else has room for it

    def _start(self) -> None:
        place = Place(self._needs)
        actor_class: Any = ray.remote(EngineActor)
        actor = actor_class.options(max_restarts=0, max_task_retries=0, **place.options).remote()
        self._names += 1
        name = f"engine {self._names}"
        member = Member(name, actor, place, time.monotonic(), self._pinned)
        self.members[member.name] = member
        self.when_done(actor.where.remote(), lambda f: self._placed(member, f))
        opening = actor.open.remote(self._spec, self._default)
        self.when_done(opening, lambda f: self._opened(member, f))

    def when_done(self, answer: Any, then: Callable[[Any], None]) -> None:
        """Have `then` called with the answer's future, in the thread that takes out events."""
        answer.future().add_done_callback(lambda f: self.events.put(lambda: then(f)))

    def _placed(self, member: Member, answer: Any) -> None:
        if member.gone or answer.exception() is not None:
            return
        member.at = answer.result()
        member.started = time.monotonic()
        self._note_engines()
        nodes = member.place.num_nodes()
        if nodes > self._needs.nodes:
            line = f"its GPUs would lie on {nodes} nodes: a pipeline stage stays on one"
            self._cannot_start(member, Failure("EngineError", line))

    def _wait_for_first(self) -> None:
        while not self._pinned:
            try:
                self.events.get(timeout=_TICK_S)()
            except queue.Empty:
                now = time.monotonic()
                self.end_overdue(now)
                self.keep_alive()
                self.log_waiting(now)

    def _opened(self, member: Member, answer: Any) -> None:
        """An engine is ready and takes part, or cannot start."""
        if member.gone:
            return
        error = answer.exception()
        if error is not None:
            self._cannot_start(member, Failure("EngineError", cause_of_death(error)[0]), died=True)
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
                self.remove(member)
                self._start()
            return
        elif info.versions != self.info.versions:
            line = f"it runs {_difference(info.versions, self.info.versions)}"
            self._cannot_start(member, Failure("EngineError", line))
            return
        self._failed_starts = 0
        member.ready = True
        self._note_engines()

    def _cannot_start(self, member: Member, failure: Failure, *, died: bool = False) -> None:
        """Try again later; end the run where no engine is left and it is the engine's own error,
        or its process died again and again."""
        where = f" on {member.at.address}" if member.at else ""
        self.remove(member)
        now = time.monotonic()
        if now >= self._retry_at:  # engines that fail together have failed once
            self._failed_starts += 1
        alone = not any(m.at for m in self.members.values())
        if failure.kind == "InputError" and not self._pinned:
            raise InputError(failure.line)  # the user's mistake, not one node's trouble
        tries = MAX_DEATHS if died else MAX_REFUSALS if self._pinned else 1
        if alone and self._failed_starts >= tries:
            raise EngineError(f"no engine can start: {failure.line}")
        first_s = DIED_RETRY_S if died else RETRY_S
        wait_s = first_s * 2.0 ** min(10, max(0, self._failed_starts - 1))
        wait_s = min(wait_s, MAX_RETRY_S if self.engines else LONELY_RETRY_S)
        self._retry_at = now + wait_s
        self._log(f"an engine{where} cannot start: {failure.line}; again in {wait_s:.0f} s")

    def remove(self, member: Member) -> None:
        """End an engine."""
        member.gone = True
        self.members.pop(member.name, None)
        self._note_engines()
        ray.kill(member.actor)
        member.place.release()

    def replace(self, member: Member, reason: str, *, blame: bool = True) -> None:
        """End an engine that was lost and start another.

        Args:
            blame: whether the unit that it worked on may be the cause.
        """
        self.remove(member)
        self.restarts += 1
        where = f" on {member.at.address}" if member.at else ""
        self._log(f"{member.name}{where} is replaced: {reason}")
        self._units_lost(member, reason, blame)
        if len(self.members) < (self._capacity if self._wanted is None else self._wanted):
            self._start()  # its own replacement, whatever keeps others from starting

    def ping(self, member: Member) -> None:
        """Find out whether an engine without work is still alive."""
        self.when_done(member.actor.where.remote(), lambda f: self._pinged(member, f))

    def _pinged(self, member: Member, answer: Any) -> None:
        if member.gone:
            return
        error = answer.exception()
        if error is not None:
            self.replace(member, cause_of_death(error)[0], blame=False)
        elif member.tasks:
            member.tasks[0].reached = True

    def _note_engines(self) -> None:
        members = self.members.values()
        self.engines = {m.name: m.at.place for m in members if m.ready and m.at}

    def _nodes_changed(self, nodes: frozenset[str], engines: int) -> None:
        """Called by the watcher's thread."""

        def changed() -> None:
            self._capacity = engines
            for member in list(self.members.values()):
                if member.at and member.at.node not in nodes:
                    if member.ready:
                        self.replace(member, "its node left", blame=False)
                    else:
                        self.remove(member)
            self.keep_alive()

        self.events.put(changed)

    def log_waiting(self, now: float) -> None:
        """Tell the user once that no engine has had room for `NO_ROOM_S`."""
        if any(member.at for member in self.members.values()):
            self._roomless_since = None
        elif self._roomless_since is None:
            self._roomless_since = now
        elif now - self._roomless_since > NO_ROOM_S:
            self._roomless_since = float("inf")
            self._log(f"waiting for room in the Ray cluster: an engine needs {self._needs}")

    def end_overdue(self, now: float) -> None:
        """Replace engines that overran a deadline: of their unit, or for being ready."""
        for member in list(self.members.values()):
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
                self.replace(member, reason)
            else:
                self._cannot_start(member, Failure("EngineError", reason))


def _allowed_s(expected_s: float | None) -> float:
    if expected_s is None:
        return FIRST_DEADLINE_S
    return max(MIN_DEADLINE_S, DEADLINE_FACTOR * expected_s)


def cause_of_death(error: BaseException) -> tuple[str, bool]:
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
