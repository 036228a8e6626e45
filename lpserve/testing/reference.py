"""Slow, obvious references that the fast paths are held against."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from lpserve.model.players import ATTENTION, MLP
from lpserve.types import Player

SPREAD = 100 * 1e-5
"""Scores of different masks must differ by at least 100 x the parity tolerance."""


def small_config(family: str, num_layers: int = 6) -> PretrainedConfig:
    """Tiny configurations; head size 32, vocabulary 97, positions for 64 tokens."""
    import transformers as tf

    common: dict[str, Any] = {
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
            **common,
            sliding_window=9,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
            query_pre_attn_scalar=32,
        )
    if family == "gpt2":
        return tf.GPT2Config(
            n_embd=64,
            n_layer=num_layers,
            n_head=2,
            n_positions=64,
            vocab_size=97,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=1,
        )
    return _more_families(family, common)


def _more_families(family: str, common: dict[str, Any]) -> PretrainedConfig:
    import transformers as tf

    layers = common["num_hidden_layers"]
    plain = {k: v for k, v in common.items() if k != "head_dim"}
    if family == "llama-mha":
        return tf.LlamaConfig(**{**common, "num_key_value_heads": 2})
    if family == "qwen2":
        return tf.Qwen2Config(**plain)
    if family == "gemma3":
        return tf.Gemma3TextConfig(
            **common,
            sliding_window=9,
            query_pre_attn_scalar=32,
            layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        )
    if family == "opt":
        return tf.OPTConfig(
            hidden_size=64,
            ffn_dim=96,
            num_hidden_layers=layers,
            num_attention_heads=2,
            vocab_size=97,
            max_position_embeddings=64,
            init_std=0.15,
            word_embed_proj_dim=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            dropout=0.0,
        )
    if family == "gpt-neox":
        return tf.GPTNeoXConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=2,
            vocab_size=97,
            max_position_embeddings=64,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=1,
        )
    if family == "phi3":
        return tf.Phi3Config(**plain)
    if family == "olmo2":
        return tf.Olmo2Config(**plain)
    if family == "cohere":
        return tf.CohereConfig(**plain, logit_scale=0.5)
    if family == "stablelm":
        return tf.StableLmConfig(**plain)
    return _families_of_experts(family, common)


def _families_of_experts(family: str, common: dict[str, Any]) -> PretrainedConfig:
    import transformers as tf

    experts: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}
    if family == "mixtral":
        return tf.MixtralConfig(**common, num_local_experts=4, **experts)
    if family == "qwen3-moe":
        return tf.Qwen3MoeConfig(
            **common,
            num_experts=4,
            moe_intermediate_size=48,
            decoder_sparse_step=1,
            norm_topk_prob=True,
            **experts,
        )
    if family == "gpt-oss":
        return tf.GptOssConfig(
            **common,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=9,
            rope_parameters={
                "rope_type": "yarn",
                "factor": 2.0,
                "rope_theta": 10000.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        )
    if family == "deepseek-v2":
        return tf.DeepseekV2Config(
            **{k: v for k, v in common.items() if k not in ("head_dim", "num_key_value_heads")},
            num_key_value_heads=2,
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_nope_head_dim=32,
            qk_rope_head_dim=64,
            v_head_dim=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            n_shared_experts=1,
        )
    return _alibi_families(family, common["num_hidden_layers"])


def _alibi_families(family: str, layers: int) -> PretrainedConfig:
    import transformers as tf

    if family == "bloom":
        return tf.BloomConfig(
            hidden_size=64,
            n_layer=layers,
            n_head=2,
            vocab_size=97,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=1,
        )
    if family == "falcon":
        return tf.FalconConfig(
            hidden_size=64,
            num_hidden_layers=layers,
            num_attention_heads=2,
            vocab_size=97,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=1,
            alibi=True,
            bias=True,
        )
    raise ValueError(family)


VLLM_FAMILIES = (
    "llama",
    "llama-mha",
    "qwen2",
    "qwen3",
    "mistral-window",
    "gemma2",
    "gemma3",
    "opt",
    "gpt2",
    "gpt-neox",
    "phi3",
    "mixtral",
    "qwen3-moe",
    "cohere",
    "gpt-oss",
    "bloom",
    "olmo2",
    "deepseek-v2",
    "stablelm",
)
"""Attention of these, beyond plain: q/k norms, windows, soft caps, sinks, ALiBi, latent (MLA)."""


FAMILIES = ("llama", "qwen3", "mistral-window", "gemma2", "gpt2")


def save_model(config: PretrainedConfig, path: Path, seed: int, **save: object) -> Path:
    """A random float32 model on disk. Norm weights are drawn too, so that they matter.

    So is the padding token's embedding, which transformers makes zero: a window that begins with
    that token would have a state of zero after any layers: no direction, and all logits equal.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
        embeddings: Any = model.get_input_embeddings()
        if embeddings.padding_idx is not None:
            embeddings.weight[embeddings.padding_idx].normal_(0.0, float(embeddings.weight.std()))
    model.save_pretrained(path, **save)
    return path


def quantize_int8(path: Path, target: Path) -> Path:
    """A copy with the layers' weights in int8 and activations rounded to int8 as they come
    (compressed-tensors, W8A8)."""
    shutil.copytree(path, target)
    tensors = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if ".layers." in name and name.endswith("proj.weight"):
            scale = weight.abs().amax(1, keepdim=True) / 127
            tensors[name] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def decoder_list(model: Any) -> tuple[Any, str]:
    """The module that owns the decoder layers, and the name of the list in it."""
    inner = getattr(model.base_model, "decoder", model.base_model)
    return inner, next(name for name in ("layers", "h", "blocks") if hasattr(inner, name))


def reference_model(path: Path) -> Any:
    """transformers' own model; written-out attention, since SDPA drops Gemma-2's soft cap."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


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


_PARTS = {
    "gpt2": ("attn", "mlp"),
    "opt": ("self_attn", "fc2"),
    "gpt-neox": ("attention", "mlp"),
    "bloom": ("self_attention", "mlp"),
    "falcon": ("self_attention", "mlp"),
}
"""Family -> the modules of a layer whose output is its attention, its feed-forward part."""


@contextmanager
def with_parts_zeroed(
    model: Any, family: str, players: Sequence[Player], mask_P: np.ndarray
) -> Iterator[Any]:
    """The model itself, whose dropped halves return zero (Bloom's add the residual: they return
    that)."""

    def absent(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        whole = output if isinstance(output, tuple) else (output,)
        nothing = args[1] if family == "bloom" else torch.zeros_like(whole[0])
        return (nothing, *whole[1:]) if isinstance(output, tuple) else nothing

    owner, name = decoder_list(model)
    attention, mlp = _PARTS.get(family, ("self_attn", "mlp"))
    modules = {ATTENTION: attention, MLP: mlp}
    handles = [
        getattr(getattr(owner, name)[player.layer], modules[player.part]).register_forward_hook(
            absent, with_kwargs=True
        )
        for player, kept in zip(players, mask_P, strict=True)
        if not kept
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


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


def slow_but(names: Iterable[str], *fast: str, mark: str = "slow") -> list[Any]:
    """Parameters of which all but `fast` make slow tests, or tests of another mark."""
    import pytest

    return [n if n in fast else pytest.param(n, marks=getattr(pytest.mark, mark)) for n in names]
