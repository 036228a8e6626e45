"""The two contracts of this package: what an engine does, and what the trie executor drives.

Notation: M masks, P players, N windows, T tokens, B rows of a micro-batch (a multiple
of N), d width, C metrics (NLL first), L = P + 1 places between players.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.errors import EngineError, InputError
from lpserve.types import (
    BoolArray,
    EngineInfo,
    FloatArray,
    IntArray,
    Scores,
    Work,
)
from lpserve.utility import check_metric, needs_full_model

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """Scores masks of one model.

    Any mask is legal, the empty one too (embedding, final norm, head). The score of a mask equals
    what the model gives with the dropped layers deleted, and does not depend on the other masks of
    the call. Several engines may be opened and closed one after another in one process.
    """

    info: EngineInfo

    def register(self, windows: TokenWindows) -> str:
        """Register more windows; returns their content hash. Weights are not loaded again."""
        ...

    def score(
        self, masks_MP: BoolArray, windows: str | None = None, extra_metrics: Sequence[str] = ()
    ) -> Scores:
        """Summed NLL of every window under every mask.

        Args:
            masks_MP: bool [M, P], True = kept; repeats are scored once.
            windows: hash of registered windows; None: those given at opening.
            extra_metrics: further metrics, from the same pass (`types.check_metric`).

        Raises:
            InputError: the engine has no such metric (`info.metrics`).
        """
        ...

    def close(self) -> None:
        """Free the model. Closing twice is allowed."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None: ...


@runtime_checkable
class Generates(Protocol):
    """An engine that continues texts under a mask."""

    def generate(
        self,
        mask_P: BoolArray,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        end_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Greedy continuations of prompts, as token ids.

        Args:
            mask_P: bool [P], True = kept.
            prompts: token ids, at least one each.
            max_new_tokens: upper bound on the tokens of a continuation.
            end_ids: tokens that end a continuation; they are not part of it.

        Raises:
            InputError: a prompt is empty, or does not fit with its continuation.
        """
        ...


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """How much the players of the full model change its hidden states."""

    influence_P: FloatArray
    """ShortGPT's block influence (arXiv 2403.03853, eq. 1): 1 - mean cosine of a player's input and
    output, over all tokens."""
    distance: FloatArray
    """Angular distance (arXiv 2403.17887, eq. 3) of the states entering players i and j (L - 1: the
    state after the last), at each window's last token: mean of arccos(cosine) / pi."""


@runtime_checkable
class HasHiddenStates(Protocol):
    """An engine that measures what layers do to the hidden states of the full model."""

    def hidden_states(self, windows: str | None = None) -> HiddenStates:
        """Measured on registered windows (None: those given at opening)."""
        ...


@runtime_checkable
class HasTaylorImportance(Protocol):
    """An engine that takes gradients of the full model's loss."""

    def taylor_importance(self, windows: str | None = None) -> FloatArray:
        """First-order importance of every layer's weights, `float64[P]`, on registered windows
        (None: those given at opening)."""
        ...


@runtime_checkable
class HasOverlap(Protocol):
    """An engine that measures how alike masks change what the model predicts."""

    def score_overlap(
        self, masks_MP: BoolArray, windows: str | None = None, extra_metrics: Sequence[str] = ()
    ) -> Scores:
        """`Engine.score`, with the overlap of the masks' effects (`types.Scores.overlap_MM`).

        Args:
            masks_MP: bool [M, P], distinct; effects are changes from the first mask's predictions.
        """
        ...


class PaddingMattersError(EngineError):
    """Windows of a padded length score otherwise than by themselves."""


class LayerStack(Protocol):
    """A model cut into embedding, steps and head; what `trie.TrieExecutor` drives.

    A step is what runs at once: a layer, or a part of one. A player is one step or several. A state
    is one tensor whose first axes count windows and tokens, `[B, T, ...]`; the others are up to the
    stack. Inputs are never modified. Steps run on the block that was embedded last.
    """

    state_dtype: torch.dtype
    """Of what every step returns, measured on the model's layers before any window is scored. The
    embedding may have another dtype: some models add their residuals in float32."""

    @property
    def num_steps(self) -> int:
        """Steps of this stack; fixed once it has been prepared."""
        ...

    @property
    def step_players(self) -> Sequence[int]:
        """The player that each of them belongs to; -1: none, and every mask runs it."""
        ...

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one window of this padded length."""
        ...

    def embed(self, block: TokenWindows) -> torch.Tensor:
        """The state entering step 0, `[N, T, d]`, in the embedding's own dtype."""
        ...

    def run_step(self, step: int, batch: torch.Tensor) -> torch.Tensor:
        """The state after one step, same shape, of `state_dtype`; takes that or the embedding's
        dtype."""
        ...

    def reduce(
        self,
        batch: torch.Tensor,
        block: TokenWindows,
        extra_metrics: Sequence[str] = (),
        full_NTd: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Head and metrics: `float64[B, C]` on the state's device, B = k * N for k stacked masks.

        Args:
            extra_metrics: metrics beside the NLL, which comes first (`types.check_metric`).
            full_NTd: the state after all steps, for metrics that compare with the full model.
        """
        ...

    def before_head(self, batch: torch.Tensor, block: TokenWindows) -> torch.Tensor:
        """States before the scored targets as the head takes them, `[k, n, ...]`, of k stacked
        masks."""
        ...

    def overlap(self, rows: torch.Tensor, reference: int) -> torch.Tensor:
        """`types.Scores.overlap_MM` of masks by their states `before_head`, `float64[M, M]`.

        Args:
            reference: row of the mask whose predictions the others are compared with.
        """
        ...


def check_masks(masks_MP: Any, num_players: int) -> BoolArray:
    """Raise InputError unless masks are bool [M >= 1, P]."""
    masks = np.asarray(masks_MP)
    if masks.dtype != bool or masks.ndim != 2 or masks.shape[1] != num_players or not len(masks):
        raise InputError(
            f"masks must be bool [M >= 1, {num_players}], True = kept: "
            f"got {masks.dtype} {list(masks.shape)}"
        )
    return masks


def check_extra_metrics(info: EngineInfo, extra_metrics: Sequence[str]) -> tuple[str, ...]:
    """Raise InputError unless an engine has all these metrics beside the NLL."""
    for name in extra_metrics:
        check_metric(name)
        if name == "nll" or ("kl" if needs_full_model(name) else name) not in info.metrics:
            raise InputError(
                f"metric {name!r} cannot be had from engine {info.kind} ({info.path}) beside nll: "
                f"it has {', '.join(info.metrics)}"
            )
    return tuple(extra_metrics)


def scores_of(
    metric_values: FloatArray,
    extra_metrics: Sequence[str],
    num_tokens_N: IntArray,
    work: Work,
    overlap_MM: FloatArray | None = None,
) -> Scores:
    """Scores from metrics side by side, the NLL first."""
    others = {name: metric_values[..., 1 + column] for column, name in enumerate(extra_metrics)}
    return Scores(
        nll_MN=metric_values[..., 0],
        num_tokens_N=num_tokens_N,
        work=work,
        others=others,
        overlap_MM=overlap_MM,
    )
