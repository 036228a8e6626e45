"""1,000 engines of uneven speed that fail: the real dispatcher in simulated time.

    PYTHONPATH=. python scripts/bench/thousand_engines.py --unit-ms 1.8 --mask-us 22

`lpserve.scoring.dispatcher.Dispatcher` cuts, sizes, repeats, retries and bisects as in a run;
engines, clock and driver are simulated. An engine works on its units in order, dies or hangs at
random and comes back after a restart; a hang ends at the Ray pool's deadline. The driver serves one
answer at a time at the costs given, which `coordinator.py` measures. Round n is proposed once round
n-2 is complete, after the time of a refit.

Efficiency: the time that the same masks would take if every engine worked without a pause or a
failure from the first second to the last, over the time that they take. Deterministic for a seed.

The arithmetic. A unit lasts 4 ms for each engine, so 1,000 engines answer 250 times a second; at a
ms an answer the driver is busy for a/4 of the time and must stay well below all of it. A round of k
units an engine lasts 4 k s. The next but one can be proposed when the last unit of the round is in
(about 4 s later, more where an engine died with it) and the refit is done; meanwhile the engines
have the following round, so nobody waits while 4 k > 4 + refit. At the end of the run nobody has
more to do: units shrink there, about 1 s is lost, and at its start, until paces are known, about as
much. A death costs the unit at work (2 s on average) and the restart: at one failure in F
engine-hours the share lost is (restart + 2 s) / F; a hang adds its deadline of 120 s.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from coordinator import NUM_PLAYERS, REQUEST, distinct_masks
from probes import publish

from lpserve.data.windows import TokenWindows
from lpserve.scoring.dispatcher import Dispatcher
from lpserve.scoring.pool import UnitResult, WorkUnit
from lpserve.scoring.progress import RunState
from lpserve.scoring.ray.fleet import DEADLINE_FACTOR, MIN_DEADLINE_S
from lpserve.scoring.units import GivenUp
from lpserve.store.blocks import WindowBlock
from lpserve.types import BoolArray, EngineInfo, Scores, Work

TARGET = 0.95
GPU_HOURS_A_FAILURE = 50_677.0
"""419 unexpected interruptions in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783, 3.3.4)."""
TICK_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is simulated; times in seconds."""

    name: str
    engines: int = 1000
    masks: int
    mask_s: float
    """At an engine of speed 1."""
    round_masks: int
    refit_s: float = 5.0
    failure_h: float | None = None
    """Engine-hours between two failures; None: none."""
    hang_share: float = 0.1
    restart_s: float = 300.0
    unit_cost_s: float
    mask_cost_s: float
    seed: int = 0


@dataclass(eq=False)
class Task:
    unit: WorkUnit
    seconds: float
    expected_s: float | None
    started: float = 0.0


@dataclass(eq=False)
class SimulatedEngine:
    name: str
    speed: float
    life: int = 0
    """Counts restarts: events of an earlier life are void."""
    up: bool = True
    hangs: bool = False
    tasks: deque[Task] = field(default_factory=deque)


