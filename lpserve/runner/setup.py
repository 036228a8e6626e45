"""What is checked before a run begins, and what it begins with: players, items, settings.

Bad input is refused here, before a model loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lpserve.config import EngineConfig, RunConfig, WindowConfig, is_task
from lpserve.data.items import ItemSet
from lpserve.data.prepare import (
    check_disjoint,
    check_length,
    check_windows,
    cut_run_items,
    cut_run_windows,
)
from lpserve.data.windows import TokenWindows
from lpserve.engine.base import EngineInfo
from lpserve.engine.registry import engine_kind
from lpserve.errors import InputError
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.costs import player_costs
from lpserve.model.players import has_parts, named_players
from lpserve.plan.constraint import Constraint, constraint_of
from lpserve.plan.targets import Target, cost_targets, read_targets, removing
from lpserve.rounds.settings import RoundSettings, StopRules
from lpserve.scoring.open import players_of
from lpserve.types import Player

Costs = dict[str, list[float]]
"""Cost (`lpserve.inputs.rules.COSTS`) -> that of each player."""


def num_players_of(config: EngineConfig) -> int:
    """The model's number of players, after its headers and the engine's options are checked."""
    return len(players_of(config))


def check_model(config: RunConfig) -> RunConfig:
    """The config with its depth-dependent defaults, after the checkpoint's headers are read."""
    players = players_of(config)
    config = config.resolved(len(players))
    if config.target is not None and has_parts(players):
        # what parts cost is known once an engine has found them
        _, shares = read_targets(config.target)
        within = _within(config, players)
        within.check(len(within.forced))
        settings = _settings(config, players, (removing(1, within),) * len(shares))
    else:
        costs = {} if config.target is None else layer_costs(config, players, config.length)
        settings = round_settings(config, players, costs)
    check_budget(config, settings)
    return config


def check_budget(config: RunConfig, settings: RoundSettings) -> None:
    """Raise InputError where the budget is too small for a run's rounds."""
    minimum = settings.minimum_budget()
    if config.budget < minimum:
        asked = f"target {config.target}" if config.target else f"max_removed {config.max_removed}"
        raise InputError(
            f"budget must be at least {minimum} for {settings.num_players} players and {asked}: "
            f"got {config.budget}"
        )


def item_sets_of(config: RunConfig) -> tuple[ItemSet, ItemSet]:
    """The calibration and held-out items of a run.

    Raises:
        InputError: texts or tasks cannot be used, do not fit the model or the utility, or the two
            sides share items.
    """
    _check_texts(config)
    calibration, heldout = cut_run_items(config)
    check_sides(config, calibration, heldout)
    return calibration, heldout


def windows_of(config: WindowConfig) -> tuple[TokenWindows, TokenWindows]:
    """The calibration and held-out windows of a config whose corpora are texts.

    Raises:
        InputError: a corpus is a task, or a text cannot be used or does not fit the model.
    """
    _check_texts(config)
    sides = cut_run_windows(config)
    check_windows_of(config, *sides)
    return sides


def _check_texts(config: WindowConfig) -> None:
    """Raise InputError where windows of the length that is asked for cannot fit the model, before
    a text turns out to be too short for them."""
    paths = [*config.calibration.values(), *config.heldout.values()]
    is_cut = any(not is_task(path) and not path.endswith(".npz") for path in paths)
    if is_cut and engine_kind(config.engine).reads_checkpoint:
        check_length(read_checkpoint(config.model), config.length)


def check_sides(config: EngineConfig, calibration: ItemSet, heldout: ItemSet) -> None:
    """Raise InputError where windows do not fit the model, or are on both sides."""
    check_windows_of(config, calibration.windows, heldout.windows)
    check_disjoint(calibration, heldout)


def check_windows_of(config: EngineConfig, *sides: TokenWindows) -> None:
    """Raise InputError where windows do not fit the config's model."""
    if engine_kind(config.engine).reads_checkpoint:
        checkpoint = read_checkpoint(config.model)
        for windows in sides:
            check_windows(checkpoint, windows)


def layer_costs(config: EngineConfig, players: Sequence[Player], length: int) -> Costs:
    """What whole layers cost, for a target; raises InputError where that cannot be told."""
    if not engine_kind(config.engine).reads_checkpoint:
        raise InputError(f"target is about what players cost, and {config.model} is no checkpoint")
    return player_costs(read_checkpoint(config.model), players, length).by_name()


def costs_of(
    model: str,
    info: EngineInfo,
    length: int,
    *,
    needed: bool,
    note: Callable[[str], None],
) -> Costs:
    """What players cost at a context of `length` tokens; empty where nothing asks for it.

    Args:
        needed: whether a target asks; else parts of layers have costs where they can be told.
        note: told why they cannot.

    Raises:
        InputError: a target needs costs that the checkpoint does not tell.
    """
    if not (needed or has_parts(info.players)) or not engine_kind(info.kind).reads_checkpoint:
        return {}
    modules = info.settings.get("modules")
    try:
        return player_costs(read_checkpoint(model), info.players, length, modules).by_name()
    except InputError as error:
        if needed:
            raise
        note(f"the plan says nothing of costs: {error}")
        return {}


def round_settings(config: RunConfig, players: Sequence[Player], costs: Costs) -> RoundSettings:
    """What the rounds depend on, of a config with its depth-dependent defaults.

    Raises:
        InputError: no set that the constraint allows is small enough.
    """
    within = _within(config, players)
    if config.target is None:
        assert config.max_removed
        within.check(config.max_removed)
        return _settings(config, players, ())
    cost, shares = read_targets(config.target)
    return _settings(config, players, cost_targets(within, shares, costs[cost], cost))


def _within(config: RunConfig, players: Sequence[Player]) -> Constraint:
    return constraint_of(
        len(players),
        named_players(players, config.protect or (), "protect"),
        named_players(players, config.force or (), "force"),
    )


def _settings(
    config: RunConfig, players: Sequence[Player], costs: tuple[Target, ...]
) -> RoundSettings:
    max_removed = config.max_removed or max(target.sizes[-1] for target in costs)
    assert config.round_size
    return RoundSettings(
        num_players=len(players),
        max_removed=max_removed,
        sizes=config.sizes or (len(players) - max_removed, len(players) - 1),
        seed=config.seed,
        surrogate=config.surrogate,
        round_size=config.round_size,
        goal=config.goal,
        constraint=_within(config, players),
        costs=costs,
        stop=StopRules(chance=config.stop_chance, gain=config.stop_gain, width=config.stop_width),
    )
