"""Durable scores in SQLite: one row for each (game, block of windows, metric, mask).

A score exists once it is committed and synced. Sums are kept for each window, so any subset or
mixture of windows, and any utility derived from them, is read back without scoring again. A block
is an immutable list of windows, made when it is first asked for. Of two scores of the same row the
first is kept. Every score carries a checksum.

Notation: M masks, N windows, P players.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpserve.data.windows import TokenWindows
from lpserve.masks import keys
from lpserve.store.blocks import KEYS_PER_QUERY, StoredWindows, WindowBlock, WindowBlocks
from lpserve.store.connection import StoreConnection
from lpserve.store.schema import OVERLAP, OVERLAP_TABLE, checksum, description_of, game_of
from lpserve.types import BoolArray, FloatArray, Game


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredScores:
    """Scores of one game, block and metric, as `Store.read_all` yields them."""

    game: str
    """The game's hash."""
    metric: str
    windows: StoredWindows
    mask_keys: list[bytes]
    nll_MN: NDArray[np.float32]
    """Sums of the metric over each window; of the NLL, in nats."""
    first_MN: BoolArray
    """False where an older block holds a score of the same mask and window."""


class Store:
    """An open score store. Use as a context manager.

    Args:
        path: the file; made if it is not there.
        holder: who has it open, for those whom the lock refuses.
        shared: whether other hosts may write to the file; None: decided by its filesystem.

    Raises:
        InputError: the path, or its filesystem, cannot hold a store.
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
        self._file = StoreConnection(Path(path), holder=holder, shared=shared)
        self._blocks = WindowBlocks(self._file)

    @property
    def path(self) -> Path:
        """The store's file."""
        return self._file.path

    def close(self) -> None:
        """Close the file and let others write to it."""
        self._file.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- registering ---------------------------------------------------------------------------

    def game_id(self, game: Game) -> int:
        """The store's number of a game, registered if it is new."""
        with self._file.transaction():
            self._file.db.execute(
                "INSERT OR IGNORE INTO games (hash, description) VALUES (?, ?)",
                (game.content_hash, description_of(game)),
            )
        with self._file.translated():
            query = "SELECT id FROM games WHERE hash = ?"
            return int(self._file.db.execute(query, (game.content_hash,)).fetchone()[0])

    def games(self) -> dict[str, Game]:
        """Every game held, by hash."""
        with self._file.translated():
            rows = self._file.db.execute("SELECT hash, description FROM games")
            return {content_hash: game_of(description) for content_hash, description in rows}

    def blocks_for(self, windows: TokenWindows | StoredWindows) -> list[WindowBlock]:
        """Blocks that cover these windows, each window once.

        Blocks that the store holds and whose windows are all wanted come first, the largest before
        others; the remaining windows are put into new blocks of at most
        `MAX_BLOCK_WINDOWS` windows and `MAX_BLOCK_TOKENS` tokens (`lpserve.store.blocks`). So a run
        on more windows scores only those that an earlier one on fewer has not.
        """
        return self._blocks.covering(windows)

    # -- scores --------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Commit everything that is put inside the `with` in one transaction, at its end."""
        with self._file.together():
            yield

    def put(
        self,
        game: int,
        block: WindowBlock,
        masks_MP: BoolArray,
        nll_MN: FloatArray,
        metric: str = "nll",
    ) -> int:
        """Commit scores; returns how many (block, mask) rows were new.

        Args:
            nll_MN: sums over each of the block's windows, in the block's order; non-finite values
                are stored as they are, and values beyond float32 as infinity.

        Raises:
            DiskFullError: no space; nothing of this call is stored.
            StoreBusyError: another writer took over a shared store.
        """
        with np.errstate(over="ignore"):  # beyond float32 is inf
            values_MN = np.asarray(nll_MN).astype("<f4")
        if values_MN.shape != (len(masks_MP), len(block.rows)):
            raise ValueError(f"scores {values_MN.shape} for {len(masks_MP)} masks of {block}")
        values = [value_N.tobytes() for value_N in values_MN]
        rows = [
            (game, block.id, metric, key, value, checksum(game, block.id, metric, key, value))
            for key, value in zip(keys(masks_MP), values, strict=True)
        ]
        with self._file.transaction():
            before = self._file.db.total_changes
            self._file.db.executemany(
                "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?, ?)", rows
            )
            return self._file.db.total_changes - before

    def get(
        self,
        game: int,
        windows: TokenWindows | StoredWindows,
        masks_MP: BoolArray,
        metric: str = "nll",
    ) -> tuple[NDArray[np.float32], BoolArray]:
        """What is known of these masks: sums `float32[M, N]`, and which are known, `bool[M, N]`.

        A window's score is found in whatever block holds it. Where it is not known the sum is NaN.
        """
        ids = self._blocks.ids(windows)
        mask_keys = keys(masks_MP)
        row_of = {key: row for row, key in enumerate(dict.fromkeys(mask_keys))}
        nll_MN = np.full((len(row_of), len(ids)), np.nan, dtype=np.float32)
        known_MN = np.zeros(nll_MN.shape, dtype=bool)
        for held in self._blocks.holding(ids):
            for key, value in _rows(self._file, game, held.block, metric, list(row_of)):
                value_N = np.frombuffer(value, dtype="<f4")
                if len(value_N) != held.size:
                    raise self._file.refused(
                        f"is corrupt (a score of {len(value_N)} windows in a block of {held.size})"
                    )
                nll_MN[row_of[key], held.columns] = value_N[held.positions]
                known_MN[row_of[key], held.columns] = True
        rows_M = [row_of[key] for key in mask_keys]
        return nll_MN[rows_M], known_MN[rows_M]

    def read_all(self, masks: int = 512) -> Iterator[StoredScores]:
        """Every score held, by game, block, metric and mask, at most `masks` masks at once."""
        after = (0, 0, "", b"")
        while True:
            with self._file.translated():
                page = self._file.db.execute(
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

    def forget(self, game: int, first: bytes, last: bytes) -> None:
        """Remove a game's scores of all masks whose keys lie from `first` to `last`, of every
        block and metric: for whoever keeps them elsewhere."""
        with self._file.transaction():
            self._file.db.execute(
                "DELETE FROM scores WHERE game = ? AND mask >= ? AND mask <= ?", (game, first, last)
            )

    def count(self) -> int:
        """Scores held, over all games, blocks and metrics."""
        with self._file.translated():
            return int(self._file.db.execute("SELECT COUNT(*) FROM scores").fetchone()[0])

    # -- overlaps ------------------------------------------------------------------------------

    def put_overlap(self, game: int, block: int, overlap_PP: FloatArray) -> None:
        """Commit how the effects of single players overlap on a block, nats summed over its
        positions (`types.Scores.overlap_MM`); of two the first is kept."""
        value = overlap_PP.astype("<f8").tobytes()
        row = (game, block, value, checksum(game, block, OVERLAP, b"", value))
        with self._file.transaction():
            self._file.db.execute(
                OVERLAP_TABLE.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS")
            )
            self._file.db.execute("INSERT OR IGNORE INTO overlaps VALUES (?, ?, ?, ?)", row)

    def get_overlap(self, game: int, block: int) -> FloatArray | None:
        """What `put_overlap` stored, `float64[P, P]`; None where it did not."""
        query = "SELECT value FROM overlaps WHERE game = ? AND block = ?"
        with self._file.translated():
            named = "SELECT 1 FROM sqlite_master WHERE name = 'overlaps'"
            if self._file.db.execute(named).fetchone() is None:
                return None
            found = self._file.db.execute(query, (game, block)).fetchone()
        if found is None:
            return None
        flat = np.frombuffer(found[0], dtype="<f8")
        return flat.reshape(math.isqrt(len(flat)), -1)

    # -- quarantine ----------------------------------------------------------------------------

    def quarantine(
        self, game: int, block: WindowBlock, mask_P: BoolArray, reason: str, metric: str = "nll"
    ) -> None:
        """Mark one mask as impossible to score on a block."""
        with self._file.transaction():
            self._file.db.execute(
                "INSERT OR IGNORE INTO quarantine VALUES (?, ?, ?, ?, ?)",
                (game, block.id, metric, keys(mask_P[None])[0], reason),
            )

    def quarantined(self, game: int, metric: str = "nll") -> dict[tuple[int, bytes], str]:
        """Masks that cannot be scored: (block id, mask key) -> reason."""
        with self._file.translated():
            rows = self._file.db.execute(
                "SELECT block, mask, reason FROM quarantine WHERE game = ? AND metric = ?",
                (game, metric),
            )
            return {(block, bytes(mask)): reason for block, mask, reason in rows}

    # -- internals -----------------------------------------------------------------------------

    def _stored(
        self, game: int, block: int, metric: str, values: dict[bytes, bytes]
    ) -> StoredScores:
        with self._file.translated():
            query = "SELECT hash FROM games WHERE id = ?"
            name = self._file.db.execute(query, (game,)).fetchone()[0]
            ids, hashes, num_tokens = zip(
                *self._file.db.execute(
                    "SELECT id, hash, num_tokens FROM block_windows JOIN windows ON id = window "
                    "WHERE block = ? ORDER BY position",
                    (block,),
                ),
                strict=True,
            )
        nll_MN = np.frombuffer(b"".join(values.values()), dtype="<f4").reshape(-1, len(ids))
        first_MN = np.ones(nll_MN.shape, dtype=bool)
        row_of = {key: row for row, key in enumerate(values)}
        for older in self._blocks.holding(ids):
            if older.block < block:
                for key, _ in _rows(self._file, game, older.block, metric, list(values)):
                    first_MN[row_of[key], older.columns] = False
        return StoredScores(
            game=name,
            metric=metric,
            mask_keys=list(values),
            nll_MN=nll_MN,
            first_MN=first_MN,
            windows=StoredWindows(hashes, np.array(num_tokens, dtype=np.int64)),
        )


def _rows(
    file: StoreConnection, game: int, block: int, metric: str, mask_keys: list[bytes]
) -> Iterator[tuple[bytes, bytes]]:
    """(mask key, stored values) of those masks that have a row."""
    for start in range(0, len(mask_keys), KEYS_PER_QUERY):
        part = mask_keys[start : start + KEYS_PER_QUERY]
        marks = ",".join("?" * len(part))
        with file.translated():
            yield from file.db.execute(
                "SELECT mask, value FROM scores WHERE game = ? AND block = ? AND metric = ? "
                f"AND mask IN ({marks})",
                (game, block, metric, *part),
            ).fetchall()
