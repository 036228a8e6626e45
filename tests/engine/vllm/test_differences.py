"""Models that vLLM runs unlike transformers are known, and are unlike still."""

from __future__ import annotations

import numpy as np
import pytest
import transformers

from lpserve.data.windows import TokenWindows
from lpserve.engine.hf.engine import TransformersEngine
from lpserve.engine.vllm.differences import MEASURED, known_difference
from lpserve.testing.checkpoints import TEXT
from lpserve.types import EngineSpec


def test_a_known_difference_is_found_by_the_model_type():
    assert known_difference({"model_type": "mamba2"}) == MEASURED["mamba2"]
    assert known_difference({"model_type": "llama"}) is None
    assert known_difference({"model_type": None}) is None
    assert known_difference({"model_type": "mamba2", "n_groups": 1}) is None
    assert known_difference({"model_type": "deepseek_v3"}) == MEASURED["deepseek_v3"]
    assert known_difference({"model_type": "deepseek_v3", "scoring_func": "sigmoid"}) is None


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_mamba2_is_unlike_still(tmp_path, rng):
    """Where this fails vLLM has changed: measure all of them again."""
    from lpserve.engine.vllm.engine import VllmEngine

    sizes = {k: v for k, v in TEXT.items() if k not in ("intermediate_size", "head_dim")}
    sizes |= {"hidden_size": 128, "num_heads": 8, "head_dim": 32, "n_groups": 8}
    config = transformers.Mamba2Config(**sizes, state_size=16, chunk_size=16)
    transformers.Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    windows = TokenWindows.from_tokens(rng.integers(3, 90, (3, 24)))
    masks = np.ones((1, TEXT["num_hidden_layers"]), dtype=bool)
    found = []
    for kind, engine in (("transformers", TransformersEngine), ("vllm", VllmEngine)):
        with engine(EngineSpec(kind=kind, model=str(tmp_path), device="cpu"), windows) as opened:
            found.append(opened.score(masks).nll_MN.sum())
            told = opened.info.settings.get("unlike_transformers")
    assert told == MEASURED["mamba2"]
    assert abs(found[1] / found[0] - 1) > 1e-4
