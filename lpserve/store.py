"""Durable scores in SQLite: one row for each (game, block of windows, metric, mask).

A score exists once it is committed (write-ahead log, full sync). NLLs are kept per window, so any
subset or mixture of windows, and any utility derived from NLL, is read back without scoring again.
A block is an immutable list of windows, fixed when it is first asked for. Writing a score twice
keeps the first. One writer at a time; the lock dies with its process.

Notation: M masks, N windows, P players.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpserve.errors import DiskFullError, InputError, LpserveError, StoreCorruptError
from lpserve.locks import PathLock
from lpserve.masks import keys
from lpserve.types import BoolArray, FloatArray, Game, IntArray
from lpserve.windows import TokenWindows

APPLICATION_ID = 0x6C707376  # "lpsv"
SCHEMA_VERSION = 1
MAX_BLOCK_WINDOWS = 64
_KEYS_PER_QUERY = 500

_SCHEMA = """
CREATE TABLE games (id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, description TEXT NOT NULL);
CREATE TABLE windows (
  id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, num_tokens INTEGER NOT NULL);
CREATE TABLE blocks (id INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE);
CREATE TABLE block_windows (
  block INTEGER NOT NULL, position INTEGER NOT NULL, window INTEGER NOT NULL,
  PRIMARY KEY (block, position)) WITHOUT ROWID;
CREATE INDEX block_windows_by_window ON block_windows (window);
CREATE TABLE scores (
  game INTEGER NOT NULL, block INTEGER NOT NULL, metric TEXT NOT NULL, mask BLOB NOT NULL,
  value BLOB NOT NULL, PRIMARY KEY (game, block, metric, mask)) WITHOUT ROWID;
