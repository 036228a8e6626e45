"""Bytes are UTF-8 or refused by what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpserve.errors import InputError
from lpserve.inputs.files import decoded

TEXT = "a café\u2028and more"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_text(encoding):
    assert decoded(TEXT.encode(encoding), Path("a")) == TEXT


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (TEXT.encode("utf-16"), "a.txt is UTF-16: save it as UTF-8"),
        ("\u2028".encode("utf-16-be").join([b"\xfe\xff", b""]), "is UTF-16"),
        (b"abc\xe9 d", r"a.txt cannot be read as UTF-8 \(byte 3\)"),
    ],
)
def test_other_encodings_are_refused(data, told):
    with pytest.raises(InputError, match=told):
        decoded(data, Path("a.txt"))
