"""Costs of players, against the loaded model's own modules and against sums by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lpserve
from lpserve.engine.parts import Modules
from lpserve.errors import InputError
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.costs import COSTS, player_costs
from lpserve.model.players import ATTENTION, MLP, half_players, layer_players
from lpserve.testing.checkpoints import write_headers
from lpserve.testing.parity import NUM_LAYERS
from lpserve.testing.reference import decoder_list, reference_model

HALVES = half_players([False] * NUM_LAYERS)
LENGTH = 50
NAMES: dict[str, tuple[list[str], list[str]]] = {
    "llama": (["self_attn"], ["mlp"]),
    "opt": (["self_attn"], ["fc1", "fc2"]),
    "mixtral": (["self_attn"], ["mlp"]),
}


def modules_of(family: str) -> dict[int, Modules]:
    attention, mlp = NAMES[family]
    return {n: {ATTENTION: attention, MLP: mlp} for n in range(NUM_LAYERS)}


@pytest.mark.parametrize("family", NAMES)
def test_parameters_are_those_of_the_models_own_modules(family, model_dir):
    checkpoint = read_checkpoint(model_dir(family))
    halves = player_costs(checkpoint, HALVES, LENGTH, modules_of(family))
    layers = player_costs(checkpoint, layer_players(NUM_LAYERS), LENGTH)
    owner, name = decoder_list(reference_model(model_dir(family)))
    for player in HALVES:
        names = NAMES[family][player.part == MLP]
        layer = getattr(owner, name)[player.layer]
        modules = [layer.get_submodule(one) for one in names]
        wanted = sum(p.numel() for module in modules for p in module.parameters())
        assert halves.params_P[player.index] == wanted
        assert layers.params_P[player.layer] == sum(p.numel() for p in layer.parameters())
    np.testing.assert_allclose(halves.flops_P.reshape(-1, 2).sum(1), layers.flops_P)
    np.testing.assert_array_equal(halves.kv_P.reshape(-1, 2).sum(1), layers.kv_P)
    assert set(halves.by_name()) == set(COSTS)


def test_a_llama_by_hand(model_dir):
    """Width 64, 2 heads of 32, 1 of keys and values, FFN 96."""
    checkpoint = read_checkpoint(model_dir("llama"))
    found = player_costs(checkpoint, HALVES, LENGTH, modules_of("llama"))
    attention, mlp = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 96
    assert found.params_P[:2].tolist() == [attention, mlp]
    assert found.flops_P[:2].tolist() == [2.0 * attention + 4 * LENGTH * 64, 2.0 * mlp]
    assert found.kv_P[:2].tolist() == [2 * 32, 0]


def test_a_token_meets_some_of_the_experts(model_dir):
    """2 of Mixtral's 4 experts and the router, while all of them are stored."""
    checkpoint = read_checkpoint(model_dir("mixtral"))
    found = player_costs(checkpoint, HALVES, LENGTH, modules_of("mixtral"))
    experts, router = 3 * 64 * 96, 4 * 64
    assert found.params_P[1] == 4 * experts + router
    assert found.flops_P[1] == 2.0 * (2 * experts + router)


@pytest.mark.parametrize(
    ("config", "cached"),
    [
        ({}, [True, True, True]),
        ({"layer_types": ["linear_attention", "full_attention", "conv"]}, [False, True, False]),
        ({"layers_block_type": ["mamba", "attention", "mamba"]}, [False, True, False]),
        ({"layer_types": ["sliding_attention"] * 3}, [True, True, True]),
    ],
)
def test_only_attention_caches_keys_and_values(config, cached, tmp_path):
    tensors = {"embed.weight": [9, 8]}
    for layer in range(3):
        tensors |= {f"layers.{layer}.mixer.in.weight": [8, 8], f"layers.{layer}.mlp.w": [8, 4]}
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 8}
    folder = write_headers(tmp_path / "model", {**sizes, **config}, tensors)
    players = half_players([False] * 3)
    modules: dict[int, Any] = {n: {ATTENTION: ["mixer"], MLP: ["mlp"]} for n in range(3)}
    found = player_costs(read_checkpoint(folder), players, 10, modules)
    assert found.kv_P.tolist() == [n for kept in cached for n in (16 * kept, 0)]
    wanted = [n for kept in cached for n in (128.0 + 4 * 10 * 8 * kept, 64.0)]
    assert found.flops_P.tolist() == wanted


def test_parts_that_the_files_name_otherwise_are_refused(model_dir):
    checkpoint = read_checkpoint(model_dir("llama"))
    modules: dict[int, Any] = {n: {ATTENTION: ["a"], MLP: ["b"]} for n in range(NUM_LAYERS)}
    with pytest.raises(InputError, match="the parts of layer 0 cannot be told apart"):
        player_costs(checkpoint, HALVES, LENGTH, modules)


def test_an_engine_names_the_modules(model_dir, rng):
    windows = lpserve.TokenWindows.from_tokens(rng.integers(3, 97, (1, 8)))
    with lpserve.open_engine(model_dir("opt"), windows, players="half") as engine:
        modules = engine.info.settings["modules"]
    found = player_costs(read_checkpoint(model_dir("opt")), HALVES, LENGTH, modules)
    assert (found.params_P > 0).all()
