"""What a coalition is worth: metrics, and the utilities made of them.

An engine sums a *metric* over every window (`check_metric`). A mask's *losses* are one number for
each *item* that a game is played on: a window of a text, or a question of a task. A `Utility` maps
losses to one number for each mask, higher is better; its formula stands here and nowhere else.

A new utility is a line in `UTILITIES`; one of a new metric also needs that metric in the engines.

Notation: M masks, I items (windows or questions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lpserve.errors import InputError
from lpserve.types import FloatArray, IntArray

METRICS = ("nll", "misses", "kl")


def check_metric(name: str) -> None:
    """Raise InputError unless a metric is known. All are summed over a window's scored positions:

    * `nll`: negative log-likelihood of the token, nats;
    * `misses`: 1 where another token has the highest logit (of equals, the first);
    * `kl`: Kullback-Leibler divergence from the full model's prediction to the masked one's, nats;
    * `kl_topK` (a number in place of K): that divergence with all tokens but the full model's K
      likeliest merged into one. Never above `kl` (data processing inequality), and cheaper: the
      full model's prediction is kept, not computed again beside every mask's.
    """
    if name not in METRICS and top_of(name) is None:
        raise InputError(f"unknown metric {name!r}: one of {', '.join(METRICS)}, kl_top64")


def top_of(metric: str) -> int | None:
    """K of `kl_topK`; None for other metrics."""
    number = metric.removeprefix("kl_top")
    return int(number) if number != metric and number.isdecimal() and int(number) else None


def needs_full_model(metric: str) -> bool:
    """Whether a metric compares with the full model's prediction."""
    return metric.startswith("kl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Utility:
    """One way to value a mask by its losses.

    `negative` is minus the mean loss, `share` one minus the mean loss (of losses that are 0 or 1
    for each token or question), and `ratio` exp of how far the mean loss lies below the full
    model's: for NLLs PPL(all kept) / PPL(mask), the utility of arXiv 2602.07804.
    """

    name: str
    about: str
    """What a mask is worth, in words, for the command line's help and the documentation."""
    formula: Literal["negative", "share", "ratio"]
    metric: str = "nll"
    """What engines sum over windows for it (`check_metric`)."""
    item: Literal["window", "question"] = "window"
    normed: bool = False
    """Whether log-likelihoods of answers are divided by their number of characters."""
    answer_scale: bool = False
    """Whether a loss is of a whole answer, so that searching on ratios divides it by the mean
    number of tokens of an answer: a ratio is then on the scale of a perplexity's, which is per
    token."""

    @property
    def reports_perplexity(self) -> bool:
        """Whether the utility is a function of the perplexity alone."""
        return self.metric == "nll" and self.item == "window"

    @property
    def in_nats(self) -> bool:
        """Whether its loss is a token's NLL or divergence, to which effects on the model's
        predictions add in second order (`lpserve.plan.expansion`)."""
        return self.item == "window" and self.metric != "misses"

    @property
    def items(self) -> str:
        """`windows` or `questions`, for messages."""
        return f"{self.item}s"

    @property
    def loss_unit(self) -> str:
        """Unit of the mean loss."""
        what = "misses" if self.formula == "share" else "nats"
        if self.item == "window":
            return f"{what} per token"
        return "nats per character" if what == "nats" and self.normed else f"{what} per question"

    @property
    def floor(self) -> float | None:
        """The utility of an infinite loss; None where there is no lowest one."""
        return 0.0 if self.formula == "ratio" else None

    def of_mean(self, mean: Any, below_full: Any) -> Any:
        """The formula: utilities of mean losses.

        Args:
            mean: a mask's mean loss.
            below_full: how far that lies below the full model's mean loss.
        """
        if self.formula == "negative":
            return -mean
        if self.formula == "share":
            return 1.0 - mean
        with np.errstate(over="ignore", under="ignore"):
            return np.exp(below_full)

    def of(
        self,
        loss_MI: NDArray[Any],
        weight_I: IntArray | FloatArray,
        full_loss_I: NDArray[Any],
        items: Sequence[int] | IntArray | None = None,
    ) -> FloatArray:
        """The utility of every mask, `float64[M]`.

        NaN where a loss is not finite: the mask was given up, or not scored on some item. Such a
        mask is never a training point and never chosen.

        Args:
            loss_MI: losses, summed over an item's scored positions.
            weight_I: what the sums are divided by in total: scored tokens, or 1 for each question.
            full_loss_I: losses of the full model.
            items: rows of the items to look at; None: all.
        """
        rows = np.arange(len(weight_I)) if items is None else np.asarray(items)
        some_MI = loss_MI[:, rows].astype(np.float64)
        total = weight_I[rows].sum()
        with np.errstate(invalid="ignore", over="ignore"):
            sum_M = some_MI.sum(axis=1)
            below_full_M = (full_loss_I[rows].astype(np.float64).sum() - sum_M) / total
            value_M = self.of_mean(sum_M / total, below_full_M)
        return np.where(np.isfinite(some_MI).all(axis=1), value_M, np.nan)

    def weights(self, num_tokens_I: IntArray) -> IntArray:
        """What losses are weighted by: scored tokens of windows, 1 for each question."""
        return num_tokens_I if self.item == "window" else np.ones_like(num_tokens_I)

    def search_scale(self, num_tokens_I: IntArray) -> float:
        """Divisor of a mean loss before exp(): brings losses of whole answers to the per-token
        scale of perplexity; 1 for all other utilities.

        Args:
            num_tokens_I: scored tokens of the windows, or of the questions' correct answers.
        """
        return float(num_tokens_I.mean()) if self.answer_scale else 1.0

    def noise_variance(self, utilities_M: FloatArray, noise_loss: float) -> FloatArray | None:
        """Variance of each utility that the engine's rounding causes; None where there is none.

        Args:
            noise_loss: root mean square noise of a mask's mean loss.
        """
        if not noise_loss:
            return None
        slope_M = utilities_M if self.formula == "ratio" else np.ones(len(utilities_M))
        return (slope_M * noise_loss) ** 2


UTILITIES: dict[str, Utility] = {
    made.name: made
    for made in (
        Utility(
            name="neg_nll",
            formula="negative",
            about="mean log-likelihood of a token, nats",
        ),
        Utility(
            name="ppl_ratio",
            formula="ratio",
            about="the full model's perplexity divided by the mask's (the paper's)",
        ),
        Utility(
            name="neg_kl",
            formula="negative",
            metric="kl",
            about="minus the mean divergence from the full model's prediction, nats per token",
        ),
        Utility(
            name="accuracy",
            formula="share",
            metric="misses",
            about="share of tokens that are the model's first choice",
        ),
        Utility(
            name="task_acc",
            formula="share",
            metric="misses",
            item="question",
            about="lm-eval's acc: share of questions answered correctly",
        ),
        Utility(
            name="task_acc_norm",
            formula="share",
            item="question",
            normed=True,
            about="lm-eval's acc_norm: the same with log-likelihoods per character",
        ),
        Utility(
            name="task_margin",
            formula="negative",
            item="question",
            answer_scale=True,
            about="mean by which the correct answer's log-likelihood exceeds that of the likeliest "
            "wrong one, nats; of a task without choices, the answer's log-likelihood",
        ),
        Utility(
            name="task_margin_norm",
            formula="negative",
            item="question",
            normed=True,
            about="that margin per character of the answers",
        ),
    )
}
"""Every utility by name, the default first; `neg_kl_topK` is `neg_kl` of the metric `kl_topK`.

`ppl_ratio` is that of arXiv 2602.07804. Losses of lm-eval's tasks are
`lpserve.data.questions.Questions.losses`."""
TEXT_UTILITIES = tuple(u.name for u in UTILITIES.values() if u.item == "window")
TASK_UTILITIES = tuple(u.name for u in UTILITIES.values() if u.item == "question")
SEARCH_UTILITY = UTILITIES["ppl_ratio"]
"""Sets are searched on exp of minus what a mask loses, whatever the run's utility: a ratio flattens
collapsed masks, whose large losses would otherwise rule the fit."""


def utility_named(name: object) -> Utility:
    """The utility of a name; raises InputError where there is none."""
    name = str(name)
    if name in UTILITIES:
        return UTILITIES[name]
    metric = name.removeprefix("neg_")
    if metric != name and top_of(metric) is not None:
        return replace(UTILITIES["neg_kl"], name=name, metric=metric)
    raise InputError(
        f"utility must be one of {', '.join(TEXT_UTILITIES)}, neg_kl_top64, "
        f"{', '.join(TASK_UTILITIES)}: got {name!r}"
    )


@dataclass(frozen=True, slots=True, eq=False)
class UtilityView:
    """A utility on the items of one game: losses in, utilities out.

    Values and rankings are about `of`; sets are searched on `search`, which is `SEARCH_UTILITY` of
    the same losses.
    """

    utility: Utility
    num_tokens_I: IntArray
    """Scored tokens of the windows, or of the questions' correct answers."""
    full_loss_I: NDArray[Any]
    """Losses of the full model."""

    @property
    def weight_I(self) -> IntArray:
        return self.utility.weights(self.num_tokens_I)

    def of(
        self, loss_MI: NDArray[Any], items: Sequence[int] | IntArray | None = None
    ) -> FloatArray:
        """The utility of every mask, `float64[M]`; see `Utility.of`."""
        return self.utility.of(loss_MI, self.weight_I, self.full_loss_I, items)

    def search(
        self, loss_MI: NDArray[Any], items: Sequence[int] | IntArray | None = None
    ) -> FloatArray:
        """What sets are searched on, `float64[M]`: in (0, 1] where no mask loses less than the full
        model does."""
        if self.utility == SEARCH_UTILITY:
            return self.of(loss_MI, items)
        scale = self.utility.search_scale(self.num_tokens_I)
        weight_I = (self.weight_I * scale).astype(np.float64)
        return SEARCH_UTILITY.of(loss_MI, weight_I, self.full_loss_I, items)
