"""Pools: many engines behind one queue, and the failure policy, written once.

`EnginePool` is the contract: find an engine with room, submit a unit of work to it, take the next
finished one. `LocalPool` runs one engine in this process on a thread of its own, so that the
coordinator goes on meanwhile.

`Dispatcher` cuts masks into units, sized for each engine from its measured pace, and owns the
failure policy:

* a unit that fails is tried again, elsewhere if it can be; one that fails twice is bisected until
  the mask that cannot be scored is alone; one that fails twice alone is given up with its reason;
* what waited behind a failing unit goes to another engine and is not blamed;
* engines that are lost again and again while nothing is scored end the run with their last reason.

Non-finite scores are results, not failures.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from lpserve.engine import build_engine
from lpserve.engine.base import Engine
from lpserve.errors import EngineError
from lpserve.masks import sort_distinct
from lpserve.progress import RunState
from lpserve.store import Block
from lpserve.types import BoolArray, EngineInfo, EngineSpec, FloatArray, Scores, Work
from lpserve.windows import TokenWindows

UNITS_IN_FLIGHT = 2
"""Units at each engine: one runs, one waits, so that none starves."""
TARGET_UNIT_S = 2.0
LEAST_UNIT_S = 0.2
"""Masks are not spread over more engines, nor split over windows, below this time a unit."""
_FIRST_UNIT_MASKS = 8
_PACE_MEMORY = 0.5
_SPARE_LOSSES = 8
"""Engines lost in a row, beyond two for each engine, before a run gives up."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Unit:
    """Masks to score on the windows of one block, or one mask on some of them."""

    masks_MP: BoolArray
    block: Block
    windows: str
    """Hash under which the engines know the windows."""
    failures: int = 0
    failed_at: frozenset[str] = frozenset()
    """Places (`Vacancy.place`) of the engines that it failed at."""
    expected_s: float | None = None
    """How long it should take where it was submitted; None: not known."""
    part: _Part | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitResult:
    """What became of a unit: scores, or the error that it ended with."""

    unit: Unit
    scores: Scores | None
    engine: str = ""
    place: str = ""
    error: str | None = None
    blamed: bool = True
    """Whether the unit may be the cause of the error: not when its turn had not come, or when a
    node left."""
    lost: bool = False
    """Whether the engine was lost while it worked on the unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenUp:
    """A mask that no engine could score, alone in its unit, twice."""

    unit: Unit
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Vacancy:
    """An engine with room for a unit."""

    engine: str
    place: str
    """What hardware it runs on: a unit that failed there is tried elsewhere."""
    idle: bool
    """Whether it has nothing to do at all."""


@dataclass(slots=True, eq=False)
class _Split:
    """A unit of one mask whose windows are scored apart, and what has come of it so far."""

    unit: Unit
    nll_N: FloatArray
    missing: int
    work: Work = field(default_factory=Work)
    ended: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Consecutive windows of a split unit."""

    split: _Split
    rows: slice


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
    def num_engines(self) -> int:
        """Engines that can take units now; changes when some die, join or leave."""
        ...

    def register(self, windows: TokenWindows) -> str:
        """Make windows known to every engine; returns their hash."""
        ...

    def vacancy(self, avoid: Set[str] = frozenset()) -> Vacancy | None:
        """An engine with room, one with nothing to do first; None when there is none.

        Places in `avoid` are left out as long as the pool has engines elsewhere.
        """
        ...

    def submit(self, unit: Unit, engine: str) -> None:
        """Hand a unit to an engine that `vacancy` named last."""
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

    num_engines = 1

    def __init__(self, spec: EngineSpec, windows: TokenWindows) -> None:
        self._engine = build_engine(spec, windows)
        self.info = self._engine.info
        self._in_flight = 0
        self._todo: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[UnitResult | EngineError] = queue.SimpleQueue()
        self._busy = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="lpserve-engine", daemon=True)
        self._thread.start()

    def register(self, windows: TokenWindows) -> str:
        with self._busy:
            return self._engine.register(windows)

    def vacancy(self, avoid: Set[str] = frozenset()) -> Vacancy | None:
        if self._in_flight >= UNITS_IN_FLIGHT:
            return None
        return Vacancy(engine="local", place="local", idle=not self._in_flight)

    def submit(self, unit: Unit, engine: str) -> None:
        self._in_flight += 1
        self._todo.put(unit)

    def next(self, timeout_s: float) -> UnitResult | None:
        try:
            result = self._done.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(result, EngineError):
            raise result
        self._in_flight -= 1
        return result

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

    def _scored(self, unit: Unit) -> UnitResult | EngineError:
        result = UnitResult(unit=unit, scores=None, engine="local", place="local")
        try:
            return replace(result, scores=self._engine.score(unit.masks_MP, unit.windows))
        except Exception as error:  # the failure policy is the dispatcher's
            reason = first_line(error)
        if still_works(self._engine, unit.windows):
            return replace(result, error=reason)
        return EngineError(
            f"the engine stopped working: {reason}; scores are kept: give the same command again"
        )


