"""Ray pools of the synthetic game, and all that they answer. Ray is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lpserve.config import RunConfig
from lpserve.data.windows import TokenWindows
from lpserve.masks import keys
from lpserve.runner.run import RunResult, run
from lpserve.scoring.dispatcher import Dispatcher
from lpserve.scoring.pool import EnginePool
from lpserve.scoring.units import GivenUp
from lpserve.store.blocks import WindowBlock
from lpserve.testing.runs import NUM_PLAYERS, make_config, stored_scores
from lpserve.types import EngineSpec

if TYPE_CHECKING:
    from lpserve.scoring.ray.pool import RayPool

THREE_WINDOWS = WindowBlock(id=0, rows=np.arange(3))


def ray_config(tmp_path: Path, texts: Mapping[str, str], engines: int, **options: Any) -> RunConfig:
    """`make_config` with Ray engines; `options` are the engine's."""
    engine_options = {"num_players": NUM_PLAYERS, "game_seed": 3, **options}
    return make_config(tmp_path, texts, pool="ray", engines=engines, engine_options=engine_options)


def undisturbed(
    tmp_path: Path, texts: Mapping[str, str]
) -> tuple[RunResult, dict[tuple[bytes, str], float]]:
    """The same run on one local engine, and what it stored."""
    config = make_config(tmp_path, texts, out=str(tmp_path / "alone"))
    return run(config), stored_scores(tmp_path / "alone" / "scores.sqlite")


def pool_of(
    engines: int | None,
    deadline_s: float | None = None,
    log: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> tuple[RayPool, TokenWindows]:
    """A Ray pool of the synthetic game, and its three windows."""
    from lpserve.scoring.ray.pool import RayPool

    windows = TokenWindows.from_tokens(np.random.default_rng(0).integers(0, 100, (3, 16)))
    spec = EngineSpec(kind="synthetic", model="", options={"num_players": NUM_PLAYERS, **options})
    return RayPool(spec, windows, engines, deadline_s=deadline_s, log=log), windows


def score_all(
    pool: EnginePool, windows: TokenWindows, masks: np.ndarray
) -> tuple[dict[bytes, np.ndarray], dict[bytes, str]]:
    """key -> NLL of what was scored, and key -> reason of what was given up."""
    dispatcher = Dispatcher(pool)
    dispatcher.add(masks, THREE_WINDOWS, dispatcher.register(windows))
    scored: dict[bytes, np.ndarray] = {}
    given_up: dict[bytes, str] = {}
    while not dispatcher.idle:
        result = dispatcher.next(1.0)
        if isinstance(result, GivenUp):
            given_up[keys(result.unit.masks_MP)[0]] = result.reason
        elif result is not None:
            assert result.scores is not None
            for key, nll in zip(keys(result.unit.masks_MP), result.scores.nll_MN, strict=True):
                assert key not in scored, "a mask was scored twice"
                scored[key] = nll
    return scored, given_up
