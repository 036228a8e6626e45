"""The contract of a pool, held by the engine of this process and by engines of a Ray cluster.

Not covered here: engines that die or come and go (tests of the Ray pool).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from lpserve.data.windows import TokenWindows
from lpserve.engine.synthetic import SyntheticEngine
from lpserve.scoring.local import LocalPool
from lpserve.scoring.pool import EnginePool, UnitResult, WorkUnit
from lpserve.scoring.progress import RunState
from lpserve.store.blocks import WindowBlock
from lpserve.types import EngineSpec

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
POISONED = "10101011"
SPEC = EngineSpec(kind="synthetic", model="", options={"num_players": 8, "poison": [POISONED]})
WINDOWS = TokenWindows.from_tokens(np.random.default_rng(0).integers(0, 100, (3, 16)))


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def pool(request: pytest.FixtureRequest) -> Iterator[EnginePool]:
    if request.param == "local":
        opened = LocalPool(SPEC, WINDOWS)
        yield opened
        opened.close()
        return
    ray = pytest.importorskip("ray")
    from lpserve.scoring.ray.pool import RayPool

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    opened = RayPool(SPEC, WINDOWS, 2)
    yield opened
    opened.close()
    ray.shutdown()


def unit_of(pool: EnginePool, masks_MP: np.ndarray, windows: TokenWindows = WINDOWS) -> WorkUnit:
    block = WindowBlock(id=0, rows=np.arange(windows.num_windows))
    return WorkUnit(masks_MP=masks_MP, block=block, windows=pool.register(windows))


def results_of(pool: EnginePool, num: int) -> list[UnitResult]:
    deadline, found = time.monotonic() + 120.0, []
    while len(found) < num:
        assert time.monotonic() < deadline
        result = pool.next(0.5)
        if result is not None:
            found.append(result)
    return found


def some_masks(rng, num: int) -> np.ndarray:
    masks_MP = rng.random((num, 8)) < 0.6
    masks_MP[:, 1] = True  # none is the poisoned one
    return masks_MP


def test_every_unit_comes_back_once_with_the_engines_own_scores(pool, rng):
    engine = next(iter(pool.engines))
    units = [unit_of(pool, some_masks(rng, num)) for num in (1, 4, 2)]
    for unit in units:
        pool.submit(unit, engine, None)
    results = results_of(pool, 3)
    assert [result.unit for result in results] == units  # one engine keeps the order
    alone = SyntheticEngine(SPEC, WINDOWS)
    for result in results:
        assert result.engine == engine
        assert result.error is None
        assert result.scores is not None
        expected = alone.score(result.unit.masks_MP).nll_MN
        np.testing.assert_array_equal(result.scores.nll_MN, expected)
    assert pool.next(0.1) is None


def test_other_windows_are_scored_once_they_are_registered(pool, rng):
    windows = TokenWindows.from_tokens(rng.integers(0, 100, (2, 16)))
    assert pool.register(windows) == windows.content_hash
    unit = unit_of(pool, some_masks(rng, 3), windows)
    pool.submit(unit, next(iter(pool.engines)), 1.0)
    (result,) = results_of(pool, 1)
    assert result.scores is not None
    assert result.scores.nll_MN.shape == (3, 2)


def test_a_unit_that_fails_comes_back_with_one_line_and_the_engine_goes_on(pool, rng):
    engine = next(iter(pool.engines))
    bad_1P = np.array([[bit == "1" for bit in POISONED]])
    bad, good = unit_of(pool, bad_1P), unit_of(pool, some_masks(rng, 2))
    pool.submit(bad, engine, None)
    pool.submit(good, engine, None)
    failed, scored = results_of(pool, 2)
    assert failed.unit is bad
    assert failed.scores is None
    assert failed.blamed
    assert not failed.lost
    assert failed.error is not None
    assert "poisoned" in failed.error
    assert len(failed.error.splitlines()) == 1
    assert scored.unit is good
    assert scored.scores is not None


def test_a_cancelled_unit_comes_back_too(pool, rng):
    engine = next(iter(pool.engines))
    units = [unit_of(pool, some_masks(rng, 2)) for _ in range(3)]
    for unit in units:
        pool.submit(unit, engine, None)
    pool.cancel(units[2], engine)
    assert {id(result.unit) for result in results_of(pool, 3)} == {id(unit) for unit in units}


def test_a_timeout_gives_none_and_figures_are_taken(pool):
    started = time.monotonic()
    assert pool.next(0.2) is None
    assert time.monotonic() - started >= 0.15
    pool.publish(RunState())
    assert pool.info.num_players == 8
    assert all(isinstance(place, str) for place in pool.engines.values())
