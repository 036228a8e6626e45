"""Runs inside vLLM's workers: the only module that names vLLM internals.

`WorkerExtension` is mixed into vLLM's worker (`worker_extension_cls`) and called by
`collective_rpc`; its methods begin with `lpserve_`. It patches every decoder layer once, so that

* in the `requests` path a dropped layer hands its input on, and
* in the `scoring` path `VllmStack` gives the trie executor vLLM's own layers one by one.

`CONTRACT` lists what is touched; `check_contract` names what a version of vLLM changed.
Expected refusals come back as `{"error": ...}`: an exception in one worker can kill the engine.

Shapes: B rows, T tokens, n = B * T flat tokens, d width, V vocabulary of this rank.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from lpserve.engine.scorer import StackScorer, full_precision
from lpserve.engine.trie import TrieSettings
from lpserve.engine.vllm_attention import AttentionSpec
from lpserve.engine.vllm_stack import LayerTap, VllmStack
from lpserve.errors import EngineError, InputError
from lpserve.windows import TokenWindows


@dataclass(frozen=True, slots=True)
class Touched:
    """A vLLM name that this module relies on."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    """Parameters that it must take."""
    attributes: tuple[str, ...] = ()
    """Attributes that its instances must have."""


_ATTENTION = "vllm.model_executor.layers.attention"
CONTRACT = (
    Touched("vllm.v1.worker.worker_base", "WorkerBase.get_model"),
    Touched("vllm.config", "set_current_vllm_config", ("vllm_config",)),
    Touched("vllm.config", "CompilationConfig", (), ("static_forward_context",)),
    Touched("vllm.config", "ModelConfig.get_total_num_hidden_layers"),
    Touched("vllm.config", "ModelConfig.get_vocab_size"),
    Touched("vllm.config", "ParallelConfig", (), (
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
        "worker_extension_cls",
    )),
    Touched("vllm.forward_context", "set_forward_context",
            ("attn_metadata", "vllm_config", "num_tokens", "skip_compiled")),
    Touched("vllm.forward_context", "get_forward_context"),
    Touched("vllm.forward_context", "ForwardContext", (), ("all_moe_layers",)),
    Touched(_ATTENTION, "Attention.forward",
            ("query", "key", "value", "output_shape", "output_dtype")),
    Touched(_ATTENTION, "Attention", (), (
        "num_heads", "num_kv_heads", "head_size", "head_size_v", "sliding_window", "attn_type",
        "kv_sharing_target_layer_name", "use_mm_prefix", "impl",
    )),
    Touched(_ATTENTION, "ChunkedLocalAttention", (), ("attention_chunk_size",)),
    Touched(_ATTENTION, "MLAAttention.forward", ("q", "kv_c_normed", "k_pe", "output_shape")),
    Touched(_ATTENTION, "MLAAttention", (), (
        "num_heads", "scale", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_b_proj",
        "indexer",
    )),
    Touched(f"{_ATTENTION}_layer_base", "AttentionLayerBase"),
    Touched("vllm.v1.attention.backend", "AttentionType"),
    Touched("vllm.model_executor.models.utils", "PPMissingLayer"),
    Touched("vllm.model_executor.layers.logits_processor", "LogitsProcessor._gather_logits",
            ("logits",)),
    Touched("vllm.model_executor.layers.logits_processor", "LogitsProcessor.forward",
            ("lm_head", "hidden_states")),
    Touched("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbedding", (),
            ("shard_indices",)),
    Touched("vllm.distributed", "tensor_model_parallel_all_gather", ("input_", "dim")),
    Touched("vllm.distributed", "get_pp_group"),
    Touched("vllm.distributed.parallel_state", "GroupCoordinator.send", ("tensor",)),
    Touched("vllm.distributed.parallel_state", "GroupCoordinator.recv", ("size", "dtype")),
)  # fmt: skip
_IMPL_ATTRIBUTES = ("scale", "alibi_slopes", "logits_soft_cap")


def check_contract() -> None:
    """Raise EngineError naming the first vLLM name that is not what this module relies on."""
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


class WorkerExtension:
    """Methods of vLLM's worker. Arguments and results are plain values and bytes."""

    # of the worker that this is mixed into
    model_config: Any
    vllm_config: Any
    device: torch.device
    get_model: Callable[[], Any]
    _lpserve_tap: LayerTap
    _lpserve_stack: VllmStack
    _lpserve_scorer: StackScorer

    def lpserve_open(self) -> dict[str, Any]:
        """Patch the layers, once; describe what this rank holds."""
        return _reported(lambda: _open(self))

    def lpserve_set_mask(self, keep: list[bool]) -> list[bool]:
        """Which of all layers run from now on in requests, True = kept; returns the part of this
        rank, read back from the patches."""
        tap = self._lpserve_tap
        tap.keep[:] = keep[tap.first : tap.first + len(tap.layers)]
        return tap.read_mask()

    def lpserve_prepare(self, state_budget_bytes: int, micro_batch_tokens: int, pack_states: bool,
                        head_chunk_bytes: int) -> dict[str, Any]:  # fmt: skip
        """Make the scoring path ready, or say why it cannot be."""

        def prepare() -> dict[str, Any]:
            model = _VllmModel(self, self._lpserve_tap)
            self._lpserve_stack = VllmStack(model, head_chunk_bytes=head_chunk_bytes)
            settings = TrieSettings(
                state_budget_bytes=state_budget_bytes, micro_batch_tokens=micro_batch_tokens,
                pack_states=pack_states,
            )  # fmt: skip
            total = self.model_config.get_total_num_hidden_layers()
            self._lpserve_scorer = StackScorer(
                self._lpserve_stack, settings, part=(self._lpserve_tap.first, total)
            )
            return {}

        return _reported(prepare)

    def lpserve_register(self, tokens: bytes, scored: bytes, shape: list[int]) -> dict[str, Any]:
        """Register windows (int32 and bool bytes of [N, T]) with the scoring path."""
        tokens_NT = np.frombuffer(tokens, dtype=np.int32).reshape(shape)
        scored_NT = np.frombuffer(scored, dtype=bool).reshape(shape)

        def register() -> dict[str, Any]:
            with self._lpserve_stack.session():
                key = self._lpserve_scorer.register(TokenWindows.from_tokens(tokens_NT, scored_NT))
            return {"key": key}

        return _reported(register)

    def lpserve_probe(self) -> dict[str, Any]:
        """The kinds of state that are exact on this rank; windows must be registered."""

        def probe() -> dict[str, Any]:
            with full_precision(), self._lpserve_stack.session():
                return {"kinds": self._lpserve_stack.probe()}

        return _reported(probe)

    def lpserve_set_state(self, kind: str) -> None:
        """The kind of state that all ranks use."""
        self._lpserve_stack.state_kind = kind

    def lpserve_score(self, key: str, masks: bytes, num_masks: int) -> dict[str, Any]:
        """NLL of registered windows under masks (bool bytes of [M, P]), scoring path."""
        masks_MP = np.frombuffer(masks, dtype=bool).reshape(num_masks, -1)

        def score() -> dict[str, Any]:
            with self._lpserve_stack.session():
                nll_MN, work = self._lpserve_scorer.score(masks_MP, key)
            return {"nll": nll_MN.tobytes(), "shape": list(nll_MN.shape),
                    "work": [work.masks, work.distinct_masks, work.layer_forwards,
                             work.skip_layer_forwards, work.tokens, work.seconds]}  # fmt: skip

        return _reported(score)

    def lpserve_noise(self, key: str) -> float:
        """`StackScorer.batch_noise` of this rank."""
        with self._lpserve_stack.session():
            return self._lpserve_scorer.batch_noise(key)

    def lpserve_calls(self) -> dict[str, Any]:
        """Times that each layer really ran so far, and the class that ran."""
        tap = self._lpserve_tap
        return {
            "calls": list(tap.calls),
            "classes": [type(layer).__module__ for layer in tap.layers],
        }


