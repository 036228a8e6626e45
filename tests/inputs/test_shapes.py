"""Values are of the declared shape, or refused with the place that is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from msgspec import Meta

from lpserve.errors import InputError
from lpserve.inputs.shapes import check_names, check_value, converted


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    removed: list[int]
    ppl: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    name: str
    plans: list[Inner] = field(default_factory=list)


LIMITED = Annotated[int, Meta(le=9, description="a whole number, at most 9")]
COUNT = Annotated[int, Meta(ge=1, description="a whole number, at least 1")]


MAYBE = COUNT | None  # pyright: ignore[reportOperatorIssue]


def test_plain_containers_become_dataclasses():
    found = converted({"name": "a", "plans": [{"removed": [1, 2], "ppl": 3}]}, Outer, "s")
    assert found == Outer(name="a", plans=[Inner(removed=[1, 2], ppl=3.0)])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({}, "s: object missing required field name"),
        ({"name": 1}, "s: name: expected str, got int"),
        (
            {"name": "a", "plans": [{"removed": [1, None]}]},
            r"s: plans\[0\]\.removed\[1\]: expected",
        ),
        ({"name": "a", "plans": [{"removed": [True]}]}, "expected int, got bool"),
        ({"name": "a", "plans": [{"removed": [], "ppl": "1"}]}, "expected float | null, got str"),
        ([], "s: expected object, got array"),
    ],
)
def test_another_shape_is_refused_with_its_place(value, told):
    with pytest.raises(InputError, match=told):
        converted(value, Outer, "s")


@pytest.mark.parametrize(
    ("value", "kind", "told"),
    [
        (0, COUNT, "k must be a whole number, at least 1: got 0"),
        (True, COUNT, "k must be a whole number, at least 1: got True"),
        ("1", MAYBE, "k must be a whole number, at least 1: got '1'"),
        ("x", COUNT | Literal["auto"], "k must be a whole number, at least 1"),
        (10**30, LIMITED, "k must be a whole number"),
        ([1] * 1000, COUNT, r"got \[1, 1, .*\.\.\.$"),
    ],
)
def test_rules_that_are_broken_are_told(value, kind, told):
    with pytest.raises(InputError, match=told):
        check_value(value, kind, "k")


def test_values_that_fit_pass():
    for value, kind in [(1, COUNT), (None, MAYBE), (1, float), ("auto", Literal["auto"])]:
        check_value(value, kind, "k")
    check_names({"name": 1}, Outer, "s")
    with pytest.raises(InputError, match="s: unknown key 'nam'"):
        check_names({"nam": 1}, Outer, "s")
