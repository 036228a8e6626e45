"""The vLLM engine: masks scored by vLLM's own layers, on one device or several.

Two paths, one contract:

* `scoring`: the trie executor runs inside vLLM's workers over the model's layers, with attention
  over whole windows and the NLL reduced there: no scheduler, KV cache or prompt log-probabilities.
* `requests`: every layer is patched to pass its input on when masked; windows are ordinary requests
  with prompt log-probabilities. Slower; serves what vLLM can serve; the reference of the other.

`auto` takes `scoring` when the model's structure allows it and both paths agree on the whole model,
on nothing kept and on random masks; which ran, and why, is in `info`.
"""

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from lpserve.engine.trie import TrieSettings
from lpserve.engine.vllm.options import (
    check_vllm_options,
    engine_arguments,
    quantization_of,
)
from lpserve.engine.vllm.process import GlobalState, start, stop
from lpserve.engine.vllm.stack import STATE_KINDS
from lpserve.errors import EngineError, InputError
from lpserve.masks import sort_distinct
from lpserve.model.architecture import check_decoder
from lpserve.model.checkpoint import checkpoint_hash, read_checkpoint
from lpserve.model.players import layer_players
from lpserve.types import (
    BoolArray,
    EngineInfo,
    EngineSpec,
    FloatArray,
    Scores,
    Work,
)
from lpserve.utility import METRICS

