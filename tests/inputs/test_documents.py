"""Documents are read within limits, and names that are given twice are refused."""

from __future__ import annotations

import json
import os

import pytest

from lpserve.errors import InputError
from lpserve.inputs.documents import (
    MOST_DEPTH,
    json_value,
    read_json_object,
    toml_value,
    yaml_value,
)

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
"""Aliases of aliases: some 400 bytes that stand for 4 billion values."""


def test_documents_are_read_as_their_parsers_read_them():
    value = {"a": [1, 2.5, None, True], "b": {"c": "ä\u2028"}}
    assert json_value(json.dumps(value), "s") == value
    assert toml_value('a = [1, 2]\n[b]\nc = "ä"', "s") == {"a": [1, 2], "b": {"c": "ä"}}
    text = "base: &b {x: 1}\nmore: {<<: *b, y: [*b, 2]}\n"
    assert yaml_value(text, "s") == {"base": {"x": 1}, "more": {"x": 1, "y": [{"x": 1}, 2]}}
    assert yaml_value("", "s") is None


@pytest.mark.parametrize(
    ("parse", "text", "told"),
    [
        (json_value, "{", "s is no JSON: "),
        (json_value, '{"a": 1, "b": 2, "a": 3}', "s: 'a' is given twice"),
        (json_value, "[" * 200 + "]" * 200, f"s is nested more than {MOST_DEPTH} deep"),
        (json_value, "[" * 100_000, f"s is nested more than {MOST_DEPTH} deep"),
        (json_value, "1" * 5000, "s is no JSON: "),
        (json_value, '["\\ud800"]', "half of a surrogate pair"),
        (toml_value, "a = = 1", "s is no TOML: "),
        (toml_value, "a = 1\na = 2", "s is no TOML: "),
        (toml_value, "a = " + "[" * 5000, "s is nested more than"),
        (yaml_value, "a: [", "s is no YAML: "),
        (yaml_value, "a: 1\nb: 2\na: 3", r"s: 'a' is given twice \(line 3\)"),
        (yaml_value, LAUGHS, "s holds more than 100,000 values"),
        (yaml_value, "a: &a [*a]", "an alias stands for what it is part of"),
        (yaml_value, "[" * 5000, "s is nested more than"),
        (yaml_value, "a: 2026-13-45", "s is no YAML: "),
        (yaml_value, "a: !!python/object:os.system x", "s is no YAML: "),
        (yaml_value, "a\n---\nb", "s is no YAML: "),
        (yaml_value, "a: !!bool maybe", "s is no YAML: "),
        (yaml_value, 'a: !!int ""', "s is no YAML: "),
        (yaml_value, "a: !!timestamp foo", "s is no YAML: "),
        (yaml_value, "x" * (1 << 21), "more than the 1,048,576 of YAML"),
    ],
)
def test_what_is_no_document_or_too_large_is_refused(parse, text, told):
    with pytest.raises(InputError, match=told):
        parse(text, "s")


def test_a_file_of_another_kind_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 1 << 40)  # a hole, of no bytes on the disk
    for name, told in [
        ("pipe.json", "no regular file"),
        ("list.json", r"holds no JSON object, but \[1\]"),
        ("large.json", "more than the 67,108,864 of such a file"),
        ("missing.json", "does not exist: look elsewhere"),
        ("list.json/inner", "a part of its path is a file"),
        (".", "is a folder"),
        ("a\0b", "null byte"),
    ]:
        with pytest.raises(InputError, match=told):
            read_json_object(tmp_path / name, missing="look elsewhere")
