"""What the benches measure with: clocks, resident memory, shares of arithmetic, the machine's name.

Used by the other scripts in this folder; nothing to run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers

import lpserve
from lpserve.data.windows import TokenWindows
from lpserve.demo import demo_values
from lpserve.engine.hf.engine import TransformersEngine

MIB = 2**20
FLAT_SHARE = 0.01
"""Growth of the resident memory, as a share of it, that still counts as flat."""
ARITHMETIC = frozenset(
    f"aten::{name}"
    for name in (
        *("mm", "addmm", "bmm", "baddbmm", "_softmax", "_log_softmax", "nll_loss_forward"),
        *("add", "add_", "sub", "mul", "mul_", "div", "div_", "neg", "silu", "pow", "exp"),
        *("sqrt", "rsqrt", "mean", "sum", "cat"),
    )
)
"""Self time of these, and of every fused attention, is arithmetic; views and allocations are not,
nor is zeroing or copying parameters."""


@dataclass(kw_only=True)
class Timing:
    """Seconds of one method over some masks."""

    wall: float = 0.0
    cpu: float = 0.0
    """Of this thread: below `wall` where the machine was busy with something else."""
    masks: int = 0
    rates: list[float] = field(default_factory=list)
    """Masks/s of every chunk."""

    def add(self, other: Timing) -> None:
        self.rates.append(other.rate)
        self.wall += other.wall
        self.cpu += other.cpu
        self.masks += other.masks

    @property
    def rate(self) -> float:
        return self.masks / self.wall


@dataclass(kw_only=True)
class Inside:
    """Seconds inside `LayerStack` calls of one run of ours."""

    layers: float = 0.0
    heads: float = 0.0
    state_copy: float = 0.0
    """One copy of one state, timed apart."""
    sorting: float = 0.0


@dataclass(kw_only=True)
class Memory:
    """Bytes: resident on CPU, allocated on a GPU."""

    start: int
    """After loading and one warm-up call."""
    peak: int
    state_budget: int
    head_chunk: int

    @property
    def allowed(self) -> float:
        return 1.2 * (self.state_budget + self.head_chunk)


class PeakMemory:
    """Highest resident memory while in the block, read every 10 ms by a thread (GPU: torch's)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stop = threading.Event()
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, memory_now(self._device))
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device)

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, memory_now(self._device))


def memory_now(device: torch.device) -> int:
    """Bytes: resident on CPU, allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def return_free_memory() -> None:
    """Give what an earlier measurement freed back to the system, so that growth is seen again."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def timed(call: Callable[[], Any], device: torch.device, masks: int) -> Timing:
    synchronise(device)
    cpu, wall = time.thread_time(), time.perf_counter()
    call()
    synchronise(device)
    return Timing(wall=time.perf_counter() - wall, cpu=time.thread_time() - cpu, masks=masks)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def timed_stack(engine: TransformersEngine, device: torch.device) -> Iterator[Inside | None]:
    """Time every layer and head call; None on a GPU, where a call returns before it is done."""
    if device.type == "cuda":
        yield None
        return
    inside, stack = Inside(), engine._scorer.stack
    plain = {"layers": stack.run_step, "heads": stack.reduce}

    def wrapped(name: str) -> Callable[..., torch.Tensor]:
        def call(*args: Any) -> torch.Tensor:
            started = time.perf_counter()
            result = plain[name](*args)
            setattr(inside, name, getattr(inside, name) + time.perf_counter() - started)
            return result

        return call

    stack.run_step, stack.reduce = wrapped("layers"), wrapped("heads")
    try:
        yield inside
    finally:
        del stack.run_step, stack.reduce