PATH_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}
"""Relative, mean NLL of a mask, between the two paths at start. In float32 both sum the same terms
in another order (measured on 18 architectures: at most 3e-7). In bfloat16 attention kernels round
differently: up to 2.3e-3 nats of about 5 on the bundled model, more with the large weights of the
tests' random models; a structural mistake is worth 1e-1 and more. float16 keeps 3 more bits."""
QUANTIZED_TOLERANCE = 5e-3
"""At least, for quantized weights: where activations are rounded to 8 bits on the way, a difference
in the last bit may turn a rounding (measured in float32, W8A8: up to 8e-5)."""
PROBE_WINDOWS, PROBE_MASKS = 16, 6
"""Most windows and random masks of the self-check."""
RPC_TIMEOUT_S = 1800.0
"""A rank that died leaves the others waiting for it; after this the engine gives up."""
_LIKELIEST = 4
"""Tokens asked for at each position to find the first choice among equals (bundled model, bfloat16:
2 share the highest logit at 2% of 6048 targets, 3 at most). Of more, the first may not be found."""


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
        self._wanted = str(spec.options.get("path", "auto"))
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

        self._ranks = self._call("lpserve_open")
        first = self._ranks[0]
        self._num_players: int = first["num_layers"]
        self._exact = spec.dtype == "float32" and not first["quantization"]
        self._tolerance = PATH_TOLERANCE[spec.dtype]
        if first["quantization"]:
            self._tolerance = max(self._tolerance, QUANTIZED_TOLERANCE)
        self._windows: dict[str, TokenWindows] = {}
        free = min(rank["free_bytes"] for rank in self._ranks)
        device = torch.device(first["device"])
        if spec.device not in ("auto", first["device"], device.type):
            raise InputError(
                f"device {spec.device!r} is asked for, but this vLLM runs on {first['device']}: "
                "leave device at auto"
            )
        settings = trie_settings(spec.options, device.type, free)
        head_chunk = HEAD_CHUNK_BYTES[device.type]
        self._default = windows.content_hash
        self.path, self.path_reason, noise = self._choose_path(windows, settings, head_chunk, spec)
        if self.path == "requests":
            self._windows = {self._default: windows}
        self.info = EngineInfo(
            kind="vllm",
            path=f"vllm/{self.path}",
            path_reason=self.path_reason,
            noise_nll=noise,
            model=str(Path(spec.model).resolve()),
            model_hash=checkpoint_hash(self._checkpoint),
            players=layer_players(self._num_players),
            dtype=spec.dtype,
            quantization=quantization_of(spec, first["quantization"]),
            device=first["device"],
            vocab_size=first["vocab_size"],
            metrics=self._metrics(),
            versions={
                "torch": torch.__version__,
                "vllm": vllm.__version__,
                "transformers": importlib.metadata.version("transformers"),
            },
            settings={
                "path": self.path,
                "state_budget_bytes": settings.state_budget_bytes,
                "micro_batch_tokens": settings.micro_batch_tokens,
                "pack_states": settings.pack_states,
                "head_chunk_bytes": head_chunk,
                "threads": first["threads"],
                "architecture": first["architecture"],
                "state": self._state_kind,
                "tensor_parallel_size": first["tensor_parallel_size"],
                "pipeline_parallel_size": first["pipeline_parallel_size"],
                "max_model_len": arguments["max_model_len"],
                "kv_cache_memory_bytes": arguments.get("kv_cache_memory_bytes"),
            },
        )

    def _metrics(self) -> tuple[str, ...]:
        if self.path == "requests":
            return ("nll", "misses")
        # no stage of a pipeline sees the whole model's last state but the last one
        return METRICS if self._ranks[0]["pipeline_parallel_size"] == 1 else ("nll", "misses")

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
            self._register_scoring(windows)
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
        score = self._score_scoring if self.path == "scoring" else self._score_requests
        values_MNC, work = score(masks_MP, self._windows[key], extra_metrics)
        return scores_of(values_MNC, extra_metrics, self._windows[key].num_tokens_N, work)

    def score_by_requests(
        self, masks_MP: BoolArray, windows: TokenWindows, extra_metrics: Sequence[str] = ()
    ) -> Scores:
        """Scores by the requests path, whichever path this engine runs: the slow reference.
        `extra_metrics` may be `misses`."""
        masks_MP = check_masks(masks_MP, self._num_players)
        values_MNC, work = self._score_requests(masks_MP, windows, extra_metrics)
        return scores_of(values_MNC, extra_metrics, windows.num_tokens_N, work)

    def generate(
        self,
        mask_P: BoolArray,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Greedy continuations under a mask, by vLLM's own requests, whichever path scores.

        Args:
            mask_P: bool [P].
            prompts: token ids, at least one each.
            max_new_tokens: most tokens of a continuation.
            end_ids: tokens that end one; they are left out of it.

        Raises:
            InputError: a prompt is empty, or does not fit with its continuation.
        """
        from vllm import SamplingParams

        (mask_P,) = check_masks(np.asarray(mask_P)[None], self._num_players)
        longest = self._max_length + 1  # max_model_len
        for row, prompt in enumerate(prompts):
            if not prompt or len(prompt) + max_new_tokens > longest:
                raise InputError(
                    f"prompt {row} has {len(prompt)} tokens: with {max_new_tokens} new ones it "
                    f"must have between 1 and {longest} (max_model_len)"
                )
        parameters = SamplingParams(
            max_tokens=max_new_tokens,
            temperature=0,
            detokenize=False,
            stop_token_ids=list(end_ids),
        )
        requests: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        self._set_mask(mask_P)
        outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        self._set_mask(np.ones(self._num_players, dtype=bool))
        found = [list(output.outputs[0].token_ids) for output in outputs]
        return [_until(tokens, end_ids) for tokens in found]

    def layer_calls(self) -> list[dict[str, Any]]:
        """For each rank: how often each of its layers ran so far, and the modules they are of."""
        return self._call("lpserve_calls")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if hasattr(self, "_llm"):
            try:
                stop(self._llm, self._left)
            finally:
                del self._llm
        gc.collect()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- which path ----------------------------------------------------------------------------

    def _choose_path(
        self, windows: TokenWindows, settings: TrieSettings, head_chunk: int, spec: EngineSpec
    ) -> tuple[str, str, float]:
        """The path, why, and the noise of its scores; raises EngineError where neither serves."""
        self._state_kind = ""
        if self._wanted == "requests":
            self._check_masks_matter(windows, self._score_requests, "requests")
            return "requests", "asked for", self._requests_noise(windows)
        noise = 0.0
        difference = 0.0
        refusal = self._prepare_scoring(windows, settings, head_chunk)
        if refusal is None:
            self._check_masks_matter(windows, self._score_scoring, "scoring")
            noise = max(self._call("lpserve_noise", windows.content_hash))
            refusal, difference, rounding = self._self_check(windows)
            noise = max(noise, rounding)
        if refusal is None:
            asked = "asked for, " if self._wanted == "scoring" else ""
            return (
                "scoring",
                f"{asked}self-check: within {difference:.1e} of requests (relative mean NLL, "
                f"tolerance {self._tolerance:.0e})",
                noise,
            )
        if self._wanted == "scoring":
            raise EngineError(f"the scoring path cannot serve {spec.model}: {refusal}")
        self._windows.clear()
        self._check_masks_matter(windows, self._score_requests, "requests")
        noise = self._requests_noise(windows)
        return "requests", f"scoring cannot serve this model: {refusal}", noise

    def _prepare_scoring(
        self, windows: TokenWindows, settings: TrieSettings, head_chunk: int
    ) -> str | None:
        """Make the workers ready; returns why they cannot be."""
        try:
            self._call(
                "lpserve_prepare",
                settings.state_budget_bytes,
                settings.micro_batch_tokens,
                settings.pack_states,
                head_chunk,
            )
            self._register_scoring(windows)
            offered = [set(reply["kinds"]) for reply in self._call("lpserve_probe")]
            kinds = [kind for kind in STATE_KINDS if all(kind in some for some in offered)]
            if not kinds:
                return (
                    "what its layers hand on is neither a hidden state, nor a sum of hidden state "
                    "and residual, nor a pair that may start with a residual of zero"
                )
            self._state_kind = kinds[0]
            self._call("lpserve_set_state", kinds[0])
        except EngineError as error:
            return str(error)
        self._windows[windows.content_hash] = windows
        return None

    def _probe_masks(self) -> BoolArray:
        """All kept, none kept, and random masks of sizes in between."""
        rng = np.random.default_rng(0)
        players = self._num_players
        kept = np.linspace(max(1, players // 4), max(1, players - 1), PROBE_MASKS).astype(int)
        random = [rng.permutation(players) < k for k in kept]
        return np.stack([np.ones(players, dtype=bool), np.zeros(players, dtype=bool), *random])

    def _check_masks_matter(self, windows: TokenWindows, score: Any, path: str) -> None:
        """Masks must matter: compiled code ignores them without a word."""
        probe = windows.select(np.arange(1))
        if path == "scoring":
            self._register_scoring(probe)
        nll_M = score(self._probe_masks(), probe)[0][:, 0, 0]
        if nll_M[0] == nll_M[1] or nll_M[0] == nll_M[2]:
            raise EngineError(
                f"vLLM's {path} path gives one score to different masks: they have no effect "
                "(a compiled model, or layers that do nothing)"
            )

    def _self_check(self, windows: TokenWindows) -> tuple[str | None, float, float]:
        """Both paths on the probe masks: why scoring is not to be trusted (None: it is), the
        largest relative difference, and, where scores round, the noise that it speaks of."""
        masks_MP = self._probe_masks()
        probe = windows.select(np.arange(min(PROBE_WINDOWS, windows.num_windows)))
        self._register_scoring(probe)
        tokens = probe.num_tokens_N.sum()
        mine_M = self._score_scoring(masks_MP, probe)[0][..., 0].sum(axis=1) / tokens
        theirs_M = self._score_requests(masks_MP, probe)[0][..., 0].sum(axis=1) / tokens
        difference = float(np.max(np.abs(mine_M - theirs_M) / np.abs(theirs_M)))
        # two roundings of the same numbers: each has half of the variance of their difference
        rounding = 0.0 if self._exact else _rms(mine_M - theirs_M) / np.sqrt(2)
        if difference <= self._tolerance:
            return None, difference, rounding
        return (
            f"its scores are {difference:.1e} (relative) from those of requests, tolerance "
            f"{self._tolerance:.0e}",
            difference,
            rounding,
        )

    def _requests_noise(self, windows: TokenWindows) -> float:
        """Where scores round: windows scored together and one by one, root mean square."""
        if self._exact:
            return 0.0
        masks_MP = self._probe_masks()
        probe = windows.select(np.arange(min(PROBE_WINDOWS, windows.num_windows)))
        together_MN = self._score_requests(masks_MP, probe)[0][..., 0]
        alone_MN = np.concatenate(
            [
                self._score_requests(masks_MP, probe.select([n]))[0][..., 0]
                for n in range(len(together_MN[0]))
            ],
            axis=1,
        )
        return _rms((together_MN - alone_MN).sum(axis=1) / probe.num_tokens_N.sum())

    # -- scoring path ----------------------------------------------------------------------------

    def _register_scoring(self, windows: TokenWindows) -> None:
        replies = self._call(
            "lpserve_register",
            windows.tokens_NT.astype(np.int32).tobytes(),
            windows.scored_NT.astype(bool).tobytes(),
            list(windows.tokens_NT.shape),
        )
        if any(reply["key"] != windows.content_hash for reply in replies):
            raise EngineError("a worker received other windows than were sent")

    def _score_scoring(
        self, masks_MP: BoolArray, windows: TokenWindows, extra_metrics: Sequence[str] = ()
    ) -> tuple[FloatArray, Work]:
        """Metrics `float64[M, N, C]`, the NLL first, and the work."""
        replies = self._call(
            "lpserve_score",
            windows.content_hash,
            masks_MP.tobytes(),
            len(masks_MP),
            list(extra_metrics),
        )
        # the last pipeline stage reduces; its tensor-parallel ranks must agree
        stages = self._ranks[0]["pipeline_parallel_size"]
        per_stage = len(replies) // stages
        arrays = [np.frombuffer(r["values"]).reshape(r["shape"]) for r in replies[-per_stage:]]
        if any(not np.array_equal(array, arrays[0], equal_nan=True) for array in arrays):
            raise EngineError("ranks disagree about the scores of the same masks")
        works = [Work(*reply["work"]) for reply in replies[::per_stage]]
        layer_forwards = sum(work.layer_forwards for work in works)
        return arrays[0].copy(), replace(works[-1], layer_forwards=layer_forwards)

    # -- requests path ---------------------------------------------------------------------------

    def _score_requests(
        self, masks_MP: BoolArray, windows: TokenWindows, extra_metrics: Sequence[str] = ()
    ) -> tuple[FloatArray, Work]:
        """The same; `extra_metrics` may be `misses`."""
        from vllm import SamplingParams

        started = time.perf_counter()
        sorted_DP, inverse_M = sort_distinct(masks_MP)
        # what follows the last scored position changes nothing before it
        prompts = [
            {"prompt_token_ids": row[: int(last)].tolist()}
            for row, last in zip(windows.tokens_NT, windows.lengths_N, strict=True)
        ]
        parameters = SamplingParams(
            max_tokens=1,
            prompt_logprobs=_LIKELIEST if extra_metrics else 0,
            temperature=0,
            detokenize=False,
        )
        values_DNC = np.empty((len(sorted_DP), windows.num_windows, 1 + len(extra_metrics)))
        for row, mask_P in enumerate(sorted_DP):
            self._set_mask(mask_P)
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
            for window, output in enumerate(outputs):
                values_DNC[row, window] = _prompt_metrics(
                    output, windows.scored_NT[window], extra_metrics
                )
        self._set_mask(np.ones(self._num_players, dtype=bool))
        return values_DNC[inverse_M], Work(
            masks=len(masks_MP),
            distinct_masks=len(sorted_DP),
            layer_forwards=int(sorted_DP.sum()),
            skip_layer_forwards=int(np.asarray(masks_MP).sum()),
            tokens=len(sorted_DP) * windows.tokens_NT.size,
            seconds=time.perf_counter() - started,
        )

    def _set_mask(self, mask_P: BoolArray) -> None:
        """Set the mask on every rank and read it back."""
        bits = [bool(bit) for bit in mask_P]
        replies = self._call("lpserve_set_mask", bits)
        for rank, reply in zip(self._ranks, replies, strict=True):
            first, local = rank["first_layer"], rank["local_layers"]
            if reply != bits[first : first + local]:
                raise EngineError("a worker did not take the mask that it was given")

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker; raises what any of them reports."""
        replies = self._llm.collective_rpc(method, timeout=RPC_TIMEOUT_S, args=arguments)
        for rank, reply in enumerate(replies):
            if isinstance(reply, dict) and "error" in reply:
                kind = InputError if reply["kind"] == "InputError" else EngineError
                where = f"rank {rank}: " if len(replies) > 1 else ""
                raise kind(f"{where}{reply['error']}")
        return replies


def _prompt_metrics(output: Any, scored_T: BoolArray, extra_metrics: Sequence[str]) -> list[float]:
    """NLL in nats and what `extra_metrics` names (`misses`), summed over the scored positions of a
    finished request."""
    tokens, nll, misses = output.prompt_token_ids, 0.0, 0
    for position in np.flatnonzero(scored_T[: len(tokens)]):
        token, found = tokens[position], output.prompt_logprobs[position]
        nll -= found[token].logprob
        misses += bool(extra_metrics) and token != _first_choice(found)
    return [nll, *[float(misses) for _ in extra_metrics]]


def _first_choice(found: Mapping[int, Any]) -> int:
    """The likeliest token; of equals the first. vLLM's rank does not tell: it counts equals, and
    both of two tokens that share the highest logit have rank 2."""
    highest = max(entry.logprob for entry in found.values())
    return min(token for token, entry in found.items() if entry.logprob == highest)


def _until(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    """Tokens before the first that ends."""
    for position, token in enumerate(tokens):
        if token in end_ids:
            return tokens[:position]
    return tokens


def _rms(values: FloatArray) -> float:
    return float(np.sqrt(np.mean(values**2)))
