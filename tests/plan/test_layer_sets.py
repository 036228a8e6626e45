"""Sets of layers from plans and from other tools' files; what cannot be meant is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.export.mergekit import mergekit_yaml
from lpserve.export.pruned_config import prune_config
from lpserve.model.checkpoint import read_checkpoint
from lpserve.plan.layer_sets import LayerSet, layer_set, layer_set_masks, mask_set, read_sets
from lpserve.testing.reference import save_model, small_config

LAYERS = 6


def written(tmp_path, name: str, text: str):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_mask_keeps_what_a_set_does_not_remove(rng):
    removed = sorted(rng.permutation(LAYERS)[: rng.integers(1, LAYERS)].tolist())
    text = "".join("0" if i in removed else "1" for i in range(LAYERS))
    sets = [LayerSet("a", tuple(removed)), mask_set(text, LAYERS, "--mask"), LayerSet("all", ())]
    masks = layer_set_masks(sets, LAYERS)
    assert (masks[0] == masks[1]).all()
    assert np.flatnonzero(~masks[0]).tolist() == removed
    assert masks[2].all()


@pytest.mark.parametrize(
    "text",
    ["2,4", "[4, 2]", "(2 4)", "# EvoPress\n\n 4 2  # two of them\n"],
)
def test_lists_of_layer_numbers(text, tmp_path):
    assert read_sets(written(tmp_path, "sets.txt", text), LAYERS) == [LayerSet("-2,4", (2, 4))]


def test_several_sets_with_names(tmp_path):
    path = written(tmp_path, "sets.txt", "SLEB: 1, 3\nShortGPT 7B: [5]\n\n0\n")
    assert read_sets(path, LAYERS) == [
        LayerSet("SLEB", (1, 3)),
        LayerSet("ShortGPT 7B", (5,)),
        LayerSet("-0", (0,)),
    ]
    path = written(tmp_path, "sets.json", json.dumps({"ours": [3, 1], "theirs": []}))
    assert read_sets(path, LAYERS) == [LayerSet("ours", (1, 3)), LayerSet("theirs", ())]
    path = written(tmp_path, "list.json", "[[3, 1], [0]]")
    assert [s.removed for s in read_sets(path, LAYERS)] == [(1, 3), (0,)]
    path = written(tmp_path, "one.json", "[3, 1]")
    assert [s.removed for s in read_sets(path, LAYERS)] == [(1, 3)]


def test_evopress_drop_config(tmp_path):
    words = ["none", "attn+mlp", "none", "none", "attn+mlp", "none"]
    path = written(tmp_path, "layer_drop_config.txt", "\n".join(words))
    assert read_sets(path, LAYERS) == [LayerSet("layer_drop_config", (1, 4))]
    words[3] = "mlp"
    path = written(tmp_path, "layer_drop_config.txt", "\n".join(words) + "\n")
    with pytest.raises(InputError, match="line 4: 'mlp' removes half of layer 3"):
        read_sets(path, LAYERS)


def test_the_mergekit_recipe_that_export_writes_is_read_back(tmp_path, rng):
    model = save_model(small_config("llama"), tmp_path / "model", 0)
    removed = sorted(rng.permutation(LAYERS)[:2].tolist())
    checkpoint = read_checkpoint(str(model))
    text = mergekit_yaml(checkpoint, prune_config(checkpoint, removed))
    path = written(tmp_path, "mergekit.yaml", text)
    assert read_sets(path, LAYERS) == [LayerSet("mergekit", tuple(removed))]


MERGE = """
slices:
- sources:
  - {{model: a, layer_range: [0, {end}]}}
- sources:
  - {{model: {other}, layer_range: [{start}, 6]}}
"""


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("s.txt", "1, 6", "line 1: layer 6 is not one of 0..5"),
        ("s.txt", "\n1 1", "line 2: a layer comes twice"),
        ("s.txt", "one, two", "is no list of layer numbers"),
        ("s.txt", "# nothing\n", "holds no set"),
        ("s.txt", "none\nattn+mlp", "speaks of 2 layers; the model has 6"),
        ("s.json", "{", "cannot be read as JSON"),
        ("s.json", '{"a": 3}', "3 is no list"),
        ("s.json", "[true]", "True is no layer number"),
        ("s.json", "[1.5]", "1.5 is no layer number"),
        ("s.yaml", "merge_method: slerp", "no mergekit recipe"),
        ("s.yaml", MERGE.format(end=3, other="a", start=2), "in order, none twice"),
        ("s.yaml", MERGE.format(end=3, other="b", start=4), "merges 2 models"),
        ("s.yaml", MERGE.format(end=3, other="a", start=6), ""),
        ("s.yaml", "slices: []", "merges 0 models"),
    ],
)
def test_what_cannot_be_meant_is_refused(name, text, reason, tmp_path):
    path = written(tmp_path, name, text)
    if not reason:
        assert [s.removed for s in read_sets(path, LAYERS)] == [(3, 4, 5)]
        return
    with pytest.raises(InputError, match=reason) as caught:
        read_sets(path, LAYERS)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["0110", "0120111", "", "abcdef"])
def test_masks_of_another_form_are_refused(text):
    with pytest.raises(InputError, match="is no mask of 6 layers"):
        mask_set(text, LAYERS, "--mask")


def test_a_plan_says_which_layers_its_players_are(tmp_path):
    entry = {
        "num_removed": 1,
        "removed": [1],
        "source": "search",
        "calibration_ppl": 9.0,
        "predicted_ppl": None,
        "heldout_ppl": None,
        "candidates": [],
    }
    plan = {
        "model": "m",
        "model_hash": "h",
        "num_players": LAYERS,
        "players": [{"index": i, "layer": LAYERS - 1 - i, "part": "layer"} for i in range(LAYERS)],
        "utility": "ppl_ratio",
        "masks_scored": 9,
        "heldout_masks": 0,
        "full_calibration_ppl": 8.0,
        "full_heldout_ppl": None,
        "plans": [entry],
        "format": 1,
    }
    path = written(tmp_path, "plan.json", json.dumps(plan))
    assert read_sets(path, LAYERS) == [LayerSet("plan -1", (LAYERS - 2,))]
    plan["players"][3]["part"] = "mlp"
    path = written(tmp_path, "plan.json", json.dumps(plan))
    with pytest.raises(InputError, match="player 3 is part 'mlp' of layer 2"):
        read_sets(path, LAYERS)


def test_a_missing_file_is_named(tmp_path):
    for name in ("no.txt", "no.json", "no.yaml"):
        with pytest.raises(InputError, match="does not exist"):
            read_sets(tmp_path / name, LAYERS)
    with pytest.raises(InputError, match="layer -1"):
        layer_set("s", [-1], LAYERS, "--removed")
