"""What every engine holds, which engine has room, and when each unit should be done.

An engine holds one unit and, unless that one takes long, a second behind it, so that it never waits
for the driver. Times are seconds of the caller's clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from lpserve.scoring.pace import EnginePaces, target_unit_s
from lpserve.scoring.pool import WorkUnit
from lpserve.scoring.units import QueuedUnit

QUEUED_FACTOR = 2.0
"""A second unit waits at an engine whose first takes at most this many times the target."""
OVERDUE_FACTOR = 2.0
OVERDUE_S = 1.0
"""A unit is overdue this much after twice its time: then as long again is expected."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A unit at an engine."""

    unit: QueuedUnit
    expected_s: float | None
    started: float
    """When the engine could begin with it: when it arrived, or the one before it was done."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedFinish:
    """When a unit should be done at the engine that holds it."""

    unit: QueuedUnit
    engine: str
    remaining_s: float
    overdue: bool
    """Whether the engine's first unit is overdue."""
    queued: bool
    """Whether it waits behind another unit."""


class EngineSlots:
    """The units at every engine, at most two each."""

    def __init__(self) -> None:
        self.engines: Mapping[str, str] = {}
        """Engine -> the hardware it runs on."""
        self.target_s = target_unit_s(0)
        """Seconds that a unit should take."""
        self._flights: dict[str, deque[_Flight]] = {}
        self._free: tuple[dict[str, None], dict[str, None]] = ({}, {})
        """Engines that hold no unit, and those that hold one short one; in order of coming."""
        self._late: set[str] = set()
        """Engines whose unit is overdue: they get no more."""

    def update(self, engines: Mapping[str, str]) -> None:
        """Take over the pool's engines: name -> hardware."""
        gone = [name for name in self._flights if name not in engines]
        self.engines = engines
        self.target_s = target_unit_s(len(engines))
        for name in gone:  # what they held comes back as results
            del self._flights[name]
            self._late.discard(name)
            self._update_free_slots(name)
        for name in engines:
            if name not in self._flights:
                self._flights[name] = deque()
                self._update_free_slots(name)

    def add(self, unit: QueuedUnit, engine: str, expected_s: float | None, now: float) -> None:
        """Note that an engine was handed a unit."""
        self._flights[engine].append(_Flight(unit, expected_s, now))
        self._update_free_slots(engine)

    def remove(self, unit: WorkUnit, engine: str, now: float) -> None:
        """Note that a unit came back from an engine, which may be gone."""
        flights = self._flights.get(engine)
        if not flights:
            return
        was_first = flights[0].unit is unit
        for flight in [f for f in flights if f.unit is unit][:1]:
            flights.remove(flight)
        if was_first:
            self._late.discard(engine)
            if flights:
                flights[0].started = now
        self._update_free_slots(engine)

    @property
    def any_free(self) -> bool:
        """Whether some engine has room."""
        return any(self._free)

    @property
    def idle(self) -> list[str]:
        """Engines that hold no unit."""
        return list(self._free[0])

    def is_idle(self, engine: str) -> bool:
        """Whether an engine holds no unit."""
        return engine in self._free[0]

    def vacant(self, avoid: Set[str]) -> str | None:
        """An engine with room, preferably one that holds no unit; None where there is none.

        Args:
            avoid: hardware to stay away from, unless there is no other.
        """
        if avoid and not any(place not in avoid for place in self.engines.values()):
            avoid = frozenset()
        for engines in self._free:
            for engine in engines:
                if self.engines[engine] not in avoid and engine not in self._late:
                    return engine
        return None

    def expected_finishes(
        self, now: float, paces: EnginePaces, may_repeat: Callable[[QueuedUnit], bool]
    ) -> list[ExpectedFinish]:
        """When each unit that may be repeated should be done; notes which engines are late."""
        found = []
        for engine, flights in self._flights.items():
            remaining_s, overdue = 0.0, False
            for position, flight in enumerate(flights):
                expected_s = flight.expected_s or paces.expected_s(flight.unit, engine)
                if expected_s is None:
                    break
                age_s = now - flight.started if position == 0 else 0.0
                if age_s > OVERDUE_S + OVERDUE_FACTOR * expected_s:
                    overdue = True
                    self._late.add(engine)
                first_overdue = overdue and position == 0
                remaining_s += age_s if first_overdue else max(0.0, expected_s - age_s)
                if may_repeat(flight.unit):
                    found.append(
                        ExpectedFinish(flight.unit, engine, remaining_s, overdue, position > 0)
                    )
        return found

    def _update_free_slots(self, engine: str) -> None:
        for engines in self._free:
            engines.pop(engine, None)
        flights = self._flights.get(engine)
        if flights is None:
            return
        if not flights:
            self._free[0][engine] = None
        elif len(flights) == 1 and (flights[0].expected_s or 0.0) <= QUEUED_FACTOR * self.target_s:
            self._free[1][engine] = None
