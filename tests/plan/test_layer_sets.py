"""Sets of layers; what cannot be numbers of layers is refused."""

from __future__ import annotations

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.model.players import half_players, layer_players
from lpserve.plan.layer_sets import (
    LayerSet,
    layer_set,
    layer_set_masks,
    mask_set,
    named_apart,
    set_name,
)

LAYERS = 6


def test_a_mask_keeps_what_a_set_does_not_remove(rng):
    removed = sorted(rng.permutation(LAYERS)[: rng.integers(1, LAYERS)].tolist())
    text = "".join("0" if i in removed else "1" for i in range(LAYERS))
    sets = [LayerSet("a", tuple(removed)), mask_set(text, LAYERS, "--mask"), LayerSet("all", ())]
    masks = layer_set_masks(sets, layer_players(LAYERS))
    assert (masks[0] == masks[1]).all()
    assert np.flatnonzero(~masks[0]).tolist() == removed
    assert masks[2].all()


def test_sets_of_parts_are_masks_over_halves_alone():
    found = layer_set("some", ["3.mlp", 1, "0.attention"], LAYERS, "s.txt")
    assert found.removed == ("0.attention", 1, "3.mlp")
    assert found.has_parts
    halves = half_players([False] * LAYERS)
    assert np.flatnonzero(~found.mask(halves)).tolist() == [0, 2, 3, 7]
    assert set_name(found.removed) == "-0.attention,1,3.mlp"
    with pytest.raises(InputError, match="set 'some' removes parts of layers: give players = half"):
        found.mask(layer_players(LAYERS))
    with pytest.raises(InputError, match="layer 1 is removed whole, and a part of it besides"):
        layer_set("some", ["1.mlp", 1], LAYERS, "s.txt")
    with pytest.raises(InputError, match=r"layer 6 is not one of 0\.\.5"):
        layer_set("some", ["6.mlp"], LAYERS, "s.txt")


@pytest.mark.parametrize("text", ["0110", "0120111", "", "abcdef"])
def test_masks_of_another_form_are_refused(text):
    with pytest.raises(InputError, match="is no mask of 6 layers"):
        mask_set(text, LAYERS, "--mask")


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ([-1], "layer -1 is not one of 0..5, the model's layers$"),
        ([1, 6], "layer 6 is not one of 0..5.*counted from 1"),
        ([0, 6], "layer 6 is not one of 0..5, the model's layers$"),
        ([9], "layer 9 is not one of 0..5, the model's layers$"),
        ([1, 1], r"a layer comes twice in \[1, 1\]"),
        ([0, 1, 0, 1, 1, 1], "is a mask, and layer numbers are needed"),
        ([True], "True is no layer number"),
    ],
)
def test_what_is_no_layer_of_the_model_is_refused(numbers, told):
    with pytest.raises(InputError, match=told):
        layer_set("s", numbers, LAYERS, "--removed")


def test_sets_of_several_files_are_told_apart_by_their_folders(tmp_path):
    one, other = tmp_path / "seed0" / "drop.txt", tmp_path / "seed1" / "drop.txt"
    for path in (one, other):
        path.parent.mkdir()
        path.touch()
    first, second = LayerSet("drop", (1, 2)), LayerSet("drop", (1, 3))
    assert named_apart([(one, first), (one, first)]) == [first]
    assert named_apart([(one, first), (other, first)]) == [first]
    assert named_apart([(one, first), (other, LayerSet("x", (1,)))]) == [first, LayerSet("x", (1,))]
    assert named_apart([(one, first), (other, second)]) == [
        LayerSet("seed0/drop", (1, 2)),
        LayerSet("seed1/drop", (1, 3)),
    ]
    runs = [(tmp_path / "seed0", first), (tmp_path / "seed1", second)]
    assert [s.name for s in named_apart(runs)] == ["seed0/drop", "seed1/drop"]
    again = one.with_name("drop2.txt")  # in one folder: the files' names
    assert [s.name for s in named_apart([(one, first), (again, second)])] == [
        f"{one}/drop",
        f"{again}/drop",
    ]
