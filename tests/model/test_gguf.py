"""GGUF files: scored as their dequantized weights say, and damaged ones refused in one line."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

import lpserve
from lpserve.cli.entry import main
from lpserve.data.tokenizer import load_tokenizer
from lpserve.errors import DataWarning, InputError
from lpserve.inputs.documents import read_json_object
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.gguf import gguf_record, readable_folder
from lpserve.model.gguf_header import tensor_types
from lpserve.testing.reference import window_nll, with_layers_deleted

NUM_LAYERS, WIDTH, HEADS, KV_HEADS, INNER, VOCABULARY = 4, 64, 2, 1, 96, 300
PIECE = gguf.GGMLQuantizationType.Q4_1


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def write_gguf(path: Path, rng: np.random.Generator, architecture: str = "llama") -> dict[str, Any]:
    """A small random model; returns what its tensors hold once dequantized, by GGUF's names."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, "hi", *(f"<{i}>" for i in range(len(letters) + 1, VOCABULARY))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_merges(["h i"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    kept: dict[str, Any] = {}

    def add(name: str, *shape: int) -> None:
        values = rng.normal(0, 0.15, shape).astype(np.float32)
        if len(shape) == 1:  # norms stay as they are
            kept[name] = values + 1
            writer.add_tensor(name, kept[name])
            return
        packed = gguf.quants.quantize(values, PIECE)
        kept[name] = gguf.quants.dequantize(packed, PIECE)
        writer.add_tensor(name, packed, raw_dtype=PIECE)

    add("token_embd.weight", VOCABULARY, WIDTH)
    add("output.weight", VOCABULARY, WIDTH)
    add("output_norm.weight", WIDTH)
    size = WIDTH // HEADS
    for layer in range(NUM_LAYERS):
        for name, rows in (("q", WIDTH), ("k", KV_HEADS * size), ("v", KV_HEADS * size)):
            add(f"blk.{layer}.attn_{name}.weight", rows, WIDTH)
        add(f"blk.{layer}.attn_output.weight", WIDTH, WIDTH)
        for name in ("gate", "up"):
            add(f"blk.{layer}.ffn_{name}.weight", INNER, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, INNER)
        add(f"blk.{layer}.attn_norm.weight", WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def reference(kept: dict[str, Any]) -> Any:
    """The model by hand: GGUF interleaves the halves of rotary heads, transformers does not."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
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
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(part)
        if heads:
            split = values.reshape(heads, values.shape[0] // heads // 2, 2, WIDTH)
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
    assert record["types"] == {"F32": 2 * NUM_LAYERS + 1, "Q4_1": 7 * NUM_LAYERS + 2}
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
