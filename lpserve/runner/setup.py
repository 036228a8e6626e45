"""What is checked before a run begins, and what it begins with: settings, engine, pool.

Bad input is refused here, before a model loads.
"""

from __future__ import annotations

from typing import Any

from lpserve.config import EngineConfig, RunConfig, WindowConfig, as_json
from lpserve.data.items import ItemSet
from lpserve.data.prepare import check_disjoint, check_windows, cut_run_items, cut_run_windows
from lpserve.data.windows import TokenWindows
from lpserve.engine.registry import engine_kind
from lpserve.errors import InputError
from lpserve.model.checkpoint import read_checkpoint
from lpserve.rounds.settings import RoundSettings, StopRules
from lpserve.store.run_folder import CONFIG_FORMAT, RunFolder
from lpserve.types import EngineInfo


def num_players_of(config: EngineConfig) -> int:
    """The model's number of players, after its headers and the engine's options are checked."""
    kind = engine_kind(config.engine)
    kind.check_options(config.engine_options)
    return kind.num_players(config.model, config.engine_options)


def check_model(config: RunConfig) -> RunConfig:
    """The config with its depth-dependent defaults, after the checkpoint's headers are read."""
    num_players = num_players_of(config)
    config = config.resolved(num_players)
    least = round_settings(config, num_players).minimum_budget()
    if config.budget < least:
        raise InputError(
            f"budget must be at least {least} for {num_players} players and max_removed "
            f"{config.max_removed}: got {config.budget}"
        )
    return config


def item_sets_of(config: RunConfig) -> tuple[ItemSet, ItemSet]:
    """The calibration and held-out items of a run.

    Raises:
        InputError: texts or tasks cannot be used, do not fit the model or the utility, or the two
            sides share items.
    """
    calibration, heldout = cut_run_items(config)
    check_sides(config, calibration, heldout)
    return calibration, heldout


def windows_of(config: WindowConfig) -> tuple[TokenWindows, TokenWindows]:
    """The calibration and held-out windows of a config whose corpora are texts.

    Raises:
        InputError: a corpus is a task, or a text cannot be used or does not fit the model.
    """
    sides = cut_run_windows(config)
    check_windows_of(config, *sides)
    return sides


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


def round_settings(config: RunConfig, num_players: int) -> RoundSettings:
    """What the rounds depend on, of a config with its depth-dependent defaults."""
    assert config.max_removed
    assert config.sizes
    assert config.round_size
    return RoundSettings(
        num_players=num_players,
        max_removed=config.max_removed,
        sizes=config.sizes,
        seed=config.seed,
        surrogate=config.surrogate,
        round_size=config.round_size,
        goal=config.goal,
        stop=StopRules(chance=config.stop_chance, gain=config.stop_gain, width=config.stop_width),
    )


def described(
    config: RunConfig,
    info: EngineInfo,
    calibration: ItemSet,
    heldout: ItemSet,
    stored: dict[str, Any] | None,
) -> dict[str, Any]:
    """What config.json says: everything needed to repeat the run, beside the windows.

    Args:
        stored: what an earlier session of the run wrote.
    """
    import lpserve

    first = (stored or {}).get("engine", {})
    # a resumed run keeps its path; why it was chosen was said at its start
    reason = first.get("path_reason", "") if first.get("path") == info.path else info.path_reason
    return {
        "format": CONFIG_FORMAT,
        "config": as_json(config),
        "model_hash": info.model_hash,
        "game": info.game.content_hash,
        "windows": {
            "calibration": calibration.content_hash,
            "heldout": heldout.content_hash,
            "corpora": [list(c) for c in calibration.corpora],
            "heldout_corpora": [list(c) for c in heldout.corpora],
        },
        "engine": {
            "kind": info.kind,
            "path": info.path,
            "path_reason": reason,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "device": info.device,
            "noise_nll": info.noise_nll,
            "settings": dict(info.settings),
        },
        "versions": {"lpserve": lpserve.__version__, **info.versions},
    }


def check_same_game(folder: RunFolder, stored: dict[str, Any], info: EngineInfo) -> None:
    """Raise InputError when the folder's scores are of another model or other numerics."""
    if stored["model_hash"] != info.model_hash:
        raise InputError(
            f"run folder {folder.path} belongs to another game: the model at {info.model} "
            "has changed since; choose another --out"
        )
    if stored["game"] != info.game.content_hash:
        engine = stored["engine"]
        raise InputError(
            f"run folder {folder.path} belongs to another game: {engine['dtype']} scores of "
            f"{engine['kind']} ({engine['path']}) do not mix with {info.dtype} scores of "
            f"{info.kind} ({info.path}); choose another --out, or give the same engine"
        )


def check_same_windows(
    folder: RunFolder,
    stored: dict[str, Any],
    calibration: ItemSet,
    heldout: ItemSet | None,
) -> None:
    """Raise InputError when a text gives other windows than the folder's run had; None: may."""
    for name, sample in (("calibration", calibration), ("heldout", heldout)):
        if sample is not None and stored["windows"][name] != sample.content_hash:
            raise InputError(
                f"run folder {folder.path} belongs to another run: the {name} text has changed "
                "since; choose another --out"
            )
