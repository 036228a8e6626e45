"""Layer numbers in quantization settings: names move with their layers, patterns match what they
matched, and settings that contradict the tensors are refused."""

from __future__ import annotations

import re

import pytest

from lpserve.errors import InputError
from lpserve.export.quantization import Renumbering, check_scales, renumbered

LAYERS, PREFIX = 12, "model.layers."
MODULES = ("self_attn.q_proj", "mlp.down_proj")
TENSORS = [
    *(f"{PREFIX}{layer}.{module}.weight" for layer in range(LAYERS) for module in MODULES),
    "lm_head.weight",
]
KEPT = [0, 2, 3, 5, 6, 7, 8, 9, 10, 11]  # without 1 and 4
NUMBERS = Renumbering(TENSORS, PREFIX, KEPT)


def name(layer: int, module: str = "mlp.down_proj") -> str:
    return f"{PREFIX}{layer}.{module}"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["lm_head", name(2), name(1), name(11)], ["lm_head", name(1), name(9)]),
        (["layers.2", "layers.1", "layers.12"], ["layers.1"]),  # no such layer as 12
        ([r"re:.*layers\.\d+\.mlp\.down_proj", "re:.*lm_head"], None),
        ([r"re:model\.layers\.(2|6)\.mlp\.down_proj"], [name(1), name(4)]),
        ([r"re:.*layers\.1\.mlp.*"], []),
        (["model.layers.3.mlp*"], [f"{PREFIX}2.mlp", name(2)]),
        (["*.q_proj"], None),
        (["Linear"], None),
    ],
)
def test_names_move_and_patterns_match_what_they_matched(given, expected):
    got = renumbered({"ignore": given}, NUMBERS, "config.json")["ignore"]
    assert got == (given if expected is None else expected)


def test_keys_of_settings_for_single_modules_move_too():
    given = {
        "dynamic": {r"-:model\.layers\.(3|4)\.mlp\.down_proj": {}, r"+:.*q_proj": {"bits": 8}},
        name(2): {"bits": 4},
        name(4): {"bits": 2},
    }
    got = renumbered(given, NUMBERS, "quantize_config.json")
    pattern = f"-:^{re.escape(name(2))}$"
    assert got == {
        "dynamic": {pattern: {}, r"+:.*q_proj": {"bits": 8}},
        name(1): {"bits": 4},
    }


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"'re:\(layers' is no regular expression"):
        renumbered({"ignore": ["re:(layers"]}, NUMBERS, "config.json")


@pytest.mark.parametrize("skip", [name(2), r"re:.*layers\.2\.mlp.*", "model.layers.2"])
def test_settings_that_contradict_the_scales_are_refused(skip):
    scaled = [*TENSORS, *(f"{name(layer)}.weight_scale" for layer in range(LAYERS) if layer != 2)]
    check_scales({"ignore": ["lm_head", skip]}, scaled, PREFIX, "config.json")
    with pytest.raises(InputError, match=r"leaves model.layers.2.mlp.down_proj unquantized, and"):
        check_scales({"ignore": [skip]}, [*scaled, f"{name(2)}.weight_scale"], PREFIX, "c")
    with pytest.raises(InputError, match=r"does not leave model.layers.2.mlp.down_proj unquant"):
        check_scales({"ignore": ["lm_head"]}, scaled, PREFIX, "config.json")