class SimulatedPool:
    """See `lpserve.scoring.pool.EnginePool`; time passes in `next` alone."""

    info: EngineInfo

    def __init__(self, setting: Setting) -> None:
        self._s = setting
        self._rng = np.random.default_rng(setting.seed)
        self.now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, Any, int]] = []
        self._done: deque[UnitResult] = deque()
        self.proposed: deque[int] = deque()
        self.failures = self.submits = 0
        speeds = self._speeds()
        self.speed = sum(speeds)
        self._all = {f"e{i}": SimulatedEngine(f"e{i}", s) for i, s in enumerate(speeds)}
        for engine in self._all.values():
            self._plan_failure(engine)
        self._note_engines()
        self._ticked = False
        self._at(TICK_S, "tick", None, 0)

    def _speeds(self) -> list[float]:
        """Log-normal around 1 by 10%; one in twenty half as fast, one in a hundred a fifth."""
        speed = np.exp(self._rng.normal(0, 0.1, self._s.engines))
        kind = self._rng.random(self._s.engines)
        return np.where(kind < 0.01, speed / 5, np.where(kind < 0.06, speed / 2, speed)).tolist()

    @property
    def engines(self) -> Mapping[str, str]:
        return self._engines

    def _note_engines(self) -> None:
        self._engines = {e.name: e.name for e in self._all.values() if e.up}

    def register(self, windows: TokenWindows) -> str:
        return windows.content_hash

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        self.submits += 1
        noise = float(np.exp(self._rng.normal(0, 0.05)))
        where = self._all[engine]
        seconds = len(unit.masks_MP) * self._s.mask_s / where.speed * noise
        where.tasks.append(Task(unit=unit, seconds=seconds, expected_s=expected_s))
        if len(where.tasks) == 1:
            self._begin(where)

    def cancel(self, unit: WorkUnit, engine: str) -> None:
        where = self._all[engine]
        for task in list(where.tasks)[1:]:
            if task.unit is unit:
                where.tasks.remove(task)
                result = UnitResult(unit=unit, scores=None, engine=engine, blamed=False)
                self._done.append(result)

    def publish(self, state: RunState) -> None: ...

    def close(self) -> None: ...

    def propose_at(self, when: float, index: int) -> None:
        self._at(when, "proposal", index, 0)

    def next(self, timeout_s: float) -> UnitResult | None:
        """The next result; None at a tick, or when a proposal is due (it is in `proposed`)."""
        while not self._done:
            if self.proposed or self._ticked:
                self._ticked = False
                return None
            when, _, kind, what, life = heapq.heappop(self._events)
            self.now = max(self.now, when)
            getattr(self, f"_{kind}")(what, life)
        result = self._done.popleft()
        self.now += self._s.unit_cost_s + self._s.mask_cost_s * len(result.unit.masks_MP)
        return result

    # -- events ----------------------------------------------------------------------------------

    def _at(self, when: float, kind: str, what: Any, life: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), kind, what, life))

    def _proposal(self, index: int, _: int) -> None:
        self.proposed.append(index)

    def _answer(self, engine: SimulatedEngine, life: int) -> None:
        if life != engine.life or engine.hangs:
            return
        task = engine.tasks.popleft()
        if engine.tasks:
            self._begin(engine)
        num_masks = len(task.unit.masks_MP)
        work = Work(masks=num_masks, distinct_masks=num_masks, seconds=task.seconds)
        nll_MN, tokens_N = np.zeros((num_masks, 1)), np.ones(1, dtype=np.int64)
        scores = Scores(nll_MN=nll_MN, num_tokens_N=tokens_N, work=work)
        self._done.append(UnitResult(unit=task.unit, scores=scores, engine=engine.name))

    def _failure(self, engine: SimulatedEngine, life: int) -> None:
        if life != engine.life:
            return
        self.failures += 1
        if engine.tasks and self._rng.random() < self._s.hang_share:
            engine.hangs = True  # a tick ends it at its deadline
        else:
            self._lose(engine)

    def _lose(self, engine: SimulatedEngine) -> None:
        for position, task in enumerate(engine.tasks):
            first = position == 0
            self._done.append(
                UnitResult(
                    unit=task.unit,
                    scores=None,
                    engine=engine.name,
                    error="died",
                    blamed=first,
                    lost=first,
                )
            )
        engine.tasks.clear()
        engine.up, engine.hangs, engine.life = False, False, engine.life + 1
        self._note_engines()
        self._at(self.now + self._s.restart_s, "restart", engine, engine.life)

    def _restart(self, engine: SimulatedEngine, life: int) -> None:
        engine.up = True
        self._note_engines()
        self._plan_failure(engine)

    def _tick(self, _: Any, __: int) -> None:
        self._at(self.now + TICK_S, "tick", None, 0)
        self._ticked = True
        for engine in self._all.values():
            if engine.hangs:
                task = engine.tasks[0]
                allowed_s = max(MIN_DEADLINE_S, DEADLINE_FACTOR * (task.expected_s or 0.0))
                if self.now - task.started > allowed_s:
                    self._lose(engine)

    def _begin(self, engine: SimulatedEngine) -> None:
        engine.tasks[0].started = self.now
        self._at(self.now + engine.tasks[0].seconds, "answer", engine, engine.life)

    def _plan_failure(self, engine: SimulatedEngine) -> None:
        if self._s.failure_h is not None:
            after = float(self._rng.exponential(3600 * self._s.failure_h))
            self._at(self.now + after, "failure", engine, engine.life)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    seconds: float
    efficiency: float
    units: int
    failures: int
    repeats: int
    given_up: int
    driver: float
    """Share of the time that the driver was at work."""
    took_s: float


