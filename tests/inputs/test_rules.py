"""The rules that configuration values keep, as errors state them."""

from __future__ import annotations

from typing import Annotated, Any

import pytest

from lpserve.errors import InputError
from lpserve.inputs.rules import (
    Count,
    CountOr0,
    LayerNames,
    Length,
    PlayerKind,
    Positive,
    Share,
    Targets,
    one_of,
)
from lpserve.inputs.shapes import check_value


@pytest.mark.parametrize(
    ("kind", "good", "bad", "words"),
    [
        (Count, [1, 2**63 - 1], [0, 2**63, True, 1.0], "a whole number, at least 1"),
        (CountOr0, [0], [-1], "a whole number, at least 0"),
        (Length, [2], [1], "a whole number, at least 2"),
        (Share, [0.5], [0, 1, -0.1], "a number above 0 and below 1"),
        (Positive, [1e-9, 3], [0.0, float("inf")], "a number above 0"),
        (Annotated[str, one_of(["a.b", "c"])], ["a.b", "c"], ["axb", "c\n", ""], "one of a.b, c"),
        (
            PlayerKind,
            ["layer", "half", "groups:a b.toml"],
            ["", "layers", "groups:", "half\n", 3],
            "one of layer, half, groups:FILE",
        ),
        (
            Targets,
            ["params=0.9", "kv=.5", "flops=0.9,0.25"],
            ["", "params", "params=", "params=0", "params=1", "params=0.0", "kv=0.5,", "x=0.5"],
            "one of params, flops, kv, = and shares above 0 and below 1, such as params=0.9,0.8",
        ),
        (
            LayerNames,
            [[], [0, "7.mlp", "11.attention", "early", "x_1"]],
            [[-1], ["7"], ["mlp.7"], ["7.mlp "], ["x.mlp"], "7.mlp", [True], [0.0]],
            "a list of layers, numbered from 0, of parts such as 7.attention, or of groups",
        ),
    ],
)
def test_values_that_break_a_rule_are_refused_with_it(
    kind: Any, good: list[Any], bad: list[Any], words: str
):
    for value in good:
        check_value(value, kind, "key")
    for value in bad:
        with pytest.raises(InputError, match=f"key must be {words}: got"):
            check_value(value, kind, "key")
