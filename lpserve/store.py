"""Durable scores in SQLite: one row for each (game, block of windows, metric, mask).

A score exists once it is committed (write-ahead log, full sync). NLLs are kept per window, so any
subset or mixture of windows, and any utility derived from NLL, is read back without scoring again.
A block is an immutable list of windows, fixed when it is first asked for. Writing a score twice
keeps the first. One writer at a time; the lock dies with its process. Every score carries a
checksum, and a file is read through before it is written to: a damaged one is refused untouched.

Notation: M masks, N windows, P players.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpserve.errors import DiskFullError, InputError, LpserveError, StoreCorruptError
from lpserve.locks import PathLock
from lpserve.masks import keys
from lpserve.types import BoolArray, FloatArray, Game, IntArray, Player
from lpserve.windows import TokenWindows

APPLICATION_ID = 0x6C707376  # "lpsv"
SCHEMA_VERSION = 1
MAX_BLOCK_WINDOWS = 64
_KEYS_PER_QUERY = 500

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


@dataclass(frozen=True, slots=True)
class StoredWindows:
    """Windows known by hash alone."""

    window_hashes: tuple[str, ...]
    num_tokens_N: IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredScores:
    """Scores of one game, block and metric, as `Store.read_all` finds them."""

    game: str
    """The game's hash."""
    metric: str
    windows: StoredWindows
    mask_keys: list[bytes]
    nll_MN: NDArray[np.float32]
    first_MN: BoolArray
    """False where an older block holds a score of the same mask and window."""


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
        if self.path.is_dir():
            raise InputError(f"store {self.path} is a folder; name a file")
        self._lock = PathLock(self.path, holder=holder)
        try:
            with self._translated():
                new = self._verify()
                self._db = sqlite3.connect(self.path, isolation_level=None)
                try:
                    self._prepare(new)
                except BaseException:
                    self._db.close()
                    raise
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

    def games(self) -> dict[str, Game]:
        """Every game held, by hash."""
        with self._translated():
            rows = self._db.execute("SELECT hash, description FROM games")
            return {content_hash: _game(description) for content_hash, description in rows}

    def blocks_for(self, windows: TokenWindows | StoredWindows) -> list[Block]:
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
        with np.errstate(over="ignore"):  # beyond float32 is inf
            values_MN = np.asarray(nll_MN).astype("<f4")
        if values_MN.shape != (len(masks_MP), len(block.rows)):
            raise ValueError(f"scores {values_MN.shape} for {len(masks_MP)} masks of {block}")
        values = [value_N.tobytes() for value_N in values_MN]
        rows = [
            (game, block.id, metric, key, value, _checksum(game, block.id, metric, key, value))
            for key, value in zip(keys(masks_MP), values, strict=True)
        ]
        with self._transaction():
            before = self._db.total_changes
            self._db.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?, ?)", rows)
            return self._db.total_changes - before

    def get(
        self,
        game: int,
        windows: TokenWindows | StoredWindows,
        masks_MP: BoolArray,
        metric: str = "nll",
    ) -> tuple[NDArray[np.float32], BoolArray]:
        """What is known of these masks: NLL in nats `float32[M, N]` and `known bool[M, N]`.

        A window's score is found in whatever block holds it.
        """
        ids = self._window_ids(windows)
        mask_keys = keys(masks_MP)
        row_of = {key: row for row, key in enumerate(dict.fromkeys(mask_keys))}
        nll_DN = np.full((len(row_of), len(ids)), np.nan, dtype=np.float32)
        known_DN = np.zeros(nll_DN.shape, dtype=bool)
        for block, size, positions, columns in self._blocks_holding(ids):
            for key, value in self._rows(game, block, metric, list(row_of)):
                value_N = np.frombuffer(value, dtype="<f4")
                if len(value_N) != size:
                    raise self._refused(
                        f"is corrupt (a score of {len(value_N)} windows in a block of {size})"
                    )
                nll_DN[row_of[key], columns] = value_N[positions]
                known_DN[row_of[key], columns] = True
        rows_M = [row_of[key] for key in mask_keys]
        return nll_DN[rows_M], known_DN[rows_M]

    def read_all(self, masks: int = 512) -> Iterator[StoredScores]:
        """Every score held, by game, block, metric and mask, at most `masks` masks at once."""
        after = (0, 0, "", b"")
        while True:
            with self._translated():
                page = self._db.execute(
                    "SELECT game, block, metric, mask, value FROM scores "
                    "WHERE (game, block, metric, mask) > (?, ?, ?, ?) "
                    "ORDER BY game, block, metric, mask LIMIT ?",
                    (*after, masks),
                ).fetchall()
            if not page:
                return
            after = page[-1][:4]
            for (game, block, metric), rows in groupby(page, key=lambda row: row[:3]):
                yield self._stored(game, block, metric, {row[3]: row[4] for row in rows})

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

    def _stored(
        self, game: int, block: int, metric: str, values: dict[bytes, bytes]
    ) -> StoredScores:
        with self._translated():
            name = self._db.execute("SELECT hash FROM games WHERE id = ?", (game,)).fetchone()[0]
            ids, hashes, num_tokens = zip(
                *self._db.execute(
                    "SELECT id, hash, num_tokens FROM block_windows JOIN windows ON id = window "
                    "WHERE block = ? ORDER BY position",
                    (block,),
                ),
                strict=True,
            )
        nll_MN = np.frombuffer(b"".join(values.values()), dtype="<f4").reshape(-1, len(ids))
        first_MN = np.ones(nll_MN.shape, dtype=bool)
        row_of = {key: row for row, key in enumerate(values)}
        for older, _, _, columns in self._blocks_holding(ids):
            if older < block:
                for key, _ in self._rows(game, older, metric, list(values)):
                    first_MN[row_of[key], columns] = False
        return StoredScores(
            game=name, metric=metric, mask_keys=list(values), nll_MN=nll_MN, first_MN=first_MN,
            windows=StoredWindows(hashes, np.array(num_tokens, dtype=np.int64)),
        )  # fmt: skip

    def _verify(self) -> bool:
        """Read the file through; returns whether it is still to be made a store.

        Over a read-only connection: any other would, on closing, write what a killed process left
        in the write-ahead log into a file that was just refused.
        """
        if not self.path.exists():
            return True
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as db:
            db.text_factory = lambda text: text.decode(errors="replace")
            try:
                new = not db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
                problem = _problem(db, new=new)
            except (ValueError, KeyError, TypeError) as error:
                new, problem = False, f"is corrupt (a row cannot be read: {error})"
            except sqlite3.DatabaseError as error:
                # SQLite's plain error: not a store's tables, or not a format it reads
                if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_ERROR:
                    raise
                new, problem = False, f"is corrupt ({error})"
        if problem:
            raise self._refused(problem)
        return new

    def _prepare(self, new: bool) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        if new:
            with self._transaction():
                for statement in _STATEMENTS:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _refused(self, problem: str) -> StoreCorruptError:
        return StoreCorruptError(
            f"store {self.path} {' '.join(problem.split())}; it is left as it is: restore a copy, "
            "or name another file"
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors as ours, in one line."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            extended = getattr(error, "sqlite_errorcode", 0)
            code = extended & 0xFF
            # no room for the shared memory file beside it is reported as its own kind of I/O error
            if code == sqlite3.SQLITE_FULL or extended == sqlite3.SQLITE_IOERR_SHMSIZE:
                raise DiskFullError(
                    f"no space to write store {self.path}; what was committed is kept: free space "
                    "and give the same command again"
                ) from None
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FORMAT):
                raise self._refused(f"is corrupt ({error})") from None
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

    def _register_windows(self, windows: TokenWindows | StoredWindows) -> dict[int, int]:
        """Window id -> row."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR IGNORE INTO windows (hash, num_tokens) VALUES (?, ?)",
                zip(windows.window_hashes, windows.num_tokens_N.tolist(), strict=True),
            )
        ids = self._window_ids(windows)
        return {window: row for row, window in enumerate(ids) if window is not None}

    def _window_ids(self, windows: TokenWindows | StoredWindows) -> list[int | None]:
        with self._translated():
            found: dict[str, int] = {}
            for start in range(0, len(windows.window_hashes), _KEYS_PER_QUERY):
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
    ) -> Iterator[tuple[int, int, IntArray, IntArray]]:
        """(block, its size, positions in it, their wanted columns) for blocks with wanted ids."""
        columns: dict[int, list[int]] = {}
        for column, window in enumerate(ids):
            if window is not None:
                columns.setdefault(window, []).append(column)
        with self._translated():
            sizes = dict(
                self._db.execute("SELECT block, COUNT(*) FROM block_windows GROUP BY block")
            )
            pairs: dict[int, list[tuple[int, int]]] = {}
            for window, wanted in columns.items():
                for block, position in self._db.execute(
                    "SELECT block, position FROM block_windows WHERE window = ?", (window,)
                ):
                    pairs.setdefault(block, []).extend((position, column) for column in wanted)
        for block in sorted(pairs, reverse=True):  # where blocks overlap, the oldest is read last
            positions, taken = np.array(pairs[block], dtype=np.int64).T
            yield block, sizes[block], positions, taken

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


def _checksum(game: int, block: int, metric: str, mask: bytes, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(mask, zlib.crc32(f"{game} {block} {metric}".encode())))


def _problem(db: sqlite3.Connection, *, new: bool) -> str | None:
    """Why a file cannot be used as a store; `new` where it has no tables yet."""
    structure = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if structure != "ok":
        return f"is corrupt ({structure})"
    if new:
        return None
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        return "is not an lpserve store"
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        return f"has format {version}, and this lpserve reads {SCHEMA_VERSION}"
    made = db.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL")
    if [sql for (sql,) in made] != _STATEMENTS:
        return "is corrupt (its tables are not those of a store)"
    # SQLite checks its structure, not what the cells hold
    for *score, crc in db.execute("SELECT game, block, metric, mask, value, crc FROM scores"):
        if _checksum(*score) != crc:
            return "is corrupt (a score does not match its checksum)"
    for content_hash, description in db.execute("SELECT hash, description FROM games"):
        if _game(description).content_hash != content_hash:
            return "is corrupt (a game does not match its hash)"
    return None


def _game(description: str) -> Game:
    about = json.loads(description)
    players = [Player(index=i, layer=n, part=part) for i, (n, part) in enumerate(about["players"])]
    return Game(model_hash=about["model"], players=tuple(players), numerics=about["numerics"])
