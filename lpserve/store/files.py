"""Writing a file completely or not at all: the one place that every result file goes through.

The content goes to a hidden temporary file in the same folder, is synced to disk, and then takes
the place of the old file in one step. Whoever reads the path sees the old content or the new one,
also after a crash. On failure the temporary file is removed and the old file is left as it was.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lpserve.errors import DiskFullError, InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RESUME_ADVICE = "scores are kept: free space and give the same command again"


def write_whole(
    path: Path, write: Callable[[BinaryIO], object], *, advice: str = RESUME_ADVICE
) -> None:
    """Write a file completely or not at all.

    A link, a pipe or a device is written in place: replacing it would destroy it.

    Args:
        write: called with the open file; writes the content.
        advice: ends the message where the disk is full.

    Raises:
        DiskFullError: the disk or a quota is full, or the file may not grow so large.
        InputError: the file cannot be written for another reason.
    """
    with space_checked(path, advice):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            with path.open("wb") as file:
                write(file)
            return
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.unlink(missing_ok=True)  # left by a process that was killed, or a link
        try:
            new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(open_unlinked(temporary, new), "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 completely or not at all; raises as `write_whole`."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays as a compressed .npz completely or not at all; raises as `write_whole`."""
    write_whole(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def open_unlinked(path: Path, flags: int) -> int:
    """Open a file of ours, never through a link: in a folder that others can write, a link could
    lead what we write to any place. Returns the descriptor.

    Raises:
        OSError: it cannot be opened; ELOOP for a link.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def make_folder(path: Path, what: str) -> None:
    """Make a folder and those above it, where they are missing.

    Args:
        what: the folder is for, such as "run folder".

    Raises:
        InputError: it cannot be made, or is a file; DiskFullError: for lack of space.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        found = path.stat()
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(f"no space to make {what} {path}") from None
        raise InputError(f"{what} {path} cannot be made: {_reason(error)}") from None
    if not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{what} {path} cannot be made: it is a file")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a crash of the machine, as `write_whole` does a file's
    content; raises as `write_whole`."""
    with space_checked(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "it is a link, which is not followed"
    return error.strerror or str(error)


@contextmanager
def space_checked(path: Path, advice: str = RESUME_ADVICE) -> Iterator[None]:
    """Turn operating system errors of writing `path` into DiskFullError or InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(f"no space to write {path}; {advice}") from None
        raise InputError(f"{path} cannot be written: {_reason(error)}") from None
