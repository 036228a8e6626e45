"""From a config to an open pool: the engine's spec, and the pool that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lpserve.config import EngineConfig
from lpserve.data.windows import TokenWindows
from lpserve.engine.registry import engine_kind
from lpserve.errors import InputError
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.content_hash import checkpoint_hash, is_sampled
from lpserve.model.players import FULL_LAYER
from lpserve.scoring.local import LocalPool
from lpserve.scoring.pool import EnginePool
from lpserve.store.store import Store
from lpserve.types import EngineInfo, EngineSpec, Player


def open_pool(
    config: EngineConfig, spec: EngineSpec, windows: TokenWindows, log: Callable[[str], None]
) -> EnginePool:
    """Start the engines of a config.

    Args:
        windows: what the engines are opened with.
        log: takes a line for the user when engines come, go or fail.

    Raises:
        InputError: pool ray needs Ray, which is not installed; or the engine refuses the spec.
        EngineError: no engine can start.
    """
    if config.pool == "local":
        if engine_kind(config.engine).reads_checkpoint:
            # the engine does the same and finds it known: a large one is told before it is read
            checkpoint_hash(read_checkpoint(config.model), tell=log)
        return LocalPool(spec, windows)
    try:
        from lpserve.scoring.ray.pool import RayPool
    except ImportError as error:
        raise InputError(f"pool ray needs Ray ({error}): install lpserve[ray]") from None
    engines = None if config.engines == "auto" else int(config.engines)
    return RayPool(spec, windows, engines, log=log)


def engine_notes(store: Store, info: EngineInfo) -> Iterator[str]:
    """What the user should know of an engine that has started, and of the store it scores into."""
    held = [game.model_hash for game in store.games().values()]
    if any(map(is_sampled, held)) and not is_sampled(info.model_hash):
        yield (
            f"store {store.path} holds scores of an lpserve that knew a model by samples of its "
            "weights; they are not read (lpserve scores STORE --adopt MODEL takes them over)"
        )
    if (player := info.settings.get("first_not_finite")) is not None:
        advice = "use bfloat16 or float32" if info.dtype == "float16" else "check its file"
        yield (
            f"layer {player} gives NaN or infinity in {info.dtype}, and so does every set that "
            f"keeps it: {advice}"
        )
    if (share := info.settings.get("unlike_transformers")) is not None:
        yield (
            "vLLM runs models of this type unlike transformers: on a CPU the whole model's loss "
            f"was off by a share of {share:.2g}; check the plan with --engine transformers, too"
        )


def players_of(config: EngineConfig) -> tuple[Player, ...]:
    """What a config's masks keep or drop, after the checkpoint's headers and the engine's options
    are checked."""
    kind = engine_kind(config.engine)
    kind.check_options(config.engine_options)
    return kind.players(config.model, config.engine_options, config.players)


def engine_spec(config: EngineConfig, stored: dict[str, Any] | None, longest: int) -> EngineSpec:
    """The spec of a config's engine.

    Args:
        stored: config.json of the run that is resumed, whose engine had resolved its path,
            micro-batch and memory settings: they are used again. None: a new run.
        longest: tokens of the longest window that will be scored.
    """
    spec = EngineSpec(
        kind=config.engine,
        model=config.model,
        dtype=config.dtype,
        device=config.device,
        options=dict(config.engine_options),
        players=() if config.players == FULL_LAYER else players_of(config),
    )
    kind = engine_kind(config.engine)
    spec = kind.for_length(spec, longest)
    engine = (stored or {}).get("engine", {})
    return kind.pinned(spec, engine["settings"]) if engine.get("kind") == spec.kind else spec
