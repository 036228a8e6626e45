"""The vLLM engine against transformers with the layers deleted, on random tiny models, on CPU.

Tolerance: 1e-5 relative mean NLL of a mask, float32; measured differences are below 5e-7. Bloom is
the exception at 1e-4: its GELU is approximated otherwise in vLLM (both vLLM paths agree to 1e-7).

Not covered here: several ranks (test_vllm_parallel), GPUs.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lpserve
from lpserve.engine import parts
from lpserve.engine.vllm.engine import VllmEngine
from lpserve.engine.vllm.worker import extension
from lpserve.errors import EngineError, InputError
from lpserve.model.players import half_players
from lpserve.testing.parity import NUM_LAYERS, edge_masks, some_windows
from lpserve.testing.reference import (
    SPREAD,
    VLLM_FAMILIES,
    quantize_int8,
    reference_model,
    relative,
    save_model,
    slow_but,
    window_nll,
    with_layers_deleted,
    with_parts_zeroed,
)
from lpserve.types import EngineSpec

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's own deprecations

TOLERANCE = 1e-5
LOOSER = {"bloom": 1e-4}


def expected_nll(path, masks, windows) -> np.ndarray:
    model = reference_model(path)
    return np.array(
        [
            window_nll(with_layers_deleted(model, mask), windows.tokens_NT, windows.scored_NT)
            for mask in masks
        ]
    )


def mean_nll(nll_MN: np.ndarray, windows: lpserve.TokenWindows) -> np.ndarray:
    return nll_MN.sum(axis=1) / windows.num_tokens_N.sum()


def open_vllm(model, windows, dtype: str = "float32", **options) -> VllmEngine:
    spec = EngineSpec(kind="vllm", model=str(model), dtype=dtype, options=options)
    return VllmEngine(spec, windows)


FAST = ("gemma2", "deepseek-v2")
"""Norms around layers and two kinds of windows, latent attention: the others are each close to one
of them, and a start of vLLM. Llama and learned positions: the other tests."""


@pytest.mark.parametrize("family", slow_but(VLLM_FAMILIES, *FAST))
def test_both_paths_equal_deleting_layers(family, model_dir, rng):
    path, windows = model_dir(family), some_windows(rng, num=6)
    masks = np.concatenate([edge_masks(), rng.random((6, NUM_LAYERS)) < 0.6])
    with open_vllm(path, windows, path="scoring") as engine:
        before = sum(engine.layer_calls()[0]["calls"])
        scoring = engine.score(masks)
        calls = engine.layer_calls()[0]
        requests = engine.score_by_requests(masks, windows)
        assert engine.info.path == "vllm/scoring"
    # the layers that ran are vLLM's (or the Transformers backend's), once for each prefix
    groups = len({-(-n // 32) for n in windows.lengths_N})
    assert sum(calls["calls"]) - before == scoring.work.layer_forwards * groups
    assert all(name.startswith(("vllm.", "transformers.")) for name in calls["classes"])

    expected = expected_nll(path, masks, windows)
    tolerance = LOOSER.get(family, TOLERANCE)
    for scores in (scoring, requests):
        got, wanted = mean_nll(scores.nll_MN, windows), mean_nll(expected, windows)
        assert relative(got, wanted) < tolerance
        assert relative(scores.nll_MN, expected) < 10 * tolerance  # single windows are shorter sums
    assert relative(scoring.nll_MN, requests.nll_MN) < TOLERANCE
    distinct = expected[np.unique(masks, axis=0, return_index=True)[1]]
    a, b = distinct[:, None], distinct[None]
    gaps = (np.abs(a - b) / np.maximum(a, b)).max(axis=-1)
    assert gaps[np.triu_indices(len(distinct), k=1)].min() > SPREAD


@pytest.mark.parametrize("family", slow_but(VLLM_FAMILIES, "gpt-neox"))
def test_both_paths_drop_halves_as_with_those_modules_zeroed(family, model_dir, rng):
    """GPT-NeoX's layers are parallel; norms, two modules, residuals inside: the others."""
    path, windows = model_dir(family), some_windows(rng)
    players = half_players([False] * NUM_LAYERS)
    masks = rng.random((10, len(players))) < 0.6
    masks[:2] = [[True], [False]]
    spec = EngineSpec(kind="vllm", model=str(path), players=players, options={"path": "scoring"})
    with VllmEngine(spec, windows) as engine:
        assert engine.info.players == players
        scoring = engine.score(masks).nll_MN
        requests = engine.score_by_requests(masks, windows).nll_MN
    model, expected = reference_model(path), []
    for mask in masks:
        with with_parts_zeroed(model, family, players, mask) as zeroed:
            expected.append(window_nll(zeroed, windows.tokens_NT, windows.scored_NT))
    tolerance = LOOSER.get(family, TOLERANCE)
    wanted = mean_nll(np.array(expected), windows)
    for nll_MN in (scoring, requests):
        assert relative(mean_nll(nll_MN, windows), wanted) < tolerance
        assert relative(nll_MN, np.array(expected)) < 10 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_both_paths_drop_groups_as_their_members(family, model_dir, rng, tmp_path):
    file = tmp_path / "groups.toml"
    file.write_text('a = [1, "3.mlp"]\nb = ["0.attention", "3.attention", 5]\nc = ["4.mlp"]\n')
    path, windows = model_dir(family), some_windows(rng)
    masks = rng.permutation([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)]) > 0
    with lpserve.open_engine(path, windows, players=f"groups:{file}") as engine:
        expected, players = engine.score(masks).nll_MN, engine.info.players
    spec = EngineSpec(kind="vllm", model=str(path), players=players, options={"path": "scoring"})
    with VllmEngine(spec, windows) as engine:
        for nll_MN in (
            engine.score(masks).nll_MN,
            engine.score_by_requests(masks, windows).nll_MN,
        ):
            assert relative(nll_MN, expected) < 10 * TOLERANCE


