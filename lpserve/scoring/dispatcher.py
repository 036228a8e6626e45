"""Which engine scores what: the queue of work units, stragglers, and the failure policy.

The policy is the same for every pool:

* masks are cut into units of about 2 s (more for 500 engines and up) at the engine's own measured
  pace, less where few are left, so that all engines end together; a lone mask is split over windows
  when engines outnumber masks (`lpserve.scoring.pace`);
* an engine holds one unit and, unless that takes long, one more behind it: so it never starves
  (`lpserve.scoring.slots`);
* a unit that is overdue is repeated elsewhere, before others; an engine with nothing to do takes
  over what would end last elsewhere, if it ends sooner here (speculative execution by longest
  approximate time to end: LATE, Zaharia et al., OSDI 2008); the first answer counts;
* a unit that fails is tried again, elsewhere if it can be; one that fails twice is bisected until
  the mask that cannot be scored is alone; one that fails twice alone is given up with its reason
  (`lpserve.scoring.units`);
* what waited behind a failing unit goes to another engine and is not blamed;
* engines that are lost again and again while nothing is scored end the run with their last reason.

Non-finite scores are results, not failures.

Notation: M masks, P players.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.errors import EngineError
from lpserve.masks import sort_distinct
from lpserve.scoring import pace
from lpserve.scoring.pool import EnginePool, UnitResult, WorkUnit
from lpserve.scoring.slots import EngineSlots, ExpectedFinish
from lpserve.scoring.units import (
    GivenUp,
    QueuedUnit,
    after_failure,
    joined,
    split_over_windows,
)
from lpserve.store.blocks import WindowBlock
from lpserve.types import BoolArray

_BACKUP_GAIN = 1.2
"""A unit is taken over where that ends it sooner by this factor."""
_BACKUP_EVERY_S = 0.2
_SPARE_LOSSES = 16
"""Engines lost in a row, beyond two for each engine, before a run gives up: as many as it takes to
bisect a unit of 64 masks to one bad one (2 + 6 + 2), and some more for a second beside it."""


@dataclass(slots=True, eq=False)
class _UnitCopies:
    """The engines that hold a unit, and those at which it has failed meanwhile."""

    at: dict[str, str] = field(default_factory=dict)
    """Engine -> its hardware."""
    failed_at: list[str] = field(default_factory=list)
    """Hardware at which it has failed while others went on with it."""


class Dispatcher:
    """Feeds a pool's engines from a queue and hands on their results.

    Args:
        clock: seconds; time passes by it (a simulation brings its own).
    """

    def __init__(self, pool: EnginePool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._queue: deque[QueuedUnit] = deque()
        self._masks_waiting = 0
        self._copies: dict[WorkUnit, _UnitCopies] = {}
        """Units at engines whose answer is wanted."""
        self._slots = EngineSlots()
        self._windows: dict[str, TokenWindows] = {}
        self.paces = pace.EnginePaces(self._windows.__getitem__)
        self._lost_in_a_row = self._max_engines = 0
        self._next_backup = 0.0
        self.closed = False
        """Whether `stop` was called."""

    def register(self, windows: TokenWindows) -> str:
        """Make windows known to the engines; returns their hash."""
        key = self._pool.register(windows)
        self._windows[key] = windows
        return key

    def add(
        self,
        masks_MP: BoolArray,
        block: WindowBlock,
        windows: str,
        extra_metrics: tuple[str, ...] = (),
    ) -> None:
        """Queue masks to be scored on the windows of a block.

        They are queued in key order: neighbours share prefixes, so they stay together.

        Args:
            masks_MP: bool [M, P]; repeated ones are scored once.
            windows: hash of the block's windows, which are registered.
            extra_metrics: metrics beside the NLL.
        """
        sorted_MP, _ = sort_distinct(masks_MP)
        unit = QueuedUnit(
            masks_MP=sorted_MP, block=block, windows=windows, extra_metrics=extra_metrics
        )
        self._enqueue(unit, first=False)
        self._pump()

    def add_overlap(
        self,
        masks_MP: BoolArray,
        block: WindowBlock,
        windows: str,
        extra_metrics: tuple[str, ...] = (),
    ) -> None:
        """`add`, with the overlap of the masks' effects: on one engine, before what is queued."""
        unit = QueuedUnit(
            masks_MP=masks_MP,
            block=block,
            windows=windows,
            extra_metrics=extra_metrics,
            overlap=True,
        )
        self._enqueue(unit, first=True)
        self._pump()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued and no answer is awaited."""
        return not self._queue and not self._copies

    @property
    def in_flight(self) -> int:
        """Units at engines."""
        return len(self._copies)

    @property
    def masks_waiting(self) -> int:
        """Masks in the queue."""
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
            if (done := self._take(result)) is not None:
                return done

    # -- results ---------------------------------------------------------------------------------

    def _take(self, result: UnitResult) -> UnitResult | GivenUp | None:
        self._slots.remove(result.unit, result.engine, self._clock())
        if result.scores is not None:
            self._lost_in_a_row, self._max_engines = 0, len(self._slots.engines)
            self.paces.learn(result)
        if result.lost and result.blamed:
            self._count_loss(result)
        copies = self._copies.get(result.unit)
        if copies is None:  # answered elsewhere before
            return None
        place = copies.at.pop(result.engine)
        if result.scores is None:
            if result.blamed:
                copies.failed_at.append(place)
            if copies.at:  # another engine goes on with it
                return None
            del self._copies[result.unit]
            return self._failed(result, copies.failed_at)
        del self._copies[result.unit]
        for engine in copies.at:
            self._pool.cancel(result.unit, engine)
        self._pump()
        return joined(result, self._windows.__getitem__)

    def _failed(self, result: UnitResult, failed_at: list[str]) -> GivenUp | None:
        unit = result.unit
        assert isinstance(unit, QueuedUnit)
        if unit.window_slice and unit.window_slice.split.ended:
            return None
        decided = after_failure(unit, failed_at, result.error or "failed")
        if isinstance(decided, GivenUp):
            return decided
        for again in reversed(decided):
            self._enqueue(again, first=True)
        return None

    def _count_loss(self, result: UnitResult) -> None:
        self._lost_in_a_row += 1
        if self._lost_in_a_row > _SPARE_LOSSES + 2 * self._max_engines:
            raise EngineError(
                f"{self._lost_in_a_row} engines were lost in a row while nothing was scored; the "
                f"last: {result.error}; scores are kept: give the same command again"
            )

    # -- queue -----------------------------------------------------------------------------------

    def _enqueue(self, unit: QueuedUnit, *, first: bool) -> None:
        self._masks_waiting += len(unit.masks_MP)
        (self._queue.appendleft if first else self._queue.append)(unit)

    def _pump(self) -> None:
        """Hand out units while engines have room."""
        if self.closed:
            return
        engines = self._pool.engines
        if engines is not self._slots.engines:
            self._slots.update(engines)
            self._max_engines = max(self._max_engines, len(engines))
        self._back_up_stragglers()
        while self._queue and (found := self._next_unit()):
            unit, engine = found
            self._queue.remove(unit)
            self._masks_waiting -= len(unit.masks_MP)
            if unit.window_slice and unit.window_slice.split.ended:
                continue
            if not unit.failures and not unit.window_slice and not unit.overlap:
                unit = self._cut(unit, engine)
            self._copies[unit] = _UnitCopies()
            self._submit(unit, engine)

    def _next_unit(self) -> tuple[QueuedUnit, str] | None:
        """The first unit for which there is an engine: one that must go elsewhere holds up none."""
        if not self._slots.any_free:
            return None
        for unit in self._queue:
            engine = self._slots.vacant(unit.failed_at)
            if engine is not None:
                return unit, engine
        return None

    def _submit(self, unit: QueuedUnit, engine: str) -> None:
        expected_s = self.paces.expected_s(unit, engine)
        self._copies[unit].at[engine] = self._slots.engines[engine]
        self._slots.add(unit, engine, expected_s, self._clock())
        self._pool.submit(unit, engine, expected_s)

    def _cut(self, unit: QueuedUnit, engine: str) -> QueuedUnit:
        """As much of a unit as the engine should get; the rest is queued again."""
        size = pace.unit_size(
            mask_s=self.paces.expected_s(replace(unit, masks_MP=unit.masks_MP[:1]), engine),
            masks_waiting=self._masks_waiting + len(unit.masks_MP),
            num_engines=len(self._slots.engines),
            target_s=self._slots.target_s,
            together=self.paces.together,
        )
        if len(unit.masks_MP) > size.masks:
            self._enqueue(replace(unit, masks_MP=unit.masks_MP[size.masks :]), first=True)
            unit = replace(unit, masks_MP=unit.masks_MP[: size.masks])
        parts = min(size.window_parts, len(unit.block.rows))
        if len(unit.masks_MP) > 1 or parts < 2 or not self._slots.is_idle(engine):
            return unit
        windows = self._windows[unit.windows]
        first, *others = split_over_windows(unit, windows, parts, self.register)
        for part in reversed(others):
            self._enqueue(part, first=True)
        return first

    # -- stragglers ------------------------------------------------------------------------------

    def _back_up_stragglers(self) -> None:
        """Have overdue units repeated elsewhere. Where nothing is queued, engines with nothing to
        do take over the units that should end last, if they end them sooner (LATE)."""
        now = self._clock()
        if now < self._next_backup or not self._copies:
            return
        self._next_backup = now + _BACKUP_EVERY_S
        finishes = self._slots.expected_finishes(now, self.paces, self._may_repeat)
        finishes.sort(key=lambda finish: -finish.remaining_s)
        for finish in finishes:
            if finish.overdue:
                engine = self._slots.vacant({self._slots.engines[finish.engine]})
                if engine is None:
                    break
                self._repeat(finish, engine)
        if self._queue:
            return
        known = self.paces.seconds_per_token
        idle = sorted(self._slots.idle, key=lambda engine: known.get(engine, np.inf))
        left = [finish for finish in finishes if len(self._copies[finish.unit].at) == 1]
        for engine, finish in zip(idle, left, strict=False):
            here_s = self.paces.expected_s(finish.unit, engine)
            if here_s is None or _BACKUP_GAIN * here_s + pace.MIN_UNIT_S > finish.remaining_s:
                return
            self._repeat(finish, engine)

    def _may_repeat(self, unit: QueuedUnit) -> bool:
        """Whether one engine alone holds a unit, and it has failed nowhere: a unit that has may be
        what ends engines."""
        copies = self._copies.get(unit)
        return bool(copies and len(copies.at) == 1 and not copies.failed_at and not unit.failures)

    def _repeat(self, finish: ExpectedFinish, engine: str) -> None:
        self._submit(finish.unit, engine)
        if finish.queued:
            self._pool.cancel(finish.unit, finish.engine)
