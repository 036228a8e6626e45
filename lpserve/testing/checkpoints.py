"""Checkpoints of any size that are headers alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np


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