CREATE TABLE quarantine (
  game INTEGER NOT NULL, block INTEGER NOT NULL, metric TEXT NOT NULL, mask BLOB NOT NULL,
  reason TEXT NOT NULL, PRIMARY KEY (game, block, metric, mask)) WITHOUT ROWID;
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Windows that are scored and stored together."""

    id: int
    rows: IntArray
    """Their rows in the windows it was asked for, in stored order."""


class Store:
    """An open score store. Use as a context manager.

    Raises:
        StoreBusyError: another process has it open for writing.
        StoreCorruptError: the file is not a readable lpserve store; it is left as it is.
        DiskFullError: a write found no space; what was committed before is kept.
    """

    def __init__(self, path: str | Path, *, holder: str = "an lpserve process") -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise InputError(f"store {self.path}: folder {self.path.parent} does not exist")
        self._lock = PathLock(self.path, holder=holder)
        try:
            with self._translated():
                self._db = sqlite3.connect(self.path, isolation_level=None)
                self._check()
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        self._db.close()
        self._lock.release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- registering ---------------------------------------------------------------------------

    def game_id(self, game: Game) -> int:
        description = {
            "model": game.model_hash,
            "numerics": game.numerics,
            "players": [[p.layer, p.part] for p in game.players],
        }
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO games (hash, description) VALUES (?, ?)",
                (game.content_hash, json.dumps(description)),
            )
        return self._id("games", game.content_hash)

    def games(self) -> dict[str, dict]:
        """Description of every game held, by hash."""
        with self._translated():
            return {h: json.loads(d) for h, d in self._db.execute("SELECT hash, description FROM games")}  # fmt: skip

    def blocks_for(self, windows: TokenWindows) -> list[Block]:
        """Blocks that cover these windows, each once.

        Blocks already held whose windows are all wanted come first (largest first); the rest are
        made new, at most `MAX_BLOCK_WINDOWS` windows each. So a larger number of windows scores
        only what a smaller one has not.
        """
        row_of = self._register_windows(windows)
        chosen: list[Block] = []
        with self._translated():
            held: dict[int, list[int]] = {}
            for block, window in self._db.execute(
                "SELECT block, window FROM block_windows ORDER BY block, position"
            ):
                held.setdefault(block, []).append(window)
        for block, members in sorted(held.items(), key=lambda item: (-len(item[1]), item[0])):
            if all(window in row_of for window in members):
                rows = [row_of.pop(window) for window in members]
                chosen.append(Block(id=block, rows=np.array(rows, dtype=np.int64)))
        rest = list(row_of.items())
        for start in range(0, len(rest), MAX_BLOCK_WINDOWS):
            part = rest[start : start + MAX_BLOCK_WINDOWS]
            block = self._make_block([window for window, _ in part])
            chosen.append(Block(id=block, rows=np.array([row for _, row in part], dtype=np.int64)))
        return chosen

    # -- scores --------------------------------------------------------------------------------

    def put(
        self, game: int, block: Block, masks_MP: BoolArray, nll_MN: FloatArray, metric: str = "nll"
    ) -> int:
        """Commit scores; returns how many were new. Non-finite values are stored as they are."""
        values_MN = np.asarray(nll_MN).astype("<f4")
        if values_MN.shape != (len(masks_MP), len(block.rows)):
            raise ValueError(f"scores {values_MN.shape} for {len(masks_MP)} masks of {block}")
        rows = [
            (game, block.id, metric, key, value_N.tobytes())
            for key, value_N in zip(keys(masks_MP), values_MN, strict=True)
        ]
        with self._transaction():
            before = self._db.total_changes
            self._db.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?)", rows)
            return self._db.total_changes - before

    def get(
        self, game: int, windows: TokenWindows, masks_MP: BoolArray, metric: str = "nll"
    ) -> tuple[NDArray[np.float32], BoolArray]:
        """What is known of these masks: NLL in nats `float32[M, N]` and `known bool[M, N]`.

        A window's score is found in whatever block holds it.
        """
        ids = self._window_ids(windows)
        nll_MN = np.full((len(masks_MP), windows.num_windows), np.nan, dtype=np.float32)
        known_MN = np.zeros(nll_MN.shape, dtype=bool)
        row_of = {key: row for row, key in enumerate(keys(masks_MP))}
        for block, size, pairs in self._blocks_holding(ids):
            for key, value in self._rows(game, block, metric, list(row_of)):
                value_N = np.frombuffer(value, dtype="<f4")
                if len(value_N) != size:
                    raise StoreCorruptError(
                        f"store {self.path} is corrupt: a score of {len(value_N)} windows in a "
                        f"block of {size}; it is left as it is"
                    )
                for position, column in pairs:
                    nll_MN[row_of[key], column] = value_N[position]
                    known_MN[row_of[key], column] = True
        return nll_MN, known_MN

    def count(self) -> int:
        """Scores held, over all games, blocks and metrics."""
        with self._translated():
            return int(self._db.execute("SELECT COUNT(*) FROM scores").fetchone()[0])

    # -- quarantine ----------------------------------------------------------------------------

    def quarantine(
        self, game: int, block: Block, mask_P: BoolArray, reason: str, metric: str = "nll"
    ) -> None:
        """Mark one mask as impossible to score on a block."""
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO quarantine VALUES (?, ?, ?, ?, ?)",
                (game, block.id, metric, keys(mask_P[None])[0], reason),
            )

    def quarantined(self, game: int, metric: str = "nll") -> dict[tuple[int, bytes], str]:
        """(block id, mask key) -> reason."""
        with self._translated():
            rows = self._db.execute(
                "SELECT block, mask, reason FROM quarantine WHERE game = ? AND metric = ?",
                (game, metric),
            )
            return {(block, bytes(mask)): reason for block, mask, reason in rows}

    # -- internals -----------------------------------------------------------------------------

    def _check(self) -> None:
        new = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0
        if not new:
            problem = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise StoreCorruptError(
                    f"store {self.path} is corrupt ({problem}); it is left as it is: restore a "
                    "copy, or name another file"
                )
            if self._db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise StoreCorruptError(
                    f"{self.path} is not an lpserve store; it is left as it is: name another file"
                )
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version != SCHEMA_VERSION:
                raise StoreCorruptError(
                    f"store {self.path} has format {version}; this lpserve reads {SCHEMA_VERSION}"
                )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if new:
            with self._transaction():
                for statement in _SCHEMA.strip().split(";\n"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors as ours, in one line."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_FULL:
                raise DiskFullError(
                    f"no space to write store {self.path}; what was committed is kept: free space "
                    "and give the same command again"
                ) from None
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FORMAT):
                raise StoreCorruptError(
                    f"store {self.path} is corrupt ({error}); it is left as it is: restore a copy, "
                    "or name another file"
                ) from None
            if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
                raise InputError(f"store {self.path} cannot be written: {error}") from None
            raise LpserveError(f"store {self.path}: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _id(self, table: str, content_hash: str) -> int:
        with self._translated():
            row = self._db.execute(f"SELECT id FROM {table} WHERE hash = ?", (content_hash,))
            return int(row.fetchone()[0])

    def _register_windows(self, windows: TokenWindows) -> dict[int, int]:
        """Window id -> row."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR IGNORE INTO windows (hash, num_tokens) VALUES (?, ?)",
                zip(windows.window_hashes, windows.num_tokens_N.tolist(), strict=True),
            )
        ids = self._window_ids(windows)
        return {window: row for row, window in enumerate(ids) if window is not None}

    def _window_ids(self, windows: TokenWindows) -> list[int | None]:
        with self._translated():
            found: dict[str, int] = {}
            for start in range(0, windows.num_windows, _KEYS_PER_QUERY):
                part = windows.window_hashes[start : start + _KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                found.update(
                    self._db.execute(f"SELECT hash, id FROM windows WHERE hash IN ({marks})", part)
                )
            return [found.get(h) for h in windows.window_hashes]

    def _make_block(self, members: Sequence[int]) -> int:
        content_hash = hashlib.sha256(np.array(members, dtype="<i8").tobytes()).hexdigest()
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO blocks (hash) VALUES (?)", (content_hash,))
            block = self._db.execute(
                "SELECT id FROM blocks WHERE hash = ?", (content_hash,)
            ).fetchone()[0]
            self._db.executemany(
                "INSERT OR IGNORE INTO block_windows VALUES (?, ?, ?)",
                [(block, position, window) for position, window in enumerate(members)],
            )
        return int(block)

    def _blocks_holding(
        self, ids: Sequence[int | None]
    ) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """(block, its size, [(position in the block, wanted column)]) for blocks with wanted ids."""
        columns: dict[int, list[int]] = {}
        for column, window in enumerate(ids):
            if window is not None:
                columns.setdefault(window, []).append(column)
        with self._translated():
            sizes = dict(self._db.execute("SELECT block, COUNT(*) FROM block_windows GROUP BY block"))
            pairs: dict[int, list[tuple[int, int]]] = {}
            for window, wanted in columns.items():
                for block, position in self._db.execute(
                    "SELECT block, position FROM block_windows WHERE window = ?", (window,)
                ):
                    pairs.setdefault(block, []).extend((position, column) for column in wanted)
        for block in sorted(pairs, reverse=True):  # where blocks overlap, the oldest is read last
            yield block, sizes[block], pairs[block]

    def _rows(
        self, game: int, block: int, metric: str, mask_keys: list[bytes]
    ) -> Iterator[tuple[bytes, bytes]]:
        for start in range(0, len(mask_keys), _KEYS_PER_QUERY):
            part = mask_keys[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(part))
            with self._translated():
                yield from self._db.execute(
                    "SELECT mask, value FROM scores WHERE game = ? AND block = ? AND metric = ? "
                    f"AND mask IN ({marks})",
                    (game, block, metric, *part),
                ).fetchall()
