"""JSON, TOML and YAML within limits: a document that is small on disk stays small in memory.

Names that are given twice are refused, since parsers keep one of the two without a word.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpserve.errors import InputError, LpserveError, first_line
from lpserve.inputs.files import read_document

if TYPE_CHECKING:
    import yaml

MOST_DEPTH = 100
"""Containers inside each other: configs of models have some five."""
MOST_YAML_CHARACTERS = 1 << 20
MOST_YAML_NODES = 100_000
"""With every alias counted as often as it is used: nine lines of aliases of aliases may stand for
a billion nodes."""


def read_json(path: Path, *, missing: str = "", repeats: bool = False) -> Any:
    """The value of a JSON file; arguments are those of `json_value` and `files.read_bytes`."""
    return json_value(read_document(path, missing=missing), str(path), repeats=repeats)


def read_json_object(path: Path, *, missing: str = "", repeats: bool = False) -> dict[str, Any]:
    """The object of a JSON file; raises InputError where it holds another value."""
    value = read_json(path, missing=missing, repeats=repeats)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object, but {shown(value)}")
    return value


def json_value(text: str, source: str, *, repeats: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        source: names the text in errors.
        repeats: whether a name may come twice in an object; the last counts, as everywhere.

    Raises:
        InputError: it is no JSON, or nested deeper than `MOST_DEPTH`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{source}: {shown(twice)} is given twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=None if repeats else unique)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{source} is no JSON: {first_line(error)}") from None
    except RecursionError:
        raise _too_deep(source) from None
    _check_depth(value, source)
    if "\\ud" in text or "\\uD" in text:
        _check_whole_characters(value, source)
    return value


def toml_value(text: str, source: str) -> dict[str, Any]:
    """The table of a TOML text; raises InputError where it is none."""
    try:
        value = tomllib.loads(text)
    except ValueError as error:
        raise InputError(f"{source} is no TOML: {first_line(error)}") from None
    except RecursionError:
        raise _too_deep(source) from None
    _check_depth(value, source)
    return value


def yaml_value(text: str, source: str) -> Any:
    """The value of a YAML text of one document.

    Raises:
        InputError: it is no YAML, longer than `MOST_YAML_CHARACTERS`, nested too deeply, holds more
            nodes than `MOST_YAML_NODES`, or gives a name twice.
    """
    import yaml

    if len(text) > MOST_YAML_CHARACTERS:
        raise InputError(
            f"{source} has {len(text):,} characters, more than the {MOST_YAML_CHARACTERS:,} of YAML"
        )
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_nodes(node, source)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except LpserveError:
        raise
    except RecursionError:
        raise _too_deep(source) from None
    except Exception as error:  # PyYAML's own, and KeyError and others for values like !!bool maybe
        raise InputError(f"{source} is no YAML: {_yaml_reason(error)}") from None
    _check_depth(value, source)
    return value


def shown(value: Any, most: int = 60) -> str:
    """A value as errors show it: its beginning, on one line."""
    text = (
        repr(value) if not isinstance(value, dict | list) else f"{json.dumps(value, default=str)}"
    )
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _yaml_reason(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is None or problem is None:
        return first_line(error)
    return f"{problem} (line {mark.line + 1})"


def _too_deep(source: str) -> InputError:
    return InputError(f"{source} is nested more than {MOST_DEPTH} deep")


def _check_whole_characters(value: Any, source: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{source}: the text holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
            "character"
        ) from None


def _check_depth(value: Any, source: str) -> None:
    level, depth = [value], 0
    while level:
        if depth > MOST_DEPTH:
            raise _too_deep(source)
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [v for v in item.values() if isinstance(v, dict | list)]
            elif isinstance(item, list):
                inner += [v for v in item if isinstance(v, dict | list)]
        level, depth = inner, depth + 1


def _check_nodes(root: yaml.Node, source: str) -> None:
    """Raise InputError for aliases that grow or turn in a circle, and for names given twice."""
    import yaml

    sizes: dict[int, int] = {}  # 0: being counted

    def size_of(node: yaml.Node, depth: int) -> int:
        known = sizes.get(id(node))
        if known == 0:
            raise InputError(f"{source}: an alias stands for what it is part of")
        if known is not None:
            return known
        if depth > MOST_DEPTH:
            raise _too_deep(source)
        sizes[id(node)] = 0
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_names(node, source)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = list(node.value)
        size = 1 + sum(size_of(child, depth + 1) for child in children)
        if size > MOST_YAML_NODES:
            raise InputError(f"{source} holds more than {MOST_YAML_NODES:,} values")
        sizes[id(node)] = size
        return size

    size_of(root, 0)


def _check_names(node: yaml.MappingNode, source: str) -> None:
    import yaml

    seen: set[Hashable] = set()
    for name, _ in node.value:
        if isinstance(name, yaml.ScalarNode):
            known = (name.tag, name.value)
            if known in seen:
                raise InputError(
                    f"{source}: {name.value!r} is given twice (line {name.start_mark.line + 1})"
                )
            seen.add(known)
