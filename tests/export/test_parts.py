"""Checkpoints whose absent halves are zeros, reloaded, against the engine that skips the halves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers as tf
from safetensors.torch import load_file

import lpserve
from lpserve.config import config_from
from lpserve.errors import InputError
from lpserve.export.export import export_checkpoint, export_run
from lpserve.export.parts import part_tensors
from lpserve.masks import without
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.players import ATTENTION, MLP, half_players
from lpserve.testing.checkpoints import save_random
from lpserve.testing.parity import NUM_LAYERS
from lpserve.testing.reference import reference_model, relative, slow_but, window_nll

HALVES = half_players([False] * NUM_LAYERS)
FAMILIES = ("llama", "gemma2", "gpt2", "opt", "gpt-neox", "bloom", "mixtral", "deepseek-v2")


@pytest.mark.process
@pytest.mark.parametrize("family", slow_but(FAMILIES, "opt", "mixtral"))
def test_the_export_scores_what_the_engine_scores_without_the_halves(
    family, model_dir, rng, tmp_path
):
    """Layer 1 goes whole, and of layers 2 and 4 one half each."""
    path, removed = model_dir(family), [2, 3, 4, 9]
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 97, (3, 40)))
    report = export_checkpoint(path, removed, tmp_path / "out", players=HALVES, windows=windows)
    assert (report.verified, report.generates) == (True, True)
    assert (report.removed, report.zeroed) == ([1], ["2.attention", "4.mlp"])
    with lpserve.open_engine(path, windows, players="half") as engine:
        expected = engine.score(without(len(HALVES), removed)[None]).nll_MN[0]
    model = reference_model(tmp_path / "out")
    assert model.config.num_hidden_layers == NUM_LAYERS - 1
    assert relative(window_nll(model, windows.tokens_NT, windows.scored_NT), expected) < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "without 1 of 6 layers and 2 parts of others" in card
    assert "take as much time and memory as before" in card
    assert not (tmp_path / "out" / "mergekit.yaml").exists()
    told = json.loads((tmp_path / "out" / "lpserve_export.json").read_text())
    assert told["zeroed"] == ["2.attention", "4.mlp"]


@pytest.mark.process
@pytest.mark.parametrize("family", slow_but(FAMILIES, "gemma2"))
def test_weights_of_absent_halves_may_be_left_out(family, model_dir, rng, tmp_path):
    """Layer 1 goes whole, and a half of others, the attention of the first layer among them: by its
    cache transformers counts tokens. The export is verified: it scores what the engine scores, and
    generates with a cache as without."""
    path, removed = model_dir(family), [0, 2, 3, 4, 9]
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 97, (3, 40)))
    out = tmp_path / "out"
    report = export_checkpoint(path, removed, out, players=HALVES, windows=windows, slim=True)
    assert (report.verified, report.generates) == (True, True)
    assert report.removed == [1]
    assert (report.zeroed, report.left_out) == ([], ["0.attention", "2.attention", "4.mlp"])
    whole = export_checkpoint(path, removed, tmp_path / "z", players=HALVES, verify=False)
    assert whole.zeroed == report.left_out
    parts = [
        {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        for folder in (out, tmp_path / "z")
    ]
    gone = {name for name in parts[1] if name not in parts[0]}
    assert gone
    for name, tensor in parts[1].items():
        assert not tensor.any() if name in gone else tensor.equal(parts[0][name])
    # as a model like any other: in the engine, and exported once more
    with lpserve.open_engine(out, windows) as engine:
        scored = engine.score(np.ones((1, NUM_LAYERS - 1), dtype=bool)).nll_MN[0]
    with lpserve.open_engine(path, windows, players="half") as engine:
        expected = engine.score(without(len(HALVES), removed)[None]).nll_MN[0]
    assert relative(scored, expected) < 1e-5
    assert export_checkpoint(out, [2], tmp_path / "again", windows=windows).verified
    card = (out / "README.md").read_text()
    assert "import lpserve.hf" in card
    assert "mergekit" not in card


def hybrid(vocab_size, hidden_size, num_hidden_layers):
    """Gated delta nets and attention in turn, each before experts."""
    return tf.Qwen3NextConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"] * (num_hidden_layers // 2),
    )


def state_space(**common):
    return tf.Mamba2Config(
        **common, state_size=16, num_heads=8, head_dim=16, n_groups=2, chunk_size=8, expand=2
    )


def experts(**common):
    return tf.Qwen3MoeConfig(
        **common,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("config", "players", "slim"),
    [
        (state_space, "layer", False),
        (hybrid, "layer", False),
        (hybrid, "half", True),
        pytest.param(experts, "layer", False, marks=pytest.mark.slow),
        pytest.param(experts, "half", True, marks=pytest.mark.slow),
    ],
)
def test_state_space_models_hybrids_and_experts_go_from_a_run_to_an_export_that_generates(
    config, players, slim, rng, tmp_path
):
    """Layer 0 stays: slim exports need a mixer of its kind, by which caches count."""
    made = config(vocab_size=96, hidden_size=64, num_hidden_layers=4)
    save_random(made, tmp_path / "model", 0)
    for name in ("c", "h"):
        np.savez(tmp_path / f"{name}.npz", tokens=rng.integers(1, 96, (4, 24)))
    lpserve.run(
        config_from(
            {
                "model": str(tmp_path / "model"),
                "calibration": str(tmp_path / "c.npz"),
                "heldout": str(tmp_path / "h.npz"),
                "players": players,
                "budget": 30,
                "max_removed": 2,
                "protect": [0],
                "out": str(tmp_path / "run"),
                "progress_s": 100.0,
            },
            "test",
        )
    )
    report = export_run(tmp_path / "run", 2, tmp_path / "out", slim=slim)
    assert (report.verified, report.generates) == (True, True)
    assert report.worst_relative_difference is not None
    assert report.worst_relative_difference < 1e-6
    gone = len(report.removed) * (2 if players == "half" else 1) + len(report.left_out)
    assert gone == 2


@pytest.mark.process
def test_no_layer_need_go_whole(model_dir, tmp_path):
    report = export_checkpoint(model_dir("llama"), [0], tmp_path / "out", players=HALVES)
    assert (report.removed, report.zeroed) == ([], ["0.attention"])
    before = load_file(model_dir("llama") / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name.startswith("model.layers.0.self_attn."):
            assert not tensor.any()
        else:
            assert tensor.equal(before[name])
    with pytest.raises(InputError, match="nothing is removed"):
        export_checkpoint(model_dir("llama"), [], tmp_path / "other", players=HALVES)


def test_files_that_name_modules_otherwise_than_the_class_are_understood_or_refused(model_dir):
    checkpoint = read_checkpoint(model_dir("llama"))
    mlp, attention = HALVES[7], HALVES[6]
    modules = {3: {ATTENTION: ["self_attn"], MLP: ["feed_forward"]}}
    names = part_tensors(checkpoint, "model.layers.", [mlp], modules)
    assert names == {f"model.layers.3.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    modules = {3: {ATTENTION: ["attn"], MLP: ["feed_forward"]}}
    with pytest.raises(InputError, match="the parts of layer 3 cannot be told apart in its files"):
        part_tensors(checkpoint, "model.layers.", [attention], modules)


def test_modules_are_told_by_the_engine(model_dir):
    windows = lpserve.TokenWindows.from_tokens(np.arange(3, 40)[None])
    with lpserve.open_engine(model_dir("opt"), windows, players="half") as engine:
        modules = engine.info.settings["modules"]
    assert modules[5] == {ATTENTION: ["self_attn"], MLP: ["fc1", "fc2"]}
