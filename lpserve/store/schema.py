"""The format of a store's file: its tables, its checksums, and the check of an existing file."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from lpserve.store.lease import LEASE_TABLE
from lpserve.types import Game, Player

APPLICATION_ID = 0x6C707376  # "lpsv"
SCHEMA_VERSION = 1
BUSY_S = 30.0
"""How long a statement waits for another connection's lock: a reader must not fail a commit."""

_SCHEMA = """
CREATE TABLE games (id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, description TEXT NOT NULL);
CREATE TABLE windows (
  id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, num_tokens INTEGER NOT NULL,
  UNIQUE (hash, num_tokens));
CREATE TABLE blocks (id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE);
CREATE TABLE block_windows (
  block INTEGER NOT NULL, position INTEGER NOT NULL, window INTEGER NOT NULL,
  PRIMARY KEY (block, position)) WITHOUT ROWID;
CREATE INDEX block_windows_by_window ON block_windows (window);
CREATE TABLE scores (
  game INTEGER NOT NULL, block INTEGER NOT NULL, metric TEXT NOT NULL, mask BLOB NOT NULL,
  value BLOB NOT NULL, crc INTEGER NOT NULL,
  PRIMARY KEY (game, block, metric, mask)) WITHOUT ROWID;
CREATE TABLE quarantine (
  game INTEGER NOT NULL, block INTEGER NOT NULL, metric TEXT NOT NULL, mask BLOB NOT NULL,
  reason TEXT NOT NULL, PRIMARY KEY (game, block, metric, mask)) WITHOUT ROWID;
"""
_STATEMENTS = _SCHEMA.strip().removesuffix(";").split(";\n")
OVERLAP_TABLE = """CREATE TABLE overlaps (
  game INTEGER NOT NULL, block INTEGER NOT NULL, value BLOB NOT NULL, crc INTEGER NOT NULL,
  PRIMARY KEY (game, block)) WITHOUT ROWID"""
"""Overlaps of the effects of single players; made when the first is stored."""
OVERLAP = "overlap"
"""What stands for a metric in the checksum of an overlap."""


def connect_sqlite(path: Path, mode: str) -> sqlite3.Connection:
    """A connection without implicit transactions; `mode` is SQLite's: ro, rw or rwc."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection that does not fail on damaged text.

    Read-only, because any other would, on closing, write what a killed process left in the
    write-ahead log into a file that is to be left as it is. What it left in a rollback journal is
    part of the file's last committed state, and a read-only connection cannot put it back: then,
    and only then, one that may write does so first.
    """
    real = path.resolve()  # SQLite keeps its journal beside the file itself, not beside a link
    if real.with_name(f"{real.name}-journal").exists():
        with closing(connect_sqlite(path, "rw")) as db:
            db.execute("PRAGMA schema_version").fetchone()
    with closing(connect_sqlite(path, "ro")) as db:
        db.text_factory = lambda text: text.decode(errors="replace")
        yield db


def is_empty(db: sqlite3.Connection) -> bool:
    """Whether the file has no tables yet."""
    return not _tables(db)


def create(db: sqlite3.Connection) -> None:
    """Make the tables, in the caller's transaction."""
    for statement in _STATEMENTS:
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def problem(db: sqlite3.Connection) -> str | None:
    """Why a file cannot be used as a store; None if it can, or if it has no tables yet.

    Raises:
        sqlite3.DatabaseError: what SQLite itself finds.
    """
    try:
        return _problem(db)
    except (ValueError, KeyError, TypeError) as error:
        return f"is corrupt (a row cannot be read: {error})"
    except sqlite3.DatabaseError as error:
        # SQLite's plain error: not a store's tables, or not a format it reads
        if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_ERROR:
            raise
        return f"is corrupt ({error})"


def checksum(game: int, block: int, metric: str, mask: bytes, value: bytes) -> int:
    """CRC-32 of a row of scores, its keys included."""
    return zlib.crc32(value, zlib.crc32(mask, zlib.crc32(f"{game} {block} {metric}".encode())))


def game_of(description: str) -> Game:
    """The game that a row of games describes in JSON."""
    about = json.loads(description)
    players = [Player(index=i, layer=n, part=part) for i, (n, part) in enumerate(about["players"])]
    return Game(model_hash=about["model"], players=tuple(players), numerics=about["numerics"])


def description_of(game: Game) -> str:
    """A game in JSON, as a row of games describes it."""
    players = [[player.layer, player.part] for player in game.players]
    about = {"model": game.model_hash, "numerics": game.numerics, "players": players}
    return json.dumps(about)


def _problem(db: sqlite3.Connection) -> str | None:
    structure = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if structure != "ok":
        return f"is corrupt ({structure})"
    tables = _tables(db)
    if not tables:
        return None
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        return "is not an lpserve store"
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        return f"has format {version}, and this lpserve reads {SCHEMA_VERSION}"
    # the lease comes with the first opening on a shared path
    fixed, later = tables[: len(_STATEMENTS)], tables[len(_STATEMENTS) :]
    known = {LEASE_TABLE, OVERLAP_TABLE}
    if fixed != _STATEMENTS or len(later) > len(set(later)) or not known.issuperset(later):
        return "is corrupt (its tables are not those of a store)"
    # SQLite checks its structure, not what the cells hold
    for *score, crc in db.execute("SELECT game, block, metric, mask, value, crc FROM scores"):
        if checksum(*score) != crc:
            return "is corrupt (a score does not match its checksum)"
    if OVERLAP_TABLE in later:
        for game, block, value, crc in db.execute("SELECT * FROM overlaps"):
            if checksum(game, block, OVERLAP, b"", value) != crc:
                return "is corrupt (an overlap does not match its checksum)"
    for content_hash, description in db.execute("SELECT hash, description FROM games"):
        if game_of(description).content_hash != content_hash:
            return "is corrupt (a game does not match its hash)"
    return None


def _tables(db: sqlite3.Connection) -> list[str]:
    return [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")]
