"""Engine options for vLLM: what is refused, and with which words. No engine starts here."""

from __future__ import annotations

import pytest

from lpserve import TokenWindows
from lpserve.engine.vllm.options import (
    REFUSED,
    check_options,
    check_vllm_options,
    engine_arguments,
    kv_cache_bytes,
    quantization_of,
)
from lpserve.errors import InputError
from lpserve.types import EngineSpec

pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def spec(dtype: str = "bfloat16", **options) -> EngineSpec:
    return EngineSpec(kind="vllm", model="m", dtype=dtype, options=options)


def windows(num: int = 10, length: int = 128) -> TokenWindows:
    import numpy as np

    return TokenWindows.from_tokens(np.ones((num, length), dtype=np.int64))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_change_a_score_is_refused_with_its_reason(name):
    with pytest.raises(InputError) as caught:
        check_options({name: True})
    assert f"{name!r} is refused: {REFUSED[name]}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "fast"}, "path must be one of auto, scoring, requests: got 'fast'"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be a whole number above 0: got 0"),
        ({"pipeline_parallel_size": "2"}, "pipeline_parallel_size must be a whole number"),
        ({"tensor_paralel_size": 2}, "did you mean 'tensor_parallel_size'?"),
        ({"colour": 2}, "vLLM has no argument 'colour'"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(options, words):
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        check_vllm_options(spec(**options))


@pytest.mark.vllm
def test_every_refused_name_is_an_argument_of_vllm_or_ours():
    from lpserve.engine.vllm.worker.extension import known_arguments

    assert set(REFUSED) - {"device"} <= known_arguments()


def test_arguments_pass_through_and_ours_are_set():
    options = {"path": "scoring", "state_budget_mb": 3, "tensor_parallel_size": 4, "seed": 5}
    arguments = engine_arguments(spec(**options), LLAMA_70B, windows())
    assert arguments["tensor_parallel_size"] == 4
    assert arguments["seed"] == 5
    assert arguments["enforce_eager"] is True
    assert arguments["enable_prefix_caching"] is False
    assert arguments["max_model_len"] == 129
    assert not {"path", "state_budget_mb"} & set(arguments)
    chosen = engine_arguments(spec(kv_cache_memory_bytes=7), LLAMA_70B, windows())
    assert chosen["kv_cache_memory_bytes"] == 7
    with pytest.raises(InputError, match="max_model_len must be above the windows' 128 tokens"):
        engine_arguments(spec(max_model_len=128), LLAMA_70B, windows())


def test_the_kv_cache_holds_the_windows_of_one_mask_and_little_more():
    """70B in bfloat16 over 8 ranks: 40 KiB a token and rank, twice 1,280 tokens in whole blocks."""
    per_token = 2 * 1 * 128 * 80 * 2
    got = kv_cache_bytes(LLAMA_70B, spec(tensor_parallel_size=8), windows(), 129)
    assert 2 * 1280 * per_token <= got <= 2 * 10 * 256 * per_token + (8 << 20)
    assert kv_cache_bytes(LLAMA_70B, spec(), windows(), 129) > 7 * got  # one rank holds all heads


def test_the_kv_cache_is_sized_by_the_layers_that_need_most():
    """Gemma-4's layers that attend to all of the text have other heads, named in two ways."""
    usual = kv_cache_bytes(LLAMA_70B, spec(), windows(), 129) - (8 << 20)
    for more in (
        {"global_head_dim": 512, "num_global_key_value_heads": 4},
        {"per_layer_config": {"5": {"head_dim": 512, "num_key_value_heads": 4}}},
        {"per_layer_config": {"5": {"head_dim": 256}, "6": None, "7": {"head_dim": "x"}}},
    ):
        got = kv_cache_bytes({**LLAMA_70B, **more}, spec(), windows(), 129)
        assert got - (8 << 20) == 2 * usual


def test_what_rounds_belongs_to_the_numerics():
    assert quantization_of(spec(), None) == ""
    assert quantization_of(spec(kv_cache_dtype="auto"), "fp8") == "fp8"
    assert quantization_of(spec(kv_cache_dtype="fp8"), "gptq") == 'gptq+kv_cache_dtype="fp8"'
