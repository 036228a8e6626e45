"""Searches that rank players by a criterion instead of scoring masks: one `Ask`, the ranked sets.

The last layers need nothing; block influence, angular distance and Taylor+ are measured inside the
model (`lpserve.engine.hf.criteria`).

Notation: P players; L = P + 1 hidden states between them, the input and the output included.
"""

from __future__ import annotations

import numpy as np

from lpserve.masks import without
from lpserve.rivals.proposer import Ask, Proposer, SearchSetting, ranked_sets
from lpserve.types import FloatArray

TAYLOR_SPARED_FIRST, TAYLOR_SPARED_LAST = 4, 2


def last_layers(num_players: int, max_removed: int) -> Proposer:
    """The last r players; a strong start for fine-tuning (Lu et al., arXiv 2411.15558)."""
    yield from ranked_sets(-np.arange(num_players, dtype=np.float64), max_removed)


def block_influence(influence_P: FloatArray, max_removed: int) -> Proposer:
    """ShortGPT (Men et al., arXiv 2403.03853): the r players that change the hidden state least.

    Args:
        influence_P: 1 - mean cosine of a player's input and output
            (`engine.base.HiddenStates`).
    """
    yield from ranked_sets(influence_P, max_removed)


def contiguous_layers(distance: FloatArray, max_removed: int) -> Proposer:
    """Gromov et al. (arXiv 2403.17887): the r consecutive players around which
    the hidden states differ least.

    Args:
        distance: angular distance of the states entering players i and j, `float64[P+1, P+1]`
            (`engine.base.HiddenStates`).
    """
    num_players = len(distance) - 1
    sets = []
    for r in range(1, min(max_removed, num_players) + 1):
        start = int(np.argmin([distance[i, i + r] for i in range(num_players - r + 1)]))
        sets.append(without(num_players, list(range(start, start + r))))
    yield Ask(np.array(sets))


def taylor(importance_P: FloatArray, max_removed: int) -> Proposer:
    """Shortened-LLaMA's Taylor+ (Kim et al., arXiv 2402.02834): the r players of the lowest
    first-order importance; the first 4 and last 2 are spared as long as others are left.

    Args:
        importance_P: sum of |weight x gradient| over a player (`engine.hf.criteria`).
    """
    spared_P = np.ones(len(importance_P), dtype=bool)
    spared_P[TAYLOR_SPARED_FIRST : len(importance_P) - TAYLOR_SPARED_LAST] = False
    # the spared ones come last, in the same order
    yield from ranked_sets(
        np.where(spared_P, importance_P + importance_P.sum(), importance_P), max_removed
    )


def propose_last(setting: SearchSetting) -> Proposer:
    """`last_layers` for the registry."""
    return last_layers(setting.num_players, setting.max_removed)


def propose_shortgpt(setting: SearchSetting) -> Proposer:
    """`block_influence` for the registry; `measured` is an `engine.base.HiddenStates`."""
    return block_influence(setting.measured.influence_P, setting.max_removed)


def propose_angular(setting: SearchSetting) -> Proposer:
    """`contiguous_layers` for the registry; `measured` is an `engine.base.HiddenStates`."""
    return contiguous_layers(setting.measured.distance, setting.max_removed)


def propose_taylor(setting: SearchSetting) -> Proposer:
    """`taylor` for the registry; `measured` is the importance of every player."""
    return taylor(setting.measured, setting.max_removed)
