"""Writing a file completely or not at all: the one place that every result file goes through.

The content goes to a hidden temporary file in the same folder, is synced to disk, and then takes
the place of the old file in one step. Whoever reads the path sees the old content or the new one,
also after a crash. On failure the temporary file is removed and the old file is left as it was.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lpserve.errors import DiskFullError, InputError

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
        try:
            with temporary.open("wb") as file:
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


@contextmanager
def space_checked(path: Path, advice: str = RESUME_ADVICE) -> Iterator[None]:
    """Turn operating system errors of writing `path` into DiskFullError or InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFullError(f"no space to write {path}; {advice}") from None
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
