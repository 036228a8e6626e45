"""Checkpoints in use: latency, throughput and memory of a dense model and of pruned ones.

Each checkpoint is measured in each engine in a fresh process (`speed_worker`), one after another,
with the same prompts; the figures hold for this machine. The first checkpoint is the baseline of
the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lpserve.config import DTYPES
from lpserve.engine.kind import InUse
from lpserve.engine.registry import ENGINE_KINDS
from lpserve.errors import EngineError, InputError
from lpserve.model.architecture import check_decoder, read_architecture
from lpserve.model.checkpoint import read_checkpoint

ENGINES = tuple(name for name, kind in ENGINE_KINDS.items() if kind.in_use)
"""Engine kinds that can be measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedConfig:
    """What to measure."""

    models: tuple[str, ...]
    """Checkpoint folders; the first is the baseline."""
    engines: tuple[str, ...] = ("transformers",)
    dtype: str = "bfloat16"
    device: str = "auto"
    """`auto` (a GPU where there is one) or `cpu`."""
    prompt_tokens: int = 128
    new_tokens: int = 64
    batch: int = 16
    """Requests of the batch that throughput is measured on."""
    repeats: int = 3
    """Timed repeats, after one to warm up; medians are reported."""
    seed: int = 0
    """Seed of the random prompts."""
    vllm_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `vllm.LLM`."""

    def __post_init__(self) -> None:
        for key, choices in (("engines", ENGINES), ("dtype", DTYPES), ("device", ("auto", "cpu"))):
            given = getattr(self, key)
            for value in (given,) if isinstance(given, str) else given:
                if value not in choices:
                    raise InputError(f"{key} must be of {', '.join(choices)}: got {value!r}")
        for key in ("prompt_tokens", "new_tokens", "batch", "repeats"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{key} must be a whole number above 0: got {value!r}")
        if not self.models:
            raise InputError("no model to measure: name checkpoint folders, the dense one first")


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """One checkpoint in one engine."""

    model: str
    engine: str
    version: str
    """Version of the engine."""
    device: str
    threads: int
    num_layers: int
    weight_bytes: int
    """Bytes of the checkpoint's tensors, as stored."""
    load_s: float
    """Seconds to open the checkpoint in the engine."""
    first_token_s: float
    """Seconds from a prompt to its first new token, for a single request."""
    decode_s: float
    """Seconds for each further token of a single request."""
    batch_tokens_per_s: float
    """New tokens of a batch divided by the seconds from its prompts to its end."""
    batch_tokens_per_s_range: tuple[float, float]
    """Slowest and fastest repeat."""
    peak_bytes: int
    """Peak memory, summed over the ranks; it includes vLLM's cache of keys and values. GPU: the
    peak that torch allocated. CPU: the peak of the process above its memory before the model was
    loaded."""


def measure(config: SpeedConfig) -> list[Speed]:
    """Measure every checkpoint in every engine, in order.

    Raises:
        InputError: a checkpoint cannot be used, or has too few positions; before anything loads.
        EngineError: a process failed; the message is the last line that it printed.
    """
    weights = {}
    for model in config.models:
        checkpoint = read_checkpoint(model)
        check_decoder(checkpoint)
        length = config.prompt_tokens + config.new_tokens
        architecture = read_architecture(checkpoint)
        limit = architecture.max_positions
        if limit is not None and length > limit:
            raise InputError(
                f"model {model} has {limit} positions ({architecture.positions_key}): "
                f"prompt_tokens + new_tokens is {length}"
            )
        weights[model] = sum(entry.num_bytes for entry in checkpoint.tensors)
    for engine in config.engines:
        _in_use(engine).check(config.device)
    return [
        _measured(config, model, engine, weights[model])
        for engine in config.engines
        for model in config.models
    ]


def _in_use(engine: str) -> InUse:
    in_use = ENGINE_KINDS[engine].in_use
    assert in_use is not None
    return in_use


def _measured(config: SpeedConfig, model: str, engine: str, weight_bytes: int) -> Speed:
    script = str(_in_use(engine).script)
    task = asdict(config) | {"model": str(Path(model).resolve()), "script": script}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("speed_worker.py")), json.dumps(task)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"{model} cannot be measured with {engine}: {last}")
    found = json.loads(lines[-1])
    found["batch_tokens_per_s_range"] = tuple(found["batch_tokens_per_s_range"])
    return Speed(model=model, engine=engine, weight_bytes=weight_bytes, **found)


def table(speeds: list[Speed]) -> list[str]:
    """A Markdown table; factors are over the first checkpoint in the same engine."""
    lines = [
        "| engine | checkpoint | layers | weights MiB | peak MiB | first token ms | ms a token | "
        "batch tokens/s (range) | faster: first token / token / batch |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for s in speeds:
        base = next(b for b in speeds if b.engine == s.engine)
        low, high = s.batch_tokens_per_s_range
        faster = (
            base.first_token_s / s.first_token_s,
            base.decode_s / s.decode_s,
            s.batch_tokens_per_s / base.batch_tokens_per_s,
        )
        lines.append(
            f"| {s.engine} {s.version} | {s.model} | {s.num_layers} "
            f"| {s.weight_bytes / 2**20:,.1f} "
            f"| {s.peak_bytes / 2**20:,.0f} | {1e3 * s.first_token_s:.2f} | {1e3 * s.decode_s:.2f} "
            f"| {s.batch_tokens_per_s:,.0f} ({low:,.0f} to {high:,.0f}) "
            f"| {' / '.join(f'{f:.2f} x' for f in faster)} |"
        )
    return lines
