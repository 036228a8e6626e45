"""Would other windows have chosen another set? Computed from stored per-window scores.

Calibration matters more than the search (arXiv 2604.24938): with few windows the best scored set of
a size is often best by luck. Among the scored sets of one size this compares the plan's set with
the others under paired draws of the windows (`lpserve.analysis.resample`), between disjoint halves
of them, and between corpora. The plan's set was chosen on these same windows, so that the shares of
draws in which it is best are biased upwards.

Notation: M masks of one size, P players, N windows (or questions), B draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lpserve.analysis.resample import mean_nll, window_weights
from lpserve.masks import best_row, removed_players
from lpserve.plan.plan import UNSETTLED
from lpserve.types import Z90, BoolArray, FloatArray, IntArray

SETTLED = 0.9
"""A set is settled when it is the best scored one in this share of the draws."""
_SPLITS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Stability:
    """How the best set of one size depends on the windows. Field names are keys in `plan.json`."""

    num_sets: int
    """Scored sets of this size."""
    stays_best: float
    """Share of draws of the windows in which the plan's set is the best of them."""
    regret: float
    """Mean over draws of (perplexity of the plan's set / best perplexity of the draw) - 1. Other
    losses are divided by `scale` and exponentiated first."""
    rival: list[int] | None
    """The runner-up: what is removed by the set that is best in most of the other draws; None if no
    other set ever is."""
    rival_gap: float | None
    """Mean loss of the runner-up minus the plan's on all windows (`types.loss_unit`)."""
    rival_gap_stderr: float | None
    """Its standard error over windows, paired."""
    windows_needed: int | None
    """Number of windows of the same mixture for which the gap would be 1.645 standard errors; None
    if the gap is not above 0."""
    halves_overlap: float | None
    """Share of removed players that the best sets of two disjoint halves of the windows have in
    common; mean over 100 splits. None with fewer than 4 windows."""
    halves_regret: float | None
    """(Perplexity on one half of the other half's best set / that of the half's own best) - 1; mean
    over splits and both directions."""
    corpora: dict[str, list[int]] = field(default_factory=dict)
    """Corpus -> what the set that is best on it alone removes; empty for a single corpus."""

    @property
    def settled(self) -> bool:
        """Whether the plan's set is the best one in at least the share `SETTLED` of the draws."""
        return self.stays_best >= SETTLED

    def warning(self, drawn: str, unit: str) -> str:
        """One line about a set that is not settled and has a runner-up.

        Args:
            drawn: what was drawn and how many: `10 windows`, `200 questions`.
            unit: unit of the losses (`types.loss_unit`).
        """
        kind = drawn.split()[-1]
        assert self.rival is not None
        assert self.rival_gap is not None
        assert self.rival_gap_stderr is not None
        enough = (
            f"about {self.windows_needed} {kind} of this kind would settle it"
            if self.windows_needed is not None
            else f"no number of {kind} would tell them apart"
        )
        return (
            f"{UNSETTLED}{kind} decides this set: in {1 - self.stays_best:.0%} of draws of the "
            f"{drawn} another scored set is better, mostly {self.rival} "
            f"({self.rival_gap:.4f} +- {Z90 * self.rival_gap_stderr:.4f} {unit} behind); "
            f"{enough}"
        )


def set_stability(
    *,
    masks_MP: BoolArray,
    loss_MN: FloatArray,
    num_tokens_N: IntArray,
    corpora: Sequence[tuple[str, int]],
    chosen: int,
    seed: int,
    scale: float = 1.0,
) -> Stability | None:
    """Stability of row `chosen` among the scored sets of its size; None for a single window.

    Args:
        masks_MP: masks of one size, distinct.
        loss_MN: their summed losses (for example NLLs in nats), finite.
        num_tokens_N: weight of each window: its tokens, or what else its loss is a sum over.
        corpora: name and number of windows of each corpus, in order.
        chosen: row of the plan's set.
        seed: of the draws and splits.
        scale: divisor of mean losses before they are exponentiated (`types.loss_scale`).
    """
    num_windows = len(num_tokens_N)
    if num_windows < 2:
        return None
    weights = window_weights([count for _, count in corpora], seed=seed)
    drawn_losses = mean_nll(loss_MN, num_tokens_N, weights)
    best = drawn_losses.min(axis=0)
    winner = drawn_losses.argmin(axis=0)
    winner[drawn_losses[chosen] <= best] = chosen
    wins_M = np.bincount(winner, minlength=len(masks_MP))
    stays_best = float(wins_M[chosen] / len(winner))
    wins_M[chosen] = 0
    runner_up = int(np.argmax(wins_M)) if wins_M.any() else None
    gap, error, needed = (None, None, None)
    if runner_up is not None:
        gap = float((loss_MN[runner_up] - loss_MN[chosen]).sum() / num_tokens_N.sum())
        error = float((drawn_losses[runner_up] - drawn_losses[chosen]).std(ddof=1))
        needed = _windows_needed(num_windows, gap, error)
    overlap, regret = _halves(masks_MP, loss_MN / scale, num_tokens_N, seed)
    return Stability(
        num_sets=len(masks_MP),
        stays_best=stays_best,
        regret=float(np.expm1((drawn_losses[chosen] - best) / scale).mean()),
        rival=None if runner_up is None else list(removed_players(masks_MP[runner_up])),
        rival_gap=gap,
        rival_gap_stderr=error,
        windows_needed=needed,
        halves_overlap=overlap,
        halves_regret=regret,
        corpora=_by_corpus(masks_MP, loss_MN, corpora),
    )


def _windows_needed(num_windows: int, gap: float, error: float) -> int | None:
    """The number of windows at which the gap would be 1.645 standard errors, which fall with its
    root."""
    if gap <= 0:
        return None
    return max(num_windows, math.ceil(num_windows * (Z90 * error / gap) ** 2))


def _halves(
    masks_MP: BoolArray, loss_MN: FloatArray, num_tokens_N: IntArray, seed: int
) -> tuple[float | None, float | None]:
    """Mean overlap of the best sets of two disjoint halves, and the mean regret of one half's best
    set on the other; None for fewer than 4 windows."""
    num_windows = len(num_tokens_N)
    if num_windows < 4:
        return None, None
    rng = np.random.default_rng([seed, num_windows])
    removed = int((~masks_MP[0]).sum())
    overlaps, regrets = [], []
    for _ in range(_SPLITS):
        order = rng.permutation(num_windows)
        half = num_windows // 2
        means = [
            loss_MN[:, part].sum(axis=1) / num_tokens_N[part].sum()
            for part in (order[:half], order[half : 2 * half])
        ]
        one, other = (int(np.argmin(mean_M)) for mean_M in means)
        overlaps.append(int((~masks_MP[one] & ~masks_MP[other]).sum()) / removed)
        regrets.append(np.expm1(means[1][one] - means[1][other]))
        regrets.append(np.expm1(means[0][other] - means[0][one]))
    return float(np.mean(overlaps)), float(np.mean(regrets))


def _by_corpus(
    masks_MP: BoolArray, loss_MN: FloatArray, corpora: Sequence[tuple[str, int]]
) -> dict[str, list[int]]:
    """Corpus -> what its own best set removes."""
    if len(corpora) < 2:
        return {}
    found, start = {}, 0
    for name, count in corpora:
        row = best_row(masks_MP, -loss_MN[:, start : start + count].sum(axis=1))
        assert row is not None
        found[name] = list(removed_players(masks_MP[row]))
        start += count
    return found
