"""Scores of a model kept under another hash of it, moved to the hash that is used today.

Earlier versions hashed samples of a model's weights. Whether the weights are still those that were
scored then, only the user can know: scores are moved when the user says so, never by themselves.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

from lpserve.errors import InputError
from lpserve.store.connection import StoreConnection
from lpserve.store.run_folder import RunFolder
from lpserve.store.schema import OVERLAP, checksum, description_of, game_of
from lpserve.types import Game


def rekey_store(path: str | Path, old_model: str, new_model: str) -> dict[str, tuple[str, int]]:
    """Move all scores of a model to another hash of it, in one transaction.

    A score that is there under the new hash already is kept, and the old one dropped.

    Returns:
        For every game moved: its hash before -> (its hash now, its scores: masks on blocks).

    Raises:
        InputError, StoreBusyError, StoreCorruptError, DiskFullError: as of a
            `lpserve.store.store.Store`.
    """
    file = StoreConnection(Path(path), holder="lpserve scores", shared=None)
    moved = {}
    try:
        with file.transaction():
            for number, text in file.db.execute("SELECT id, description FROM games").fetchall():
                old = game_of(text)
                if old.model_hash == old_model:
                    new = replace(old, model_hash=new_model)
                    moved[old.content_hash] = new.content_hash, _move(file.db, number, new)
    finally:
        file.close()
    return moved


def rekey_run(folder: Path, old_model: str, new_model: str) -> dict[str, tuple[str, int]]:
    """`rekey_store` for the store in a run's folder, whose config.json then names the new hash.

    The run's command, given again, reads every score and writes plan and tables under that hash.

    Raises:
        InputError: the folder's run was of another model; or as `rekey_store`.
    """
    run = RunFolder(folder)
    try:
        stored = run.read_config()
        if stored is not None and stored["model_hash"] not in (old_model, new_model):
            raise InputError(f"run folder {folder} is of another model, or of other weights of it")
        moved = rekey_store(folder / "scores.sqlite", old_model, new_model)
        if stored is not None and stored["game"] in moved:
            game, _ = moved[stored["game"]]
            run.begun = True
            text = json.dumps(stored | {"model_hash": new_model, "game": game}, indent=2)
            run.write("config.json", text + "\n")
    finally:
        run.close()
    return moved


def _move(db: sqlite3.Connection, old: int, game: Game) -> int:
    """Give the scores of game number `old` to `game`; returns how many there were."""
    db.execute(
        "INSERT OR IGNORE INTO games (hash, description) VALUES (?, ?)",
        (game.content_hash, description_of(game)),
    )
    new = db.execute("SELECT id FROM games WHERE hash = ?", (game.content_hash,)).fetchone()[0]
    db.create_function("row_checksum", 5, checksum, deterministic=True)
    db.execute(
        "INSERT OR IGNORE INTO scores SELECT ?, block, metric, mask, value, "
        "row_checksum(?, block, metric, mask, value) FROM scores WHERE game = ?",
        (new, new, old),
    )
    count = db.execute("SELECT COUNT(*) FROM scores WHERE game = ?", (old,)).fetchone()[0]
    db.execute(
        "INSERT OR IGNORE INTO quarantine SELECT ?, block, metric, mask, reason "
        "FROM quarantine WHERE game = ?",
        (new, old),
    )
    tables = ["scores", "quarantine"]
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'overlaps'").fetchone():
        tables.append("overlaps")
        db.execute(
            "INSERT OR IGNORE INTO overlaps SELECT ?, block, value, "
            "row_checksum(?, block, ?, x'', value) FROM overlaps WHERE game = ?",
            (new, new, OVERLAP, old),
        )
    for table in tables:
        db.execute(f"DELETE FROM {table} WHERE game = ?", (old,))
    db.execute("DELETE FROM games WHERE id = ?", (old,))
    return int(count)