def _open(worker: Any) -> dict[str, Any]:
    check_contract()
    if not hasattr(worker, "_lpserve_tap"):
        layers, first = _decoder_layers(worker)
        worker._lpserve_tap = LayerTap(layers, first, _forget_moe_order)
        _allocate_receive_buffers(worker)
        _use_plain_rotary_with_mla(worker)
    parallel = worker.vllm_config.parallel_config
    config = worker.model_config
    return {
        "num_layers": config.get_total_num_hidden_layers(),
        "first_layer": worker._lpserve_tap.first,
        "local_layers": len(worker._lpserve_tap.layers),
        "architecture": type(worker.get_model()).__name__,
        "vocab_size": config.get_vocab_size(),
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "quantization": config.quantization,
        "device": str(worker.device),
        "free_bytes": _free_bytes(worker.device),
        "threads": torch.get_num_threads(),
    }


class _VllmModel:
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

    def token_nll(self, rows_nd: torch.Tensor, ids_n: torch.Tensor) -> torch.Tensor:
        """float32[n] nats. Under tensor parallelism each rank reduces its own part of the
        vocabulary; three numbers a token travel, never logits."""
        if self.tensor_parallel_size == 1:
            logits_nV = self.model.compute_logits(rows_nd).float()
            return torch.nn.functional.cross_entropy(logits_nV, ids_n, reduction="none")
        from vllm.distributed import tensor_model_parallel_all_gather

        shard = self._shard_indices(rows_nd)
        start, size = shard.org_vocab_start_index, shard.num_org_elements
        logits_nV = self.model.compute_logits(rows_nd)[:, :size].float()
        here_n = (ids_n >= start) & (ids_n < start + size)
        local_n = (ids_n - start).clamp(0, max(size - 1, 0))
        most_n = logits_nV.amax(dim=1)
        sums_n = (logits_nV - most_n[:, None]).exp().sum(dim=1)
        target_n = torch.where(here_n, logits_nV.gather(1, local_n[:, None])[:, 0], 0.0)
        parts = tensor_model_parallel_all_gather(torch.stack([most_n, sums_n, target_n]), dim=1)
        most_Rn, sums_Rn, target_Rn = parts.view(3, self.tensor_parallel_size, -1)
        top_n = most_Rn.amax(dim=0)
        total_n = (sums_Rn * (most_Rn - top_n).exp()).sum(dim=0)
        return top_n + total_n.log() - target_Rn.sum(dim=0)

    def _shard_indices(self, rows_nd: torch.Tensor) -> Any:
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
        spec = _attention_spec(name, module)

        def forward(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
            output_shape: torch.Size | None = None, output_dtype: torch.dtype | None = None,
        ) -> torch.Tensor:  # fmt: skip
            out = spec.attend(query, key, value, self.length)
            return out if output_dtype is None else out.to(output_dtype)

        return forward

    def _mla(self, name: str, module: Any) -> Callable[..., torch.Tensor]:
        """Multi-head latent attention with its keys and values written out, as in a prefill."""
        if module.indexer is not None:
            raise EngineError(f"{name} attends to a selection of tokens (sparse attention)")
        heads, nope, rope = module.num_heads, module.qk_nope_head_dim, module.qk_rope_head_dim
        spec = AttentionSpec(
            num_heads=heads, num_kv_heads=heads, head_size=nope + rope,
            head_size_v=module.v_head_dim, scale=float(module.scale),
            window=getattr(module, "sliding_window", None),
        )  # fmt: skip

        def forward(
            q: torch.Tensor, kv_c_normed: torch.Tensor, k_pe: torch.Tensor,
            output_shape: torch.Size | None = None, **_: Any,
        ) -> torch.Tensor:  # fmt: skip
            kv = module.kv_b_proj(kv_c_normed)[0].view(-1, heads, nope + module.v_head_dim)
            k_nope, value = kv.split([nope, module.v_head_dim], dim=-1)
            key = torch.cat([k_nope, k_pe.view(-1, 1, rope).expand(-1, heads, -1)], dim=-1)
            return spec.attend(q, key, value, self.length)

        return forward


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


