"""Arrays are read as NumPy reads them, or refused before memory is asked for."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.inputs.arrays import array_of, read_arrays


def test_arrays_are_those_that_numpy_wrote(tmp_path, rng):
    arrays = {
        "floats": rng.normal(size=(3, 4)).astype(np.float32),
        "by_column": np.asfortranarray(rng.integers(0, 9, (5, 2))),
        "bools": rng.integers(0, 2, 7).astype(bool),
        "texts": np.array(["a", "äöü", ""]),
        "scalar": np.array("about"),
        "empty": np.zeros((0, 3)),
        "big_endian": np.arange(3, dtype=">i4"),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = read_arrays(tmp_path / "a.npz")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


def archive(tmp_path, header: bytes, data: bytes = b""):
    """An .npz of one array with this header."""
    padded = header + b" " * (118 - len(header) - 1) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + data
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("tokens.npy", content)
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    ("header", "data", "told"),
    [
        (b"{'descr': '<f8', 'fortran_order': False, 'shape': (10**12,)}", b"", "damaged"),
        (
            b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}",
            b"",
            "has 0 bytes",
        ),
        (b"{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}", b"x" * 15, "has 15 bytes"),
        (b"{'descr': '|O', 'fortran_order': False, 'shape': ()}", b"x" * 8, "Python objects"),
        (b"{'descr': '|b1', 'fortran_order': False, 'shape': (2,)}", b"\1\2", "neither true nor"),
        (b"{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}", b"", "damaged"),
        (b"not a header", b"", "damaged"),
    ],
)
def test_headers_that_lie_are_refused(header, data, told, tmp_path):
    with pytest.raises(InputError, match=told):
        read_arrays(archive(tmp_path, header, data))


def test_a_flipped_bit_is_found(tmp_path, rng):
    np.savez(tmp_path / "a.npz", tokens=rng.integers(0, 9, 500))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[1000] ^= 4
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(InputError, match=r"damaged: Bad CRC-32"):
        read_arrays(tmp_path / "a.npz")


def test_an_archive_that_grows_is_refused(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("a.npy", b"\0" * (300 << 20))
    (tmp_path / "a.npz").write_bytes(file.getvalue())
    assert len(file.getvalue()) < 1 << 20
    with pytest.raises(InputError, match="grows to far more than its size"):
        read_arrays(tmp_path / "a.npz")


def test_shared_axes_have_one_length():
    sizes: dict[str, int] = {}
    arrays = {"nll": np.zeros((3, 4)), "masks": np.zeros((2, 5), dtype=bool)}
    assert array_of(arrays, "nll", "f", "MI", sizes, "s") is arrays["nll"]
    assert sizes == {"M": 3, "I": 4}
    for name, kind, axes, told in [
        ("masks", "b", "MP", r"of shape \[3, 5\]: got \[2, 5\]"),
        ("nll", "iu", "MI", "must hold whole numbers: got float64"),
        ("nll", "f", "M", r"of shape \[3\]: got \[3, 4\]"),
        ("loss", "f", "MI", "s: it holds no array 'loss'"),
    ]:
        with pytest.raises(InputError, match=told):
            array_of(arrays, name, kind, axes, sizes, "s")
