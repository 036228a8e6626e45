"""Checkpoints of any size that are headers alone, and small models whose layers are called in other
ways than Llama's."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf


def write_headers(folder: Path, config: dict[str, Any], tensors: dict[str, list[int]]) -> Path:
    """A checkpoint whose data is a hole in the file: headers of any size, no bytes on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def llama_headers(
    folder: Path, layers: int, width: int, ffn: int, vocab: int, heads: int, kv: int
) -> Path:
    """Headers of a Llama of this shape, head size width / heads, output not tied."""
    tensors = {"model.embed_tokens.weight": [vocab, width], "lm_head.weight": [vocab, width]}
    small = width // heads * kv
    for i in range(layers):
        shapes = {
            "self_attn.q_proj": [width, width],
            "self_attn.k_proj": [small, width],
            "self_attn.v_proj": [small, width],
            "self_attn.o_proj": [width, width],
            "mlp.gate_proj": [ffn, width],
            "mlp.up_proj": [ffn, width],
            "mlp.down_proj": [width, ffn],
            "input_layernorm": [width],
        }
        tensors |= {f"model.layers.{i}.{n}.weight": s for n, s in shapes.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
    }
    return write_headers(folder, config, tensors)


PLAYERS, VOCABULARY = 4, 97
TYPES = ["sliding_attention", "full_attention"] * 2
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": PLAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA_3N: dict[str, Any] = {
    **TEXT,
    "layer_types": TYPES,
    "sliding_window": 8,
    "laurel_rank": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "altup_num_inputs": 2,
}


def zamba2_config() -> Any:
    """Hands every layer the embedding of the text."""
    return tf.Zamba2Config(
        **{**TEXT, "num_key_value_heads": 2},
        layers_block_type=["linear_attention", "hybrid"] * 2,
        mamba_d_state=8,
        mamba_ngroups=1,
        n_mamba_heads=2,
        chunk_size=8,
    )


def gemma_3n_config() -> Any:
    """Keeps four states to a token, their axis first; its layers take a part of the embedding."""
    return tf.Gemma3nTextConfig(**GEMMA_3N, num_kv_shared_layers=0)


def qwen2_vl_config() -> Any:
    """A decoder inside a model that reads pictures."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    return tf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)


def save_random(config: Any, path: Any, seed: int) -> Any:
    """A random float32 model of a config, in memory; and saved. Norms and biases matter, too."""
    torch.manual_seed(seed)
    if "Conditional" in (name := _class_name(config)):
        model: Any = getattr(tf, name)(config)
    else:
        model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(path)
    return model


def _class_name(config: Any) -> str:
    return "Qwen2VLForConditionalGeneration" if config.model_type == "qwen2_vl" else ""


GGUF_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
"""Of the model that `write_gguf` writes, as transformers names them."""


def write_gguf(path: Path, rng: np.random.Generator, architecture: str = "llama") -> dict[str, Any]:
    """A small random model; returns what its tensors hold once dequantized, by GGUF's names."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    packing = gguf.GGMLQuantizationType.Q4_1
    width, inner, layers, heads, kv_heads, vocabulary, positions, _ = GGUF_SIZES.values()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(positions)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, "hi", *(f"<{i}>" for i in range(len(letters) + 1, vocabulary))]
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
        packed = gguf.quants.quantize(values, packing)
        kept[name] = gguf.quants.dequantize(packed, packing)
        writer.add_tensor(name, packed, raw_dtype=packing)

    add("token_embd.weight", vocabulary, width)
    add("output.weight", vocabulary, width)
    add("output_norm.weight", width)
    size = width // heads
    for layer in range(layers):
        for name, rows in (("q", width), ("k", kv_heads * size), ("v", kv_heads * size)):
            add(f"blk.{layer}.attn_{name}.weight", rows, width)
        add(f"blk.{layer}.attn_output.weight", width, width)
        for name in ("gate", "up"):
            add(f"blk.{layer}.ffn_{name}.weight", inner, width)
        add(f"blk.{layer}.ffn_down.weight", width, inner)
        add(f"blk.{layer}.attn_norm.weight", width)
        add(f"blk.{layer}.ffn_norm.weight", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept
