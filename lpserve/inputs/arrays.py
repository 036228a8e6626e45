"""Arrays in .npz files that people give: read within limits, and checked by shape and kind.

A zip may claim to hold far more than it does, and grow to far more than its size: both are found in
its headers, before memory is asked for.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lpserve.errors import InputError, LpserveError, first_line
from lpserve.inputs.files import read_bytes

GROWTH, ALLOWED_BYTES = 200, 256 << 20
"""Arrays may have this many times the bytes of their file, or this many bytes, if that is more."""
KINDS = {"b": "true or false", "iu": "whole numbers", "f": "real numbers", "U": "texts"}
"""What arrays hold, by the letters of NumPy's `dtype.kind`."""


def read_arrays(path: Path, *, missing: str = "") -> dict[str, NDArray[Any]]:
    """All arrays of an .npz file by name.

    Raises:
        InputError: the file is missing, cannot be read, is no .npz or damaged, holds Python
            objects, or grows to more than its size lets expect.
    """
    data = read_bytes(path, missing=missing)
    limit = max(ALLOWED_BYTES, GROWTH * len(data))
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                limit -= entry.file_size
                if limit < 0:
                    raise ValueError("it grows to far more than its size")
                name = entry.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"it holds {name} twice")
                # read whole, so that its checksum is compared; a longer one is cut by its header
                arrays[name] = _array(archive.read(entry))
    except LpserveError:  # a signal
        raise
    except Exception as error:  # zipfile, zlib, struct and numpy each raise kinds of their own
        raise InputError(f"{path} is no .npz of arrays, or damaged: {first_line(error)}") from None
    return arrays


def _array(data: bytes) -> NDArray[Any]:
    file: BinaryIO = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"an array of format {version}")
    shape, by_column, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    needed = math.prod(shape) * dtype.itemsize
    if any(size < 0 for size in shape) or needed != len(data) - file.tell():
        raise ValueError(f"an array of shape {shape} has {len(data) - file.tell()} bytes")
    flat = np.frombuffer(data, dtype, count=math.prod(shape), offset=file.tell())
    if dtype.kind == "b" and flat.view(np.uint8).max(initial=0) > 1:
        raise ValueError("it holds bytes that are neither true nor false")
    return flat.reshape(shape, order="F" if by_column else "C").copy()


def array_of(
    arrays: Mapping[str, NDArray[Any]],
    name: str,
    kind: str,
    axes: str,
    sizes: MutableMapping[str, int],
    source: str,
) -> NDArray[Any]:
    """An array of a file, of a known kind and number of axes, as long as others on shared axes.

    Args:
        kind: one of `KINDS`.
        axes: a letter for each axis.
        sizes: letter -> length, of the axes known so far; new ones are added.
        source: the file, for errors.

    Raises:
        InputError: it is missing, or of another kind or shape.
    """
    found = arrays.get(name)
    if found is None:
        raise InputError(f"{source}: it holds no array {name!r}")
    if found.dtype.kind not in kind:
        raise InputError(f"{source}: array {name!r} must hold {KINDS[kind]}: got {found.dtype}")
    lengths = dict(zip(axes, found.shape, strict=False))
    wanted = [sizes.get(letter, lengths.get(letter, "any")) for letter in axes]
    if list(found.shape) != wanted:
        raise InputError(
            f"{source}: array {name!r} must be of shape {wanted}: got {list(found.shape)}"
        )
    sizes.update(lengths)
    return found
