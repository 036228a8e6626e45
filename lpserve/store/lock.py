"""A lock on a path that dies with its process (flock) and names its holder to those it refuses."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from lpserve.errors import InputError, StoreBusyError
from lpserve.store.files import open_unlinked

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)


class PathLock:
    """An exclusive lock on `path`, kept in the file `<path>.lock` beside it.

    On a filesystem without such locks `held` is False; a run folder there is guarded by the lease
    of its store.

    Args:
        holder: who locks it, for those who are refused.

    Raises:
        StoreBusyError: another process holds it.
        InputError: the lock file cannot be made or locked.
    """

    def __init__(self, path: Path, *, holder: str) -> None:
        lock_path = path.with_name(f"{path.name}.lock")
        try:
            self._file = open_unlinked(lock_path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
        except OSError as error:
            link = error.errno == errno.ELOOP
            reason = "it is a link, which is not followed" if link else error.strerror
            raise InputError(f"{path} cannot be locked: {lock_path}: {reason}") from None
        self.held = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(self._file, 4096).decode(errors="replace")
            os.close(self._file)
            raise StoreBusyError(
                f"{path} is in use by {_holder(text)}; wait for it to end, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(self._file)
                raise InputError(
                    f"{path} cannot be locked: {lock_path}: {error.strerror}"
                ) from None
            self.held = False
        about = {"holder": holder, "pid": os.getpid(), "host": socket.gethostname()}
        text = json.dumps(about | {"since": time.ctime()}).encode()
        # who holds it is told to others as far as the disk allows; the lock stands without
        with suppress(OSError):
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text, 0)

    def release(self) -> None:
        """Let others lock the path; may be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _holder(text: str) -> str:
    try:
        about = json.loads(text)
        return f"{about['holder']} (pid {about['pid']} on {about['host']}, since {about['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
