"""What the coordinator costs: engines that sleep, everything else real (Ray, SQLite, surrogate).

    PYTHONPATH=. python scripts/bench/coordinator.py --out coordinator.md

* Idle share of 1, 4 and 16 engines whose batches take about 1 s, and what a batch and a mask cost
  the driver: CPU time of all its threads.
* The most masks/s that the driver can feed: 16 engines that could do 20,000 masks/s and more.
* Memory over 1 million distinct masks, all scored, stored and counted.
* How long an engine's next batch waits at the driver (from an answer's arrival to the next submit
  to that engine) while a surrogate is refitted, against refitting in the loop itself (baseline: the
  loop before rounds were proposed on a thread). An answer that arrives while scores are committed
  waits for the disk too: that part is told apart, since a refit has no hand in it.

Idle share: 1 - (seconds in `score`) / (seconds between an engine's first and last answer). Actors
and driver share this machine's cores. Takes about ten minutes; needs Ray.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from probes import MIB, machine_lines, publish

import lpserve.runner.coordinator
import lpserve.scoring.pace
import lpserve.scoring.ray.pool
import lpserve.scoring.session
from lpserve.config import config_from
from lpserve.data.windows import TokenWindows
from lpserve.rounds.history import Round
from lpserve.runner.run import run
from lpserve.scoring.dispatcher import Dispatcher
from lpserve.scoring.pool import WorkUnit
from lpserve.scoring.ray.pool import RayPool
from lpserve.scoring.tracker import ScoreRequest, ScoreTracker
from lpserve.scoring.units import GivenUp
from lpserve.store.store import Store
from lpserve.testing.pools import distinct_masks
from lpserve.types import BoolArray, EngineSpec

NUM_PLAYERS, NUM_WINDOWS, LENGTH = 32, 10, 128
BATCH_S = 1.0
ENGINE_COUNTS = (1, 4, 16)
FEED_TARGET, IDLE_TARGET, LAG_TARGET_S = 20_000.0, 0.02, 0.010


@dataclass
class Lags:
    """From an answer's arrival to the next submit to the same engine, where work waited."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    commits: list[tuple[float, float]] = field(default_factory=list)
    arrived: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in self.spans]

    def without_commits(self) -> list[float]:
        """Seconds less those in which scores were committed."""
        return [
            end - start - sum(max(0.0, min(end, e) - max(start, s)) for s, e in self.commits)
            for start, end in self.spans
        ]


class TimedStore(Store):
    """Notes when it commits."""

    @contextmanager
    def together(self) -> Iterator[None]:
        with super().together():
            yield
            started = time.perf_counter()
        TimedPool.lags.commits.append((started, time.perf_counter()))


class TimedDispatcher(Dispatcher):
    """Known to the pool, which asks it whether work waits."""

    last: Dispatcher | None = None

    def __init__(self, pool: Any) -> None:
        super().__init__(pool)
        TimedDispatcher.last = self


class TimedPool(RayPool):
    """Notes when answers arrive (in Ray's own thread) and when the engine is given more."""

    lags = Lags()

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        arrived = self.lags.arrived.pop(engine, None)
        if arrived is not None:
            self.lags.spans.append((arrived, time.perf_counter()))
        fleet: Any = self._fleet
        plain_when_done, plain_ping = fleet.when_done, fleet.ping
        pings = False

        def ping(member: Any) -> None:
            nonlocal pings
            pings = True
            plain_ping(member)
            pings = False

        def stamped(answer: Any, then: Callable[[Any], None]) -> None:
            def arrive(_: Any) -> None:
                if TimedDispatcher.last and TimedDispatcher.last.masks_waiting:
                    self.lags.arrived.setdefault(engine, time.perf_counter())

            if not pings:  # the answer to a ping is no end of a batch
                answer.future().add_done_callback(arrive)
            plain_when_done(answer, then)

        fleet.when_done, fleet.ping = stamped, ping
        try:
            super().submit(unit, engine, expected_s)
        finally:
            del fleet.when_done, fleet.ping


