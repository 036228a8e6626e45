"""Files of sets, from plans and from other tools; what may be meant in two ways is refused."""

from __future__ import annotations

import json

import pytest

from lpserve.errors import InputError
from lpserve.export.mergekit import mergekit_yaml
from lpserve.export.pruned_config import prune_config
from lpserve.model.checkpoint import read_checkpoint
from lpserve.plan.layer_sets import LayerSet
from lpserve.plan.set_files import read_sets
from lpserve.testing.checkpoints import write_headers
from lpserve.testing.reference import save_model, small_config

LAYERS = 6


def written(tmp_path, name: str, text: str):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        *("2,4", "[4, 2]", "(2 4)", "# EvoPress\n\n 4 2  # two of them\n"),
        *("2;4", "\ufeff2,4", "2.0, 4", "2,4\r\n", "{2, 4}"),
    ],
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
    assert read_sets(path, LAYERS) == [LayerSet("layer_drop_config", (1, "3.mlp", 4))]
    words[0] = "attn"
    path = written(tmp_path, "layer_drop_config.txt", "\n".join(words) + "\n")
    (found,) = read_sets(path, LAYERS)
    assert found.removed == ("0.attention", 1, "3.mlp", 4)


def test_block_configs_of_puzzletron(tmp_path):
    blocks: list[dict] = [{"attention": {"no_op": False}, "ffn": {"no_op": False}}] * LAYERS
    blocks[2] = {"attention": {"no_op": True}, "ffn": {"ffn_mult": 2.5}}
    blocks[4] = {"attention": {"no_op": True}, "ffn": {"no_op": True}}
    path = written(tmp_path, "config.json", json.dumps({"block_configs": blocks}))
    assert read_sets(path, LAYERS) == [LayerSet("config", ("2.attention", 4))]
    blocks[1] = {"attention": {"replace_with_linear": True}, "ffn": {}}
    for content, words in (
        (blocks, "the attention of layer 1 is replaced, not removed"),
        (blocks[:3], "block_configs speaks of 3 layers; the model has 6"),
        ({}, "block_configs: expected"),
    ):
        path = written(tmp_path, "config.json", json.dumps({"block_configs": content}))
        with pytest.raises(InputError, match=words):
            read_sets(path, LAYERS)


def test_lists_may_name_parts(tmp_path):
    path = written(tmp_path, "s.txt", "some: 3, 0.attention 5.mlp\n")
    assert read_sets(path, LAYERS) == [LayerSet("some", ("0.attention", 3, "5.mlp"))]
    path = written(tmp_path, "s.json", '["2.mlp", 4]')
    assert read_sets(path, LAYERS) == [LayerSet("-2.mlp,4", ("2.mlp", 4))]


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
        ("s.txt", "3:5", "may be a range, or a set named '3' that removes 5"),
        ("s.txt", "[1:3]", "may be a range"),
        ("s.txt", "[1, 3)", "brackets of .* do not match"),
        ("s.txt", "ours: 1-3", "'1-3' may be a range"),
        ("s.txt", "1..3", "may be a range"),
        ("s.txt", "Pruning order: 5, 2, 0, 1, 4, 3", "removes every layer"),
        ("s.txt", "attn.3, mlp.2", "'attn.3' names no layer: write 7.attention"),
        ("s.txt", "011011", "may be a mask: give it by --mask"),
        ("s.txt", "[0, 1, 0, 1, 1, 0]", "is a mask, and layer numbers are needed"),
        ("s.txt", "1, 2, 6", "counted from 1"),
        ("s.txt", "03", "is no list of layer numbers"),
        ("s.txt", "1.5", "is no list of layer numbers"),
        ("s.json", "[0, 1, 2, 3, 4, 5]", "removes every layer"),
        ("s.json", '["a"]', "'a' is no layer number"),
        ("s.json", "[" * 100_000, "is no JSON|nested more"),
        ("s.txt", "# nothing\n", "holds no set"),
        ("s.txt", "none\nattn+mlp", "speaks of 2 layers; the model has 6"),
        ("s.json", "{", "is no JSON|nested more"),
        ("s.json", '{"a": 3}', "3 is no list"),
        ("s.json", "[true]", "True is no layer number"),
        ("s.json", "[1.5]", "1.5 is no layer number"),
        ("s.yaml", "merge_method: slerp", "no mergekit recipe"),
        ("s.yaml", MERGE.format(end=3, other="a", start=2), "in order, none twice"),
        ("s.yaml", MERGE.format(end=3, other="b", start=4), "merges 2 models"),
        ("s.yaml", MERGE.format(end=3, other="a", start=6), ""),
        ("s.yaml", "slices: []", "merges 0 models"),
        ("s.yaml", MERGE.format(end=3, other="a", start="-.inf"), "no mergekit recipe"),
        ("s.yaml", MERGE.format(end=10**13, other="a", start=2), "a layer_range beyond 10,000"),
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
    plan["plans"][0]["removed"] = [3]
    path = written(tmp_path, "plan.json", json.dumps(plan))
    assert read_sets(path, LAYERS) == [LayerSet("plan -1", ("2.mlp",))]


def test_assignments_of_a_shell_are_named_sets(tmp_path):
    text = 'export REPLACED_LAYERS="4,2"\nOTHERS = 1\n'
    assert read_sets(written(tmp_path, "s.sh", text), LAYERS) == [
        LayerSet("REPLACED_LAYERS", (2, 4)),
        LayerSet("OTHERS", (1,)),
    ]


@pytest.mark.parametrize("text", ["[3.0, 1]", '["3", "1"]', "\ufeff[3, 1]"])
def test_numbers_of_json_in_other_spellings(text, tmp_path):
    path = written(tmp_path, "s.json", text)
    assert [s.removed for s in read_sets(path, LAYERS)] == [(1, 3)]


@pytest.mark.parametrize(
    "words", [["None", "ATTN+MLP"], ["none", "mlp+attn"], ["none", "attn + mlp"]]
)
def test_evopress_words_in_other_spellings(words, tmp_path):
    text = "\ufeff" + "\n".join([words[0], words[1], *[words[0]] * 4])
    assert read_sets(written(tmp_path, "drop.txt", text), LAYERS) == [LayerSet("drop", (1,))]


def test_a_file_in_utf_16_is_named_for_what_it_is(tmp_path):
    path = tmp_path / "s.txt"
    path.write_text("1, 2", encoding="utf-16")
    with pytest.raises(InputError, match="is UTF-16: save it as UTF-8"):
        read_sets(path, LAYERS)


RECIPE = """
merge_method: {method}
slices:
- sources:
  - model: {model}
    layer_range: {first}
{extra}
- sources:
  - model: {model}
    layer_range: [4, 6]
"""


def recipe(method="passthrough", model="a", first="[0, 3]", extra="") -> str:
    return RECIPE.format(method=method, model=model, first=first, extra=extra)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (recipe(extra="    parameters: {scale: [{filter: o_proj, value: 0}]}"), "parameters"),
        (recipe(extra="  parameters: {scale: 0}"), "parameters"),
        (recipe() + "parameters: {scale: 0}\n", "parameters"),
        (recipe(model="a+lora"), "an adapter"),
        (recipe(model="{model: a, lora: b}"), "an adapter"),
        (recipe(extra="    lora: b"), "lora"),
        (recipe(method="slerp"), "merges by 'slerp'"),
        (recipe(first="[-3, 3]"), "begins below 0"),
        (recipe(first="[0, 4]"), "keeps every layer"),
    ],
)
def test_a_recipe_that_does_more_than_leave_layers_out_is_refused(text, told, tmp_path):
    assert [s.removed for s in read_sets(written(tmp_path, "r.yaml", recipe()), LAYERS)] == [(3,)]
    with pytest.raises(InputError, match=told):
        read_sets(written(tmp_path, "s.yaml", text), LAYERS)


def test_a_recipe_for_a_model_of_another_depth_is_refused_where_that_is_at_hand(tmp_path):
    model = write_headers(tmp_path / "m", {"num_hidden_layers": 8}, {"layers.0.w": [1]})
    with pytest.raises(InputError, match="of 8 layers; this model has 6"):
        read_sets(written(tmp_path, "s.yaml", recipe(model=str(model))), LAYERS)


def test_a_missing_file_is_named(tmp_path):
    for name in ("no.txt", "no.json", "no.yaml"):
        with pytest.raises(InputError, match="does not exist"):
            read_sets(tmp_path / name, LAYERS)
