"""One writer at a time for a store on a shared path, where a lock would hold on one host alone.

The lease is a row of the store: a token, its holder, and a beat, a number that the holder increases
every `BEAT_S`. Where the beat stands still for `LEASE_S`, or the holder is a process of this host
that has died, the next writer takes over. The clocks of two hosts disagree, so none are compared. A
writer that lost the lease finds another token at its next transaction, and writes nothing.
"""

from __future__ import annotations

import os
import secrets
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from lpserve.errors import StoreBusyError

LEASE_S = 30.0
"""Seconds without a beat after which a holder counts as gone."""
BEAT_S = 5.0
"""Seconds between two beats."""

LEASE_TABLE = """\
CREATE TABLE lease (
  id INTEGER PRIMARY KEY CHECK (id = 1), token TEXT, beat INTEGER NOT NULL, holder TEXT NOT NULL,
  pid INTEGER NOT NULL, host TEXT NOT NULL, since TEXT NOT NULL, kernel TEXT NOT NULL,
  started TEXT NOT NULL)"""


class _Held(NamedTuple):
    """The row while someone holds the lease, as text: it may be damaged."""

    token: str
    beat: str
    holder: str
    pid: str
    host: str
    since: str
    kernel: str
    started: str

    @property
    def sign_of_life(self) -> tuple[str, str]:
        return self.token, self.beat


class Lease:
    """The right to write to the store at `path`: found free, taken, kept, released.

    Args:
        holder: who takes it, for those who are refused.
    """

    def __init__(self, path: Path, *, holder: str) -> None:
        self._path = path
        self._holder = holder
        self._token = secrets.token_hex(16)
        self._seen: tuple[str, str] | None = None
        self._taken = False
        self._closing = threading.Event()
        self._heart: threading.Thread | None = None

    def await_free(self, db: sqlite3.Connection) -> None:
        """Return once no living writer holds the lease: at once, or after `LEASE_S` of watching.

        Raises:
            StoreBusyError: its holder is alive.
        """
        held = _held(db)
        if held is not None and not _has_died(held):
            started = time.monotonic()
            while time.monotonic() - started < LEASE_S:
                time.sleep(min(BEAT_S, LEASE_S) / 10)
                now = _held(db)
                if now is None:
                    break
                if now.sign_of_life != held.sign_of_life:
                    raise self._busy(now)
        self._seen = held.sign_of_life if held is not None else None

    def take(self, db: sqlite3.Connection) -> None:
        """Take the lease that `await_free` found free.

        Raises:
            StoreBusyError: it is held, and not as `await_free` saw it.
        """
        with writing(db):
            held = _held(db)
            if held is not None and held.sign_of_life != self._seen:
                raise self._busy(held)
            if not has_lease(db):
                db.execute(LEASE_TABLE)
            pid, host = os.getpid(), socket.gethostname()
            db.execute(
                "INSERT OR REPLACE INTO lease (id, token, beat, holder, pid, host, since, kernel, "
                "started) VALUES (1, ?, 0, ?, ?, ?, ?, ?, ?)",
                (self._token, self._holder, pid, host, time.ctime(), _kernel(), _started(pid)),
            )
        self._taken = True

    def keep(self) -> None:
        """Give a sign of life every `BEAT_S` from now on, until `release`."""
        self._heart = threading.Thread(target=self._beat, name="lpserve-lease", daemon=True)
        self._heart.start()

    def renew(self, db: sqlite3.Connection) -> None:
        """Make sure, first thing in a transaction that writes, that the lease is still held.

        Raises:
            StoreBusyError: another writer has taken over.
        """
        if not self._count_up(db):
            raise StoreBusyError(
                f"store {self._path} was taken over by another writer, because this process "
                f"showed no sign of life for {LEASE_S:g} s; what was committed is kept: give the "
                "same command again"
            )

    def release(self, db: sqlite3.Connection) -> None:
        """Give the lease back, if it was taken and is still held."""
        self._closing.set()
        if self._heart is not None:
            self._heart.join()
        if not self._taken:
            return
        self._taken = False
        # a row that cannot be written now is taken over like that of a process that died
        with suppress(sqlite3.Error):
            db.execute("UPDATE lease SET token = NULL WHERE token = ?", (self._token,))

    def _beat(self) -> None:
        uri = f"{self._path.absolute().as_uri()}?mode=rw"
        while not self._closing.wait(BEAT_S):
            # What fails here (a reader that stays, a full disk) is tried again at the next beat;
            # if it lasts, the next score's own transaction fails of it and says so.
            with (
                suppress(sqlite3.Error),
                closing(sqlite3.connect(uri, uri=True, timeout=BEAT_S, isolation_level=None)) as db,
            ):
                db.execute("PRAGMA synchronous = FULL")
                if not self._count_up(db):
                    return

    def _count_up(self, db: sqlite3.Connection) -> bool:
        """Whether the lease was still held."""
        beat = "UPDATE lease SET beat = beat + 1 WHERE id = 1 AND token = ?"
        return db.execute(beat, (self._token,)).rowcount == 1

    def _busy(self, held: _Held) -> StoreBusyError:
        about = f"{held.holder} (pid {held.pid} on {held.host}, since {held.since})"
        return StoreBusyError(
            f"{self._path} is in use by {' '.join(about.split())}; wait for it to end, or stop it"
        )


@contextmanager
def writing(db: sqlite3.Connection) -> Iterator[None]:
    """A transaction that holds the right to write from its start; undone where it fails."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def has_lease(db: sqlite3.Connection) -> bool:
    """Whether the store has the table of leases: it was once opened on a shared path."""
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'lease'").fetchone() is not None


def _held(db: sqlite3.Connection) -> _Held | None:
    columns = ", ".join(f"CAST({name} AS BLOB)" for name in _Held._fields)
    try:
        row = db.execute(f"SELECT {columns} FROM lease WHERE token NOT NULL").fetchone()
    except UnicodeDecodeError:  # of SQLite's own words on a damaged file
        return None
    except sqlite3.OperationalError as error:
        # no such table; or no store at all, which is for who reads the file through to say
        if getattr(error, "sqlite_errorcode", 0) != sqlite3.SQLITE_ERROR:
            raise
        return None
    return row and _Held(*((cell or b"").decode(errors="replace") for cell in row))


def _has_died(held: _Held) -> bool:
    """Whether the holder is known to have been a process of this host that is no more."""
    if not held.kernel or held.kernel != _kernel() or held.host != socket.gethostname():
        return False
    try:
        os.kill(int(held.pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, and alive
    except (ValueError, OverflowError):
        return False
    # another process may have the number by now
    started = _started(int(held.pid))
    return started != "" and started != held.started


def _kernel() -> str:
    """Identifies this boot of this host and its process namespace; empty where it is not known.

    Containers share a kernel, and may share a host's name, but number their processes apart.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since boot; "ended" for a zombie, empty if not known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return "ended" if fields[0] in "ZX" else fields[19]
