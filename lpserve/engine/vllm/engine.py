"""The vLLM engine: masks scored by vLLM's own layers, on one device or several.

Two paths, one contract:

* `scoring`: the trie executor runs inside vLLM's workers over the model's layers, with attention
  over whole windows and the NLL reduced there: no scheduler, KV cache or prompt log-probabilities.
* `requests`: every layer is patched to pass its input on when masked; windows are ordinary requests
  with prompt log-probabilities. Slower; serves what vLLM can serve; the reference of the other.

`auto` takes `scoring` when the model's structure allows it and both paths agree on the full model,
on nothing kept and on random masks; which ran, and why, is in `info`.
"""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lpserve.data.prepare import check_windows
from lpserve.data.windows import TokenWindows
from lpserve.engine.base import (
    check_extra_metrics,
    check_masks,
    scores_of,
)
from lpserve.engine.scorer import HEAD_CHUNK_BYTES, trie_settings
from lpserve.engine.vllm.differences import known_difference
from lpserve.engine.vllm.options import (
    check_vllm_options,
    engine_arguments,
    quantization_of,
)
from lpserve.engine.vllm.paths import PathChoice
from lpserve.engine.vllm.process import GlobalState, start, stop
from lpserve.engine.vllm.ranks import Ranks
from lpserve.errors import InputError
from lpserve.model.architecture import check_decoder
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.content_hash import checkpoint_hash
from lpserve.model.gguf import gguf_record
from lpserve.types import (
    BoolArray,
    EngineInfo,
    EngineSpec,
    Scores,
)
from lpserve.utility import METRICS


