"""What a run's folder says about the run, and whether another run may go on in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpserve.config import RunConfig, as_json
from lpserve.data.items import ItemSet
from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.inputs.arrays import array_of, read_arrays
from lpserve.model.content_hash import is_sampled
from lpserve.store.files import write_npz
from lpserve.store.run_folder import CONFIG_FORMAT, RunFolder
from lpserve.types import EngineInfo


def write_windows_file(path: Path, calibration: ItemSet, heldout: ItemSet) -> None:
    """Write windows.npz, from which both item sets can be read again.

    Raises:
        DiskFullError, InputError: the file cannot be written; an older one is left as it was.
    """
    held = {f"heldout_{name}": array for name, array in heldout.arrays().items()}
    write_npz(path, {**calibration.arrays(), **held})


def holds_windows(path: Path, calibration: ItemSet, heldout: ItemSet) -> bool:
    """Whether windows.npz is there and holds these item sets."""
    try:
        found = _window_hashes(path)
    except InputError:
        return False
    sides = {"calibration": calibration, "heldout": heldout}
    return all(found[name] == side.ppl_windows.window_hashes for name, side in sides.items())


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
        "players": [[player.layer, player.part] for player in info.players],
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
    if is_sampled(stored["model_hash"]) and not is_sampled(info.model_hash):
        raise InputError(
            f"run folder {folder.path} is of an lpserve that knew a model by samples of its "
            f"weights: if these are the same still, `lpserve scores {folder.path} --adopt MODEL` "
            "takes its scores over; else choose another --out"
        )
    if stored["model_hash"] != info.model_hash:
        raise InputError(
            f"run folder {folder.path} belongs to another game: the model at {info.model} "
            "has changed since; choose another --out"
        )
    players = [[player.layer, player.part] for player in info.players]
    if stored.get("players", players) != players:
        raise InputError(
            f"run folder {folder.path} belongs to another game: its players were others (see its "
            "config.json), the file of groups has changed; choose another --out"
        )
    if stored["game"] != info.game.content_hash:
        engine = stored["engine"]
        raise InputError(
            f"run folder {folder.path} belongs to another game: {engine['dtype']} scores of "
            f"{engine['kind']} ({engine['path']}) do not mix with {info.dtype} scores of "
            f"{info.kind} ({info.path}); choose another --out, or give the same engine"
        )


def made_by(stored: dict[str, Any], info: EngineInfo) -> bool:
    """Whether a run's scores were made by such an engine, as its config.json says."""
    engine = stored["engine"]
    return (engine["kind"], engine["path"]) == (info.kind, info.path)


def check_same_windows(
    folder: RunFolder,
    stored: dict[str, Any],
    calibration: ItemSet,
    heldout: ItemSet | None,
) -> None:
    """Raise InputError when a text gives other windows than the folder's run had, which a larger
    number of them holds too; None: may."""
    before: dict[str, tuple[str, ...]] | None = None
    for name, sample in (("calibration", calibration), ("heldout", heldout)):
        if sample is None or stored["windows"][name] == sample.content_hash:
            continue
        before = before or _window_hashes(folder.path / "windows.npz")
        if not set(before[name]) < set(sample.ppl_windows.window_hashes):
            raise InputError(
                f"run folder {folder.path} belongs to another run: the {name} text has changed "
                "since; choose another --out"
            )


def _window_hashes(path: Path) -> dict[str, tuple[str, ...]]:
    """Hashes of the windows that `write_windows_file` wrote, of both sides."""
    arrays = read_arrays(path)
    found = {}
    for name, prefix in (("calibration", ""), ("heldout", "heldout_")):
        sizes: dict[str, int] = {}
        tokens = array_of(arrays, f"{prefix}tokens", "iu", "NT", sizes, str(path))
        scored = array_of(arrays, f"{prefix}scored", "b", "NT", sizes, str(path))
        found[name] = TokenWindows.from_tokens(tokens, scored, name=name).window_hashes
    return found