@dataclass(kw_only=True)
class Stream:
    """Masks that went through pool, store and scoreboard."""

    masks: int = 0
    batches: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    idle: float = 0.0
    lags: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)


def windows() -> TokenWindows:
    tokens = np.random.default_rng(0).integers(0, 1000, (NUM_WINDOWS, LENGTH))
    return TokenWindows.from_tokens(tokens)


def stream(engines: int, masks: int, delay_s: float, batch_s: float) -> Stream:
    """Score distinct masks; at most two requests of `REQUEST_MASKS` masks are open."""
    lpserve.scoring.pace.TARGET_UNIT_S = batch_s
    options = {"num_players": NUM_PLAYERS, "delay_s": delay_s}
    spec = EngineSpec(kind="synthetic", model="", options=options)
    TimedPool.lags = Lags()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        store = stack.enter_context(Store(Path(folder) / "scores.sqlite"))
        pool = TimedPool(spec, windows(), engines)
        stack.callback(pool.close)
        while len(pool.processes) < engines:
            pool.next(0.2)
        dispatcher = TimedDispatcher(pool)
        board = ScoreTracker(store, store.game_id(pool.info.game), windows(), dispatcher)
        return _pump(store, dispatcher, board, distinct_masks(masks), engines)


def _pump(
    store: Store,
    dispatcher: Dispatcher,
    board: ScoreTracker,
    source: Iterator[BoolArray],
    engines: int,
) -> Stream:
    done, pending = Stream(), list[ScoreRequest]()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    busy: dict[str, float] = {}
    process = psutil.Process()
    started, cpu = time.perf_counter(), time.process_time()
    more = True
    while more or pending:
        while more and len(pending) < 2:
            chunk = next(source, None)
            more = chunk is not None
            if chunk is not None:
                pending.append(board.request(chunk))
        result = dispatcher.next(0.2)
        with store.together() if result else nullcontext():  # as the coordinator does
            while result is not None:
                assert not isinstance(result, GivenUp)
                assert result.scores is not None
                board.accept(result)
                now = time.perf_counter()
                done.batches += 1
                done.masks += len(result.unit.masks_MP)
                if result.engine in first:
                    busy[result.engine] = busy.get(result.engine, 0.0) + result.scores.work.seconds
                    last[result.engine] = now
                elif done.batches > 3 * engines:  # units have their size
                    first[result.engine] = now
                result = dispatcher.next(0.0)
        pending = [request for request in pending if not request.complete]
        if done.masks // 100_000 > len(done.resident):
            done.resident.append(process.memory_info().rss)
    done.wall_s = time.perf_counter() - started
    done.cpu_s = time.process_time() - cpu
    spans = {name: last[name] - first[name] for name in last if last[name] > first[name]}
    if spans:
        done.idle = 1 - sum(busy[name] for name in spans) / sum(spans.values())
    done.lags = TimedPool.lags.seconds
    return done


def in_the_loop(call: Callable[..., Any], *args: Any) -> Future[Any]:
    """Stands in for the planner's thread: proposes at once, in the loop (the baseline)."""
    future: Future[Any] = Future()
    future.set_result(call(*args))
    return future


@dataclass(kw_only=True)
class Refits:
    """A whole run whose surrogate is refitted while engines work."""

    lags: Lags
    refits_s: list[float]
    wall_s: float


