"""The values that cross module boundaries. Imports numpy and `errors` alone.

Notation: M masks, P players, N windows, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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


def neg_nll_utility(nll_MN: FloatArray, num_tokens_N: IntArray | FloatArray) -> FloatArray:
    """Utility `neg_nll`: mean log-likelihood in nats per token, higher is better.

    A mask with any non-finite NLL gets NaN: never a training point, never chosen.
    """
    with np.errstate(invalid="ignore"):
        mean_M = -nll_MN.sum(axis=1) / num_tokens_N.sum()
    return np.where(np.isfinite(nll_MN).all(axis=1), mean_M, np.nan)


def ppl_ratio_utility(
    nll_MN: FloatArray, num_tokens_N: IntArray | FloatArray, full_nll_N: FloatArray
) -> FloatArray:
    """Utility `ppl_ratio` of arXiv 2602.07804: PPL(all kept) / PPL(mask); 0 where non-finite."""
    total = num_tokens_N.sum()
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        ratio_M = np.exp((full_nll_N.sum() - nll_MN.sum(axis=1)) / total)
    return np.where(np.isfinite(nll_MN).all(axis=1), ratio_M, 0.0)


METRICS = ("nll", "misses", "kl")


def check_metric(name: str) -> None:
    """Raise InputError unless a metric is known. All are summed over a window's scored positions:

    * `nll`: negative log-likelihood of the token, nats;
    * `misses`: 1 where another token has the highest logit (of equals, the first);
    * `kl`: Kullback-Leibler divergence from the whole model's prediction to the masked one's, nats;
    * `kl_topK` (a number in place of K): the same with all tokens but the whole model's K likeliest
      taken as one. Never above `kl` (data processing inequality), and cheaper: the whole model's
      prediction is kept, not computed again beside every mask's.
    """
    if name not in METRICS and top_of(name) is None:
        raise InputError(f"unknown metric {name!r}: one of {', '.join(METRICS)}, kl_top64")


def top_of(metric: str) -> int | None:
    """K of `kl_topK`; None for other metrics."""
    number = metric.removeprefix("kl_top")
    return int(number) if number != metric and number.isdecimal() and int(number) else None


def needs_whole_model(metric: str) -> bool:
    """Whether a metric compares with the whole model's prediction."""
    return metric.startswith("kl")


UTILITIES = ("neg_nll", "ppl_ratio", "neg_kl", "accuracy")
TASK_UTILITIES = ("task_acc", "task_acc_norm", "task_margin", "task_margin_norm")
_SHARES = ("accuracy", "task_acc", "task_acc_norm")


def metric_of(utility: str) -> str:
    """The metric whose sums over windows, a mask's losses, a utility is made of.

    * `neg_nll`: mean log-likelihood, nats per token;
    * `ppl_ratio` of arXiv 2602.07804: PPL(all kept) / PPL(mask);
    * `neg_kl`, `neg_kl_topK`: minus the mean divergence from the whole model's prediction, nats per
      token (see `check_metric`);
    * `accuracy`: share of tokens that are the model's first choice.

    Of lm-eval's tasks, with questions in place of windows (`questions.Questions.losses`):

    * `task_acc`, `task_acc_norm`: share of questions answered right, lm-eval's `acc`, `acc_norm`;
    * `task_margin`, `task_margin_norm`: mean by which the right answer's log-likelihood exceeds
      that of the likeliest wrong one, nats; `_norm`: nats per character of the answers.

    Raises:
        InputError: there is no such utility.
    """
    utility = str(utility)
    if utility in ("neg_nll", "ppl_ratio", *TASK_UTILITIES[1:]):
        return "nll"
    if utility in ("accuracy", "task_acc"):
        return "misses"
    metric = utility.removeprefix("neg_")
    if metric != utility and (metric == "kl" or top_of(metric) is not None):
        return metric
    raise InputError(
        f"utility must be one of {', '.join(UTILITIES)}, neg_kl_top64, "
        f"{', '.join(TASK_UTILITIES)}: got {utility!r}"
    )


def is_task_utility(utility: str) -> bool:
    """Whether a utility is about questions of tasks, not windows of texts."""
    return utility in TASK_UTILITIES


def is_share(utility: str) -> bool:
    """Whether a utility is the share of what is not missed."""
    return utility in _SHARES


def is_normed(utility: str) -> bool:
    """Whether log-likelihoods of answers are divided by their characters."""
    return utility.endswith("_norm")


def loss_weights(utility: str, num_tokens_N: IntArray) -> IntArray:
    """What a utility's losses are divided by in all: tokens of windows, or 1 for each question."""
    return np.ones_like(num_tokens_N) if is_task_utility(utility) else num_tokens_N


def loss_scale(utility: str, num_tokens_N: IntArray) -> float:
    """What a mean loss is divided by before it is exponentiated, so that the result is a share as
    that of a perplexity is: a margin's nats are those of a whole answer.

    Args:
        num_tokens_N: tokens of the windows, or of the questions' right answers.
    """
    return float(num_tokens_N.mean()) if utility == "task_margin" else 1.0


def loss_unit(utility: str) -> str:
    """The unit of a utility's mean loss."""
    what = "misses" if is_share(utility) else "nats"
    if not is_task_utility(utility):
        return f"{what} per token"
    return "nats per character" if utility == "task_margin_norm" else f"{what} per question"


def units_in_words(utility: str) -> str:
    """What is drawn, weighed and resampled."""
    return "questions" if is_task_utility(utility) else "windows"


def has_perplexity(utility: str) -> bool:
    """Whether a utility says what the perplexity is."""
    return metric_of(utility) == "nll" and not is_task_utility(utility)


Z90 = 1.645
"""Half-width of a 90% normal interval in standard errors."""


def utilities(
    name: str, loss_MN: FloatArray, weight_N: IntArray | FloatArray, full_loss_N: FloatArray
) -> FloatArray:
    """The named utility of every mask, `float64[M]`, from its losses (`metric_of`).

    Args:
        weight_N: what losses are divided by in all: scored tokens of each window, or 1 for each
            question.

    `ppl_ratio` of other losses than NLLs is exp of minus what a mask loses, in (0, 1] where no mask
    loses less than the whole model: on that scale sets are searched.
    """
    loss_MN = np.asarray(loss_MN, dtype=np.float64)
    if name == "ppl_ratio":
        return ppl_ratio_utility(loss_MN, weight_N, np.asarray(full_loss_N, dtype=np.float64))
    metric_of(name)
    mean_M = neg_nll_utility(loss_MN, weight_N)
    return 1.0 + mean_M if is_share(name) else mean_M


def known_utilities(
    name: str,
    loss_MN: NDArray[np.float32],
    weight_N: IntArray | FloatArray,
    full_loss_N: NDArray[np.float32],
    windows: Sequence[int] | IntArray | None = None,
) -> FloatArray:
    """A utility of stored losses on all windows (or questions) or on some, `float64[M]`.

    NaN where a score is not finite there: the mask was given up, or not scored. Such a mask is
    never a training point and never chosen.
    """
    rows = np.arange(len(weight_N)) if windows is None else np.asarray(windows)
    some_MN = loss_MN[:, rows].astype(np.float64)
    full_N = full_loss_N[rows].astype(np.float64)
    value_M = utilities(name, some_MN, weight_N[rows], full_N)
    return np.where(np.isfinite(some_MN).all(axis=1), value_M, np.nan)


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
