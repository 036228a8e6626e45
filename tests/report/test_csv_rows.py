"""Tables are read back to the last digit, and no cell of text is a formula."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from lpserve.report.csv_rows import csv_text


def read(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_numbers_of_any_kind_are_read_back_exactly(rng):
    number = rng.normal()
    row = [number, np.float64(number), np.float32(number), 3, np.int64(-3), None, "a, b\nc"]
    header, cells = read(csv_text([*"abcdefg"], [row]))
    assert header == [*"abcdefg"]
    assert [float(cell) for cell in cells[:3]] == [number, number, float(np.float32(number))]
    assert cells[3:] == ["3", "-3", "", "a, b\nc"]
    assert "np." not in csv_text(["a"], [row])


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r"])
def test_a_text_that_begins_as_a_formula_stays_a_text(begin):
    text = f'{begin}HYPERLINK("http://x","y")'
    (_, (cell, number)) = read(csv_text(["set", "value"], [[text, -1.5]]))
    assert cell == f"'{text}"
    assert number == "-1.5"
