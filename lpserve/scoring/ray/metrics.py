"""A run's figures as Ray metrics, which appear on Prometheus endpoints and Ray's dashboard."""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge

from lpserve.scoring.progress import RunState


class RunMetrics:
    """Publishes a run's figures.

    Ray adds the prefix `ray_` to their names and the suffix `_total` to those of counters.
    """

    def __init__(self, model: str) -> None:
        tags = {"tag_keys": ("model", "stage")}
        self._model = model
        self._scored = Counter("lpserve_masks_scored", "Masks scored by this run.", **tags)
        self._saved = Counter(
            "lpserve_layer_forwards_saved",
            "Layer-forwards that shared prefixes saved, against skipping alone.",
            **tags,
        )
        self._restarts = Counter("lpserve_engine_restarts", "Engines lost and replaced.", **tags)
        self._quarantined = Counter(
            "lpserve_masks_quarantined", "Masks that no engine could score.", **tags
        )
        self._speed = Gauge("lpserve_masks_per_second", "Masks scored per second.", **tags)
        self._in_flight = Gauge("lpserve_units_in_flight", "Batches at the engines.", **tags)
        self._engines = Gauge("lpserve_engines", "Engines that take part.", **tags)
        self._counted: dict[tuple[str, str], float] = {}
        self._last = (time.monotonic(), 0)

    def publish(self, state: RunState, *, engines: int, units: int, restarts: int) -> None:
        """Set the gauges, and raise the counters by what is new since the last call."""
        tags = {"model": self._model, "stage": state.stage}
        scored = state.done - state.reused
        work = state.work
        now = time.monotonic()
        then, before = self._last
        if scored < before:  # another stage
            then, before = now, scored
        if now > then:
            self._speed.set((scored - before) / (now - then), tags)
        self._last = (now, scored)
        self._engines.set(engines, tags)
        self._in_flight.set(units, tags)
        for counter, total in (
            (self._scored, scored),
            (self._saved, work.skip_layer_forwards - work.layer_forwards),
            (self._restarts, restarts),
            (self._quarantined, state.quarantined),
        ):
            self._count(counter, total, tags)

    def _count(self, counter: Counter, total: float, tags: dict[str, str]) -> None:
        """Raise a counter to a total; Ray's counters take increments above 0 only."""
        by_stage = counter in (self._scored, self._quarantined)
        key = (counter.info["name"], tags["stage"] if by_stage else "")
        new = total - self._counted.get(key, 0)
        if new > 0:
            counter.inc(new, tags)
            self._counted[key] = total
