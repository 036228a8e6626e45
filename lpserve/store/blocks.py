"""Windows in a store, and the blocks in which they are scored: immutable lists of windows.

Notation: N windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.store.connection import StoreConnection
from lpserve.types import IntArray

MAX_BLOCK_WINDOWS, MAX_BLOCK_TOKENS = 64, 32768
"""Windows of a new block, and their scored tokens unless one window has more: what is scored at
once should take seconds on any machine, since it is lost when a process is killed."""
KEYS_PER_QUERY = 500
"""Values in one SQL statement, below what SQLite allows."""


@dataclass(frozen=True, slots=True)
class StoredWindows:
    """Windows of which only hashes and lengths are known, not the tokens."""

    window_hashes: tuple[str, ...]
    num_tokens_N: IntArray


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowBlock:
    """Windows that are scored and stored together."""

    id: int
    rows: IntArray
    """Where they are among the windows that were asked for; in the block's order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldWindows:
    """The windows of a block that were asked for."""

    block: int
    size: int
    """Windows of the block, asked for or not."""
    positions: IntArray
    """Where they are in the block."""
    columns: IntArray
    """Where they are among the windows that were asked for."""


class WindowBlocks:
    """The windows and blocks of an open store."""

    def __init__(self, file: StoreConnection) -> None:
        self._file = file

    def covering(self, windows: TokenWindows | StoredWindows) -> list[WindowBlock]:
        """See `lpserve.store.store.Store.blocks_for`."""
        row_of = self._register_windows(windows)
        chosen: list[WindowBlock] = []
        with self._file.translated():
            held: dict[int, list[int]] = {}
            for block, window in self._file.db.execute(
                "SELECT block, window FROM block_windows ORDER BY block, position"
            ):
                held.setdefault(block, []).append(window)
        for block, members in sorted(held.items(), key=lambda item: (-len(item[1]), item[0])):
            if all(window in row_of for window in members):
                rows = [row_of.pop(window) for window in members]
                chosen.append(WindowBlock(id=block, rows=np.array(rows, dtype=np.int64)))
        for part in _new_blocks(list(row_of.items()), windows.num_tokens_N):
            block = self._make_block([window for window, _ in part])
            chosen.append(
                WindowBlock(id=block, rows=np.array([row for _, row in part], dtype=np.int64))
            )
        return chosen

    def ids(self, windows: TokenWindows | StoredWindows) -> list[int | None]:
        """The store's number of each window; None where it does not know one."""
        with self._file.translated():
            found: dict[str, int] = {}
            for start in range(0, len(windows.window_hashes), KEYS_PER_QUERY):
                part = windows.window_hashes[start : start + KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                query = f"SELECT hash, id FROM windows WHERE hash IN ({marks})"
                found.update(self._file.db.execute(query, part))
            return [found.get(h) for h in windows.window_hashes]

    def holding(self, ids: Sequence[int | None]) -> Iterator[HeldWindows]:
        """Every block that holds some of these windows, the newest first: where blocks overlap, the
        oldest is read last."""
        columns: dict[int, list[int]] = {}
        for column, window in enumerate(ids):
            if window is not None:
                columns.setdefault(window, []).append(column)
        with self._file.translated():
            query = "SELECT block, COUNT(*) FROM block_windows GROUP BY block"
            sizes = dict(self._file.db.execute(query))
            pairs: dict[int, list[tuple[int, int]]] = {}
            for window, wanted in columns.items():
                for block, position in self._file.db.execute(
                    "SELECT block, position FROM block_windows WHERE window = ?", (window,)
                ):
                    pairs.setdefault(block, []).extend((position, column) for column in wanted)
        for block in sorted(pairs, reverse=True):
            positions, taken = np.array(pairs[block], dtype=np.int64).T
            yield HeldWindows(block=block, size=sizes[block], positions=positions, columns=taken)

    def _register_windows(self, windows: TokenWindows | StoredWindows) -> dict[int, int]:
        """Window id -> row."""
        with self._file.transaction():
            self._file.db.executemany(
                "INSERT OR IGNORE INTO windows (hash, num_tokens) VALUES (?, ?)",
                zip(windows.window_hashes, windows.num_tokens_N.tolist(), strict=True),
            )
        ids = self.ids(windows)
        return {window: row for row, window in enumerate(ids) if window is not None}

    def _make_block(self, members: Sequence[int]) -> int:
        content_hash = hashlib.sha256(np.array(members, dtype="<i8").tobytes()).hexdigest()
        db = self._file.db
        with self._file.transaction():
            db.execute("INSERT OR IGNORE INTO blocks (hash) VALUES (?)", (content_hash,))
            found = db.execute("SELECT id FROM blocks WHERE hash = ?", (content_hash,))
            block = found.fetchone()[0]
            db.executemany(
                "INSERT OR IGNORE INTO block_windows VALUES (?, ?, ?)",
                [(block, position, window) for position, window in enumerate(members)],
            )
        return int(block)


def _new_blocks(
    rest: Sequence[tuple[int, int]], num_tokens_N: IntArray
) -> Iterator[Sequence[tuple[int, int]]]:
    """Windows that no block covers, as (window, row), in the blocks that are made of them."""
    start = tokens = 0
    for place, (_, row) in enumerate(rest):
        tokens += int(num_tokens_N[row])
        full = place - start >= MAX_BLOCK_WINDOWS or tokens > MAX_BLOCK_TOKENS
        if full and place > start:
            yield rest[start:place]
            start, tokens = place, int(num_tokens_N[row])
    if rest:
        yield rest[start:]
