"""The dispatcher's policy in simulated time: simulated engines, any number of failures.

Real engines and processes: test_ray_pool, test_ray_faults. Not covered here: scores' values.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace

import numpy as np
import pytest

from lpserve.data.windows import TokenWindows
from lpserve.errors import EngineError
from lpserve.masks import keys
from lpserve.scoring.dispatcher import Dispatcher
from lpserve.scoring.pace import LONG_QUEUE, ROUND
from lpserve.scoring.pool import UnitResult
from lpserve.scoring.units import GivenUp
from lpserve.store.blocks import WindowBlock
from lpserve.testing.pools import SimulatedPool, SimulationSetting, distinct_masks


def setting(rng, **changes):
    values = {
        "name": "test",
        "engines": 20,
        "masks": 3000,
        "mask_s": 0.5,
        "round_masks": 1000,
        "restart_s": 20.0,
        "unit_cost_s": 1e-3,
        "mask_cost_s": 1e-5,
        "seed": int(rng.integers(1e9)),
    }
    return SimulationSetting(**(values | changes))


def dispatch(chosen, pool=None, together=ROUND):
    """Every result, and the pool that gave them."""
    pool = pool or SimulatedPool(chosen)
    dispatcher = Dispatcher(pool, clock=lambda: pool.now)
    dispatcher.paces.together = together
    windows = dispatcher.register(TokenWindows.from_tokens(np.zeros((1, 128), dtype=np.int64)))
    masks_MP = np.concatenate(list(distinct_masks(chosen.masks)))
    dispatcher.add(masks_MP, WindowBlock(id=0, rows=np.arange(1)), windows)
    results = []
    while not dispatcher.idle:
        result = dispatcher.next(0.0)
        if result is not None:
            results.append(result)
    return results, masks_MP, pool


@pytest.mark.parametrize("failure_s", [None, 2000.0, 60.0])
def test_every_mask_comes_back_once_whatever_fails(failure_s, rng):
    """At one death or hang a minute for every engine some unit in thirty is hit. A mask that is hit
    every time it is tried is given up: one of 3,000 in 2 of 209 such runs, never two."""
    hours = None if failure_s is None else failure_s / 3600
    results, masks_MP, pool = dispatch(setting(rng, failure_h=hours))
    scored = Counter(key for result in results for key in keys(result.unit.masks_MP))
    assert scored == Counter(keys(masks_MP))
    given_up = sum(isinstance(result, GivenUp) for result in results)
    assert given_up <= (failure_s == 60.0)
    assert (pool.failures > 8) == (failure_s == 60.0)  # about 20 are expected


@pytest.mark.parametrize("engines", [1, 2, 20])
@pytest.mark.parametrize("hangs", [False, True])
def test_masks_that_end_every_engine_are_found_and_the_rest_is_scored(hangs, engines, rng):
    chosen = setting(rng, engines=engines, masks=500, mask_s=0.1)
    all_keys = keys(np.concatenate(list(distinct_masks(chosen.masks))))
    bad = {all_keys[i] for i in rng.choice(len(all_keys), 3, replace=False)}

    class Pool(SimulatedPool):
        def _begin(self, engine) -> None:
            super()._begin(engine)
            if not bad.isdisjoint(keys(engine.tasks[0].unit.masks_MP)):
                engine.hangs = True
                if not hangs:
                    self._at(self.now + 0.01, "end", engine, engine.life)

        def _end(self, engine, life) -> None:
            if life == engine.life:
                self._lose(engine)

    results, _, _ = dispatch(chosen, Pool(chosen))
    given_up = [r.unit.masks_MP for r in results if isinstance(r, GivenUp)]
    scored = Counter(k for r in results if isinstance(r, UnitResult) for k in keys(r.unit.masks_MP))
    assert {keys(masks_MP)[0] for masks_MP in given_up} == bad
    assert len(given_up) == len(bad)
    assert scored == Counter(set(all_keys) - bad)


@pytest.mark.parametrize("blamed", [False, True])
def test_nodes_that_leave_never_end_a_run_but_engines_that_die_do(blamed, rng):
    chosen = setting(rng, engines=3, masks=20, restart_s=1.0)

    class Pool(SimulatedPool):
        left = 60

        def _begin(self, engine) -> None:
            super()._begin(engine)
            if self.left:
                self.left -= 1
                engine.hangs = True
                self._at(self.now + 0.01, "end", engine, engine.life)

        def _end(self, engine, life) -> None:
            if life == engine.life:
                self._lose(engine)
                if not blamed:
                    self._done = deque(replace(result, blamed=False) for result in self._done)

    if blamed:
        with pytest.raises(EngineError, match="23 engines were lost in a row"):
            dispatch(chosen, Pool(chosen))
        return
    results, masks_MP, _ = dispatch(chosen, Pool(chosen))
    assert Counter(k for r in results for k in keys(r.unit.masks_MP)) == Counter(keys(masks_MP))


def test_engines_of_any_speed_end_together(rng):
    """Within 10%: the last units (2 s of 75 s) and the first, before any pace is known."""
    chosen = setting(rng)
    _, _, pool = dispatch(chosen)
    ideal_s = chosen.masks * chosen.mask_s / pool.speed
    assert pool.now < 1.1 * ideal_s


def test_few_masks_are_spread_over_all_engines(rng):
    results, _, _ = dispatch(setting(rng, masks=40, mask_s=1.0))
    done = [result for result in results if isinstance(result, UnitResult)]
    assert all(len(result.unit.masks_MP) <= 2 for result in done)
    assert len({result.engine for result in done}) >= 15  # slow ones may be relieved


def test_units_take_about_two_seconds_at_every_engine(rng):
    results, _, pool = dispatch(setting(rng, masks=20_000, mask_s=0.05))
    seconds = [
        result.scores.work.seconds
        for result in results[100:-100]  # paces are known, and there is more to do than a share
        if isinstance(result, UnitResult) and result.scores
    ]
    assert 1.5 < np.median(seconds) < 2.5
    assert np.quantile(seconds, 0.9) < 3.0
    assert pool.submits < 800  # 500 of 2 s, and the first and last ones


def test_slow_masks_are_scored_together_so_that_they_share_prefixes(rng):
    """By the time of a unit alone, masks of 2 s and more would go one by one; an engine of half the
    speed is handed 7, in 30 s. A very slow one is handed fewer: units count by their masks."""
    results, _, pool = dispatch(setting(rng, engines=2, masks=400, mask_s=2.0))
    sizes = [len(r.unit.masks_MP) for r in results if isinstance(r, UnitResult)]
    of_mask = np.repeat(sizes, sizes)
    assert np.median(of_mask[20:-60]) >= 6  # paces are known, and there is more to do than a share
    assert pool.now < 1.25 * 400 * 2.0 / pool.speed


def test_where_thousands_wait_more_of_them_go_together(rng):
    """Two minutes of a slow engine's work; the last ones are shared out so that all end together,
    and quick masks go as before."""
    chosen = setting(rng, engines=2, masks=3000, mask_s=1.0)
    results, _, pool = dispatch(chosen, together=LONG_QUEUE)
    sizes = [len(r.unit.masks_MP) for r in results if isinstance(r, UnitResult)]
    of_mask = np.repeat(sizes, sizes)
    assert 60 <= np.median(of_mask[20:-600]) <= 170  # engines are of uneven speed
    assert pool.now < 1.1 * 3000 * 1.0 / pool.speed
    chosen = setting(rng, engines=5, masks=50_000, mask_s=0.005)
    results, _, _ = dispatch(chosen, together=LONG_QUEUE)
    sizes = [len(r.unit.masks_MP) for r in results[20:-20]]
    assert 200 <= np.median(sizes) <= 500  # two seconds of work, as without


@pytest.mark.parametrize("dies", [False, True])
def test_masks_whose_overlap_is_wanted_stay_together_and_in_order(dies, rng):
    chosen = setting(rng, engines=3, masks=200, mask_s=0.5, restart_s=1.0)

    class Pool(SimulatedPool):
        def _begin(self, engine) -> None:
            super()._begin(engine)
            if dies and engine.tasks[0].unit.overlap:
                engine.hangs = True
                self._at(self.now + 0.01, "end", engine, engine.life)

        def _end(self, engine, life) -> None:
            if life == engine.life:
                self._lose(engine)

    pool = Pool(chosen)
    dispatcher = Dispatcher(pool, clock=lambda: pool.now)
    windows = dispatcher.register(TokenWindows.from_tokens(np.zeros((4, 128), dtype=np.int64)))
    masks_MP = rng.permutation(np.concatenate(list(distinct_masks(chosen.masks))))
    block = WindowBlock(id=0, rows=np.arange(4))
    dispatcher.add(masks_MP[40:], block, windows)
    dispatcher.add_overlap(masks_MP[:40], block, windows)
    found = []
    while not dispatcher.idle:
        found += filter(None, [dispatcher.next(0.0)])
    (unit,) = [result for result in found if result.unit.overlap]
    assert isinstance(unit, GivenUp) == dies
    assert (unit.unit.masks_MP == masks_MP[:40]).all()
    others = [
        key for result in found if not result.unit.overlap for key in keys(result.unit.masks_MP)
    ]
    assert Counter(others) == Counter(keys(masks_MP[40:]))
