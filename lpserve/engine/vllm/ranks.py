"""vLLM's workers, called together: masks set, windows sent, and masks scored by either path."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.errors import EngineError, InputError, typed_first_line
from lpserve.masks import sort_distinct
from lpserve.model.players import kept_parts, layer_parts, layer_players
from lpserve.types import BoolArray, FloatArray, Player, Work

RPC_TIMEOUT_S = 1800.0
"""A rank that died leaves the others waiting for it; after this the engine gives up."""
_LIKELIEST = 4
"""Tokens asked for at each position to find the first choice among equals (bundled model, bfloat16:
2 share the highest logit at 2% of 6048 targets, 3 at most). Of more, the first may not be found."""


class Ranks:
    """The worker processes of one `vllm.LLM`, which hold the layers of a model.

    Shapes: M masks, P players, N windows, C metrics (NLL first).

    Raises:
        EngineError, InputError: whatever a worker reports, from every method.
    """

    def __init__(self, llm: Any, players: Sequence[Player] = ()) -> None:
        """
        Args:
            players: what masks keep or drop; empty: the layers.
        """
        self._llm = llm
        self.about: list[dict[str, Any]] = self.call("lpserve_open")
        """For each rank, what it holds; see `worker.extension`."""
        num_layers: int = self.about[0]["num_layers"]
        self.players = tuple(players or layer_players(num_layers))
        self.parts = layer_parts(self.players, num_layers)
        """Of each layer, what is run apart and its player."""
        self.modules: dict[int, dict[str, list[str]]] = {}
        """Of each layer that is run in halves, the child modules of its parts."""

    @property
    def num_players(self) -> int:
        """What a mask has a bit for."""
        return len(self.players)

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return self.about[0]["pipeline_parallel_size"]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every worker; raises what any of them reports."""
        replies = self._llm.collective_rpc(method, timeout=RPC_TIMEOUT_S, args=arguments)
        for rank, reply in enumerate(replies):
            if isinstance(reply, dict) and "error" in reply:
                kind = InputError if reply["kind"] == "InputError" else EngineError
                where = f"rank {rank}: " if len(replies) > 1 else ""
                raise kind(f"{where}{reply['error']}")
        return replies

    def set_mask(self, mask_P: BoolArray) -> None:
        """Set the mask on every rank and read it back."""
        kept = kept_parts(self.parts, [bool(bit) for bit in mask_P])
        replies = self.call("lpserve_set_mask", kept)
        for rank, reply in zip(self.about, replies, strict=True):
            first, local = rank["first_layer"], rank["local_layers"]
            if reply != kept[first : first + local]:
                raise EngineError("a worker did not take the mask that it was given")

    def make_steps(self, kind: str) -> None:
        """What the scoring path runs, on every rank, for states of a kind.

        Raises:
            EngineError: a layer that is not run whole cannot be taken apart.
        """
        found = self.call("lpserve_find_halves", kind, self.parts)
        paired = any(reply["paired"] for reply in found)
        self.modules = {n: parts for reply in found for n, parts in reply["modules"].items()}
        replies = self.call("lpserve_make_steps", paired)
        per_stage = len(replies) // self.num_stages
        self.call("lpserve_set_stage", [reply["steps"] for reply in replies[::per_stage]])

    # -- scoring path ----------------------------------------------------------------------------

    def register(self, windows: TokenWindows) -> None:
        """Register windows with the scoring path."""
        replies = self.call(
            "lpserve_register",
            windows.tokens_NT.astype(np.int32).tobytes(),
            windows.scored_NT.astype(bool).tobytes(),
            list(windows.tokens_NT.shape),
        )
        if any(reply["key"] != windows.content_hash for reply in replies):
            raise EngineError("a worker received other windows than were sent")

    def score_by_stack(
        self, masks_MP: BoolArray, windows: TokenWindows, extra_metrics: Sequence[str] = ()
    ) -> tuple[FloatArray, Work]:
        """Metrics `float64[M, N, C]` by the trie executor inside the workers, and the work."""
        return self._agreed(self._ask("lpserve_score", masks_MP, windows, extra_metrics))

    def score_overlap(
        self, masks_MP: BoolArray, windows: TokenWindows, extra_metrics: Sequence[str] = ()
    ) -> tuple[FloatArray, Work, FloatArray]:
        """`score_by_stack`, with the overlap of the masks' effects (`types.Scores.overlap_MM`)."""
        replies = self._ask("lpserve_overlap", masks_MP, windows, extra_metrics)
        metric_values, work = self._agreed(replies)
        overlap_MM = np.frombuffer(replies[-1]["overlap"]).reshape(len(masks_MP), -1)
        return metric_values, work, overlap_MM.copy()

    def _ask(
        self, method: str, masks_MP: BoolArray, windows: TokenWindows, extra_metrics: Sequence[str]
    ) -> list[Any]:
        masks = masks_MP.tobytes(), len(masks_MP)
        return self.call(method, windows.content_hash, *masks, list(extra_metrics))

    def _agreed(self, replies: list[Any]) -> tuple[FloatArray, Work]:
        """What the last pipeline stage gives, whose tensor-parallel ranks must agree, and the work
        of all stages."""
        per_stage = len(replies) // self.num_stages
        arrays = [np.frombuffer(r["values"]).reshape(r["shape"]) for r in replies[-per_stage:]]
        if any(not np.array_equal(array, arrays[0], equal_nan=True) for array in arrays):
            raise EngineError("ranks disagree about the scores of the same masks")
        works = [Work(*reply["work"]) for reply in replies[::per_stage]]
        layer_forwards = sum(work.layer_forwards for work in works)
        return arrays[0].copy(), replace(works[-1], layer_forwards=layer_forwards)

    # -- requests path ---------------------------------------------------------------------------

    def score_by_requests(
        self, masks_MP: BoolArray, windows: TokenWindows, extra_metrics: Sequence[str] = ()
    ) -> tuple[FloatArray, Work]:
        """Metrics `float64[M, N, C]` by requests with prompt log-probabilities, and the work;
        `extra_metrics` may be `misses`."""
        from vllm import SamplingParams

        started = time.perf_counter()
        sorted_MP, inverse_M = sort_distinct(masks_MP)
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
        metric_values = np.empty((len(sorted_MP), windows.num_windows, 1 + len(extra_metrics)))
        for row, mask_P in enumerate(sorted_MP):
            self.set_mask(mask_P)
            outputs = self._answers(prompts, parameters)
            for window, output in enumerate(outputs):
                metric_values[row, window] = prompt_metrics(
                    output, windows.scored_NT[window], extra_metrics
                )
        self.set_mask(np.ones(self.num_players, dtype=bool))
        return metric_values[inverse_M], Work(
            masks=len(masks_MP),
            distinct_masks=len(sorted_MP),
            layer_forwards=int(sorted_MP.sum()),
            skip_layer_forwards=int(np.asarray(masks_MP).sum()),
            tokens=len(sorted_MP) * windows.tokens_NT.size,
            seconds=time.perf_counter() - started,
        )

    def generate(
        self,
        mask_P: BoolArray,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int],
    ) -> list[list[int]]:
        """Greedy continuations under a mask; see `engine.base.Generates`."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            max_tokens=max_new_tokens,
            temperature=0,
            detokenize=False,
            stop_token_ids=list(end_ids),
        )
        requests: list[Any] = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        self.set_mask(mask_P)
        outputs = self._answers(requests, parameters)
        self.set_mask(np.ones(self.num_players, dtype=bool))
        found = [list(output.outputs[0].token_ids) for output in outputs]
        return [_until(tokens, end_ids) for tokens in found]

    def _answers(self, requests: list[Any], parameters: Any) -> list[Any]:
        """Finished requests under the mask that is set."""
        try:
            return self._llm.generate(requests, parameters, use_tqdm=False)
        except Exception as error:  # whatever the model's layers and vLLM's kernels raise
            raise EngineError(f"vLLM cannot run the model: {typed_first_line(error)}") from error


def prompt_metrics(output: Any, scored_T: BoolArray, extra_metrics: Sequence[str]) -> list[float]:
    """NLL in nats and what `extra_metrics` names (`misses`), summed over the scored positions of a
    finished request."""
    tokens, nll, misses = output.prompt_token_ids, 0.0, 0
    for position in np.flatnonzero(scored_T[: len(tokens)]):
        token, found = tokens[position], output.prompt_logprobs[position]
        nll -= found[token].logprob
        misses += bool(extra_metrics) and token != _first_choice(found)
    return [nll, *[float(misses) for _ in extra_metrics]]


def _first_choice(found: Mapping[int, Any]) -> int:
    """The likeliest token; of equals the first. vLLM's rank does not say: it counts equals, and
    both of two tokens that share the highest logit have rank 2."""
    highest = max(entry.logprob for entry in found.values())
    return min(token for token, entry in found.items() if entry.logprob == highest)


def _until(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    """Tokens before the first that ends."""
    for position, token in enumerate(tokens):
        if token in end_ids:
            return tokens[:position]
    return tokens