def refits(*, in_loop: bool, budget: int) -> Refits:
    """A run of 4 engines; how long submits wait, and how long proposing a round takes."""
    lpserve.scoring.pace.TARGET_UNIT_S = BATCH_S
    spent: list[float] = []
    plain_propose = lpserve.runner.coordinator.RoundPlanner.propose
    on_thread = lpserve.runner.coordinator.in_background

    def propose(self: Any, *args: Any) -> Round:
        started = time.perf_counter()
        asked = plain_propose(self, *args)
        spent.append(time.perf_counter() - started)
        return asked

    TimedPool.lags = Lags()
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, 1000, (2 * NUM_WINDOWS, LENGTH))
        np.savez(f"{folder}/text.npz", tokens=tokens[:NUM_WINDOWS])
        np.savez(f"{folder}/heldout.npz", tokens=tokens[NUM_WINDOWS:])
        config = config_from(
            {
                "model": "synthetic",
                "engine": "synthetic",
                "pool": "ray",
                "engines": 4,
                "calibration": f"{folder}/text.npz",
                "heldout": f"{folder}/heldout.npz",
                "budget": budget,
                "max_removed": 12,
                "round_size": 400,
                "progress_s": 1000.0,
                "out": f"{folder}/run",
                "engine_options": {"num_players": NUM_PLAYERS, "delay_s": BATCH_S / 5},
            },
            "bench",
        )
        changed: dict[tuple[Any, str], Any] = {
            (lpserve.scoring.ray.pool, "RayPool"): TimedPool,
            (lpserve.scoring.session, "Dispatcher"): TimedDispatcher,
            (lpserve.scoring.session, "Store"): TimedStore,
            (lpserve.runner.coordinator.RoundPlanner, "propose"): propose,
            (lpserve.runner.coordinator, "in_background"): in_the_loop if in_loop else on_thread,
        }
        before = {key: getattr(*key) for key in changed}
        for (owner, name), value in changed.items():
            setattr(owner, name, value)
        try:
            started = time.perf_counter()
            run(config)
            wall_s = time.perf_counter() - started
        finally:
            for (owner, name), value in before.items():
                setattr(owner, name, value)
    return Refits(lags=TimedPool.lags, refits_s=spent, wall_s=wall_s)


def milliseconds(values: list[float]) -> str:
    """Median, 99th percentile and maximum."""
    if not values:
        return "- | - | -"
    high = float(np.quantile(values, 0.99))
    return " | ".join(f"{1e3 * v:.2f}" for v in (statistics.median(values), high, max(values)))


def verdict(holds: bool) -> str:
    return "yes" if holds else "**no**"