def time_state_copy(
    engine: TransformersEngine, windows: TokenWindows, args: argparse.Namespace
) -> float:
    """Seconds to copy one state into a buffer that is not in the cache."""
    rows = engine._scorer.executor.group_rows(windows.num_windows, windows.length)
    state = torch.ones((rows, windows.length, args.width), dtype=getattr(torch, args.dtype))
    budget = engine.info.settings["state_budget_bytes"]
    count = max(1, min(256, budget // (state.numel() * state.element_size())))
    buffers = [torch.empty_like(state) for _ in range(count)]
    for buffer in buffers:
        buffer.zero_()  # first touch
    laps = [timed(lambda: [b.copy_(state) for b in buffers], state.device, 1) for _ in range(5)]
    return statistics.median(lap.wall for lap in laps) / count


def profiled(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Seconds in arithmetic ops, and of wall time, under the profiler."""
    activity = torch.profiler.ProfilerActivity
    on_gpu = device.type == "cuda"
    kinds = [activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        wall = timed(call, device, 1).wall
    events = profile.key_averages()
    micros = (
        sum(event.self_device_time_total for event in events)
        if on_gpu
        else sum(
            event.self_cpu_time_total
            for event in events
            if event.key in ARITHMETIC or event.key.startswith("aten::_scaled_dot_product_")
        )
    )
    return micros / 1e6, wall


def verdict(holds: bool) -> str:
    return "yes" if holds else "**NO**"


def machine_lines(threads: int, device: str = "cpu") -> list[str]:
    """Machine, versions and command line."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    if device.startswith("cuda"):
        processor += f", {torch.cuda.get_device_name(device)}"
    return [
        f"- machine: {processor}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.platform()}",
        f"- versions: lpserve {lpserve.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"numpy {np.__version__}",
        f"- threads: {threads}; load of the machine before (1 minute): {os.getloadavg()[0]:.2f}",
        f"- command: `{Path(sys.executable).name} {' '.join(sys.argv)}`",
        "",
    ]


def publish(lines: list[str], out: Path | None) -> None:
    """Print the lines, and write them to a file if one is named."""
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if out is not None:
        out.write_text(text, encoding="utf-8")


def save_random_llama(args: argparse.Namespace, folder: Path) -> None:
    """A random float32 Llama whose layers matter: weights five times transformers' default."""
    config = transformers.LlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        vocab_size=args.vocabulary,
        max_position_embeddings=args.length,
        initializer_range=0.1,
    )
    torch.manual_seed(args.seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.to(getattr(torch, args.dtype)).save_pretrained(str(folder))


def demo_windows() -> tuple[str, TokenWindows]:
    """The bundled model and the calibration windows of the demonstration."""
    values = demo_values()
    windows = TokenWindows.from_file(
        next(iter(values["calibration"].values())),
        tokenizer=values["model"],
        num_windows=values["num_windows"],
        length=values["length"],
        seed=0,
    )
    return values["model"], windows


def random_windows(args: argparse.Namespace, num_windows: int) -> TokenWindows:
    rng = np.random.default_rng([args.seed, num_windows])
    return TokenWindows.from_tokens(rng.integers(args.vocabulary, size=(num_windows, args.length)))


@dataclass(kw_only=True)
class Flat:
    """Memory, in bytes, after each part of a long run of distinct masks."""

    num_masks: int
    start: int
    points: list[int] = field(default_factory=list)

    @property
    def growth(self) -> int:
        return max(self.points) - self.points[0]


def memory_line(memory: Memory) -> str:
    grown = memory.peak - memory.start
    return (
        f"- memory: {memory.start / MIB:.1f} MiB after loading and a warm-up call, peak "
        f"{memory.peak / MIB:.1f} MiB, grown by {grown / MIB:.1f} MiB; 1.2 x (state budget "
        f"{memory.state_budget / MIB:.0f} + head chunk {memory.head_chunk / MIB:.0f}) is "
        f"{memory.allowed / MIB:.1f} MiB: {verdict(grown <= memory.allowed)}"
    )


def flat_lines(flat: Flat) -> list[str]:
    step = flat.num_masks // len(flat.points)
    points = ", ".join(
        f"{step * (i + 1):,}: {point / MIB:.1f}" for i, point in enumerate(flat.points)
    )
    return [
        f"**Memory over {flat.num_masks:,} distinct masks**, MiB: 0: {flat.start / MIB:.1f}, "
        f"{points}; growth after the first {step:,} is {flat.growth / MIB:.2f} MiB, flat (at most "
        f"{FLAT_SHARE:.0%}): {verdict(flat.growth <= FLAT_SHARE * flat.points[0])}",
        "",
    ]
