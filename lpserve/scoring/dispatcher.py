"""Who scores what: units sized for each engine, late ones repeated, and the failure policy.

Written in one place, for every pool:

* masks are cut into units of about 2 s (more for 500 engines and up) at the engine's own measured
  pace, less where few are left, so that all engines end together; a lone mask is split over windows
  when engines outnumber masks;
* an engine holds one unit and, unless that takes long, one more behind it: so it never starves;
* a unit that is overdue is repeated elsewhere, before others; an engine with nothing to do takes
  over what would end last elsewhere, if it ends sooner here (after LATE, Zaharia et al. 2008); the
  first answer counts;
* a unit that fails is tried again, elsewhere if it can be; one that fails twice is bisected until
  the mask that cannot be scored is alone; one that fails twice alone is given up with its reason;
* what waited behind a failing unit goes to another engine and is not blamed;
* engines that are lost again and again while nothing is scored end the run with their last reason.

Non-finite scores are results, not failures.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.errors import EngineError
from lpserve.masks import sort_distinct
from lpserve.scoring.pool import EnginePool, UnitResult, WorkUnit
from lpserve.store.store import WindowBlock
from lpserve.types import BoolArray, FloatArray, Scores, Work

TARGET_UNIT_S = 2.0
ANSWER_S = 0.004
"""Units last at least this long for each engine: an answer costs the driver about half of it
(`scripts/bench/results/coordinator.md`), so it keeps pace with any number of engines."""
LEAST_UNIT_S = 0.2
"""Masks are not spread over more engines, nor split over windows, below this time a unit."""
QUEUED_FACTOR = 2.0
"""A second unit waits at an engine whose first takes at most this many times the target."""
OVERDUE_FACTOR = 2.0
OVERDUE_S = 1.0
"""A unit is overdue this much after twice its time: then as long again is expected."""
_FIRST_UNIT_MASKS = 2
_PACE_MEMORY = 0.5
_GAIN = 1.2
_RELIEF_EVERY_S = 0.2
_SPARE_LOSSES = 16
"""Engines lost in a row, beyond two for each engine, before a run gives up: as many as it takes to
bisect a unit of 64 masks to one bad one (2 + 6 + 2), and some more for a second beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenUp:
    """A mask that no engine could score, alone in its unit, twice."""

    unit: WorkUnit
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job(WorkUnit):
    """A unit and what has happened to it."""

    failures: int = 0
    failed_at: frozenset[str] = frozenset()
    """Hardware of the engines that it failed at."""
    part: _Part | None = None


@dataclass(slots=True, eq=False)
class _Split:
    """A unit of one mask whose windows are scored apart, and what has come of it so far."""

    job: _Job
    values_CN: FloatArray
    """Metrics of the windows, NLL first."""
    missing: int
    work: Work = field(default_factory=Work)
    ended: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Consecutive windows of a split unit."""

    split: _Split
    rows: slice


@dataclass(slots=True, eq=False)
class _Held:
    """Where a unit is, and what has come of it there."""

    at: dict[str, str] = field(default_factory=dict)
    """Engine -> its hardware."""
    failed_at: list[str] = field(default_factory=list)
    """Hardware at which it has failed while others went on with it."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A unit at an engine."""

    job: _Job
    expected_s: float | None
    started: float
    """When it came, or its turn."""


@dataclass(slots=True, eq=False)
class _End:
    """When a unit should be done where it is."""

    engine: str
    flight: _Flight
    in_s: float
    overdue: bool


