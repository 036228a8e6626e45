"""The text of files that people give, as UTF-8."""

from __future__ import annotations

from pathlib import Path

from lpserve.errors import InputError


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
