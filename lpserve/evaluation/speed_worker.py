"""Measures one checkpoint in one engine, in a process of its own. Run as a script.

    python speed_worker.py '{"model": ..., "engine": "transformers" | "vllm", ...}'

Prints one JSON line. Imports nothing of lpserve: what it measures is what users run. Prompts are
random tokens, generation is greedy and runs to its full length.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Generate = Callable[[Any, int], int]
"""(prompts int [B, P], new tokens of each) -> tokens generated in all."""
Held = tuple[int, int, int]
"""Id of a process, the most bytes that torch had allocated on its GPU, and the most it took."""
Opened = tuple[Generate, Callable[[], list[Held]], dict[str, Any]]
"""What generates, what its worker processes held, and what is told of the engine."""


def main(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    on_gpu = task["device"] != "cpu" and torch.cuda.is_available()
    before = _resident_bytes()
    started = time.perf_counter()
    opened = _transformers if task["engine"] == "transformers" else _vllm
    generate, workers, about = opened(task, "cuda" if on_gpu else "cpu")
    load_s = time.perf_counter() - started
    rng = np.random.default_rng(task["seed"])
    prompts_BP = rng.integers(0, about.pop("vocab_size"), (task["batch"], task["prompt_tokens"]))
    new = task["new_tokens"]

    def seconds(prompts: Any, count: int) -> list[float]:
        taken = []
        for repeat in range(task["repeats"] + 1):  # the first warms up
            begun = time.perf_counter()
            made = generate(prompts, count)
            if on_gpu:
                torch.cuda.synchronize()
            if made != len(prompts) * count:
                raise RuntimeError(f"generated {made} tokens, not {len(prompts) * count}")
            if repeat:
                taken.append(time.perf_counter() - begun)
        return taken

    first = seconds(prompts_BP[:1], 1)
    alone = seconds(prompts_BP[:1], new)
    batch = seconds(prompts_BP, new)
    decode_s = (statistics.median(alone) - statistics.median(first)) / max(1, new - 1)
    rates = sorted(task["batch"] * new / s for s in batch)
    held = {pid: (on_device, taken) for pid, on_device, taken in (*workers(), _held())}
    peak = sum(on_device if on_gpu else taken - before for on_device, taken in held.values())
    return {
        **about,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "load_s": load_s,
        "first_token_s": statistics.median(first),
        "decode_s": decode_s,
        "batch_tokens_per_s": statistics.median(rates),
        "batch_tokens_per_s_range": [rates[0], rates[-1]],
        "peak_bytes": peak,
    }


def _transformers(task: dict[str, Any], device: str) -> Opened:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        task["model"], dtype=getattr(torch, task["dtype"]), local_files_only=True
    )
    model = model.to(device).eval()

    @torch.inference_mode()
    def generate(prompts: Any, new: int) -> int:
        ids = torch.from_numpy(prompts).to(device)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return int(made.shape[0] * (made.shape[1] - ids.shape[1]))

    config = model.config.get_text_config()
    about = {
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "version": transformers.__version__,
    }
    return generate, list, about


def _vllm(task: dict[str, Any], device: str) -> Opened:
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

    config = AutoConfig.from_pretrained(task["model"], local_files_only=True).get_text_config()
    about = {
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "version": vllm.__version__,
    }
    return generate, lambda: llm.collective_rpc(_held), about


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _held(_worker: object = None) -> Held:
    import torch

    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return os.getpid(), on_device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
