"""Folders of which transformers and vLLM would load other weights than each other are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from lpserve.errors import InputError
from lpserve.model.architecture import check_decoder
from lpserve.model.checkpoint import INDEX_NAME, read_checkpoint
from lpserve.testing.checkpoints import write_headers

LLAMA = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
LAYERS = {f"model.layers.{i}.w": [4] for i in range(2)}


def write_sharded(folder: Path) -> Path:
    """Two shards and their index."""
    for i, name in enumerate(LAYERS):
        write_headers(folder, LLAMA, {name: LAYERS[name]})
        (folder / "model.safetensors").rename(folder / f"model-{i}.safetensors")
    weight_map = {name: f"model-{i}.safetensors" for i, name in enumerate(LAYERS)}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refused(folder: Path, *words: str) -> None:
    """The refusal is one line that holds all the words."""
    with pytest.raises(InputError) as caught:
        read_checkpoint(folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_file_of_all_weights_beside_shards_and_their_index_is_refused(tmp_path):
    folder = write_sharded(tmp_path / "m")
    assert [shard.name for shard in read_checkpoint(folder).shards] == [
        "model-0.safetensors",
        "model-1.safetensors",
    ]
    shutil.copy(folder / "model-0.safetensors", folder / "model.safetensors")
    refused(folder, "model.safetensors and", INDEX_NAME, "move the other")


def test_an_index_that_names_the_one_file_is_read(tmp_path):
    folder = write_headers(tmp_path / "m", LLAMA, LAYERS)
    weight_map = dict.fromkeys(LAYERS, "model.safetensors")
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert len(read_checkpoint(folder).tensors) == 2


def test_another_file_of_weights_without_an_index_is_refused(tmp_path):
    folder = write_headers(tmp_path / "m", LLAMA, LAYERS)
    shutil.copy(folder / "model.safetensors", folder / "old.safetensors")
    refused(folder, "old.safetensors and model.safetensors")


@pytest.mark.parametrize("sharded", [False, True])
def test_mistrals_own_files_beside_the_weights_are_left_alone(sharded, tmp_path):
    folder = tmp_path / "m"
    _ = write_sharded(folder) if sharded else write_headers(folder, LLAMA, LAYERS)
    (folder / "consolidated.safetensors").write_bytes(b"")
    assert len(read_checkpoint(folder).tensors) == 2


def test_shards_that_an_index_does_not_name_are_left_alone(tmp_path):
    folder = write_sharded(tmp_path / "m")
    shutil.copy(folder / "model-0.safetensors", folder / "old.safetensors")
    assert len(read_checkpoint(folder).tensors) == 2


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_an_adapter_beside_the_weights_is_refused(name, tmp_path):
    folder = write_headers(tmp_path / "m", LLAMA, LAYERS)
    (folder / name).write_text("{}")
    refused(folder, "holds an adapter", name, "merge it")


def test_weights_that_the_config_names_are_refused_where_they_are_others(tmp_path):
    other = LLAMA | {"transformers_weights": "other.safetensors"}
    folder = write_headers(tmp_path / "m", other, LAYERS)
    refused(folder, "'other.safetensors'", "transformers_weights")
    same = LLAMA | {"transformers_weights": "model.safetensors"}
    assert len(read_checkpoint(write_headers(tmp_path / "n", same, LAYERS)).tensors) == 2


# -- as many layers as the config counts ----------------------------------------------------------


def layers(*numbers: int, prefix: str = "model.layers") -> dict[str, list[int]]:
    return {f"{prefix}.{i}.w": [4] for i in numbers}


def test_layers_that_the_config_does_not_count_are_refused(tmp_path):
    folder = write_headers(tmp_path / "m", LLAMA, layers(0, 1, 2, 3))
    with pytest.raises(InputError, match=re.escape("counts 2 layers, and the files hold model.la")):
        check_decoder(read_checkpoint(folder))


@pytest.mark.parametrize("ahead", [1, 2])
def test_layers_that_predict_further_ahead_are_counted_apart(ahead, tmp_path):
    config = LLAMA | {"num_nextn_predict_layers": ahead}
    check_decoder(read_checkpoint(write_headers(tmp_path / "m", config, layers(0, 1, 2))))
    folder = write_headers(tmp_path / "n", config, layers(*range(3 + ahead)))
    with pytest.raises(InputError, match=f"hold model.layers.{2 + ahead} too"):
        check_decoder(read_checkpoint(folder))


def test_a_longer_list_beside_the_decoders_is_not_taken_for_it(tmp_path):
    both = layers(0, 1) | layers(0, 1, 2, prefix="vision.blocks")
    check_decoder(read_checkpoint(write_headers(tmp_path / "m", LLAMA, both)))
