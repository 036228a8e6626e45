"""The values that cross module boundaries. Imports numpy and `errors` alone.

Notation: M masks, P players, N windows, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.errors import InputError

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Player:
    """A unit of the model that can be skipped."""

    index: int
    """Position among the players, 0..P-1, in execution order."""
    layer: int
    """Decoder layer in the original model, 0-based."""
    part: str = "layer"
    """Which part of that layer: `layer` is the whole of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Game:
    """What a score belongs to: model content, players and numerics. Windows are hashed apart."""

    model_hash: str
    players: tuple[Player, ...]
    numerics: str
    """dtype, engine path and quantization; float32 alone where nothing is rounded further, since
    float32 scores of every engine agree."""

    @property
    def content_hash(self) -> str:
        parts = [self.model_hash, *(f"{p.layer}.{p.part}" for p in self.players), self.numerics]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """Describes an engine without building it; pools build it where it runs. Picklable."""

    kind: str
    """`transformers`, `vllm` or `synthetic`."""
    model: str
    """Checkpoint folder (`synthetic`: ignored)."""
    dtype: str = "float32"
    device: str = "auto"
    """`auto` is `cuda` where torch sees one, else `cpu`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the engine kind, such as `state_budget_mb`."""
    players: tuple[Player, ...] = ()
    """What masks keep or drop; empty: the decoder layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What an open engine really is."""

    kind: str
    path: str
    """What really ran, e.g. `transformers/sdpa` or `vllm/scoring`."""
    path_reason: str = ""
    """Why that path, where an engine has several."""
    noise_nll: float = 0.0
    """Rounding noise of a mask's mean NLL, measured at start: nats per token, root mean square.
    What the other masks of a batch change, or, in half precision or quantized, what another order
    of the same arithmetic changes (vLLM's two paths), whichever is larger. 0: float32, alone in its
    batch."""
    quantization: str = ""
    """Method by which the engine rounds weights, "" for none."""
    model: str
    model_hash: str
    """Content hash of the checkpoint."""
    players: tuple[Player, ...]
    dtype: str
    device: str
    vocab_size: int
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    """Resolved settings that set arithmetic or memory: micro-batch, state budget, threads."""
    metrics: tuple[str, ...] = ("nll",)
    """What it can score (`check_metric`); `kl` stands for `kl_topK` too."""
    has_overlap: bool = False
    """Whether it measures `Scores.overlap_MM`."""

    @property
    def num_players(self) -> int:
        return len(self.players)

    @property
    def game(self) -> Game:
        exact = self.dtype == "float32" and not self.quantization
        quantization = f"/{self.quantization}" if self.quantization else ""
        numerics = self.dtype if exact else f"{self.dtype}/{self.path}{quantization}"
        return Game(model_hash=self.model_hash, players=self.players, numerics=numerics)


@dataclass(frozen=True, slots=True)
class Work:
    """What scoring a batch of masks took. Layer-forwards count one player run over all windows."""

    masks: int = 0
    """Masks asked for, repeats included."""
    distinct_masks: int = 0
    """Head passes: one for each distinct mask."""
    layer_forwards: int = 0
    skip_layer_forwards: int = 0
    """What running every mask alone, its dropped layers skipped, would have taken."""
    tokens: int = 0
    """Tokens of the windows times distinct masks."""
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            masks=self.masks + other.masks,
            distinct_masks=self.distinct_masks + other.distinct_masks,
            layer_forwards=self.layer_forwards + other.layer_forwards,
            skip_layer_forwards=self.skip_layer_forwards + other.skip_layer_forwards,
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Summed negative log-likelihoods: sums are kept, division happens once at the end."""

    nll_MN: FloatArray
    """Nats, summed over the scored positions of each window."""
    num_tokens_N: IntArray
    """Scored positions of each window."""
    work: Work
    others: Mapping[str, FloatArray] = field(default_factory=dict)
    """Further metrics that were asked for: name -> `float64[M, N]`, summed over the scored
    positions of each window; see `check_metric`."""
    overlap_MM: FloatArray | None = None
    """How alike masks change the predictions of the first of them, nats, summed over all scored
    positions: entry (i, j) is Cov_p(z_i - z_0, z_j - z_0), with z the logits under a mask, the
    covariance over the vocabulary by p = softmax(z_0). It is the Gauss-Newton matrix of the NLL
    with whole effects in place of derivatives. None where it was not asked for."""

    def of(self, metric: str) -> FloatArray:
        """The sums of a metric, `float64[M, N]`."""
        return self.nll_MN if metric == "nll" else self.others[metric]

    def mean_nll_M(self) -> FloatArray:
        """Nats per scored token over all windows."""
        return self.nll_MN.sum(axis=1) / self.num_tokens_N.sum()

    def perplexity_M(self) -> FloatArray:
        return perplexity(self.mean_nll_M())


def perplexity(mean_nll: Any) -> Any:
    """exp of the mean NLL in nats per token, an array or one number; inf beyond float64."""
    with np.errstate(over="ignore"):
        return np.exp(mean_nll)


Z90 = 1.645
"""Half-width of a 90% normal interval in standard errors."""


def scored_masks(masks_MP: BoolArray, utilities_M: FloatArray) -> tuple[BoolArray, FloatArray]:
    """Masks `bool[M, P]` and their utilities `float64[M]`, checked.

    Raises:
        InputError: an array has another shape or dtype, masks repeat, a utility is not finite.
    """
    masks, utilities = np.asarray(masks_MP), np.asarray(utilities_M, dtype=np.float64)
    if masks.ndim != 2 or masks.dtype != bool or masks.shape[1] < 1:
        raise InputError(f"masks must be bool [M, P]: got {masks.dtype} {list(masks.shape)}")
    check_per_mask("utilities", utilities, len(masks))
    if len(np.unique(masks, axis=0)) != len(masks):
        raise InputError("masks repeat: give each mask once")
    return masks, utilities


def check_per_mask(name: str, numbers_M: FloatArray, num_masks: int) -> None:
    """Raise InputError unless there is a finite number for every mask."""
    if numbers_M.shape != (num_masks,):
        shape = list(numbers_M.shape)
        raise InputError(f"{num_masks} masks need as many {name}: got an array {shape}")
    if not np.isfinite(numbers_M).all():
        row = int(np.flatnonzero(~np.isfinite(numbers_M))[0])
        raise InputError(
            f"{name} must be finite, that of mask {row} is not: leave masks without a finite "
            "score out"
        )
