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
