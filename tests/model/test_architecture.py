"""One reading of a config: the names that model families use, nested configs, what is left out."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from lpserve.errors import InputError
from lpserve.model.architecture import (
    Architecture,
    find_layer_prefix,
    read_architecture,
    required,
)
from lpserve.model.checkpoint import read_checkpoint
from lpserve.testing.reference import small_config

LLAMA = {
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}


def write_model(folder: Path, names: list[str], config: dict | None = None) -> Path:
    """A checkpoint of tensors of two bytes each."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    header = {
        name: {"dtype": "BF16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(2 * len(names))
    (folder / "model.safetensors").write_bytes(data)
    return folder


def test_families_that_name_the_same_quantities_differently_read_alike():
    gpt2 = {
        "n_layer": 6,
        "n_head": 4,
        "n_embd": 64,
        "vocab_size": 97,
        "n_positions": 128,
        "num_key_value_heads": 2,
    }
    ours, other = Architecture.from_config(LLAMA), Architecture.from_config(gpt2)
    names = ("num_layers", "num_heads", "num_kv_heads", "head_size", "width", "vocab_size")
    assert [getattr(ours, n) for n in names] == [6, 4, 2, 16, 64, 97]
    assert [getattr(other, n) for n in names] == [6, 4, 2, 16, 64, 97]
    assert (ours.max_positions, ours.positions_key) == (128, "max_position_embeddings")
    assert (other.max_positions, other.positions_key) == (128, "n_positions")


def test_the_language_model_of_a_nested_config_counts_and_gaps_are_filled_from_outside():
    nested = {
        "vocab_size": 500,
        "num_hidden_layers": 3,
        "text_config": LLAMA | {"vocab_size": None},
    }
    found = Architecture.from_config(nested)
    assert found.num_layers == 6
    assert found.vocab_size == 500


def test_the_lowest_of_several_bounds_on_positions_holds():
    found = Architecture.from_config(LLAMA | {"n_positions": 64})
    assert (found.max_positions, found.positions_key) == (64, "n_positions")
    assert Architecture.from_config({}).max_positions is None


def test_a_quantity_that_is_left_out_is_an_error_only_where_it_is_needed():
    found = Architecture.from_config({"num_hidden_layers": "6", "num_attention_heads": True})
    assert found.num_layers is None
    assert found.num_heads is None
    with pytest.raises(InputError, match=r"config\.json names no num_hidden_layers"):
        required(found.num_layers, "num_hidden_layers")


def test_soft_capped_scores_need_the_eager_attention_of_transformers():
    assert Architecture.from_config(small_config("gemma2").to_dict()).attention == "eager"
    assert Architecture.from_config(small_config("llama").to_dict()).attention is None


def test_layers_are_found_by_their_numbers_and_an_ambiguous_list_needs_a_name(tmp_path):
    names = [f"model.layers.{i}.w" for i in range(3)] + ["embed.w", "model.layers.1.experts.0.w"]
    checkpoint = read_checkpoint(write_model(tmp_path / "a", names))
    assert find_layer_prefix(checkpoint, 3) == "model.layers."
    assert find_layer_prefix(checkpoint, 3, "layers") == "model.layers."
    with pytest.raises(InputError, match="0 numbered lists"):
        find_layer_prefix(checkpoint, 4)
    both = names + [f"vision.blocks.{i}.w" for i in range(3)]
    checkpoint = read_checkpoint(write_model(tmp_path / "b", both))
    with pytest.raises(InputError, match="2 numbered lists"):
        find_layer_prefix(checkpoint, 3)
    assert find_layer_prefix(checkpoint, 3, "layers") == "model.layers."


def test_a_checkpoint_that_changes_is_read_again(tmp_path):
    folder = write_model(tmp_path / "m", ["layers.0.w"], LLAMA)
    first = read_checkpoint(folder)
    assert read_architecture(first).num_layers == 6
    assert [t.name for t in first.tensors] == ["layers.0.w"]
    write_model(folder, ["layers.9.w"], LLAMA | {"num_hidden_layers": 7})
    shard = folder / "model.safetensors"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1_000_000))
    again = read_checkpoint(folder)
    assert read_architecture(again).num_layers == 7
    assert [t.name for t in again.tensors] == ["layers.9.w"]
