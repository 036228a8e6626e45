"""An open store file: the right to write to it, its transactions, and its errors in our words.

A file is read through before it is written to, and a damaged one is left untouched.

One writer at a time. On a local filesystem a lock that dies with its process sees to that, and
SQLite keeps a write-ahead log. On one that other hosts may share, a lease does
(`lpserve.store.lease`), and SQLite keeps a rollback journal: the log's index is memory that hosts
cannot share.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lpserve.errors import (
    DiskFullError,
    InputError,
    LpserveError,
    StoreBusyError,
    StoreCorruptError,
)
from lpserve.store.filesystem import is_shared
from lpserve.store.lease import Lease, has_lease, writing
from lpserve.store.lock import PathLock
from lpserve.store.schema import connect_sqlite, create, is_empty, problem, reading

# A filesystem that cannot do these gives no store its durability, or its one writer.
_LACKS = {
    sqlite3.SQLITE_IOERR_LOCK: "locks no files",
    sqlite3.SQLITE_IOERR_RDLOCK: "locks no files",
    sqlite3.SQLITE_IOERR_CHECKRESERVEDLOCK: "locks no files",
    sqlite3.SQLITE_IOERR_DIR_FSYNC: "syncs no folders",
}


class StoreConnection:
    """The SQLite connection of an open store, with its lock or lease.

    Args:
        holder: who has it open, for those whom the lock refuses.
        shared: whether other hosts may see the file; None: what its filesystem says.

    Raises:
        StoreBusyError: another process has it open for writing.
        StoreCorruptError: the file is not a readable lpserve store; it is left as it is.
        InputError: the path or its filesystem cannot hold a store.
        DiskFullError: no space.
    """

    db: sqlite3.Connection

    def __init__(self, path: Path, *, holder: str, shared: bool | None) -> None:
        self.path = path
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
            with self.translated():
                new = self._verify()
                self.db = connect_sqlite(self.path, "rwc")
                try:
                    self._prepare(new)
                except BaseException:
                    self._lease.release(self.db)
                    self.db.close()
                    raise
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise

    def close(self) -> None:
        """Give the lease or lock back and close the file."""
        self._lease.release(self.db)
        self.db.close()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction that writes; within `together`, a part of that one."""
        with self.translated(), nullcontext() if self._together else writing(self.db):
            if self._shared and not self._together:
                self._lease.renew(self.db)
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """One transaction around all those inside the `with`."""
        with self.transaction():
            self._together = True
            try:
                yield
            finally:
                self._together = False

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn SQLite's errors into lpserve's, each one line long."""
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
                raise self.refused(f"is corrupt ({error})") from None
            if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
                raise InputError(f"store {self.path} cannot be written: {error}") from None
            raise LpserveError(f"store {self.path}: {error}") from error

    def refused(self, problem: str) -> StoreCorruptError:
        """The error that says why the file cannot be used."""
        return StoreCorruptError(
            f"store {self.path} {' '.join(problem.split())}; it is left as it is: restore a copy, "
            "or name another file"
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
            raise self.refused(found)
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
            self.db.execute("PRAGMA synchronous = EXTRA")
            if new:
                self._create()
            self._lease.take(self.db)
            self._lease.keep()
        else:
            # another host may see a disk of this one, and be at work there
            if has_lease(self.db):
                self._lease.take(self.db)
            self._set_journal("wal")
            self.db.execute("PRAGMA synchronous = FULL")
            if new:
                self._create()
            self._lease.release(self.db)

    def _set_journal(self, mode: str) -> None:
        got = self.db.execute(f"PRAGMA journal_mode = {mode}").fetchone()[0]
        if got != mode:
            raise InputError(
                f"store {self.path} cannot be kept here: its filesystem allows the journal mode "
                f"{got!r} where {mode!r} is needed; name a file on another"
            )

    def _create(self) -> None:
        with writing(self.db):
            if not is_empty(self.db):
                raise StoreBusyError(
                    f"{self.path} is in use by another process, which has just made it; wait for "
                    "it to end, or stop it"
                )
            create(self.db)
