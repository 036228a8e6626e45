"""SLEB's greedy search (Song et al., arXiv 2402.09025)."""

from __future__ import annotations

from lpserve.masks import best_row, drop_one, full_mask
from lpserve.rivals.proposer import Ask, Proposer, SearchSetting


def greedy(num_players: int, max_removed: int) -> Proposer:
    """SLEB's greedy, every step evaluated anew (Song et al., arXiv 2402.09025, its metric 3).

    A step drops each player left beside those already gone and keeps the best set; ties go to the
    smaller mask key. Every player may go: the published code spares the first and the last one.
    """
    current_P = full_mask(num_players)
    for _ in range(min(max_removed, num_players)):
        options_MP = drop_one(current_P)
        nll_M = yield Ask(options_MP)
        best = best_row(options_MP, -nll_M)
        if best is None:
            return
        current_P = options_MP[best]


def propose(setting: SearchSetting) -> Proposer:
    """The proposer of the registry."""
    return greedy(setting.num_players, setting.max_removed)