class Dispatcher:
    """Feeds a pool with units of about `TARGET_UNIT_S` and applies the failure policy."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._waiting: deque[Unit] = deque()
        self._masks_waiting = 0
        self._in_flight = 0
        self._known: dict[str, TokenWindows] = {}
        self._pace: dict[str, float] = {}
        """Engine -> seconds for a token of a mask."""
        self._lost_in_a_row = 0
        self.closed = False

    def register(self, windows: TokenWindows) -> str:
        """Make windows known to the engines; returns their hash."""
        key = self._pool.register(windows)
        self._known[key] = windows
        return key

    def add(self, masks_MP: BoolArray, block: Block, windows: str) -> None:
        """Queue masks for registered windows; neighbours in key order stay together, since they
        share prefixes."""
        sorted_DP, _ = sort_distinct(masks_MP)
        self._wait(Unit(masks_MP=sorted_DP, block=block, windows=windows), first=False)
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
        """The next scored unit or given-up mask; None when none came in time.

        Raises:
            EngineError: engines are lost again and again, and nothing is scored in between.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._pump()
            result = self._pool.next(max(0.0, deadline - time.monotonic()))
            if result is None:
                return None
            self._in_flight -= 1
            if result.scores is not None:
                self._learn_pace(result)
                self._pump()
                done = self._joined(result)
            else:
                done = self._failed(result)
            if done is not None:
                return done

    # -- failures --------------------------------------------------------------------------------

    def _failed(self, result: UnitResult) -> GivenUp | None:
        unit = result.unit
        if unit.part and unit.part.split.ended:
            return None
        if result.lost:
            self._count_loss(result)
        if not result.blamed:
            self._wait(unit, first=True)
            return None
        failures, failed_at = unit.failures + 1, unit.failed_at | {result.place}
        if failures < 2:
            self._wait(replace(unit, failures=failures, failed_at=failed_at), first=True)
        elif len(unit.masks_MP) == 1:
            if unit.part:  # the mask is given up as a whole
                unit.part.split.ended = True
                unit = unit.part.split.unit
            return GivenUp(unit=unit, reason=result.error or "failed")
        else:
            half = len(unit.masks_MP) // 2
            for part in (unit.masks_MP[half:], unit.masks_MP[:half]):
                # each half has one failure behind it, so that another bisects it at once; a mask
                # alone starts anew: none is given up for what befell its neighbours
                told = replace(unit, failures=1 if len(part) > 1 else 0, failed_at=failed_at)
                self._wait(replace(told, masks_MP=part), first=True)
        return None

    def _count_loss(self, result: UnitResult) -> None:
        self._lost_in_a_row += 1
        if self._lost_in_a_row > _SPARE_LOSSES + 2 * self._pool.num_engines:
            raise EngineError(
                f"{self._lost_in_a_row} engines were lost in a row while nothing was scored; the "
                f"last: {result.error}; scores are kept: give the same command again"
            )

    # -- units -----------------------------------------------------------------------------------

    def _wait(self, unit: Unit, *, first: bool) -> None:
        self._masks_waiting += len(unit.masks_MP)
        (self._waiting.appendleft if first else self._waiting.append)(unit)

    def _pump(self) -> None:
        while self._waiting and not self.closed:
            vacancy = self._pool.vacancy(self._waiting[0].failed_at)
            if vacancy is None:
                return
            unit = self._waiting.popleft()
            self._masks_waiting -= len(unit.masks_MP)
            if unit.part and unit.part.split.ended:
                continue
            if not unit.failures and not unit.part:
                unit = self._cut(unit, vacancy)
            expected_s = self._expected_s(unit, vacancy.engine)
            self._pool.submit(replace(unit, expected_s=expected_s), vacancy.engine)
            self._in_flight += 1

    def _cut(self, unit: Unit, vacancy: Vacancy) -> Unit:
        """As much of a unit as the engine should get; the rest waits."""
        waiting = self._masks_waiting + len(unit.masks_MP)
        mask_s = self._expected_s(replace(unit, masks_MP=unit.masks_MP[:1]), vacancy.engine)
        share = -(-waiting // self._pool.num_engines)
        if mask_s is None:
            size = min(_FIRST_UNIT_MASKS, share)
        else:
            share = max(share, int(LEAST_UNIT_S / mask_s))
            size = max(1, min(int(TARGET_UNIT_S / mask_s), share))
        if len(unit.masks_MP) > size:
            self._wait(replace(unit, masks_MP=unit.masks_MP[size:]), first=True)
            unit = replace(unit, masks_MP=unit.masks_MP[:size])
        if len(unit.masks_MP) == 1 and vacancy.idle and mask_s is not None:
            engines = self._pool.num_engines // waiting
            num_parts = min(engines, int(mask_s / LEAST_UNIT_S), len(unit.block.rows))
            if num_parts > 1:
                return self._split(unit, num_parts)
        return unit

    def _split(self, unit: Unit, num_parts: int) -> Unit:
        """Split a mask over windows, for more engines than masks; returns the first part."""
        num_windows = len(unit.block.rows)
        split = _Split(unit=unit, nll_N=np.empty(num_windows), missing=num_parts)
        bounds = np.linspace(0, num_windows, num_parts + 1).astype(int).tolist()
        parts = []
        for start, stop in pairwise(bounds):
            some = self._known[unit.windows].select(np.arange(start, stop))
            part = _Part(split, slice(start, stop))
            parts.append(replace(unit, windows=self.register(some), part=part))
        for part in reversed(parts[1:]):
            self._wait(part, first=True)
        return parts[0]

    def _joined(self, result: UnitResult) -> UnitResult | None:
        """The result itself, or of the whole unit once its last part has come."""
        part = result.unit.part
        if part is None or result.scores is None:
            return result
        split = part.split
        split.nll_N[part.rows] = result.scores.nll_MN[0]
        split.missing -= 1
        split.work += result.scores.work
        if split.missing or split.ended:
            return None
        whole = self._known[split.unit.windows]
        # one mask was scored: a layer-forward is one over all windows
        last = result.scores.work
        work = replace(last, tokens=split.work.tokens, seconds=split.work.seconds)
        scores = Scores(nll_MN=split.nll_N[None], num_tokens_N=whole.num_tokens_N, work=work)
        return replace(result, unit=split.unit, scores=scores)

    # -- pace ------------------------------------------------------------------------------------

    def _tokens(self, windows: str) -> int:
        return self._known[windows].tokens_NT.size

    def _expected_s(self, unit: Unit, engine: str) -> float | None:
        """From the engine's own pace, or the others' as long as it has none."""
        pace = self._pace.get(engine)
        if pace is None:
            if not self._pace:
                return None
            pace = sum(self._pace.values()) / len(self._pace)
        return pace * len(unit.masks_MP) * self._tokens(unit.windows)

    def _learn_pace(self, result: UnitResult) -> None:
        assert result.scores is not None
        self._lost_in_a_row = 0
        tokens = len(result.unit.masks_MP) * self._tokens(result.unit.windows)
        measured = max(result.scores.work.seconds, 1e-6) / tokens
        before = self._pace.get(result.engine, measured)
        self._pace[result.engine] = _PACE_MEMORY * before + (1 - _PACE_MEMORY) * measured
