"""Reading files that people give: regular ones, of a size that fits, in UTF-8.

A pipe or a device may have no end, and a file of another kind may fill the memory: both are refused
before they are read, as is all that the machine does not let us read.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from lpserve.errors import InputError

_RAY_JOB_FOLDER = "/runtime_resources/working_dir_files/"
MOST_DOCUMENT_BYTES = 64 << 20
"""Of a file that is read as a whole for what it says: configs, indices, sets, plans."""


def regular_size(path: Path) -> int:
    """Bytes of a regular file, for readers that open it themselves; raises InputError."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, "") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is no regular file: it may have no end")
    return found.st_size


def read_bytes(path: Path, *, most: int | None = None, missing: str = "") -> bytes:
    """The bytes of a regular file.

    Args:
        most: bytes that it may have; None: any number.
        missing: what to do where it is missing, or what it is needed for.

    Raises:
        InputError: it is missing, no regular file, larger, or cannot be read.
    """
    try:
        # opening a pipe without O_NONBLOCK would wait for somebody to write to it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{path} is no regular file: it may have no end")
            if most is not None and found.st_size > most:
                raise InputError(
                    f"{path} has {found.st_size:,} bytes, more than the {most:,} of such a file"
                )
            return file.read() if most is None else file.read(most + 1)[:most]
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, error, missing) from None


def _unreadable(path: Path, error: OSError | ValueError, missing: str) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} does not exist{missing and f': {missing}'}")
    if isinstance(error, IsADirectoryError):
        return InputError(f"{path} is a folder, not a file")
    return InputError(f"{path} cannot be read: {reason_of(error)}")


def read_document(path: Path, *, most: int = MOST_DOCUMENT_BYTES, missing: str = "") -> str:
    """The text of a regular file in UTF-8; arguments and errors are those of `read_bytes`."""
    return decoded(read_bytes(path, most=most, missing=missing), path)


def decoded(data: bytes, path: Path) -> str:
    """The text of a file's bytes; a byte order mark is left out.

    Raises:
        InputError: the bytes are UTF-16, or not UTF-8; names `path`.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is UTF-16: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} cannot be read as UTF-8 (byte {error.start}): convert it, as by iconv -t UTF-8"
        ) from None


def is_there(path: Path) -> bool:
    """Whether a path exists, as far as we are let to know.

    Raises:
        InputError: it cannot be found out, for want of a permission or of a working disk.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from None
    return True


def reason_of(error: OSError | ValueError) -> str:
    """Why a file cannot be reached, in the system's words."""
    if isinstance(error, OSError):
        if error.errno == errno.ENOTDIR:
            return "a part of its path is a file, not a folder"
        return error.strerror or str(error)
    return str(error)


def check_lasting(path: str, key: str) -> None:
    """Raise InputError for a relative path in the folder that Ray makes for a job with
    `--working-dir`: Ray removes it, and the next job of the same name has another."""
    if _RAY_JOB_FOLDER in str(Path.cwd()) and not Path(path).is_absolute():
        raise InputError(
            f"{key} must be an absolute path in a Ray job, whose folder is temporary: got {path!r}"
        )
