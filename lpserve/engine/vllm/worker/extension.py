"""Runs inside vLLM's workers: the only package that names vLLM internals.

`WorkerExtension` is mixed into vLLM's worker (`worker_extension_cls`) and called by
`collective_rpc`; its methods begin with `lpserve_`. It patches every decoder layer once, so that

* in the `requests` path a dropped layer hands its input on, and
* in the `scoring` path `VllmStack` gives the trie executor vLLM's own layers one by one.

`contract.py` lists what is touched; `model.py` drives a model in vLLM's contexts. Expected refusals
come back as `{"error": ...}`: an exception in one worker can kill the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from lpserve.data.windows import TokenWindows
from lpserve.engine.scorer import StackScorer, free_bytes, full_precision
from lpserve.engine.trie import TrieSettings
from lpserve.engine.vllm.stack import VllmStack
from lpserve.engine.vllm.tap import LayerTap
from lpserve.engine.vllm.worker.contract import check_contract
from lpserve.engine.vllm.worker.model import VllmModel
from lpserve.errors import EngineError, InputError, typed_first_line
from lpserve.types import FloatArray, Work


def known_arguments() -> frozenset[str]:
    """Names of the arguments of `vllm.LLM`."""
    from vllm.engine.arg_utils import EngineArgs

    return frozenset(EngineArgs.__dataclass_fields__)


def shut_down(llm: Any) -> None:
    """End an engine (None: one that did not start) and vLLM's distributed state."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if llm is not None:
        llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


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

    def lpserve_set_mask(self, kept: list[list[str]]) -> list[list[str]]:
        """Which parts of all layers run from now on in requests; returns those of this rank, read
        back from the patches."""
        tap = self._lpserve_tap
        tap.kept[:] = kept[tap.first : tap.first + len(tap.layers)]
        return tap.read_mask()

    def lpserve_prepare(
        self,
        state_budget_bytes: int,
        micro_batch_tokens: int,
        pack_states: bool,
        head_chunk_bytes: int,
    ) -> dict[str, Any]:
        """Make the scoring path ready, or say why it cannot be."""

        def prepare() -> dict[str, Any]:
            model = VllmModel(self, self._lpserve_tap)
            self._lpserve_stack = VllmStack(model, head_chunk_bytes=head_chunk_bytes)
            settings = TrieSettings(
                state_budget_bytes=state_budget_bytes,
                micro_batch_tokens=micro_batch_tokens,
                pack_states=pack_states,
            )
            self._lpserve_scorer = StackScorer(self._lpserve_stack, settings)
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

    def lpserve_find_halves(self, kind: str, parts: list[dict[str, int]]) -> dict[str, Any]:
        """Take the kind of state that all ranks use, and find the halves of layers that are not run
        whole.

        Args:
            parts: of each layer of the model, what is run apart and its player.
        """
        tap = self._lpserve_tap

        def find() -> dict[str, Any]:
            self._lpserve_stack.state_kind = kind
            with full_precision(), self._lpserve_stack.session():
                mine = parts[tap.first : tap.first + len(tap.layers)]
                paired = self._lpserve_stack.find_halves(mine)
                return {"paired": paired, "modules": self._lpserve_stack.modules()}

        return _reported(find)

    def lpserve_make_steps(self, paired: bool) -> dict[str, Any]:
        """The player of each step of this rank."""
        return _reported(lambda: {"steps": self._lpserve_stack.make_steps(paired=paired)})

    def lpserve_set_stage(self, stages: list[list[int]]) -> None:
        """Take the steps of all stages of the pipeline."""
        stage = stages.index(self._lpserve_stack.step_players)
        first = sum(map(len, stages[:stage]))
        self._lpserve_scorer.stage = first, [player for steps in stages for player in steps]

    def lpserve_score(
        self, key: str, masks: bytes, num_masks: int, extra_metrics: list[str]
    ) -> dict[str, Any]:
        """NLL and other metrics of registered windows under masks (bool bytes of [M, P]), scoring
        path."""
        masks_MP = np.frombuffer(masks, dtype=bool).reshape(num_masks, -1)

        def score() -> dict[str, Any]:
            with self._lpserve_stack.session():
                metric_values, work = self._lpserve_scorer.score(masks_MP, key, extra_metrics)
            return _reply(metric_values, work)

        return _reported(score)

    def lpserve_overlap(
        self, key: str, masks: bytes, num_masks: int, extra_metrics: list[str]
    ) -> dict[str, Any]:
        """`lpserve_score`, with the overlap of the masks' effects."""
        masks_MP = np.frombuffer(masks, dtype=bool).reshape(num_masks, -1)

        def score() -> dict[str, Any]:
            with self._lpserve_stack.session():
                found = self._lpserve_scorer.score_overlap(masks_MP, key, extra_metrics)
            metric_values, work, overlap_MM = found
            return _reply(metric_values, work) | {"overlap": overlap_MM.tobytes()}

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


def _reply(metric_values: FloatArray, work: Work) -> dict[str, Any]:
    """Scores as plain values, which pass between processes."""
    return {
        "values": metric_values.tobytes(),
        "shape": list(metric_values.shape),
        "work": list(dataclasses.astuple(work)),
    }


def _open(worker: Any) -> dict[str, Any]:
    check_contract()
    if not hasattr(worker, "_lpserve_tap"):
        layers, first = _decoder_layers(worker)
        _check_own_keys(layers, first)
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
        "free_bytes": free_bytes(worker.device),
        "threads": torch.get_num_threads(),
    }


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
    fitting = [lists[n] for n in outer if any(id(m) in attends for m in lists[n].modules())]
    # two lists may hold the same layers (Gemma-4's, which a second module runs)
    distinct = list({tuple(map(id, modules)): modules for modules in fitting}.values())
    if len(distinct) != 1:
        raise EngineError(
            f"{type(model).__name__}: found {len(distinct)} lists of {total} decoder layers, not "
            "one"
        )
    modules = distinct[0]
    local = [i for i, layer in enumerate(modules) if not isinstance(layer, PPMissingLayer)]
    return [modules[i] for i in local], local[0]


def _check_own_keys(layers: list[nn.Module], first: int) -> None:
    """Raise EngineError where a layer attends to keys and values that another one computes: by
    requests, too, it would read what an earlier request left in the cache."""
    for index, layer in enumerate(layers, first):
        for module in layer.modules():
            if getattr(module, "kv_sharing_target_layer_name", None) is not None:
                raise EngineError(
                    f"layer {index} takes keys and values of {module.kv_sharing_target_layer_name}:"
                    " its layers cannot be skipped one by one"
                )


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
        return {"error": typed_first_line(error), "kind": "failure"}
