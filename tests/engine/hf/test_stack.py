"""Models whose layers are called in other ways than Llama's, against transformers itself.

The reference runs the model's own forward pass on one window at a time, with the forward of every
removed layer replaced by one that hands its state on. Tolerance: 1e-5 relative on a window's NLL in
float32, where batches of other shapes round differently.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import lpserve
from lpserve.errors import EngineError, InputError
from lpserve.testing.checkpoints import (
    GEMMA_3N,
    PLAYERS,
    TEXT,
    VOCABULARY,
    gemma_3n_config,
    qwen2_vl_config,
    save_random,
    zamba2_config,
)
from lpserve.testing.reference import relative, window_nll
from tests.conftest import SEED

LATENT: dict[str, Any] = {
    **TEXT,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
}


def bloom() -> Any:
    """Hands its layers ALiBi's bias, one for each window and head."""
    return tf.BloomConfig(hidden_size=32, n_layer=PLAYERS, n_head=2, vocab_size=VOCABULARY)


def xglm() -> Any:
    """Refuses a mask of another number of windows."""
    return tf.XGLMConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        ffn_dim=48,
        num_layers=PLAYERS,
        attention_heads=2,
        max_position_embeddings=64,
    )


def glm_dsa() -> Any:
    """Its layers return what the next may attend to, which they ignore where they find their own;
    padding changes what is attended to."""
    return tf.GlmMoeDsaConfig(**LATENT)


def deepseek_v32() -> Any:
    """Padding changes what its sparse attention sees."""
    return tf.DeepseekV32Config(**LATENT)


def llama_4() -> Any:
    """Its decoder's output is of a class of its own."""
    return tf.Llama4TextConfig(
        **TEXT,
        num_local_experts=2,
        intermediate_size_mlp=48,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
        attention_chunk_size=8,
    )


def openai_gpt() -> Any:
    """Its layers return lists."""
    return tf.OpenAIGPTConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=PLAYERS, n_head=2, n_positions=64
    )


def rwkv() -> Any:
    """Halves its states every second layer, which it need not where nothing overflows."""
    return tf.RwkvConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        attention_hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=PLAYERS,
        rescale_every=2,
    )


SERVED = [bloom, zamba2_config, gemma_3n_config, glm_dsa, llama_4, qwen2_vl_config, rwkv]
SERVED_ELSEWHERE = [xglm, deepseek_v32, openai_gpt]


def decoder_layers(model: Any) -> list[Any]:
    return next(
        list(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == PLAYERS and "vis" not in name
    )


@contextmanager
def handing_on(model: Any, mask_P: np.ndarray):
    """Layers that are removed return their state, and None for all else."""
    layers = decoder_layers(model)
    outputs: dict[int, Any] = {}
    hooks = [
        layer.register_forward_hook(lambda module, args, out, i=i: outputs.update({i: out}))
        for i, layer in enumerate(layers)
    ]
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 9)[None], use_cache=False)
    for hook in hooks:
        hook.remove()

    def replacement(index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            state = args[0] if args else kwargs["hidden_states"]
            if isinstance(outputs[index], torch.Tensor):
                return state
            return (state, *[None] * (len(outputs[index]) - 1))

        return forward

    removed = [i for i in range(PLAYERS) if not mask_P[i]]
    for i in removed:
        layers[i].forward = replacement(i)
    try:
        yield model
    finally:
        for i in removed:
            del layers[i].forward


@pytest.mark.parametrize(
    "config",
    [
        *[pytest.param(make, id=make.__name__) for make in SERVED],
        *[
            pytest.param(make, id=make.__name__, marks=pytest.mark.slow)
            for make in SERVED_ELSEWHERE
        ],
    ],
)
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scores_are_those_of_the_model_with_layers_skipped(config, packed, tmp_path, rng):
    model = save_random(config(), tmp_path / "model", SEED)
    if config is rwkv:
        model.config.rescale_every = 0
    tokens_NT = rng.integers(3, VOCABULARY, (3, 24))
    scored_NT = np.ones(tokens_NT.shape, dtype=bool)
    scored_NT[:, 0] = False
    scored_NT[1, 11:] = False  # a short window, in a block of padded ones
    windows = lpserve.TokenWindows.from_tokens(tokens_NT, scored_NT)
    full_P = np.ones(PLAYERS, dtype=bool)
    masks_MP = np.stack([full_P, ~full_P, *(rng.random((3, PLAYERS)) < 0.6)])
    options: dict[str, Any] = {"micro_batch_tokens": 1024} if packed else {}
    with lpserve.open_engine(tmp_path / "model", windows, **options) as engine:
        got_MN = engine.score(masks_MP).nll_MN
    for mask_P, got_N in zip(masks_MP, got_MN, strict=True):
        with handing_on(model, mask_P) as skipped:
            assert relative(got_N, window_nll(skipped, tokens_NT, scored_NT)) < 1e-5, mask_P


def test_keys_and_values_that_layers_share_are_refused(tmp_path, rng):
    save_random(tf.Gemma3nTextConfig(**GEMMA_3N, num_kv_shared_layers=2), tmp_path / "model", SEED)
    windows = lpserve.TokenWindows.from_tokens(rng.integers(3, VOCABULARY, (1, 8)))
    with pytest.raises(EngineError, match="takes 'shared_kv_states', which earlier layers compute"):
        lpserve.open_engine(tmp_path / "model", windows)


def test_routing_that_feeds_the_next_layer_is_refused(tmp_path, rng):
    config = tf.ZayaConfig(
        **TEXT,
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        layer_types=["hybrid", "hybrid_sliding"] * 2,
        sliding_window=8,
    )
    save_random(config, tmp_path / "model", SEED)
    windows = lpserve.TokenWindows.from_tokens(rng.integers(3, VOCABULARY, (1, 8)))
    with pytest.raises(EngineError, match=r"layer 1 of .* takes argument 1, which earlier layers"):
        lpserve.open_engine(tmp_path / "model", windows)


def test_an_encoder_is_refused(tmp_path, rng):
    config = tf.T5Config(d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8, vocab_size=97)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    windows = lpserve.TokenWindows.from_tokens(rng.integers(3, VOCABULARY, (1, 8)))
    with pytest.raises(InputError, match="not a decoder-only language model"):
        lpserve.open_engine(tmp_path / "model", windows)


def test_a_layer_that_gives_nan_is_named_and_the_others_scored(model_dir, tmp_path, rng):
    model: Any = tf.AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    windows = lpserve.TokenWindows.from_tokens(rng.integers(2, 97, (2, 16)))
    masks_MP = np.ones((2, 6), dtype=bool)
    masks_MP[1, 3] = False
    with lpserve.open_engine(tmp_path / "model", windows) as engine:
        assert engine.info.settings["first_not_finite"] == 3
        nll_MN = engine.score(masks_MP).nll_MN
    assert np.isnan(nll_MN[0]).all()
    assert np.isfinite(nll_MN[1]).all()
