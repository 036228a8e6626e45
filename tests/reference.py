"""Slow, obvious references that the fast paths are held against."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

SPREAD = 100 * 1e-5
"""Scores of different masks must differ by at least 100 x the parity tolerance."""


def small_config(family: str, num_layers: int = 6) -> PretrainedConfig:
    """Tiny configurations; head size 32, vocabulary 97, positions for 64 tokens."""
    import transformers as tf

    common = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "llama":
        return tf.LlamaConfig(**common)
    if family == "qwen3":
        return tf.Qwen3Config(**common)
    if family == "mistral-window":
        return tf.MistralConfig(**common, sliding_window=11)
    if family == "gemma2":
        return tf.Gemma2Config(
            **common, sliding_window=9, attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
            query_pre_attn_scalar=32,
        )  # fmt: skip
    if family == "gpt2":
        return tf.GPT2Config(
            n_embd=64, n_layer=num_layers, n_head=2, n_positions=64, vocab_size=97,
            initializer_range=0.15, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
    raise ValueError(family)


FAMILIES = ("llama", "qwen3", "mistral-window", "gemma2", "gpt2")


def save_model(config: PretrainedConfig, path: Path, seed: int, **save: object) -> Path:
    """A random float32 model on disk. Norm weights are drawn too, so that they matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
    model.save_pretrained(path, **save)
    return path


def decoder_list(model: Any) -> tuple[Any, str]:
    """The module that owns the decoder layers, and the name of the list in it."""
    inner = model.base_model
    return (inner, "h") if hasattr(inner, "h") else (inner, "layers")


def with_layers_deleted(model: Any, mask_P: np.ndarray) -> Any:
    """A deep copy whose dropped layers are deleted together with their per-layer config entries."""
    pruned = copy.deepcopy(model)
    owner, name = decoder_list(pruned)
    kept = [layer for layer, keep in zip(getattr(owner, name), mask_P, strict=True) if keep]
    setattr(owner, name, torch.nn.ModuleList(kept))
    pruned.config.num_hidden_layers = len(kept)
    if getattr(pruned.config, "layer_types", None) is not None:
        types = [t for t, keep in zip(pruned.config.layer_types, mask_P, strict=True) if keep]
        pruned.config.layer_types = types
    return pruned


@torch.inference_mode()
def window_nll(model: torch.nn.Module, tokens_NT: np.ndarray, scored_NT: np.ndarray) -> np.ndarray:
    """float64[N]: nats of every window, one at a time, padding cut off."""
    sums = []
    for tokens_T, scored_T in zip(tokens_NT, scored_NT, strict=True):
        length = int(np.flatnonzero(scored_T)[-1]) + 1
        ids = torch.from_numpy(tokens_T[None, :length].astype(np.int64))
        logits = model(input_ids=ids, use_cache=False).logits[0]
        log_probs = logits.double().log_softmax(-1)
        positions = np.flatnonzero(scored_T)
        sums.append(-sum(float(log_probs[p - 1, int(tokens_T[p])]) for p in positions))
    return np.array(sums)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest relative difference."""
    return float((np.abs(got - expected) / np.abs(expected)).max())