def simulate(setting: Setting) -> Outcome:
    """Score all masks, round after round."""
    began = time.perf_counter()
    pool = SimulatedPool(setting)
    dispatcher = Dispatcher(pool, clock=lambda: pool.now)
    tokens = np.zeros((1, 128), dtype=np.int64)
    windows = dispatcher.register(TokenWindows.from_tokens(tokens))
    rounds = _rounds(setting)
    left = [len(masks_MP) for masks_MP in rounds]
    complete = units = given_up = 0
    asked = 0
    pool.propose_at(0.0, 0)
    while complete < len(rounds):
        while pool.proposed:
            index = pool.proposed.popleft()
            block = WindowBlock(id=index, rows=np.arange(1))
            dispatcher.add(rounds[index], block, windows)
            asked = index + 1
            if asked < len(rounds) and asked <= complete + 1:
                pool.propose_at(pool.now + (setting.refit_s if asked > 1 else 0.0), asked)
        result = dispatcher.next(0.0)
        if result is None:
            continue
        units += 1
        given_up += isinstance(result, GivenUp)
        left[result.unit.block.id] -= len(result.unit.masks_MP)
        while complete < len(rounds) and not left[complete]:
            complete += 1
            if asked < len(rounds) and asked == complete + 1:  # it waited for this round
                pool.propose_at(pool.now + setting.refit_s, asked)
    ideal_s = setting.masks * setting.mask_s / pool.speed
    busy_s = units * setting.unit_cost_s + setting.masks * setting.mask_cost_s
    return Outcome(
        seconds=pool.now,
        efficiency=ideal_s / pool.now,
        units=units,
        failures=pool.failures,
        repeats=pool.submits - units,
        given_up=given_up,
        driver=busy_s / pool.now,
        took_s=time.perf_counter() - began,
    )


def _rounds(setting: Setting) -> list[BoolArray]:
    chunks = list(distinct_masks(setting.masks))
    masks_MP = np.concatenate(chunks)
    return [
        masks_MP[start : start + setting.round_masks]
        for start in range(0, setting.masks, setting.round_masks)
    ]


def settings(args: argparse.Namespace) -> list[Setting]:
    engine_h = GPU_HOURS_A_FAILURE / 8
    costs = {"unit_cost_s": args.unit_ms / 1e3, "mask_cost_s": args.mask_us / 1e6}
    fine = {"masks": 600_000, "mask_s": 0.5, "round_masks": 32_000, **costs}
    coarse = {"masks": 200_000, "mask_s": 5.0, "round_masks": 16_000, **costs}
    return [
        Setting(name="0.5 s a mask, no failures", **fine),
        Setting(name="0.5 s a mask, failures as published", failure_h=engine_h, **fine),
        Setting(name="the same, failures 300 times as often", failure_h=engine_h / 300, **fine),
        Setting(name="5 s a mask, failures as published", failure_h=engine_h, **coarse),
        Setting(name="the same, failures 300 times as often", failure_h=engine_h / 300, **coarse),
        Setting(name="0.5 s a mask, rounds too small", **(fine | {"round_masks": 4_000})),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--unit-ms", type=float, required=True, help="driver, an answer")
    parser.add_argument("--mask-us", type=float, required=True, help="driver, a mask")
    args = parser.parse_args()
    assert NUM_PLAYERS == 32
    assert REQUEST
    lines = [
        "# 1,000 engines, simulated",
        "",
        f"`PYTHONPATH=. python scripts/bench/thousand_engines.py --unit-ms {args.unit_ms} "
        f"--mask-us {args.mask_us}`. The real dispatcher in simulated time; driver costs from "
        "[coordinator.md](coordinator.md); one failure in "
        f"{GPU_HOURS_A_FAILURE:,.0f} GPU-hours (Llama 3, arXiv 2407.21783), 8 GPUs an engine, one "
        "failure in ten a hang, 300 s to restart; refits of 5 s. The arithmetic is in the "
        "script's docstring.",
        "",
        "| setting | masks | a round | hours at work | efficiency | at least 95% | failures | "
        "repeated | given up | driver busy |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for setting in settings(args):
        done = simulate(setting)
        lines.append(
            f"| {setting.name} | {setting.masks:,} | {setting.round_masks:,} | "
            f"{done.seconds / 3600:.2f} | {done.efficiency:.1%} | "
            f"{'yes' if done.efficiency >= TARGET else '**no**'} | {done.failures} | "
            f"{done.repeats} | {done.given_up} | {done.driver:.0%} |"
        )
        print(f"{lines[-1]}  ({done.took_s:.0f} s)", flush=True)
    publish(lines, args.out)


if __name__ == "__main__":
    main()
