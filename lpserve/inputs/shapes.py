"""Values from outside as values of a declared type, checked by msgspec.

Types are those of annotations: `int`, `list[int]`, `Literal[...]`, dataclasses of these. A rule
that a type cannot say stands in `Annotated[type, msgspec.Meta(...)]`, whose `description` completes
the sentence "KEY must be ...". Conversion is strict: a text is no number, and true is no 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin

import msgspec

from lpserve.errors import InputError
from lpserve.inputs.documents import shown

T = TypeVar("T")


def converted(value: Any, kind: type[T], source: str) -> T:
    """A value of plain containers as one of `kind`, such as a dataclass.

    Args:
        source: names the value in errors, as a file's path.

    Raises:
        InputError: it is of another shape; says where in it, and what belongs there.
    """
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {_located(str(error))}") from None


def check_value(value: Any, kind: Any, key: str) -> None:
    """Raise InputError unless a value is one of `kind`: "KEY must be RULE: got VALUE".

    Raises:
        InputError: it is not; the rule is the description of the type's `msgspec.Meta`.
    """
    try:
        msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        rule = next(_descriptions(kind), None)
        told = (
            f"must be {rule}: got {shown(value)}" if rule else f"cannot be: {_located(str(error))}"
        )
        raise InputError(f"{key} {told}") from None


def check_names(value: Any, kind: type, source: str) -> None:
    """Raise InputError where an object holds a name that is no field of the dataclass `kind`."""
    assert is_dataclass(kind)
    if isinstance(value, Mapping):
        known = {one.name for one in fields(kind)}
        if more := [name for name in value if name not in known]:
            raise InputError(f"{source}: unknown key {shown(more[0])}")


def _descriptions(kind: Any) -> Iterator[str]:
    """Descriptions in a type, outer ones first."""
    if get_origin(kind) is Annotated:
        for extra in get_args(kind)[1:]:
            if isinstance(extra, msgspec.Meta) and extra.description:
                yield extra.description
    for inner in get_args(kind):
        if not isinstance(inner, str | msgspec.Meta):
            yield from _descriptions(inner)


def _located(message: str) -> str:
    """msgspec's message with its place in front: "plans[0].removed: expected int, got str"."""
    found = re.fullmatch(r"(?s)(.*?)(?: - at `(?:key in )?\$\.?(.*)`)?", message)
    assert found is not None
    problem = found[1].replace("`", "")
    problem = problem[:1].lower() + problem[1:]
    return f"{found[2]}: {problem}" if found[2] else problem
