"""Values that people give, made plain before they are checked: texts for paths, Python's numbers.

A config takes from Python what it takes from a file, and a path or a number of NumPy as well.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping
from typing import Any

from lpserve.errors import InputError

MOST_CHARACTERS = 4096
"""Of a text in a config: the longest path that Linux takes."""


def plain_value(value: Any, key: str) -> Any:
    """A value as configs keep it, containers included.

    Raises:
        InputError: a text that no file or service could be named by.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        if "\0" in value:
            raise InputError(f"{key} must be a text without NUL characters: got {value[:40]!r}")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise InputError(f"{key} must be a text in UTF-8: got {value[:40]!r}")
        if len(value) > MOST_CHARACTERS:
            raise InputError(
                f"{key} must be at most {MOST_CHARACTERS} characters: got {len(value)}, "
                f"{value[:40]!r}..."
            )
        return str(value)
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(name): plain_value(item, f"{key}.{name}") for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_value(item, key) for item in value)
    return value
