"""A checkpoint in vLLM as users run it, for `lpserve speed`. Imports nothing of lpserve."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def open_checkpoint(task: dict[str, Any], device: str, memory: Callable[..., Any]) -> Any:
    """Load a checkpoint; see `lpserve.evaluation.speed_worker.Opened`. `memory` is called in every
    worker process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    import vllm
    from transformers import AutoConfig

    length = task["prompt_tokens"] + task["new_tokens"]
    arguments = {
        "model": task["model"],
        "dtype": task["dtype"],
        "max_model_len": length,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "max_num_seqs": task["batch"],
    } | task["vllm_options"]
    llm: Any = vllm.LLM(**arguments)

    def generate(prompts: Any, new: int) -> int:
        parameters = vllm.SamplingParams(
            max_tokens=new, min_tokens=new, ignore_eos=True, temperature=0, detokenize=False
        )
        requests = [{"prompt_token_ids": row.tolist()} for row in prompts]
        outputs = llm.generate(requests, parameters, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    whole: Any = AutoConfig.from_pretrained(
        task["model"], local_files_only=True, trust_remote_code=False
    )
    config = whole.get_text_config()
    about = {
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "version": vllm.__version__,
    }
    return generate, lambda: llm.collective_rpc(memory), about
