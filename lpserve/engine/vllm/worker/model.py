"""A model inside vLLM's worker as `VllmStack` drives it: forward, logits, attention, neighbours.

Shapes: n flat tokens (windows in a row), d width, V vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lpserve.engine.head import LocalVocabulary, Vocabulary
from lpserve.engine.vllm.tap import LayerTap
from lpserve.engine.vllm.worker.attention import AttentionSpec
from lpserve.engine.vllm.worker.contract import IMPL_ATTRIBUTES
from lpserve.engine.vllm.worker.parallel import PipelineLink, VocabularyPart
from lpserve.errors import EngineError


class VllmModel:
    """What `VllmStack` drives: the model's forward, logits and attention, in vLLM's contexts."""

    def __init__(self, worker: Any, tap: LayerTap) -> None:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        self.tap = tap
        self.vllm_config = worker.vllm_config
        self.model: Any = worker.get_model()
        self.name = type(self.model).__name__
        self.device: torch.device = worker.device
        self.dtype: torch.dtype = worker.model_config.dtype
        self.vocab_size: int = worker.model_config.get_vocab_size()
        self.uses_mrope = bool(getattr(worker.model_config, "uses_mrope", False))
        self.length = 0
        parallel = worker.vllm_config.parallel_config
        self.tensor_parallel_size: int = parallel.tensor_parallel_size
        self.link = PipelineLink(self.device, self.dtype)
        if parallel.data_parallel_size > 1:
            raise EngineError("data parallelism inside one engine")
        self._attention = self._attention_forwards()
        self._processors = [m for m in self.model.modules() if isinstance(m, LogitsProcessor)]
        if len(self._processors) != 1 and self.link.is_last:
            raise EngineError(f"{self.name} has {len(self._processors)} logits processors, not one")
        self._shard: Any = None

    @contextmanager
    def session(self) -> Iterator[None]:
        """vLLM's contexts, and attention over whole windows; put back afterwards."""
        from vllm.config import set_current_vllm_config
        from vllm.forward_context import get_forward_context, set_forward_context

        contexts = set_forward_context(None, self.vllm_config, num_tokens=1, skip_compiled=True)
        with set_current_vllm_config(self.vllm_config), contexts:
            get_forward_context().all_moe_layers = None
            for module, forward in self._attention:
                module.forward = forward
            processors = self._processors if self.tensor_parallel_size > 1 else []
            for processor in processors:
                processor._gather_logits = _as_it_is
            try:
                yield
            finally:
                for module, _ in self._attention:
                    del module.forward
                for processor in processors:
                    del processor._gather_logits

    def run(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The model's forward under the tap's handler: final hidden states."""
        if self.uses_mrope:
            positions = positions.expand(3, -1)
        if self.link.is_first:
            return self.model(input_ids=ids, positions=positions)
        received = self.model.make_empty_intermediate_tensors(
            batch_size=len(ids), dtype=self.dtype, device=self.device
        )
        return self.model(input_ids=None, positions=positions, intermediate_tensors=received)

    def vocabulary(self) -> Vocabulary:
        """The whole of it, or, under tensor parallelism, this rank's part."""
        if self.tensor_parallel_size > 1:
            return VocabularyPart(
                self.shard_indices, self.model.compute_logits, self.tensor_parallel_size
            )
        return LocalVocabulary(self.model.compute_logits)

    def shard_indices(self, rows: torch.Tensor) -> Any:
        """Which rows of the vocabulary this rank's head holds."""
        if self._shard is None:
            processor = self._processors[0]
            heads: list[Any] = []
            original = processor.forward

            def forward(lm_head: Any, *args: Any, **kwargs: Any) -> Any:
                heads.append(lm_head)
                return original(lm_head, *args, **kwargs)

            processor.forward = forward
            try:
                self.model.compute_logits(rows[:1])
            finally:
                del processor.forward
            self._shard = heads[0].shard_indices
        return self._shard

    def _attention_forwards(self) -> list[tuple[Any, Callable[..., torch.Tensor]]]:
        """Every attention module with its replacement; raises EngineError for what has none."""
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        inside = {id(m) for layer in self.tap.layers for m in layer.modules()}
        context = self.vllm_config.compilation_config.static_forward_context
        found = []
        for name, module in context.items():
            if isinstance(module, AttentionLayerBase):
                if id(module) not in inside:
                    raise EngineError(f"{name} is attention outside the decoder layers")
                found.append((module, self._replacement(name, module)))
        return found

    def _replacement(self, name: str, module: Any) -> Callable[..., torch.Tensor]:
        from vllm.model_executor.layers.attention import (
            Attention,
            ChunkedLocalAttention,
            MLAAttention,
        )

        if type(module) is MLAAttention:
            return self._mla(name, module)
        if type(module) not in (Attention, ChunkedLocalAttention):
            raise EngineError(f"{name} is {type(module).__name__}")
        spec = attention_spec(name, module)

        def forward(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            output_shape: torch.Size | None = None,
            output_dtype: torch.dtype | None = None,
        ) -> torch.Tensor:
            out = spec.attend(query, key, value, self.length)
            return out if output_dtype is None else out.to(output_dtype)

        return forward

    def _mla(self, name: str, module: Any) -> Callable[..., torch.Tensor]:
        """Multi-head latent attention with its keys and values written out, as in a prefill."""
        if module.indexer is not None:
            raise EngineError(f"{name} attends to a selection of tokens (sparse attention)")
        heads, nope, rope = module.num_heads, module.qk_nope_head_dim, module.qk_rope_head_dim
        spec = AttentionSpec(
            num_heads=heads,
            num_kv_heads=heads,
            head_size=nope + rope,
            head_size_v=module.v_head_dim,
            scale=float(module.scale),
            window=getattr(module, "sliding_window", None),
        )

        def forward(
            q: torch.Tensor,
            kv_c_normed: torch.Tensor,
            k_pe: torch.Tensor,
            output_shape: torch.Size | None = None,
            **_: Any,
        ) -> torch.Tensor:
            kv = module.kv_b_proj(kv_c_normed)[0].view(-1, heads, nope + module.v_head_dim)
            k_nope, value = kv.split([nope, module.v_head_dim], dim=-1)
            key = torch.cat([k_nope, k_pe.view(-1, 1, rope).expand(-1, heads, -1)], dim=-1)
            return spec.attend(q, key, value, self.length)

        return forward


def attention_spec(name: str, module: Any) -> AttentionSpec:
    from vllm.v1.attention.backend import AttentionType

    for attribute in IMPL_ATTRIBUTES:
        if not hasattr(module.impl, attribute):
            raise EngineError(f"{name}: {type(module.impl).__name__} has no {attribute!r}")
    if module.attn_type != AttentionType.DECODER:
        raise EngineError(f"{name} is not causal self-attention")
    if module.use_mm_prefix:
        raise EngineError(f"{name} attends both ways over a prefix")
    if getattr(module, "use_alibi_sqrt", False):
        raise EngineError(f"{name} has ALiBi slopes under a square root")
    if str(getattr(module, "kv_cache_dtype", "auto")).startswith(("fp8", "nvfp4", "int8")):
        raise EngineError(f"{name} rounds keys and values to {module.kv_cache_dtype}")
    impl, slopes, sinks = module.impl, module.impl.alibi_slopes, getattr(module.impl, "sinks", None)
    cap, window = impl.logits_soft_cap, module.sliding_window
    device = torch.device("cpu") if sinks is None else sinks.device
    if slopes is not None:
        slopes = torch.as_tensor(slopes, dtype=torch.float32)
        slopes = slopes.to(next(module.parameters(), torch.empty(0, device=device)).device)
    return AttentionSpec(
        num_heads=module.num_heads,
        num_kv_heads=module.num_kv_heads,
        head_size=module.head_size,
        head_size_v=module.head_size_v,
        scale=float(impl.scale),
        window=window or None,
        chunk=getattr(module, "attention_chunk_size", None),
        soft_cap=float(cap) if cap else None,
        sinks=sinks,
        alibi=slopes,
    )


def _as_it_is(logits: torch.Tensor) -> torch.Tensor:
    return logits
