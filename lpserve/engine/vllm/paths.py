"""Which of vLLM's two paths scores: made ready, probed, and held against each other at start."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.engine.trie import TrieSettings
from lpserve.engine.vllm.ranks import Ranks
from lpserve.engine.vllm.stack import STATE_KINDS
from lpserve.errors import EngineError
from lpserve.masks import sort_distinct
from lpserve.model.players import has_parts
from lpserve.types import BoolArray, EngineSpec, FloatArray

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


class ChosenPath(NamedTuple):
    """The path that an engine takes."""

    name: str
    """`scoring` or `requests`."""
    reason: str
    noise_nll: float
    """Rounding noise of a mask's mean NLL, nats per token, root mean square."""
    state_kind: str
    """One of `stack.STATE_KINDS`; "" where the scoring path could not be made ready."""


class PathChoice:
    """Chooses between the paths of an engine that has just started."""

    def __init__(self, ranks: Ranks, spec: EngineSpec) -> None:
        quantized = bool(ranks.about[0]["quantization"])
        self._ranks = ranks
        self._model = spec.model
        self._wanted = str(spec.options.get("path", "auto"))
        self._exact = spec.dtype == "float32" and not quantized
        self._tolerance = PATH_TOLERANCE[spec.dtype]
        if quantized:
            self._tolerance = max(self._tolerance, QUANTIZED_TOLERANCE)
        self._state_kind = ""
        self._halves = has_parts(ranks.players)

    def choose(self, windows: TokenWindows, settings: TrieSettings, head_chunk: int) -> ChosenPath:
        """The path for an engine opened on these windows; raises EngineError where neither serves.

        Args:
            settings: of the trie executor in every worker.
            head_chunk: bytes of logits held at once.
        """
        if self._wanted == "requests" and not self._halves:
            return self._requests(windows, "asked for")
        refusal = self._prepare_scoring(windows, settings, head_chunk)
        if self._halves and refusal is not None:
            raise EngineError(
                f"the halves of {self._model}'s layers are found on vLLM's scoring path, which "
                f"cannot serve it: {refusal}"
            )
        if self._wanted == "requests":
            return self._requests(windows, "asked for")
        noise = difference = 0.0
        if refusal is None:
            self._check_masks_matter(windows, self._ranks.score_by_stack, "scoring")
            noise = max(self._ranks.call("lpserve_noise", windows.content_hash))
            refusal, difference, rounding = self._self_check(windows)
            noise = max(noise, rounding)
        if refusal is None:
            asked = "asked for, " if self._wanted == "scoring" else ""
            reason = (
                f"{asked}self-check: within {difference:.1e} of requests (relative mean NLL, "
                f"tolerance {self._tolerance:.0e})"
            )
            return ChosenPath("scoring", reason, noise, self._state_kind)
        if self._wanted == "scoring":
            raise EngineError(f"the scoring path cannot serve {self._model}: {refusal}")
        return self._requests(windows, f"scoring cannot serve this model: {refusal}")

    def _requests(self, windows: TokenWindows, reason: str) -> ChosenPath:
        self._check_masks_matter(windows, self._ranks.score_by_requests, "requests")
        self._check_order_is_nothing(windows)
        noise = self._requests_noise(windows)
        return ChosenPath("requests", reason, noise, self._state_kind)

    def _prepare_scoring(
        self, windows: TokenWindows, settings: TrieSettings, head_chunk: int
    ) -> str | None:
        """Make the workers ready; returns why they cannot be."""
        try:
            self._ranks.call(
                "lpserve_prepare",
                settings.state_budget_bytes,
                settings.micro_batch_tokens,
                settings.pack_states,
                head_chunk,
            )
            self._ranks.register(windows)
            offered = [set(reply["kinds"]) for reply in self._ranks.call("lpserve_probe")]
            kinds = [kind for kind in STATE_KINDS if all(kind in some for some in offered)]
            if not kinds:
                return (
                    "what its layers hand on is neither a hidden state, nor a sum of hidden state "
                    "and residual, nor a pair that may start with a residual of zero"
                )
            self._state_kind = kinds[0]
            self._ranks.make_steps(kinds[0])
        except EngineError as error:
            return str(error)
        return None

    def _probe_masks(self) -> BoolArray:
        """All kept, none kept, and random masks of sizes in between."""
        rng = np.random.default_rng(0)
        players = self._ranks.num_players
        kept = np.linspace(max(1, players // 4), max(1, players - 1), PROBE_MASKS).astype(int)
        random = [rng.permutation(players) < k for k in kept]
        return np.stack([np.ones(players, dtype=bool), np.zeros(players, dtype=bool), *random])

    def _check_masks_matter(self, windows: TokenWindows, score: Any, path: str) -> None:
        """Masks must matter: compiled code ignores them without a word."""
        probe = windows.select(np.arange(1))
        if path == "scoring":
            self._ranks.register(probe)
        nll_M = score(self._probe_masks(), probe)[0][:, 0, 0]
        if nll_M[0] == nll_M[1] or nll_M[0] == nll_M[2]:
            raise EngineError(
                f"vLLM's {path} path gives one score to different masks: they have no effect "
                "(a compiled model, or layers that do nothing)"
            )

    def _check_order_is_nothing(self, windows: TokenWindows) -> None:
        """A mask's score must not depend on the masks before it, as where a layer reads what
        another one left in a cache. What is read comes from a layer before: so masks that keep
        the last layers alone."""
        probe, players = windows.select(np.arange(1)), self._ranks.num_players
        last = [np.arange(players) >= quarter * players // 4 for quarter in (1, 2, 3)]
        masks_MP = sort_distinct(np.concatenate([self._probe_masks(), last]))[0]
        first_M = self._ranks.score_by_requests(masks_MP, probe)[0][:, 0, 0]
        for row in reversed(range(len(masks_MP))):
            again = self._ranks.score_by_requests(masks_MP[row : row + 1], probe)[0][0, 0, 0]
            if abs(again / first_M[row] - 1) > self._tolerance:
                raise EngineError(
                    "vLLM's requests path gives a mask another score after other masks: its layers "
                    "cannot be skipped one by one"
                )

    def _self_check(self, windows: TokenWindows) -> tuple[str | None, float, float]:
        """Both paths on the probe masks: why scoring is not to be trusted (None: it is), the
        largest relative difference, and, where scores round, the noise that it speaks of."""
        masks_MP = self._probe_masks()
        probe = windows.select(np.arange(min(PROBE_WINDOWS, windows.num_windows)))
        self._ranks.register(probe)
        tokens = probe.num_tokens_N.sum()
        mine_M = self._ranks.score_by_stack(masks_MP, probe)[0][..., 0].sum(axis=1) / tokens
        theirs_M = self._ranks.score_by_requests(masks_MP, probe)[0][..., 0].sum(axis=1) / tokens
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
        together_MN = self._ranks.score_by_requests(masks_MP, probe)[0][..., 0]
        alone_MN = np.concatenate(
            [
                self._ranks.score_by_requests(masks_MP, probe.select([n]))[0][..., 0]
                for n in range(len(together_MN[0]))
            ],
            axis=1,
        )
        return _rms((together_MN - alone_MN).sum(axis=1) / probe.num_tokens_N.sum())


def _rms(values: FloatArray) -> float:
    return float(np.sqrt(np.mean(values**2)))
