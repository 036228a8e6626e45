"""A run's folder: its lock, its config, its files and the event journal.

A folder belongs to one config; only the keys in `config.CHANGEABLE` may differ when it is resumed.
A folder that this process made is removed again if the run never starts, except on a path that
other hosts share, where another host's run may have started in it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from lpserve.config import CHANGEABLE, GROWING
from lpserve.errors import InputError
from lpserve.inputs.documents import read_json_object
from lpserve.inputs.files import is_there
from lpserve.inputs.shapes import converted
from lpserve.store.files import make_folder, open_unlinked, space_checked, write_text
from lpserve.store.filesystem import is_shared
from lpserve.store.lock import PathLock

CONFIG_FORMAT = 1


class _Windows(TypedDict):
    calibration: str
    heldout: str


class _Engine(TypedDict):
    kind: str
    path: str
    dtype: str
    path_reason: NotRequired[str]
    settings: NotRequired[dict[str, Any]]


class _RunConfigFile(TypedDict):
    """What is read of a run's config.json (`lpserve.runner.manifest.described` writes it)."""

    format: int
    config: dict[str, Any]
    model_hash: str
    game: str
    windows: _Windows
    engine: _Engine


def read_run_config(path: Path) -> dict[str, Any]:
    """The content of a run's config.json; raises InputError where it is none."""
    stored = read_json_object(path)
    wrong = f"{path} is no config of a run; choose another --out"
    converted(stored, _RunConfigFile, wrong)
    if stored["format"] != CONFIG_FORMAT:
        raise InputError(f"{wrong}: its format is {stored['format']}, not {CONFIG_FORMAT}")
    return stored


class RunFolder:
    """An open, locked run folder.

    Raises:
        InputError: the path is a file, or cannot be made.
        StoreBusyError: another run is at work in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._made = not self.path.exists()
        make_folder(self.path, "run folder")
        self._made = self._made and not is_shared(self.path)
        self.begun = False
        """Whether the run has started: its folder then stays."""
        self._lock = PathLock(self.path / "run", holder=f"a run in {self.path}")

    def read_config(self) -> dict[str, Any] | None:
        """What an earlier run wrote to config.json, or None; see `read_run_config`."""
        path = self.path / "config.json"
        return read_run_config(path) if is_there(path) else None

    def check_same_config(
        self, stored: dict[str, Any], config: dict[str, Any], ignore: Collection[str] = ()
    ) -> None:
        """Raise InputError where a config differs from the folder's in a key that must not change.

        Args:
            stored: what `read_config` found.
            ignore: keys that may differ, besides `config.CHANGEABLE`.
        """
        old = stored["config"]
        for key in sorted(set(old) | set(config)):
            if key in (*CHANGEABLE, "out", *ignore) or old.get(key) == config.get(key):
                continue
            if key in GROWING and type(old.get(key)) is int and config[key] > old[key]:
                continue
            if key in GROWING:
                raise InputError(
                    f"run folder {self.path} has {key} = {old.get(key)!r}, which can only grow: "
                    f"got {config.get(key)!r}; choose another --out"
                )
            raise InputError(
                f"run folder {self.path} belongs to another run: {key} was {old.get(key)!r}, "
                f"is {config.get(key)!r}; choose another --out, or give the same {key}"
            )

    def write(self, name: str, text: str) -> Path:
        """Write a text file into the folder, completely or not at all."""
        path = self.path / name
        write_text(path, text)
        return path

    def event(self, kind: str, **details: Any) -> None:
        """Append one line to events.jsonl; a torn last line of a killed run is cut off first."""
        path = self.path / "events.jsonl"
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **details}) + "\n"
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
        with space_checked(path), os.fdopen(open_unlinked(path, flags), "ab+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line.encode())

    def close(self) -> None:
        """Release the lock; remove a folder that is this process's alone if nothing began in it."""
        self._lock.release()
        if self._made and not self.begun:
            for name in ("run.lock", "scores.sqlite", "scores.sqlite.lock"):
                (self.path / name).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
