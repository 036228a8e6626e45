"""What is checked before a run begins, and what it begins with: players, items, settings.

Bad input is refused here, before a model loads.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from lpserve.engine.registry import engine_kind
from lpserve.errors import InputError
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.players import named_players
from lpserve.plan.constraint import constraint_of
from lpserve.rounds.settings import RoundSettings, StopRules
from lpserve.scoring.open import players_of
from lpserve.types import Player


def num_players_of(config: EngineConfig) -> int:
    """The model's number of players, after its headers and the engine's options are checked."""
    return len(players_of(config))


def check_model(config: RunConfig) -> RunConfig:
    """The config with its depth-dependent defaults, after the checkpoint's headers are read."""
    players = players_of(config)
    num_players = len(players)
    config = config.resolved(num_players)
    settings = round_settings(config, players)
    settings.within.check(settings.max_removed)
    minimum = settings.minimum_budget()
    if config.budget < minimum:
        raise InputError(
            f"budget must be at least {minimum} for {num_players} players and max_removed "
            f"{config.max_removed}: got {config.budget}"
        )
    return config


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


def round_settings(config: RunConfig, players: Sequence[Player]) -> RoundSettings:
    """What the rounds depend on, of a config with its depth-dependent defaults."""
    assert config.max_removed
    assert config.sizes
    assert config.round_size
    return RoundSettings(
        num_players=len(players),
        max_removed=config.max_removed,
        sizes=config.sizes,
        seed=config.seed,
        surrogate=config.surrogate,
        round_size=config.round_size,
        goal=config.goal,
        constraint=constraint_of(
            len(players),
            named_players(players, config.protect or (), "protect"),
            named_players(players, config.force or (), "force"),
        ),
        stop=StopRules(chance=config.stop_chance, gain=config.stop_gain, width=config.stop_width),
    )
