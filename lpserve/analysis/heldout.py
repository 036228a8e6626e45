"""What held-out items say of a run's sets. They report and warn; they never choose.

Notation: M held-out masks, P players, I items.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lpserve.analysis.record import RunRecord, heldout_losses
from lpserve.masks import full_mask
from lpserve.types import (
    BoolArray,
    IntArray,
    perplexity,
)
from lpserve.utility import Utility, UtilityView


def ppl_of(nll_N: NDArray[np.float32], num_tokens_N: IntArray) -> float:
    return float(perplexity(nll_N.astype(np.float64).sum() / num_tokens_N.sum()))


def finite_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def heldout_objective(scored: RunRecord) -> Utility:
    """The utility that held-out losses are of: where the run's is not defined, a text's NLLs."""
    return heldout_losses(scored)[1]


def _row(scored: RunRecord, mask_P: BoolArray) -> int | None:
    found = np.flatnonzero((scored.heldout_masks_MP == mask_P).all(axis=1))
    return int(found[0]) if len(found) else None


def heldout_gap(
    scored: RunRecord, mask_P: BoolArray, chosen_P: BoolArray
) -> tuple[float | None, float | None]:
    """Mean held-out loss minus the chosen set's, and its standard error paired over windows."""
    loss_MN, judge = heldout_losses(scored)
    weight_N = judge.weights(scored.heldout_num_tokens_I)
    here, there = _row(scored, mask_P), _row(scored, chosen_P)
    if here is None or there is None:
        return None, None
    gap_N = loss_MN[here].astype(np.float64) - loss_MN[there].astype(np.float64)
    total = weight_N.sum()
    error = float(gap_N.std(ddof=1) * np.sqrt(len(gap_N)) / total) if len(gap_N) > 1 else None
    return float(gap_N.sum() / total), error


def heldout_utility(scored: RunRecord, mask_P: BoolArray) -> float | None:
    loss_MI, row = scored.heldout_loss_MI, _row(scored, mask_P)
    full = _row(scored, full_mask(scored.num_players))
    if loss_MI is None or row is None or full is None:
        return None
    view = UtilityView(scored.objective, scored.heldout_num_tokens_I, loss_MI[full])
    value_1 = view.of(loss_MI[[row]])
    return finite_or_none(value_1[0])


def heldout_ppl(scored: RunRecord, mask_P: BoolArray) -> float | None:
    row = _row(scored, mask_P)
    if row is None or not np.isfinite(scored.heldout_nll_MI[row]).all():
        return None
    return ppl_of(scored.heldout_nll_MI[row], scored.heldout_num_tokens_I)