class Dispatcher:
    """Feeds a pool and takes its results.

    Args:
        clock: seconds; time passes by it (a simulation brings its own).
    """

    def __init__(self, pool: EnginePool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._waiting: deque[_Job] = deque()
        self._masks_waiting = 0
        self._live: dict[WorkUnit, _Held] = {}
        """Units at engines whose answer is wanted."""
        self._engines: Mapping[str, str] = {}
        self._flights: dict[str, deque[_Flight]] = {}
        self._room: tuple[dict[str, None], dict[str, None]] = ({}, {})
        """Engines that hold no unit, and one short one."""
        self._known: dict[str, TokenWindows] = {}
        self._pace: dict[str, float] = {}
        """Engine -> seconds for a token of a mask."""
        self._late: set[str] = set()
        """Engines whose unit is overdue: they get no more."""
        self._lost_in_a_row = self._most_engines = 0
        self._target_s = TARGET_UNIT_S
        self._next_relief = 0.0
        self.closed = False

    def register(self, windows: TokenWindows) -> str:
        """Make windows known to the engines; returns their hash."""
        key = self._pool.register(windows)
        self._known[key] = windows
        return key

    def add(
        self,
        masks_MP: BoolArray,
        block: WindowBlock,
        windows: str,
        extra_metrics: tuple[str, ...] = (),
    ) -> None:
        """Queue masks for registered windows; neighbours in key order stay together, since they
        share prefixes. `extra_metrics` names metrics beside the NLL."""
        sorted_DP, _ = sort_distinct(masks_MP)
        self._wait(
            _Job(masks_MP=sorted_DP, block=block, windows=windows, extra_metrics=extra_metrics),
            first=False,
        )
        self._pump()

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._live

    @property
    def in_flight(self) -> int:
        """Units at engines."""
        return len(self._live)

    @property
    def masks_waiting(self) -> int:
        return self._masks_waiting

    def stop(self) -> None:
        """Submit nothing more; units in flight still arrive."""
        self.closed = True

    def next(self, timeout_s: float) -> UnitResult | GivenUp | None:
        """The next scored unit or given-up mask; None when none came in time.

        Raises:
            EngineError: engines are lost again and again, and nothing is scored in between.
        """
        deadline = self._clock() + timeout_s
        while True:
            self._pump()
            result = self._pool.next(max(0.0, deadline - self._clock()))
            if result is None:
                return None
            done = self._take(result)
            if done is not None:
                return done

    # -- results ---------------------------------------------------------------------------------

    def _take(self, result: UnitResult) -> UnitResult | GivenUp | None:
        self._landed(result)
        if result.scores is not None:
            self._learn_pace(result)
        if result.lost and result.blamed:
            self._count_loss(result)
        held = self._live.get(result.unit)
        if held is None:  # answered elsewhere before
            return None
        place = held.at.pop(result.engine)
        if result.scores is None:
            if result.blamed:
                held.failed_at.append(place)
            if held.at:  # another engine goes on with it
                return None
            del self._live[result.unit]
            return self._failed(result, held.failed_at)
        del self._live[result.unit]
        for engine in held.at:
            self._pool.cancel(result.unit, engine)
        self._pump()
        return self._joined(result)

    def _landed(self, result: UnitResult) -> None:
        flights = self._flights.get(result.engine)
        if flights is None:
            return
        at_work = flights[0].job is result.unit
        for flight in [f for f in flights if f.job is result.unit][:1]:
            flights.remove(flight)
        if at_work:
            self._late.discard(result.engine)
        if at_work and flights:
            flights[0].started = self._clock()
        self._file(result.engine)

    def _failed(self, result: UnitResult, failed_at: list[str]) -> GivenUp | None:
        job = result.unit
        assert isinstance(job, _Job)
        if job.part and job.part.split.ended:
            return None
        failures, places = job.failures + len(failed_at), job.failed_at.union(failed_at)
        if not failed_at or failures < 2:
            self._wait(replace(job, failures=failures, failed_at=places), first=True)
        elif len(job.masks_MP) == 1:
            if job.part:  # the mask is given up as a whole
                job.part.split.ended = True
                job = job.part.split.job
            return GivenUp(unit=job, reason=result.error or "failed")
        else:
            half = len(job.masks_MP) // 2
            for masks_MP in (job.masks_MP[half:], job.masks_MP[:half]):
                # each half has one failure behind it, so that another bisects it at once; a mask
                # alone starts anew: none is given up for what befell its neighbours
                failures = 1 if len(masks_MP) > 1 else 0
                told = replace(job, masks_MP=masks_MP, failures=failures, failed_at=places)
                self._wait(told, first=True)
        return None

    def _count_loss(self, result: UnitResult) -> None:
        self._lost_in_a_row += 1
        if self._lost_in_a_row > _SPARE_LOSSES + 2 * self._most_engines:
            raise EngineError(
                f"{self._lost_in_a_row} engines were lost in a row while nothing was scored; the "
                f"last: {result.error}; scores are kept: give the same command again"
            )

    # -- engines ---------------------------------------------------------------------------------

    def _note_engines(self) -> None:
        engines = self._pool.engines
        if engines is self._engines:
            return
        gone = [name for name in self._flights if name not in engines]
        self._engines = engines
        self._most_engines = max(self._most_engines, len(engines))
        self._target_s = max(TARGET_UNIT_S, ANSWER_S * len(engines))
        for name in gone:  # what they held comes back as results
            del self._flights[name]
            self._late.discard(name)
            self._file(name)
        for name in engines:
            if name not in self._flights:
                self._flights[name] = deque()
                self._file(name)

    def _file(self, engine: str) -> None:
        """Note how much room an engine has."""
        for engines in self._room:
            engines.pop(engine, None)
        flights = self._flights.get(engine)
        if flights is None:
            return
        if not flights:
            self._room[0][engine] = None
        elif len(flights) == 1 and (flights[0].expected_s or 0.0) <= QUEUED_FACTOR * self._target_s:
            self._room[1][engine] = None

    def _vacant(self, avoid: Set[str]) -> str | None:
        """An engine with room, one with nothing to do first; not on hardware in `avoid` as long as
        there is other."""
        if avoid and not any(place not in avoid for place in self._engines.values()):
            avoid = frozenset()
        for engines in self._room:
            for engine in engines:
                if self._engines[engine] not in avoid and engine not in self._late:
                    return engine
        return None

    # -- units -----------------------------------------------------------------------------------

    def _wait(self, job: _Job, *, first: bool) -> None:
        self._masks_waiting += len(job.masks_MP)
        (self._waiting.appendleft if first else self._waiting.append)(job)

    def _pump(self) -> None:
        if self.closed:
            return
        self._note_engines()
        self._relieve()
        while self._waiting and (found := self._next_job()):
            job, engine = found
            self._waiting.remove(job)
            self._masks_waiting -= len(job.masks_MP)
            if job.part and job.part.split.ended:
                continue
            if not job.failures and not job.part:
                job = self._cut(job, engine)
            self._live[job] = _Held()
            self._submit(job, engine)

    def _next_job(self) -> tuple[_Job, str] | None:
        """The first unit for which there is an engine: one that must go elsewhere holds up none."""
        if not any(self._room):
            return None
        for job in self._waiting:
            engine = self._vacant(job.failed_at)
            if engine is not None:
                return job, engine
        return None

    def _submit(self, job: _Job, engine: str) -> None:
        expected_s = self._expected_s(job, engine)
        self._live[job].at[engine] = self._engines[engine]
        self._flights[engine].append(_Flight(job, expected_s, self._clock()))
        self._file(engine)
        self._pool.submit(job, engine, expected_s)

    def _cut(self, job: _Job, engine: str) -> _Job:
        """As much of a unit as the engine should get; the rest waits."""
        waiting = self._masks_waiting + len(job.masks_MP)
        share = -(-waiting // len(self._engines))
        mask_s = self._expected_s(replace(job, masks_MP=job.masks_MP[:1]), engine)
        if mask_s is None:
            size = min(_FIRST_UNIT_MASKS, share)
        else:
            share = max(share, int(LEAST_UNIT_S / mask_s))
            size = max(1, min(int(self._target_s / mask_s), share))
        if len(job.masks_MP) > size:
            self._wait(replace(job, masks_MP=job.masks_MP[size:]), first=True)
            job = replace(job, masks_MP=job.masks_MP[:size])
        if len(job.masks_MP) == 1 and engine in self._room[0] and mask_s is not None:
            num_parts = min(
                len(self._engines) // waiting, int(mask_s / LEAST_UNIT_S), len(job.block.rows)
            )
            if num_parts > 1:
                return self._split(job, num_parts)
        return job

    def _split(self, job: _Job, num_parts: int) -> _Job:
        """Split a mask over windows, for more engines than masks; returns the first part."""
        num_windows = len(job.block.rows)
        values_CN = np.empty((1 + len(job.extra_metrics), num_windows))
        split = _Split(job=job, values_CN=values_CN, missing=num_parts)
        bounds = np.linspace(0, num_windows, num_parts + 1).astype(int).tolist()
        parts = []
        for start, stop in pairwise(bounds):
            some = self._known[job.windows].select(np.arange(start, stop))
            part = _Part(split, slice(start, stop))
            parts.append(replace(job, windows=self.register(some), part=part))
        for part in reversed(parts[1:]):
            self._wait(part, first=True)
        return parts[0]

    def _joined(self, result: UnitResult) -> UnitResult | None:
        """The result itself, or of the whole unit once its last part has come."""
        job, scores = result.unit, result.scores
        assert isinstance(job, _Job)
        if job.part is None or scores is None:
            return result
        split = job.part.split
        for values_N, metric in zip(split.values_CN, ("nll", *job.extra_metrics), strict=True):
            values_N[job.part.rows] = scores.of(metric)[0]
        split.missing -= 1
        split.work += scores.work
        if split.missing or split.ended:
            return None
        num_tokens_N = self._known[split.job.windows].num_tokens_N
        # one mask was scored: a layer-forward is one over all windows
        work = replace(scores.work, tokens=split.work.tokens, seconds=split.work.seconds)
        nll_1N, *others = split.values_CN[:, None]
        whole = Scores(
            nll_MN=nll_1N,
            num_tokens_N=num_tokens_N,
            work=work,
            others=dict(zip(job.extra_metrics, others, strict=True)),
        )
        return replace(result, unit=split.job, scores=whole)

    # -- time ------------------------------------------------------------------------------------

    def _relieve(self) -> None:
        """Have units that are overdue repeated elsewhere, and, where nothing waits, engines with
        nothing to do take over what ends last."""
        now = self._clock()
        if now < self._next_relief or not self._live:
            return
        self._next_relief = now + _RELIEF_EVERY_S
        ends = sorted(self._ends(now), key=lambda end: -end.in_s)
        for end in ends:
            if end.overdue:
                engine = self._vacant({self._engines[end.engine]})
                if engine is None:
                    break
                self._repeat(end, engine)
        if self._waiting:
            return
        idle = sorted(self._room[0], key=lambda engine: self._pace.get(engine, np.inf))
        left = [end for end in ends if len(self._live[end.flight.job].at) == 1]
        for engine, end in zip(idle, left, strict=False):
            here_s = self._expected_s(end.flight.job, engine)
            if here_s is None or _GAIN * here_s + LEAST_UNIT_S > end.in_s:
                return
            self._repeat(end, engine)

    def _repeat(self, end: _End, engine: str) -> None:
        self._submit(end.flight.job, engine)
        if end.flight is not self._flights[end.engine][0]:
            self._pool.cancel(end.flight.job, end.engine)

    def _ends(self, now: float) -> list[_End]:
        """When each unit that one engine alone holds should be done; notes which engines are late.

        A unit that has failed somewhere is not repeated: it may be what ends engines.
        """
        ends = []
        for engine, flights in self._flights.items():
            in_s, overdue = 0.0, False
            for position, flight in enumerate(flights):
                expected_s = flight.expected_s or self._expected_s(flight.job, engine)
                if expected_s is None:
                    break
                age_s = now - flight.started if position == 0 else 0.0
                if age_s > OVERDUE_S + OVERDUE_FACTOR * expected_s:
                    overdue = True
                    self._late.add(engine)
                in_s += age_s if overdue and not position else max(0.0, expected_s - age_s)
                held = self._live.get(flight.job)
                if held and len(held.at) == 1 and not held.failed_at and not flight.job.failures:
                    ends.append(_End(engine, flight, in_s, overdue))
        return ends

    def _expected_s(self, unit: WorkUnit, engine: str) -> float | None:
        """From the engine's own pace, or the others' as long as it has none."""
        pace = self._pace.get(engine)
        if pace is None:
            if not self._pace:
                return None
            pace = sum(self._pace.values()) / len(self._pace)
        return pace * len(unit.masks_MP) * self._known[unit.windows].tokens_NT.size

    def _learn_pace(self, result: UnitResult) -> None:
        assert result.scores is not None
        self._lost_in_a_row, self._most_engines = 0, len(self._engines)
        tokens = len(result.unit.masks_MP) * self._known[result.unit.windows].tokens_NT.size
        measured = max(result.scores.work.seconds, 1e-6) / tokens
        before = self._pace.get(result.engine, measured)
        self._pace[result.engine] = _PACE_MEMORY * before + (1 - _PACE_MEMORY) * measured
