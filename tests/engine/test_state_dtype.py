"""States whose dtype is not the embedding's: Mamba adds its residuals in float32.

The scores of a bfloat16 Mamba must be those of transformers with the layers deleted, bit for bit:
one rounding of a state to bfloat16 would show as 1e-3 and more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

import lpserve
from lpserve.engine.head import on_device, plain_nll
from lpserve.errors import EngineError
from lpserve.testing.reference import save_model
from tests.conftest import SEED

PLAYERS = 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    config = MambaConfig(
        hidden_size=32,
        state_size=4,
        num_hidden_layers=PLAYERS,
        vocab_size=97,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return save_model(config, tmp_path_factory.mktemp("models") / "mamba", SEED)


def deleted_nll(path, masks_MP, windows) -> np.ndarray:
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    inner, rows = model.base_model, []
    layers = list(inner.layers)
    for mask_P in masks_MP:
        inner.layers = torch.nn.ModuleList(
            [layer for layer, kept in zip(layers, mask_P, strict=True) if kept]
        )
        with torch.inference_mode():
            logits = model(input_ids=on_device(windows.tokens_NT, CPU), use_cache=False).logits
        rows.append(plain_nll(logits, windows, CPU).numpy())
    return np.array(rows)


@pytest.mark.thorough
@pytest.mark.parametrize("packed", [False, True])
def test_states_keep_the_dtype_that_layers_return(packed, mamba, rng):
    windows = lpserve.TokenWindows.from_tokens(rng.integers(2, 97, (2, 16)))
    masks_MP = np.array([[bool(n >> p & 1) for p in range(PLAYERS)] for n in range(2**PLAYERS)])
    options: dict[str, Any] = {"micro_batch_tokens": 128} if packed else {}
    with lpserve.open_engine(mamba, windows, dtype="bfloat16", **options) as engine:
        got_MN = engine.score(masks_MP).nll_MN
        stack = engine._scorer.stack  # pyright: ignore[reportAttributeAccessIssue]
        assert stack.state_dtype == torch.float32
        assert stack.state_bytes(16) == 16 * 32 * 4
        assert engine._scorer.executor.num_live == 0  # pyright: ignore[reportAttributeAccessIssue]
    expected_MN = deleted_nll(mamba, masks_MP, windows)
    tolerance = 2e-2 if packed else 0.0  # products of other batch shapes round differently
    np.testing.assert_allclose(got_MN, expected_MN, rtol=tolerance)


def layer_in_float32(monkeypatch, *, only: int | None) -> None:
    """Have one Llama layer (None: the first that runs) return float32."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

    original = LlamaDecoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        out = original(self, hidden_states.to(torch.bfloat16), *args, **kwargs)
        is_it = self.self_attn.layer_idx == only
        return out.float() if is_it or (hidden_states.dtype == torch.float32 and only == 0) else out

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    norm = LlamaRMSNorm.forward
    monkeypatch.setattr(  # as Mamba, whose head casts what it is given
        LlamaRMSNorm, "forward", lambda self, hidden: norm(self, hidden).to(self.weight.dtype)
    )


@pytest.mark.parametrize(
    ("only", "reason"),
    [
        (2, "return states of several dtypes"),
        (0, "layer 1 of LlamaForCausalLM returns torch.bfloat16 or torch.float32, depending on"),
    ],
)
def test_layers_that_disagree_about_the_dtype_are_refused(only, reason, model_dir, monkeypatch):
    layer_in_float32(monkeypatch, only=only)
    windows = lpserve.TokenWindows.from_tokens(np.arange(2, 34).reshape(1, 32))
    with pytest.raises(EngineError, match=reason):
        lpserve.open_engine(model_dir("llama"), windows, dtype="bfloat16")
