"""The vLLM names that this package relies on, and a check that they are what it relies on.

Imports vLLM in `check_contract` alone; `scripts/vllm_contract.py` reads the list for releases that
cannot run on the machine at hand.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from lpserve.errors import EngineError


@dataclass(frozen=True, slots=True)
class Touched:
    """A vLLM name that this package relies on."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    """Parameters that it must take."""
    attributes: tuple[str, ...] = ()
    """Attributes that its instances must have."""


_ATTENTION = "vllm.model_executor.layers.attention"
CONTRACT = (
    Touched("vllm.v1.worker.worker_base", "WorkerBase.get_model"),
    Touched("vllm.engine.arg_utils", "EngineArgs", (), ("worker_extension_cls",)),
    Touched("vllm.v1.engine.llm_engine", "LLMEngine", (), ("engine_core",)),
    Touched("vllm.v1.engine.core_client", "EngineCoreClient.shutdown"),
    Touched("vllm.distributed.parallel_state", "cleanup_dist_env_and_memory"),
    Touched("vllm.config", "set_current_vllm_config", ("vllm_config",)),
    Touched(
        "vllm.config", "CompilationConfig", (), ("static_forward_context", "static_all_moe_layers")
    ),
    Touched("vllm.model_executor.models.registry", "_ModelRegistry.register_model", ("model_cls",)),
    Touched("vllm.model_executor.models.registry", "_ModelRegistry.get_supported_archs"),
    Touched("vllm.model_executor.models.registry", "_LazyRegisteredModel.load_model_cls"),
    Touched("vllm.model_executor.models.utils", "PPMissingLayer"),
    Touched("vllm.model_executor.layers.linear", "LinearBase"),
    Touched("vllm.config", "ModelConfig.get_total_num_hidden_layers"),
    Touched("vllm.config", "ModelConfig.get_vocab_size"),
    Touched(
        "vllm.config",
        "ParallelConfig",
        (),
        (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "data_parallel_size",
            "worker_extension_cls",
        ),
    ),
    Touched(
        "vllm.forward_context",
        "set_forward_context",
        ("attn_metadata", "vllm_config", "num_tokens", "skip_compiled"),
    ),
    Touched("vllm.forward_context", "get_forward_context"),
    Touched("vllm.forward_context", "ForwardContext", (), ("all_moe_layers",)),
    Touched(
        _ATTENTION, "Attention.forward", ("query", "key", "value", "output_shape", "output_dtype")
    ),
    Touched(
        _ATTENTION,
        "Attention",
        (),
        (
            "num_heads",
            "num_kv_heads",
            "head_size",
            "head_size_v",
            "sliding_window",
            "attn_type",
            "kv_sharing_target_layer_name",
            "use_mm_prefix",
            "impl",
        ),
    ),
    Touched(_ATTENTION, "ChunkedLocalAttention", (), ("attention_chunk_size",)),
    Touched(_ATTENTION, "MLAAttention.forward", ("q", "kv_c_normed", "k_pe", "output_shape")),
    Touched(
        _ATTENTION,
        "MLAAttention",
        (),
        (
            "num_heads",
            "scale",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "kv_b_proj",
            "indexer",
        ),
    ),
    Touched(f"{_ATTENTION}_layer_base", "AttentionLayerBase"),
    Touched("vllm.v1.attention.backend", "AttentionType"),
    Touched("vllm.model_executor.models.utils", "PPMissingLayer"),
    Touched(
        "vllm.model_executor.layers.logits_processor", "LogitsProcessor._gather_logits", ("logits",)
    ),
    Touched(
        "vllm.model_executor.layers.logits_processor",
        "LogitsProcessor.forward",
        ("lm_head", "hidden_states"),
    ),
    Touched(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "VocabParallelEmbedding",
        (),
        ("shard_indices",),
    ),
    Touched("vllm.distributed", "tensor_model_parallel_all_gather", ("input_", "dim")),
    Touched("vllm.distributed", "get_pp_group"),
    Touched("vllm.distributed.parallel_state", "GroupCoordinator.send", ("tensor",)),
    Touched("vllm.distributed.parallel_state", "GroupCoordinator.recv", ("size", "dtype")),
)
IMPL_ATTRIBUTES = ("scale", "alibi_slopes", "logits_soft_cap")
"""Of an attention layer's `impl`, whatever the backend."""


def check_contract() -> None:
    """Raise EngineError naming the first vLLM name that is not what this package relies on."""
    import vllm

    for touched in CONTRACT:
        where = f"{touched.module}.{touched.name}"
        try:
            found: Any = importlib.import_module(touched.module)
            for part in touched.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            raise EngineError(f"vLLM {vllm.__version__} has no {where}") from None
        if touched.parameters:
            has = inspect.signature(found).parameters
            for parameter in touched.parameters:
                if parameter not in has:
                    raise EngineError(f"vLLM {vllm.__version__}: {where} takes no {parameter!r}")
