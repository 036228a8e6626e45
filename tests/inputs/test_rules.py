"""The rules that configuration values keep, as errors state them."""

from __future__ import annotations

from typing import Annotated, Any

import pytest

from lpserve.errors import InputError
from lpserve.inputs.rules import Count, CountOr0, LayerNames, Length, Positive, Share, one_of
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
            LayerNames,
            [[], [0, "7.mlp", "11.attention"]],
            [[-1], ["7"], ["mlp.7"], ["7.mlp "], ["x.mlp"], "7.mlp", [True], [0.0]],
            "a list of layers, numbered from 0, or of parts such as 7.attention",
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
