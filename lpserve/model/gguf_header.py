"""The header of a GGUF file, walked within the file's bytes before any library reads it.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A damaged length sends a reader that
trusts it through memory that is not there, or round and round; here it ends in one line.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from pathlib import Path

from lpserve.errors import InputError

_MAGIC = b"GGUF"
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the values of fixed size, by type."""
_TEXT, _ARRAY = 8, 9
_MOST_AXES = 8
_NUMBERS_PER_BYTE = 8
"""At most: no type of tensor takes less than a bit for a number."""


class _Damaged(Exception):
    """What is wrong with the file, in words."""


def tensor_types(file: Path) -> tuple[dict[str, int], int]:
    """How many tensors there are of each type (`Q4_0`, ...; a number where the type is unknown),
    and how many numbers they hold together.

    Raises:
        InputError: the file is no GGUF file of version 2 or 3, or its header speaks of more than
            the file holds.
    """
    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _Walk(data).tensors()
    except _Damaged as error:
        raise InputError(f"model {file} {error}") from None
    except ValueError:  # an empty file cannot be mapped
        raise InputError(f"model {file} is no GGUF file: it is empty") from None


class _Walk:
    """From the first byte of a file to the end of its header."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def tensors(self) -> tuple[dict[str, int], int]:
        if self._data[:4] != _MAGIC:
            raise _Damaged(f"is no GGUF file: it does not begin with {_MAGIC.decode()}")
        self._at = 4
        version = self._whole("I")
        if not 2 <= version <= 3:
            raise _Damaged(f"has GGUF version {version}; versions 2 and 3 are read")
        num_tensors, num_keys = self._whole("Q"), self._whole("Q")
        for _ in range(num_keys):
            self._text()
            self._value(self._whole("I"))
        types: Counter[str] = Counter()
        numbers = 0
        for _ in range(num_tensors):
            self._text()
            axes = self._whole("I")
            if axes > _MOST_AXES:
                raise _Damaged(f"is damaged: a tensor has {axes} axes")
            numbers += math.prod(self._whole("Q") for _ in range(axes))
            types[_type_name(self._whole("I"))] += 1
            if self._whole("Q") > len(self._data):
                raise _Damaged("is damaged or cut short: a tensor lies beyond its end")
        if not types:
            raise _Damaged("holds no tensors")
        if numbers > _NUMBERS_PER_BYTE * len(self._data):
            raise _Damaged(f"is damaged or cut short: {numbers} numbers cannot be in it")
        return dict(sorted(types.items())), numbers

    def _value(self, kind: int) -> None:
        if kind == _TEXT:
            self._text()
        elif kind == _ARRAY:
            of, count = self._whole("I"), self._whole("Q")
            if of in _SIZES:
                self._skip(_SIZES[of] * count)
            elif of == _TEXT:
                for _ in range(count):  # each takes 8 bytes at least: the file's end stops it
                    self._text()
            else:
                raise _Damaged(f"is damaged: an array of values of type {of}")
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise _Damaged(f"is damaged: a value of type {kind}")

    def _text(self) -> None:
        self._skip(self._whole("Q"))

    def _whole(self, form: str) -> int:
        size = struct.calcsize(f"<{form}")
        start = self._at
        self._skip(size)
        return struct.unpack(f"<{form}", self._data[start : self._at])[0]

    def _skip(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise _Damaged("is damaged or cut short: its header goes beyond its end")
        self._at += count


def _type_name(number: int) -> str:
    try:
        from gguf import GGMLQuantizationType
    except ImportError:
        return str(number)
    known = {member.value: member.name for member in GGMLQuantizationType}
    return known.get(number, str(number))