class VllmEngine:
    """See `lpserve.engine.base.Engine`. Options:

    * `path`: `auto` (default), `scoring` or `requests`.
    * `state_budget_mb`, `micro_batch_tokens`: as for the transformers engine, on each rank.
    * any other argument of `vllm.LLM`, such as `tensor_parallel_size`; those that would change what
      a score means are refused with the reason.
    """

    def __init__(self, spec: EngineSpec, windows: TokenWindows) -> None:
        check_vllm_options(spec)
        self._checkpoint = read_checkpoint(spec.model)
        check_decoder(self._checkpoint)
        check_windows(self._checkpoint, windows)
        self._closed = False
        arguments = engine_arguments(spec, self._checkpoint.config, windows)
        self._max_length = arguments["max_model_len"] - 1
        self._left = GlobalState(self._checkpoint.config)
        self._llm: Any = start(arguments, self._left)
        try:
            self._open(spec, windows, arguments)
        except BaseException:
            self.close()
            raise

    def _open(self, spec: EngineSpec, windows: TokenWindows, arguments: Mapping[str, Any]) -> None:
        import vllm

        self._ranks = Ranks(self._llm, spec.players)
        first = self._ranks.about[0]
        self._num_players = self._ranks.num_players
        free = min(rank["free_bytes"] for rank in self._ranks.about)
        device = torch.device(first["device"])
        if spec.device not in ("auto", first["device"], device.type):
            raise InputError(
                f"device {spec.device!r} is asked for, but this vLLM runs on {first['device']}: "
                "leave device at auto"
            )
        settings = trie_settings(spec.options, device.type, free)
        head_chunk = HEAD_CHUNK_BYTES[device.type]
        self._default = windows.content_hash
        chosen = PathChoice(self._ranks, spec).choose(windows, settings, head_chunk)
        self.path, self.path_reason = chosen.name, chosen.reason
        self._windows: dict[str, TokenWindows] = {self._default: windows}
        self.info = EngineInfo(
            kind="vllm",
            path=f"vllm/{self.path}",
            path_reason=self.path_reason,
            noise_nll=chosen.noise_nll,
            model=str(Path(spec.model).resolve()),
            model_hash=checkpoint_hash(self._checkpoint),
            players=self._ranks.players,
            dtype=spec.dtype,
            quantization=quantization_of(spec, first["quantization"]),
            device=first["device"],
            vocab_size=first["vocab_size"],
            metrics=self._metrics(),
            has_overlap=self.path == "scoring",
            versions={
                "torch": torch.__version__,
                "vllm": vllm.__version__,
                "transformers": importlib.metadata.version("transformers"),
            },
            settings={
                "path": self.path,
                "modules": self._ranks.modules,
                "unlike_transformers": known_difference(self._checkpoint.config),
                "dequantized_from": gguf_record(self._checkpoint.path),
                "state_budget_bytes": settings.state_budget_bytes,
                "micro_batch_tokens": settings.micro_batch_tokens,
                "pack_states": settings.pack_states,
                "head_chunk_bytes": head_chunk,
                "threads": first["threads"],
                "architecture": first["architecture"],
                "state": chosen.state_kind,
                "tensor_parallel_size": first["tensor_parallel_size"],
                "pipeline_parallel_size": first["pipeline_parallel_size"],
                "max_model_len": arguments["max_model_len"],
                "kv_cache_memory_bytes": arguments.get("kv_cache_memory_bytes"),
            },
        )

    def _metrics(self) -> tuple[str, ...]:
        if self.path == "requests":
            return ("nll", "misses")
        # only the last stage of a pipeline sees the full model's final state
        return METRICS if self._ranks.num_stages == 1 else ("nll", "misses")

    def register(self, windows: TokenWindows) -> str:
        key = windows.content_hash
        if key in self._windows:
            return key
        check_windows(self._checkpoint, windows)
        if windows.length > self._max_length:
            raise InputError(
                f"windows of {windows.length} tokens, but the engine was opened for "
                f"{self._max_length}: set the engine option max_model_len to {windows.length + 1}"
            )
        if self.path == "scoring":
            self._ranks.register(windows)
        self._windows[key] = windows
        return key

    def score(
        self, masks_MP: BoolArray, windows: str | None = None, extra_metrics: Sequence[str] = ()
    ) -> Scores:
        key = self._default if windows is None else windows
        if key not in self._windows:
            raise InputError(f"windows {key!r} are not registered with this engine")
        masks_MP = check_masks(masks_MP, self._num_players)
        extra_metrics = check_extra_metrics(self.info, extra_metrics)
        scoring = self.path == "scoring"
        score = self._ranks.score_by_stack if scoring else self._ranks.score_by_requests
        metric_values, work = score(masks_MP, self._windows[key], extra_metrics)
        return scores_of(metric_values, extra_metrics, self._windows[key].num_tokens_N, work)

    def score_overlap(
        self, masks_MP: BoolArray, windows: str | None = None, extra_metrics: Sequence[str] = ()
    ) -> Scores:
        """See `lpserve.engine.base.HasOverlap`; the scoring path alone has it."""
        if not self.info.has_overlap:
            raise InputError("overlaps cannot be had by requests, which show no logits")
        registered = self._windows[self._default if windows is None else windows]
        masks_MP = check_masks(masks_MP, self._num_players)
        names = check_extra_metrics(self.info, extra_metrics)
        metric_values, work, overlap_MM = self._ranks.score_overlap(masks_MP, registered, names)
        return scores_of(metric_values, names, registered.num_tokens_N, work, overlap_MM)

    def score_by_requests(
        self, masks_MP: BoolArray, windows: TokenWindows, extra_metrics: Sequence[str] = ()
    ) -> Scores:
        """Scores by the requests path, whichever path this engine runs: the slow reference.
        `extra_metrics` may be `misses`."""
        masks_MP = check_masks(masks_MP, self._num_players)
        metric_values, work = self._ranks.score_by_requests(masks_MP, windows, extra_metrics)
        return scores_of(metric_values, extra_metrics, windows.num_tokens_N, work)

    def generate(
        self,
        mask_P: BoolArray,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """See `lpserve.engine.base.Generates`. By vLLM's own requests, whichever path scores."""
        (mask_P,) = check_masks(np.asarray(mask_P)[None], self._num_players)
        longest = self._max_length + 1  # max_model_len
        for row, prompt in enumerate(prompts):
            if not prompt or len(prompt) + max_new_tokens > longest:
                raise InputError(
                    f"prompt {row} has {len(prompt)} tokens: with {max_new_tokens} new ones it "
                    f"must have between 1 and {longest} (max_model_len)"
                )
        return self._ranks.generate(mask_P, prompts, max_new_tokens, end_ids)

    def layer_calls(self) -> list[dict[str, Any]]:
        """For each rank: how often each of its layers ran so far, and the modules they are of."""
        return self._ranks.call("lpserve_calls")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "_llm"):
            try:
                stop(self._llm, self._left)
            finally:
                del self._llm
                self.__dict__.pop("_ranks", None)  # it holds the LLM, too
        gc.collect()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
