"""GGUF files: scored as their dequantized weights say, and damaged ones refused in one line."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lpserve
from lpserve.cli.entry import main
from lpserve.data.tokenizer import load_tokenizer
from lpserve.errors import DataWarning, InputError
from lpserve.inputs.documents import read_json_object
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.gguf import gguf_record, readable_folder
from lpserve.model.gguf_header import tensor_types
from lpserve.testing.checkpoints import GGUF_SIZES, write_gguf
from lpserve.testing.reference import window_nll, with_layers_deleted


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def reference(kept: dict[str, Any]) -> Any:
    """The model by hand: GGUF interleaves the halves of rotary heads, transformers does not."""
    config = transformers.LlamaConfig(**GGUF_SIZES, tie_word_embeddings=False)
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {
        "model.embed_tokens.weight": kept["token_embd.weight"],
        "lm_head.weight": kept["output.weight"],
        "model.norm.weight": kept["output_norm.weight"],
    }
    for name, values in kept.items():
        if not name.startswith("blk."):
            continue
        _, layer, part, _ = name.split(".")
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
            part
        )
        if heads:
            split = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
            values = split.swapaxes(1, 2).reshape(values.shape)
        state[f"model.layers.{layer}.{names[part]}.weight"] = values
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict({name: torch.tensor(values) for name, values in state.items()})
    return model


def test_a_gguf_file_scores_and_exports_as_its_dequantized_weights(tmp_path, rng, own_cache):
    file = tmp_path / "small.gguf"
    model = reference(write_gguf(file, rng))
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 250, (3, 24)))
    masks = np.array([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1]], dtype=bool)
    with pytest.warns(DataWarning, match="dequantized to float32"):
        folder = readable_folder(file)
    assert folder.is_relative_to(own_cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)  # the second time there is nothing to do
        assert readable_folder(tmp_path) == folder  # a folder with such a file alone
        with lpserve.open_engine(str(file), windows) as engine:
            scores, info = engine.score(masks), engine.info
        assert load_tokenizer(file)("hi")["input_ids"]
    expected = np.array(
        [
            window_nll(with_layers_deleted(model, mask), windows.tokens_NT, windows.scored_NT)
            for mask in masks
        ]
    )
    np.testing.assert_allclose(scores.nll_MN, expected, rtol=1e-5)
    record = info.settings["dequantized_from"]
    assert record == gguf_record(folder)
    assert record["file"] == str(file)
    assert record["types"] == {"F32": 2 * 4 + 1, "Q4_1": 7 * 4 + 2}
    assert info.model == str(file)
    lpserve.export_checkpoint(file, removed=[1], out=tmp_path / "pruned", verify=False)
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="float32")
    got = window_nll(pruned.eval(), windows.tokens_NT, windows.scored_NT)
    np.testing.assert_allclose(got, expected[2], rtol=1e-5)
    config = read_json_object(tmp_path / "pruned" / "config.json")
    assert "quantization_config" not in config
    # other bytes are another model
    write_gguf(file, rng)
    with pytest.warns(DataWarning):
        assert readable_folder(file) != folder


def test_the_header_says_what_the_library_says(tmp_path, rng):
    file = tmp_path / "small.gguf"
    kept = write_gguf(file, rng)
    types, numbers = tensor_types(file)
    assert sum(types.values()) == len(kept)
    assert numbers == sum(values.size for values in kept.values())


def damaged(data: bytes) -> dict[str, tuple[bytes, str]]:
    key = data.index(b"llama.context_length")
    return {
        "empty": (b"", "it is empty"),
        "text": (b"hello" * 20, "does not begin with GGUF"),
        "magic alone": (b"GGUF", "beyond its end"),
        "version": (data[:4] + struct.pack("<I", 9) + data[8:], "GGUF version 9"),
        "tensors": (data[:8] + struct.pack("<Q", 2**62) + data[16:], "damaged"),
        "keys": (data[:16] + struct.pack("<Q", 2**62) + data[24:], "damaged"),
        "a key's length": (
            data[: key - 8] + struct.pack("<Q", 2**63) + data[key:],
            "its header goes beyond its end",
        ),
        "cut": (data[: len(data) // 2], "cut short"),
        "no tensors": (data[:8] + bytes(8) + data[16:], "holds no tensors"),
    }


@pytest.mark.parametrize("case", damaged(b"GGUF" + bytes(60) + b"llama.context_length"))
def test_damaged_files_are_refused_in_one_line(case, tmp_path, rng, capsys):
    file = tmp_path / "small.gguf"
    write_gguf(file, rng)
    data, words = damaged(file.read_bytes())[case]
    file.write_bytes(data)
    with pytest.raises(InputError, match=words):
        read_checkpoint(file)
    text = tmp_path / "t.txt"
    text.write_text("words " * 500)
    argv = ["run", "--model", str(file), "--calibration", str(text), "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_files_that_transformers_cannot_read_are_refused_with_its_reason(
    tmp_path, rng, monkeypatch, own_cache
):
    file = tmp_path / "small.gguf"
    write_gguf(file, rng, architecture="nobodys")
    with (
        pytest.warns(DataWarning),
        pytest.raises(InputError, match=r"transformers cannot read it: .*nobodys"),
    ):
        read_checkpoint(file)
    assert not [p for p in (own_cache / "lpserve" / "gguf").iterdir() if p.is_dir()]
    with pytest.raises(InputError, match=r"does not exist|no such file"):
        read_checkpoint(tmp_path / "none.gguf")
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"several GGUF files \(other.gguf, small.gguf\)"):
        read_checkpoint(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gguf"):
        read_checkpoint(file)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
@pytest.mark.parametrize("suffix", ["", ".gguf"])
def test_paths_that_no_file_can_have_are_one_line(name, suffix):
    with pytest.raises(InputError, match="cannot be read"):
        read_checkpoint(name + suffix)


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path, rng, monkeypatch, own_cache
):
    file = tmp_path / "small.gguf"
    write_gguf(file, rng)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with (
        pytest.warns(DataWarning),
        pytest.raises(InputError, match="set XDG_CACHE_HOME to a folder with room"),
    ):
        read_checkpoint(file)
    assert not list((own_cache / "lpserve" / "gguf").iterdir())
