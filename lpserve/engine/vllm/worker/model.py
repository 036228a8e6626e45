"""A model inside vLLM's worker as `VllmStack` drives it: forward, logits, attention, neighbours.

Shapes: n flat tokens (windows in a row), d width, V vocabulary of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lpserve.engine.head import Vocabulary, WholeVocabulary
from lpserve.engine.vllm.attention import AttentionSpec
from lpserve.engine.vllm.stack import LayerTap
from lpserve.engine.vllm.worker.contract import IMPL_ATTRIBUTES
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
        self.link = _Link(self.device, self.dtype)
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

    def run(self, ids_n: torch.Tensor, positions_n: torch.Tensor) -> torch.Tensor:
        """The model's forward under the tap's handler: final hidden states."""
        if self.uses_mrope:
            positions_n = positions_n.expand(3, -1)
        if self.link.is_first:
            return self.model(input_ids=ids_n, positions=positions_n)
        received = self.model.make_empty_intermediate_tensors(
            batch_size=len(ids_n), dtype=self.dtype, device=self.device
        )
        return self.model(input_ids=None, positions=positions_n, intermediate_tensors=received)

    def vocabulary(self) -> Vocabulary:
        """The whole of it, or, under tensor parallelism, this rank's part."""
        if self.tensor_parallel_size > 1:
            return _VocabularyPart(self)
        return WholeVocabulary(self.model.compute_logits)

    def shard_indices(self, rows_nd: torch.Tensor) -> Any:
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
                self.model.compute_logits(rows_nd[:1])
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


class _VocabularyPart:
    """The part of a vocabulary that one tensor-parallel rank holds. A few numbers a target travel
    between ranks, never logits; every rank has the same results.

    Shapes: R ranks.
    """

    def __init__(self, model: VllmModel) -> None:
        self._model = model
        self._start = self._size = 0

    def logits(self, rows_nd: torch.Tensor) -> torch.Tensor:
        shard = self._model.shard_indices(rows_nd)
        self._start, self._size = shard.org_vocab_start_index, shard.num_org_elements
        return self._model.model.compute_logits(rows_nd)[:, : self._size].float()

    def nll(self, logits_nV: torch.Tensor, ids_n: torch.Tensor) -> torch.Tensor:
        here_n = (ids_n >= self._start) & (ids_n < self._start + self._size)
        local_n = (ids_n - self._start).clamp(0, max(self._size - 1, 0))
        most_n, sums_n = _most_and_sum(logits_nV)
        target_n = torch.where(here_n, logits_nV.gather(1, local_n[:, None])[:, 0], 0.0)
        most_Rn, sums_Rn, target_Rn = self._gathered(most_n, sums_n, target_n)
        return _log_sum(most_Rn, sums_Rn) - target_Rn.sum(dim=0)

    def misses(self, logits_nV: torch.Tensor, ids_n: torch.Tensor) -> torch.Tensor:
        most_n, at_n = logits_nV.max(dim=1)
        # vocabulary rows are exact in float64
        most_Rn, at_Rn = self._gathered(most_n.double(), (at_n + self._start).double())
        # ranks hold the vocabulary in order: of equals, the first
        first_n = at_Rn.gather(0, most_Rn.argmax(dim=0, keepdim=True))[0]
        return (first_n != ids_n).float()

    def divergence(self, whole_nV: torch.Tensor, logits_knV: torch.Tensor) -> torch.Tensor:
        num_stacked, num_targets = logits_knV.shape[:2]
        most_p, sums_p = _most_and_sum(whole_nV)
        most_q, sums_q = _most_and_sum(logits_knV.flatten(0, 1))
        gaps = (whole_nV - most_p[:, None]).exp() * (whole_nV - logits_knV)
        parts = self._gathered(
            most_p.repeat(num_stacked),
            sums_p.repeat(num_stacked),
            most_q,
            sums_q,
            gaps.sum(-1).flatten(),
        )
        log_p, log_q = _log_sum(parts[0], parts[1]), _log_sum(parts[2], parts[3])
        gap = (parts[4] * (parts[0] - log_p).exp()).sum(dim=0)  # sum of p (logit p - logit q)
        return (gap - log_p + log_q).view(num_stacked, num_targets)

    def _gathered(self, *numbers_n: torch.Tensor) -> torch.Tensor:
        """Numbers of every rank, `[len(numbers_n), R, n]`."""
        from vllm.distributed import tensor_model_parallel_all_gather

        parts = tensor_model_parallel_all_gather(torch.stack(numbers_n), dim=1)
        return parts.view(len(numbers_n), self._model.tensor_parallel_size, -1)


def _most_and_sum(logits_nV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row, and the sum of exponentials beside it."""
    most_n = logits_nV.amax(dim=1)
    return most_n, (logits_nV - most_n[:, None]).exp().sum(dim=1)


def _log_sum(most_Rn: torch.Tensor, sums_Rn: torch.Tensor) -> torch.Tensor:
    """log of the sum of exponentials over all ranks, `float32[n]`."""
    top_n = most_Rn.amax(dim=0)
    return top_n + (sums_Rn * (most_Rn - top_n).exp()).sum(dim=0).log()


class _Link:
    """To the ranks before and after in vLLM's pipeline."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        from vllm.distributed import get_pp_group

        self._group = get_pp_group()
        self._device, self._dtype = device, dtype
        self.is_first: bool = self._group.is_first_rank
        self.is_last: bool = self._group.is_last_rank

    def send(self, tensor: torch.Tensor) -> None:
        self._group.send(tensor.contiguous())

    def receive(self, shape: torch.Size) -> torch.Tensor:
        return self._group.recv(shape, self._dtype)


def attention_spec(name: str, module: Any) -> AttentionSpec:
    from vllm.v1.attention.backend import AttentionType

    for attribute in IMPL_ATTRIBUTES:
        if not hasattr(module.impl, attribute):
            raise EngineError(f"{name}: {type(module.impl).__name__} has no {attribute!r}")
    if module.attn_type != AttentionType.DECODER:
        raise EngineError(f"{name} is not causal self-attention")
    if module.kv_sharing_target_layer_name is not None:
        raise EngineError(f"{name} takes keys and values of another layer")
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
        sinks_H=sinks,
        alibi_H=slopes,
    )


def _as_it_is(logits: torch.Tensor) -> torch.Tensor:
    return logits
