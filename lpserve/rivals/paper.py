"""The pipeline of arXiv 2602.07804: random masks, a network, values, the lowest values removed.

Notation: P players, D random draws, S strata.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpserve.errors import InputError
from lpserve.masks import draw, full_mask, keys, paper_kept_counts, ranking_mask
from lpserve.rivals.proposer import KnownScores, Proposer, SearchSetting
from lpserve.surrogate import PaperSurrogate
from lpserve.types import BoolArray, IntArray
from lpserve.values.sampling import paper_values

PAPER_DRAWS = 8_000
PAPER_COALITIONS = 80_000
PAPER_MIN_DRAWS = 5
"""The fewest distinct draws that its surrogate is trained on."""


def paper(
    num_players: int,
    max_removed: int,
    *,
    budget: int,
    seed: int,
    strata: Sequence[int] | None = None,
) -> Proposer:
    """The pipeline of arXiv 2602.07804: random masks, a network, values, the r lowest removed.

    Masks are drawn with replacement, as many from each stratum (`paper_kept_counts`); the published
    8,000, or as many as leave masks of the budget for the rest of the pipeline. A repeated draw
    counts as one of the 8,000 and trains the network again, as published, but is scored only once.
    Utility is the perplexity ratio; failed masks train nothing. Values come from 80,000 coalitions
    of the same strata, and their ranking is scored for every r last.

    Args:
        strata: kept counts to draw from, where a game does not hold all published ones.

    Raises:
        InputError: the budget does not hold all kept, `PAPER_MIN_DRAWS` draws and a set for every
            r; raised at the first step.
    """
    room = budget - 1 - max_removed
    if room < PAPER_MIN_DRAWS:
        raise InputError(
            f"the paper's pipeline removing up to {max_removed} needs a budget of at least "
            f"{1 + PAPER_MIN_DRAWS + max_removed} masks: got {budget}"
        )
    rng = np.random.default_rng(seed)
    draws_MP = paper_draws(num_players, PAPER_DRAWS, rng, strata)
    coalitions_MP = paper_draws(num_players, PAPER_COALITIONS, rng, strata)
    draws_MP = draws_MP[_distinct_so_far(draws_MP) <= room]
    known = KnownScores()
    nll_M = yield from known.score(np.concatenate([full_mask(num_players)[None], draws_MP]))
    finite_M = np.isfinite(nll_M[1:])
    if not np.isfinite(nll_M[0]) or finite_M.sum() < 2:
        return
    surrogate = PaperSurrogate(seed)
    # not `fit`, which refuses repeated masks and measures a held-out error that is not needed
    surrogate.train(draws_MP[finite_M], np.exp(nll_M[0] - nll_M[1:][finite_M]))
    values_P = paper_values(surrogate.mean, coalitions_MP).values_P
    sets_MP = np.array([ranking_mask(values_P, r) for r in range(1, max_removed + 1)])
    yield from known.score(sets_MP)


def paper_draws(
    num_players: int,
    count: int,
    rng: np.random.Generator,
    strata: Sequence[int] | None = None,
) -> BoolArray:
    """Random masks with replacement, from each stratum in turn, `bool[count, P]`.

    Args:
        strata: kept counts to draw from; None: the published ones.
    """
    strata = paper_kept_counts(num_players) if strata is None else strata
    share = -(-count // len(strata))
    masks_by_size = np.array([draw(num_players, kept, share, rng) for kept in strata])
    return masks_by_size.swapaxes(0, 1).reshape(-1, num_players)[:count]


def _distinct_so_far(masks_MP: BoolArray) -> IntArray:
    """Number of different masks up to and including each row, `int64[D]`."""
    seen: set[bytes] = set()
    counts = []
    for key in keys(masks_MP):
        seen.add(key)
        counts.append(len(seen))
    return np.array(counts, dtype=np.int64)


def propose(setting: SearchSetting) -> Proposer:
    """The proposer of the registry."""
    return paper(setting.num_players, setting.max_removed, budget=setting.budget, seed=setting.seed)
