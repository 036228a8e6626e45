"""Measures one checkpoint in one engine, in a process of its own. Run as a script.

    python speed_worker.py '{"model": ..., "script": ..., ...}'

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
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import numpy as np

Generate = Callable[[Any, int], int]
"""(prompts int [B, P], new tokens of each) -> total number of generated tokens."""
Held = tuple[int, int, int]
"""Id of a process, the peak bytes that torch allocated on its GPU, and its own peak bytes."""
Opened = tuple[Generate, Callable[[], list[Held]], dict[str, Any]]
"""A function that generates, one that gives its workers' memory, and facts about the engine."""


def measure_checkpoint(task: dict[str, Any]) -> dict[str, Any]:
    """Measure; returns the fields of `lpserve.evaluation.speed.Speed` that are known here."""
    import torch

    on_gpu = task["device"] != "cpu" and torch.cuda.is_available()
    before = _resident_bytes()
    started = time.perf_counter()
    generate, workers, about = _opened(task, "cuda" if on_gpu else "cpu")
    load_s = time.perf_counter() - started
    rng = np.random.default_rng(task["seed"])
    all_prompts = rng.integers(0, about.pop("vocab_size"), (task["batch"], task["prompt_tokens"]))
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

    first = seconds(all_prompts[:1], 1)
    alone = seconds(all_prompts[:1], new)
    batch = seconds(all_prompts, new)
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


def _opened(task: dict[str, Any], device: str) -> Opened:
    """What `open_checkpoint(task, device, _held)` of the engine's script gives."""
    spec = spec_from_file_location("in_use", task["script"])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.open_checkpoint(task, device, _held)


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _held(_worker: object = None) -> Held:
    import torch

    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return os.getpid(), on_device, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(measure_checkpoint(json.loads(sys.argv[1]))))