@pytest.mark.slow
def test_halves_can_be_asked_for_by_requests(model_dir, rng):
    path, windows = model_dir("llama"), some_windows(rng)
    masks = rng.random((6, 2 * NUM_LAYERS)) < 0.6
    with lpserve.open_engine(path, windows, players="half") as engine:
        expected = engine.score(masks).nll_MN
    with lpserve.open_engine(path, windows, kind="vllm", players="half", path="requests") as engine:
        assert engine.info.path == "vllm/requests"
        assert relative(engine.score(masks).nll_MN, expected) < 10 * TOLERANCE


def test_halves_of_layers_that_cannot_be_taken_apart_are_refused(model_dir, rng, monkeypatch):
    monkeypatch.setattr(parts, "_close", lambda got, wanted, other: False)
    with pytest.raises(EngineError, match=r"halves of .* are found on vLLM's scoring path, which"):
        lpserve.open_engine(model_dir("llama"), some_windows(rng), kind="vllm", players="half")


def test_auto_takes_scoring_after_the_self_check_and_says_why(model_dir, rng):
    windows = some_windows(rng)
    with lpserve.open_engine(model_dir("llama"), windows, kind="vllm") as engine:
        info = engine.info
    assert info.path == "vllm/scoring"
    assert "self-check: within" in info.path_reason
    assert info.game.numerics == "float32"
    assert info.settings["state"] in ("hidden", "sum", "pair")


def test_auto_serves_by_requests_what_scoring_cannot_and_says_why(model_dir, rng, monkeypatch):
    from lpserve.engine.vllm.worker import model as worker_model

    def refuse(name, module):
        raise EngineError(f"{name} is attention of a new kind")

    monkeypatch.setattr(worker_model, "attention_spec", refuse)
    path, windows = model_dir("llama"), some_windows(rng)
    masks = rng.random((4, NUM_LAYERS)) < 0.6
    with open_vllm(path, windows) as engine:
        assert engine.info.path == "vllm/requests"
        assert "attention of a new kind" in engine.info.path_reason
        assert relative(engine.score(masks).nll_MN, expected_nll(path, masks, windows)) < 1e-4
    with pytest.raises(EngineError, match=r"scoring path cannot serve .* attention of a new kind"):
        open_vllm(path, windows, path="scoring")


def test_auto_does_not_trust_scores_that_differ(model_dir, rng, monkeypatch):
    from lpserve.engine.vllm.worker import attention

    def wrong(q, k, v, spec, length):
        return q

    monkeypatch.setattr(attention, "_fused", wrong)
    with open_vllm(model_dir("llama"), some_windows(rng)) as engine:
        assert engine.info.path == "vllm/requests"
        assert "from those of requests" in engine.info.path_reason