def _attention_spec(name: str, module: Any) -> AttentionSpec:
    from vllm.v1.attention.backend import AttentionType

    for attribute in _IMPL_ATTRIBUTES:
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
        num_heads=module.num_heads, num_kv_heads=module.num_kv_heads, head_size=module.head_size,
        head_size_v=module.head_size_v, scale=float(impl.scale), window=window or None,
        chunk=getattr(module, "attention_chunk_size", None), soft_cap=float(cap) if cap else None,
        sinks_H=sinks, alibi_H=slopes,
    )  # fmt: skip


def _decoder_layers(worker: Any) -> tuple[list[nn.Module], int]:
    """The decoder layers on this rank and the index of the first of them, found by structure."""
    from vllm.model_executor.models.utils import PPMissingLayer

    total = worker.model_config.get_total_num_hidden_layers()
    model = worker.get_model()
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total
    }
    # of nested lists (one part of each layer, say) the outermost drives the rest
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    attends = {id(m) for m in worker.vllm_config.compilation_config.static_forward_context.values()}
    fitting = [n for n in outer if any(id(m) in attends for m in lists[n].modules())]
    if len(fitting) != 1:
        raise EngineError(
            f"{type(model).__name__}: found {len(fitting)} lists of {total} decoder layers, not one"
        )
    modules = lists[fitting[0]]
    local = [i for i, layer in enumerate(modules) if not isinstance(layer, PPMissingLayer)]
    return [modules[i] for i in local], local[0]


