"""What is checked before a run begins, and what it begins with: settings, engine, pool.

Bad input is refused here, before a model loads.
"""

from __future__ import annotations

from typing import Any

from lpserve.config import EngineConfig, RunConfig, as_json
from lpserve.data.items import ItemSet
from lpserve.engine.vllm.options import check_options as check_vllm_options
from lpserve.errors import InputError
from lpserve.model.architecture import check_decoder, read_architecture, required
from lpserve.model.checkpoint import read_checkpoint
from lpserve.rounds.planner import RoundSettings, StopRules
from lpserve.store.run_folder import CONFIG_FORMAT, RunFolder
from lpserve.types import EngineInfo


def num_players_of(config: EngineConfig) -> int:
    """The model's number of players, after its headers and the engine's options are checked."""
    if config.engine == "vllm":
        check_vllm_options(config.engine_options)
    if config.engine == "synthetic":
        return int(config.engine_options.get("num_players", 8))
    checkpoint = read_checkpoint(config.model)
    check_decoder(checkpoint)
    return required(read_architecture(checkpoint).num_layers, "number of layers")


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