def test_an_engine_whose_masks_have_no_effect_refuses(model_dir, rng, monkeypatch):
    from lpserve.engine.vllm import tap

    monkeypatch.setattr(tap.LayerTap, "skips", lambda self, index: False)
    with pytest.raises(EngineError, match="one score to different masks"):
        open_vllm(model_dir("llama"), some_windows(rng), path="requests")


@pytest.mark.parametrize("path_name", ["scoring", pytest.param("requests", marks=pytest.mark.slow)])
def test_windows_of_different_lengths_score_as_one_by_one(path_name, model_dir, rng):
    tokens = rng.integers(0, 97, (5, 60))
    scored = rng.random((5, 60)) < 0.7
    scored[:, 0] = False
    for row, length in enumerate((60, 12, 33, 2, 59)):
        scored[row, length:] = False
        scored[row, length - 1] = True
    windows = lpserve.TokenWindows.from_tokens(tokens, scored)
    masks = rng.random((5, NUM_LAYERS)) < 0.6
    with open_vllm(model_dir("mistral-window"), windows, path=path_name) as engine:
        together = engine.score(masks).nll_MN
        for row in range(5):
            one = windows.select([row], int(windows.lengths_N[row]))
            alone = engine.score(masks, engine.register(one)).nll_MN[:, 0]
            # rounding of single short windows: the same terms in other batch shapes
            assert np.allclose(alone, together[:, row], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_other_masks_budget_and_micro_batch_do_not_matter(model_dir, rng):
    path, windows = model_dir("qwen3"), some_windows(rng, num=5)
    masks = rng.random((24, NUM_LAYERS)) < 0.6
    with open_vllm(path, windows, path="scoring") as engine:
        together = engine.score(masks).nll_MN
        alone = np.concatenate([engine.score(mask[None]).nll_MN for mask in masks])
        assert (together == alone).all()  # on CPU a micro-batch is one state
        assert engine.info.noise_nll == 0.0
    state = 40 * 64 * 4
    settings: list[dict[str, Any]] = [
        {"state_budget_mb": (NUM_LAYERS + 1) * state / 2**20, "micro_batch_tokens": 2 * 5 * 40},
        {"micro_batch_tokens": 1 << 20},
    ]
    for options in settings:
        with open_vllm(path, windows, path="scoring", **options) as engine:
            assert relative(engine.score(masks).nll_MN, together) < TOLERANCE


def test_half_precision_paths_agree_within_the_measured_tolerance(model_dir, rng):
    """bfloat16 keeps 8 bits, and weights of standard deviation 0.15 are hard on it (on the bundled
    model, scripts/bench/precision.py: 5e-4 relative between paths, 1e-3 to float32)."""
    path, windows = model_dir("llama"), some_windows(rng)
    masks = np.concatenate([edge_masks(), rng.random((8, NUM_LAYERS)) < 0.6])
    with open_vllm(path, windows, dtype="bfloat16", path="scoring") as engine:
        scoring = engine.score(masks).nll_MN
        requests = engine.score_by_requests(masks, windows).nll_MN
        assert engine.info.game.numerics == "bfloat16/vllm/scoring"
        noise = engine.info.noise_nll
    gap = np.abs(mean_nll(scoring, windows) - mean_nll(requests, windows))
    assert 0 < noise < 10 * gap.max()
    assert gap.mean() < 10 * noise
    assert relative(mean_nll(scoring, windows), mean_nll(requests, windows)) < 2e-2
    exact = expected_nll(path, masks, windows)
    assert relative(mean_nll(scoring, windows), mean_nll(exact, windows)) < 1e-1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-3), ("bfloat16", 2e-2)])
def test_a_quantized_checkpoint_scores_alike_on_both_paths(
    dtype, tolerance, model_dir, tmp_path, rng
):
    """The int8 kernels are vLLM's in both; a last bit of attention may turn a rounding to int8."""
    path = quantize_int8(model_dir("llama"), tmp_path / "int8")
    windows, masks = some_windows(rng), edge_masks()
    with open_vllm(path, windows, dtype=dtype) as engine:
        assert engine.info.path == "vllm/scoring"
        assert engine.info.quantization == "compressed-tensors"
        assert engine.info.game.numerics == f"{dtype}/vllm/scoring/compressed-tensors"
        scoring = engine.score(masks).nll_MN
        requests = engine.score_by_requests(masks, windows).nll_MN
    assert relative(mean_nll(scoring, windows), mean_nll(requests, windows)) < tolerance
    # eight bits: close to the model that was rounded, and not that model
    exact = expected_nll(model_dir("llama"), masks, windows)
    assert 1e-5 < relative(mean_nll(scoring, windows), mean_nll(exact, windows)) < 1e-1