def _forget_moe_order() -> None:
    """vLLM may name mixture-of-experts layers by counting them as they run (forward context's
    `all_moe_layers`); with a layer left out, the count would pick other layers' experts."""
    from vllm.forward_context import get_forward_context

    get_forward_context().all_moe_layers = None


def _allocate_receive_buffers(worker: Any) -> None:
    """Pipeline parallelism on CPU: vLLM 0.32 allocates the receive buffers in a warm-up run that
    eager mode with a fixed KV cache skips, and the first request fails without them."""
    from vllm.distributed import get_pp_group

    runner = worker.model_runner
    if get_pp_group().is_first_rank or getattr(runner, "intermediate_tensors", 0) is not None:
        return
    runner.intermediate_tensors = worker.get_model().make_empty_intermediate_tensors(
        batch_size=worker.scheduler_config.max_num_batched_tokens,
        dtype=worker.model_config.dtype,
        device=worker.device,
    )


def _use_plain_rotary_with_mla(worker: Any) -> None:
    """vLLM 0.32's rotary kernel for CPU reads MLA's strided queries as if they were contiguous:
    scores then depend on what else is in the batch. Its own plain form is right."""
    from vllm.model_executor.layers.attention import MLAAttention

    modules = list(worker.get_model().modules())
    if worker.device.type != "cpu" or not any(isinstance(m, MLAAttention) for m in modules):
        return
    for module in modules:
        if type(module).__name__.endswith("RotaryEmbedding"):
            module._forward_method = module.forward_native


def _reported(method: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return method()
    except (EngineError, InputError) as error:
        return {"error": str(error), "kind": type(error).__name__}
    except Exception as error:  # raised in a worker it would take the engine down without a word
        line = (str(error).splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {line}", "kind": "failure"}


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return psutil.virtual_memory().available
    return torch.cuda.mem_get_info(device)[0]


def _as_it_is(logits: torch.Tensor) -> torch.Tensor:
    return logits
