"""Shortened-LLaMA's perplexity criterion (Kim et al., arXiv 2402.02834)."""

from __future__ import annotations

import numpy as np

from lpserve.masks import drop_one, full_mask, ranking_mask
from lpserve.rivals.proposer import Ask, Proposer, SearchSetting


def one_shot(num_players: int, max_removed: int) -> Proposer:
    """Shortened-LLaMA's perplexity criterion (Kim et al., arXiv 2402.02834).

    Every player is dropped alone; the set of size r holds the r players whose absence raised the
    loss least. Sets that would hold a player without a finite score are not asked for. Published on
    10 windows of 128 tokens; here the windows are those of the comparison.
    """
    singles_PP = drop_one(full_mask(num_players))
    nll_P = yield Ask(singles_PP)
    cost_P = np.where(np.isfinite(nll_P), nll_P, np.inf)
    largest = min(max_removed, int(np.isfinite(nll_P).sum()))
    sets = [ranking_mask(cost_P, r) for r in range(2, largest + 1)]
    if sets:
        yield Ask(np.array(sets))


def propose(setting: SearchSetting) -> Proposer:
    """The proposer of the registry."""
    return one_shot(setting.num_players, setting.max_removed)