@pytest.mark.slow
def test_global_state_is_left_as_found_and_engines_follow_one_another(model_dir, rng):
    environment, setter = dict(os.environ), torch.set_num_threads
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    windows, mask = some_windows(rng), rng.random((1, NUM_LAYERS)) < 0.6
    scores = []
    for _ in range(2):
        with open_vllm(model_dir("llama"), windows, path="scoring") as engine:
            scores.append(engine.score(mask).nll_MN)
            with pytest.raises(EngineError, match="open in this process already"):
                open_vllm(model_dir("llama"), windows)
        engine.close()  # closing twice is allowed
    assert (scores[0] == scores[1]).all()
    assert dict(os.environ) == environment
    assert torch.set_num_threads is setter
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert not torch.is_inference_mode_enabled()


def test_longer_windows_than_opened_for_are_refused_with_what_to_do(model_dir, rng):
    with open_vllm(model_dir("llama"), some_windows(rng, length=24), path="scoring") as engine:
        with pytest.raises(InputError, match="max_model_len to 41"):
            engine.register(some_windows(rng, length=40))
        with pytest.raises(InputError, match="not registered"):
            engine.score(np.ones((1, NUM_LAYERS), dtype=bool), "abc")
    with open_vllm(model_dir("llama"), some_windows(rng, length=24), max_model_len=41) as engine:
        assert engine.register(some_windows(rng, length=40))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_windows_as_long_as_the_models_positions(family, model_dir, rng):
    """Requests generate one token more than the window; it never enters the model."""
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 97, (2, 64)))
    masks = rng.random((3, NUM_LAYERS)) < 0.6
    with open_vllm(model_dir(family), windows) as engine:
        assert engine.info.path == "vllm/scoring"
        got = engine.score(masks).nll_MN
        assert relative(engine.score_by_requests(masks, windows).nll_MN, got) < TOLERANCE
    assert relative(got, expected_nll(model_dir(family), masks, windows)) < TOLERANCE


@pytest.mark.slow
def test_layers_that_share_keys_and_values_are_refused(tmp_path, rng, monkeypatch):
    """By requests they would read what an earlier request left in the cache: scores were off by
    10%, and others when asked again. The check at start sees that without knowing why."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = transformers.Gemma4TextConfig(
        hidden_size=64,
        intermediate_size=96,
        vocab_size=97,
        vocab_size_per_layer_input=97,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        global_head_dim=32,  # pyright: ignore[reportCallIssue] (it takes further keys)
        sliding_window=8,
        max_position_embeddings=64,
        layer_types=kinds,
        num_kv_shared_layers=3,
        hidden_size_per_layer_input=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    path = save_model(config, tmp_path / "shared", 0)
    with pytest.raises(EngineError, match=r"layer 3 takes keys and values of model\.layers\.1"):
        open_vllm(path, some_windows(rng))
    monkeypatch.setattr(extension, "_check_own_keys", lambda layers, first: None)
    with pytest.raises(EngineError, match="another score after other masks"):
        open_vllm(path, some_windows(rng), path="requests")


@pytest.mark.slow
def test_what_vllms_kernels_raise_is_a_refusal_in_one_line(tmp_path, rng):
    """Its CPU build has no kernel for Mamba's scan, which only the first forward shows."""
    config = transformers.MambaConfig(
        hidden_size=64, num_hidden_layers=2, vocab_size=97, state_size=8
    )
    path = save_model(config, tmp_path / "mamba", 0)
    with pytest.raises(EngineError, match="vLLM cannot run the model: AttributeError") as caught:
        open_vllm(path, some_windows(rng))
    assert "\n" not in str(caught.value)


def test_vllm_that_cannot_start_gives_its_own_reason_in_one_line(model_dir, rng):
    with pytest.raises(EngineError, match="vLLM cannot start") as caught:
        open_vllm(model_dir("llama"), some_windows(rng), quantization="awq")
    assert "\n" not in str(caught.value)
    with open_vllm(model_dir("llama"), some_windows(rng), path="scoring"):
        pass  # what failed to start is not in the way
