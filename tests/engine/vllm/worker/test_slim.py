"""Checkpoints without the weights of absent parts in vLLM, as users serve them: what they score,
generate and keep in the cache, against transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import lpserve
from lpserve.engine.vllm.worker import slim
from lpserve.errors import EngineError
from lpserve.export.export import export_checkpoint
from lpserve.model.players import half_players
from lpserve.testing.parity import NUM_LAYERS
from lpserve.testing.reference import reference_model, relative, slow_but, window_nll

pytestmark = [pytest.mark.vllm, pytest.mark.process, pytest.mark.filterwarnings("ignore")]
HALVES = half_players([False] * NUM_LAYERS)
NEW = 6

SERVE = """
import json, sys
import vllm

if __name__ == "__main__":
    folder, options, ids, new = sys.argv[1], *map(json.loads, sys.argv[2:])
    llm = vllm.LLM(
        model=folder, dtype="float32", max_model_len=64, skip_tokenizer_init=True,
        enable_prefix_caching=False, enforce_eager=True, disable_log_stats=True, **options
    )
    wanted = vllm.SamplingParams(
        max_tokens=new, temperature=0, ignore_eos=True, detokenize=False, prompt_logprobs=0
    )
    done = llm.generate([{"prompt_token_ids": row} for row in ids], wanted, use_tqdm=False)
    nll = [-sum(next(iter(p.values())).logprob for p in d.prompt_logprobs[1:]) for d in done]
    cached = None
    if not options:
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        cached = sorted(name for group in groups for name in group.layer_names)
    tokens = [list(d.outputs[0].token_ids) for d in done]
    print("\\n" + json.dumps({"nll": nll, "tokens": tokens, "cached": cached}))
"""


def served(folder, ids, tmp_path, **options):
    """What plain vLLM, which knows lpserve by its entry point alone, makes of a folder."""
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if options else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks may share a NUMA node
    }
    arguments = [json.dumps(value) for value in (options, ids.tolist(), NEW)]
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith('{"nll"')))


def exported(path, out):
    """Without layer 1 and the attention of layers 0 and 2, and the feed-forward part of layer 4."""
    removed = [0, 2, 3, 4, 9]
    assert export_checkpoint(path, removed, out, players=HALVES, slim=True).verified
    return out


def compared(out, found, ids):
    model = reference_model(out)
    windows = lpserve.TokenWindows.from_tokens(ids)
    expected = window_nll(model, windows.tokens_NT, windows.scored_NT)
    assert relative(np.array(found["nll"]), expected) < 1e-5
    prompts = torch.from_numpy(ids)
    made = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert found["tokens"] == made[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", slow_but(("llama", "opt", "mixtral", "gemma2"), "llama"))
def test_vllm_serves_what_transformers_loads(family, model_dir, rng, tmp_path):
    out = exported(model_dir(family), tmp_path / "out")
    ids = rng.integers(3, 90, (3, 24))
    found = served(out, ids, tmp_path)
    compared(out, found, ids)
    # of the five layers that stay, the first two have no attention, and no place in the cache
    numbers = [int(part) for name in found["cached"] for part in name.split(".") if part.isdigit()]
    assert numbers == [2, 3, 4]


@pytest.mark.slow
def test_over_two_ranks(model_dir, rng, tmp_path):
    """Tensor parallel: vLLM's CPU build answers no request over pipeline ranks, whatever model."""
    out = exported(model_dir("llama"), tmp_path / "out")
    ids = rng.integers(3, 90, (3, 24))
    compared(out, served(out, ids, tmp_path, tensor_parallel_size=2), ids)


def test_a_module_that_vllm_does_not_have_is_named():
    absent = {"layers.0.mixer": {"width": 4, "in_files": "mixing"}}
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    with pytest.raises(EngineError, match=r"of vLLM has no module layers\.0\.mixing"):
        slim.leave_layers_out(model, absent, None)


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="has no attribute LlamaForCausalLM"):
        _ = slim.LlamaForCausalLM  # pyright: ignore[reportAttributeAccessIssue]
