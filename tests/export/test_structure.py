"""Exports of models whose config is not Llama's: shared weights, kinds of layers, what fails."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from lpserve.errors import InputError
from lpserve.export.export import export_checkpoint
from lpserve.export.pruned_config import prune_config
from lpserve.model.checkpoint import read_checkpoint
from lpserve.testing.checkpoints import (
    PLAYERS,
    TEXT,
    gemma_3n_config,
    qwen2_vl_config,
    save_random,
    zamba2_config,
)
from tests.conftest import SEED


@pytest.mark.process
def test_a_shared_weight_that_a_removed_layer_stores_moves_to_one_that_stays(tmp_path):
    config = tf.ZambaConfig(
        **{**TEXT, "num_key_value_heads": 2, "num_hidden_layers": 6},
        layers_block_type=["linear_attention", "hybrid"] * 3,
        mamba_d_state=8,
        n_mamba_heads=2,
        mamba_dt_rank=4,
    )
    save_random(config, tmp_path / "model", SEED)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert any(name.startswith("model.layers.1.shared_transf") for name in stored)
    assert not any(name.startswith("model.layers.3.shared_transf") for name in stored)
    report = export_checkpoint(tmp_path / "model", [1], tmp_path / "out")
    assert report.verified
    assert report.generates
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.startswith("model.layers.2.shared_transf") for name in pruned)


@pytest.mark.process
def test_the_text_part_of_a_model_that_reads_pictures_is_pruned_alone(tmp_path):
    save_random(qwen2_vl_config(), tmp_path / "model", SEED)
    assert export_checkpoint(tmp_path / "model", [0, 2], tmp_path / "out").verified
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    seen = {name for name in before if "visual" in name}
    assert seen
    assert all(torch.equal(before[name], after[name]) for name in seen)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == PLAYERS - 2


def jamba() -> Any:
    return tf.JambaConfig(
        **{**TEXT, "num_hidden_layers": 6},
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=8,
        mamba_dt_rank=4,
    )


def recurrent_gemma() -> Any:
    return tf.RecurrentGemmaConfig(
        **{**TEXT, "num_hidden_layers": 6},
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "recurrent", "attention"],
    )


def test_periods_and_patterns_of_layers_follow_the_kept_ones(tmp_path):
    save_random(jamba(), tmp_path / "jamba", SEED)
    config = prune_config(read_checkpoint(tmp_path / "jamba"), [0, 3]).config
    assert (config["attn_layer_period"], config["attn_layer_offset"]) == (2, 0)
    save_random(recurrent_gemma(), tmp_path / "gemma", SEED)
    config = prune_config(read_checkpoint(tmp_path / "gemma"), [1, 5]).config
    assert config["block_types"] == ["recurrent", "attention", "recurrent", "recurrent"]


def nemotron() -> Any:
    kinds = ["linear_attention", "mlp", "full_attention", "mlp"]
    return tf.NemotronHConfig(
        **{k: v for k, v in TEXT.items() if k != "num_hidden_layers"},
        layers_block_type=kinds,
        mamba_num_heads=2,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
    )


def diff_llama() -> Any:
    return tf.DiffLlamaConfig(**{**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2})


@pytest.mark.parametrize(
    ("config", "removed", "reason"),
    [
        (nemotron, [2], "could not generate with a cache"),
        (diff_llama, [1], r"layer 2 cannot stand at position 1: self_attn.lambda_init differs"),
        (
            gemma_3n_config,
            [1],
            "embed_tokens_per_layer.weight has shape .* a part for each",
        ),
        (jamba, [1], "layer 2 cannot stand at position 1: feed_forward differs"),
        (zamba2_config, [1], "cannot be exported without layers"),
    ],
)
def test_what_no_config_can_say_is_refused(config, removed, reason, tmp_path):
    torch.manual_seed(SEED)
    tf.AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=reason):
        prune_config(read_checkpoint(tmp_path / "model"), removed)
