"""Durable scores in SQLite: one row for each (game, block of windows, metric, mask).

A score exists once it is committed and synced. NLLs are kept per window, so any subset or mixture
of windows, and any utility derived from NLL, is read back without scoring again. A block is an
immutable list of windows, fixed when it is first asked for. Writing a score twice keeps the first.
Every score carries a checksum, and a file is read through before it is written to: a damaged one
is refused untouched.

One writer at a time. On a local filesystem a lock that dies with its process sees to that, and
SQLite keeps a write-ahead log. On one that other hosts may share, a lease does
(`lpserve.store.lease`), and SQLite keeps a rollback journal: the log's index is memory that hosts
cannot share.

Notation: M masks, N windows, P players.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpserve.data.windows import TokenWindows
from lpserve.errors import (
    DiskFullError,
    InputError,
    LpserveError,
    StoreBusyError,
    StoreCorruptError,
)
from lpserve.masks import keys
from lpserve.store.filesystem import is_shared
from lpserve.store.lease import Lease, has_lease, writing
from lpserve.store.lock import PathLock
from lpserve.store.schema import checksum, connect, create, game_of, is_empty, problem, reading
from lpserve.types import BoolArray, FloatArray, Game, IntArray

MAX_BLOCK_WINDOWS = 64
_KEYS_PER_QUERY = 500
# A filesystem that cannot do these gives no store its durability, or its one writer.
_LACKS = {
    sqlite3.SQLITE_IOERR_LOCK: "locks no files",
    sqlite3.SQLITE_IOERR_RDLOCK: "locks no files",
    sqlite3.SQLITE_IOERR_CHECKRESERVEDLOCK: "locks no files",
    sqlite3.SQLITE_IOERR_DIR_FSYNC: "syncs no folders",
}


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
class WindowBlock:
    """Windows that are scored and stored together."""

    id: int
    rows: IntArray
    """Their rows in the windows it was asked for, in stored order."""


class Store:
    """An open score store. Use as a context manager.

    Whether other hosts may share the file is what its filesystem says, unless `shared` does.

    Raises:
        StoreBusyError: another process has it open for writing; or, from any later write, another
            writer took over a shared store because this process had shown no sign of life.
        StoreCorruptError: the file is not a readable lpserve store; it is left as it is.
        DiskFullError: a write found no space; what was committed before is kept.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        holder: str = "an lpserve process",
        shared: bool | None = None,
    ) -> None:
        self.path = Path(path)
        self._together = False
        if not self.path.parent.is_dir():
            raise InputError(f"store {self.path}: folder {self.path.parent} does not exist")
        if self.path.is_dir():
            raise InputError(f"store {self.path} is a folder; name a file")
        self._shared = is_shared(self.path) if shared is None else shared
        self._lock = None if self._shared else PathLock(self.path, holder=holder)
        if self._lock is not None and not self._lock.held:
            self._shared = True  # no filesystem of this host alone is without locks
        self._lease = Lease(self.path, holder=holder)
        try:
            with self._translated():
                new = self._verify()
                self._db = connect(self.path, "rwc")
                try:
                    self._prepare(new)
                except BaseException:
                    self._lease.release(self._db)
                    self._db.close()
                    raise
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    def close(self) -> None:
        self._lease.release(self._db)
        self._db.close()
        if self._lock is not None:
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
            return {content_hash: game_of(description) for content_hash, description in rows}

    def blocks_for(self, windows: TokenWindows | StoredWindows) -> list[WindowBlock]:
        """Blocks that cover these windows, each once.

        Blocks already held whose windows are all wanted come first (largest first); the rest are
        made new, at most `MAX_BLOCK_WINDOWS` windows each. So a larger number of windows scores
        only what a smaller one has not.
        """
        row_of = self._register_windows(windows)
        chosen: list[WindowBlock] = []
        with self._translated():
            held: dict[int, list[int]] = {}
            for block, window in self._db.execute(
                "SELECT block, window FROM block_windows ORDER BY block, position"
            ):
                held.setdefault(block, []).append(window)
        for block, members in sorted(held.items(), key=lambda item: (-len(item[1]), item[0])):
            if all(window in row_of for window in members):
                rows = [row_of.pop(window) for window in members]
                chosen.append(WindowBlock(id=block, rows=np.array(rows, dtype=np.int64)))
        rest = list(row_of.items())
        for start in range(0, len(rest), MAX_BLOCK_WINDOWS):
            part = rest[start : start + MAX_BLOCK_WINDOWS]
            block = self._make_block([window for window, _ in part])
            chosen.append(
                WindowBlock(id=block, rows=np.array([row for _, row in part], dtype=np.int64))
            )
        return chosen

    # -- scores --------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Commit what is put in the block at its end, at once: one wait for the disk."""
        with self._transaction():
            self._together = True
            try:
                yield
            finally:
                self._together = False

    def put(
        self,
        game: int,
        block: WindowBlock,
        masks_MP: BoolArray,
        nll_MN: FloatArray,
        metric: str = "nll",
    ) -> int:
        """Commit scores; returns how many were new. Non-finite values are stored as they are."""
        with np.errstate(over="ignore"):  # beyond float32 is inf
            values_MN = np.asarray(nll_MN).astype("<f4")
        if values_MN.shape != (len(masks_MP), len(block.rows)):
            raise ValueError(f"scores {values_MN.shape} for {len(masks_MP)} masks of {block}")
        values = [value_N.tobytes() for value_N in values_MN]
        rows = [
            (game, block.id, metric, key, value, checksum(game, block.id, metric, key, value))
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
        self, game: int, block: WindowBlock, mask_P: BoolArray, reason: str, metric: str = "nll"
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
            game=name,
            metric=metric,
            mask_keys=list(values),
            nll_MN=nll_MN,
            first_MN=first_MN,
            windows=StoredWindows(hashes, np.array(num_tokens, dtype=np.int64)),
        )

    def _verify(self) -> bool:
        """Read the file through; returns whether it is still to be made a store.

        Not while another host writes to it: reading for long would keep that from committing.
        """
        if not self.path.exists():
            return True
        try:
            found, new = self._read_through()
        except sqlite3.OperationalError as error:
            # a writer was killed, and left its journal, after `reading` had looked for one
            if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
            found, new = self._read_through()
        if found:
            raise self._refused(found)
        return new

    def _read_through(self) -> tuple[str | None, bool]:
        """What is wrong with the file, if anything, and whether it is empty."""
        with reading(self.path) as db:
            self._lease.await_free(db)
            found = problem(db)
            return found, not found and is_empty(db)

    def _prepare(self, new: bool) -> None:
        if self._shared:
            self._set_journal("delete")
            # FULL alone may lose a commit with the power: the journal's removal, which commits,
            # is an entry of the folder, and only EXTRA syncs that
            self._db.execute("PRAGMA synchronous = EXTRA")
            if new:
                self._create()
            self._lease.take(self._db)
            self._lease.keep()
        else:
            # another host may see a disk of this one, and be at work there
            if has_lease(self._db):
                self._lease.take(self._db)
            self._set_journal("wal")
            self._db.execute("PRAGMA synchronous = FULL")
            if new:
                self._create()
            self._lease.release(self._db)

    def _set_journal(self, mode: str) -> None:
        got = self._db.execute(f"PRAGMA journal_mode = {mode}").fetchone()[0]
        if got != mode:
            raise InputError(
                f"store {self.path} cannot be kept here: its filesystem allows the journal mode "
                f"{got!r} where {mode!r} is needed; name a file on another"
            )

    def _create(self) -> None:
        with writing(self._db):
            if not is_empty(self._db):
                raise StoreBusyError(
                    f"{self.path} is in use by another process, which has just made it; wait for "
                    "it to end, or stop it"
                )
            create(self._db)

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
            if code == sqlite3.SQLITE_BUSY:
                raise StoreBusyError(
                    f"store {self.path} is locked by another program that reads or writes it; what "
                    "was committed is kept: wait for it to end, or stop it, and give the same "
                    "command again"
                ) from None
            if extended in _LACKS:
                raise InputError(
                    f"store {self.path} cannot be kept here: its filesystem {_LACKS[extended]}; "
                    "name a file on another"
                ) from None
            if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FORMAT):
                raise self._refused(f"is corrupt ({error})") from None
            if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
                raise InputError(f"store {self.path} cannot be written: {error}") from None
            raise LpserveError(f"store {self.path}: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._translated(), nullcontext() if self._together else writing(self._db):
            if self._shared and not self._together:
                self._lease.renew(self._db)
            yield

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