def idle_lines(args: argparse.Namespace) -> list[str]:
    lines = [
        "## Engines whose batches take 1 s",
        "",
        "| engines | batches | masks a batch | idle share | target | met | driver CPU a batch, ms "
        "| next batch waits, ms: median | 99% | most |",
        "| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for engines in ENGINE_COUNTS:
        done = stream(engines, args.seconds * engines * 100, BATCH_S / 100, BATCH_S)
        lines.append(
            f"| {engines} | {done.batches} | {done.masks / done.batches:.0f} | {done.idle:.2%} | "
            f"{IDLE_TARGET:.0%} | {verdict(done.idle < IDLE_TARGET)} | "
            f"{1e3 * done.cpu_s / done.batches:.2f} | {milliseconds(done.lags)} |"
        )
    return [*lines, ""]


def feed_lines(args: argparse.Namespace) -> list[str]:
    lines = [
        "## The most masks that the driver can feed",
        "",
        "Wall clock with actors on the same cores; the driver's CPU time says what it could feed "
        "with a core to itself.",
        "",
        "| engines, each able to do | masks | masks/s | target | met | driver CPU a mask, us | "
        "masks/s a core could feed |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for engines, per_engine in ((16, 2_500), (4, 10_000), (2, 1_000_000)):
        done = stream(engines, args.feed_masks, 1 / per_engine, BATCH_S)
        rate, cpu = done.masks / done.wall_s, done.cpu_s / done.masks
        lines.append(
            f"| {engines} x {per_engine:,} masks/s | {done.masks:,} | {rate:,.0f} | "
            f"{FEED_TARGET:,.0f} | {verdict(rate >= FEED_TARGET)} | {1e6 * cpu:.1f} | "
            f"{1 / cpu:,.0f} |"
        )
    return [*lines, ""]


def batch_lines(args: argparse.Namespace) -> list[str]:
    lines = [
        "## The most batches that the driver can feed",
        "",
        "8 engines with tiny batches, so that the driver is the bottleneck; what a batch costs, "
        "its masks included.",
        "",
        "| masks a batch | batches | batches/s | wall clock a batch, ms | driver CPU a batch, ms |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    least, lpserve.scoring.pace.MIN_UNIT_S = lpserve.scoring.pace.MIN_UNIT_S, 1e-3
    for delay_s in (0.005, 0.002):
        done = stream(8, args.batch_masks, delay_s, 0.02)
        lines.append(
            f"| {done.masks / done.batches:.1f} | {done.batches:,} | "
            f"{done.batches / done.wall_s:.0f} | {1e3 * done.wall_s / done.batches:.2f} | "
            f"{1e3 * done.cpu_s / done.batches:.2f} |"
        )
    lpserve.scoring.pace.MIN_UNIT_S = least
    return [*lines, ""]


def memory_lines(args: argparse.Namespace) -> list[str]:
    done = stream(2, args.memory_masks, 1e-6, 0.2)
    points = ", ".join(
        f"{100_000 * (i + 1):,}: {point / MIB:.0f}" for i, point in enumerate(done.resident)
    )
    growth = max(done.resident) - done.resident[0]
    return [
        f"## Memory over {done.masks:,} masks",
        "",
        f"Driver's resident MiB after so many masks: {points}. Growth after the first 100,000: "
        f"{growth / MIB:.1f} MiB, {growth / (done.masks - 100_000):.0f} bytes a mask; flat (at "
        f"most 5%): {verdict(growth <= 0.05 * done.resident[0])}. {done.masks / done.wall_s:,.0f} "
        "masks/s.",
        "",
    ]


def refit_lines(args: argparse.Namespace) -> list[str]:
    lines = [
        f"## A run of {args.budget:,} masks on 4 engines, surrogate refitted meanwhile",
        "",
        "Waits without the time in which scores were being committed to disk; in brackets with it.",
        "",
        "| rounds are proposed | rounds | longest, s | next batch waits, ms: median | 99% | most | "
        "most at most 10 ms | longest commit, ms | whole run, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for name, in_loop in (("in the loop (baseline)", True), ("on a thread", False)):
        done = refits(in_loop=in_loop, budget=args.budget)
        waits, whole = done.lags.without_commits(), done.lags.seconds
        longest_commit = max(end - start for start, end in done.lags.commits)
        lines.append(
            f"| {name} | {len(done.refits_s)} | {max(done.refits_s):.2f} | "
            f"{milliseconds(waits)} ({1e3 * max(whole):.2f}) | "
            f"{verdict(max(waits) <= LAG_TARGET_S)} | {1e3 * longest_commit:.1f} | "
            f"{done.wall_s:.1f} |"
        )
    return [*lines, ""]


PARTS = {
    "idle": idle_lines,
    "feed": feed_lines,
    "batches": batch_lines,
    "memory": memory_lines,
    "refits": refit_lines,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="also write the tables here")
    parser.add_argument("--seconds", type=int, default=30, help="of each idle share (30)")
    parser.add_argument("--feed-masks", type=int, default=400_000)
    parser.add_argument("--batch-masks", type=int, default=40_000)
    parser.add_argument("--memory-masks", type=int, default=1_000_000)
    parser.add_argument("--budget", type=int, default=1600, help="masks of the run with refits")
    parser.add_argument("--only", choices=tuple(PARTS))
    args = parser.parse_args()
    ray.init("local", num_cpus=64, include_dashboard=False, log_to_driver=False)
    lines = [
        "# The coordinator",
        "",
        f"`PYTHONPATH=. python scripts/bench/coordinator.py`; {NUM_PLAYERS} players, {NUM_WINDOWS} "
        f"windows; Ray {ray.__version__}.",
        "",
        *machine_lines(os.cpu_count() or 1),
        "",
    ]
    for name, part in PARTS.items():
        if args.only in (None, name):
            lines += part(args)
    publish(lines, args.out)


if __name__ == "__main__":
    main()
