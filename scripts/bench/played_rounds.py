"""The rounds of a run on a game whose scores are at hand, played as the coordinator plays them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lpserve.rounds.history import CompletedRound, Round
from lpserve.rounds.planner import RoundPlanner
from lpserve.rounds.settings import RoundSettings
from lpserve.types import BoolArray, IntArray
from lpserve.utility import Utility


def played_rounds(
    settings: RoundSettings,
    nll_of: Callable[[BoolArray], np.ndarray],
    utility: Utility,
    num_tokens_N: IntArray,
    budget: int,
    *,
    screen: IntArray | None = None,
    overlap_PP: np.ndarray | None = None,
) -> Iterator[Round]:
    """One round after another, cut where the budget ends.

    Round n is chosen from complete rounds up to n-2, when it is asked for.

    Args:
        nll_of: masks -> `float32[M, N]`, nats.
        utility, num_tokens_N, screen: see `RoundPlanner`.
        overlap_PP: see `CompletedRound`.
    """
    planner = RoundPlanner(
        settings, utility, num_tokens_N, screen=screen, overlap=overlap_PP is not None
    )
    rounds: list[CompletedRound] = []

    def score(asked: Round) -> None:
        nll_MN = nll_of(asked.all_masks)
        if screen is not None:
            others_N = ~np.isin(np.arange(nll_MN.shape[1]), screen)
            screened = np.flatnonzero(~asked.full_M)
            nll_MN[np.ix_(screened, np.flatnonzero(others_N))] = np.nan
        overlap = None if rounds else overlap_PP
        rounds.append(CompletedRound(asked.all_masks, nll_MN, nll_MN, overlap))

    index, left, last = 0, budget, None
    while left:
        asked = planner.propose(index, rounds).first(left)
        if not len(asked.all_masks):
            break
        if last is not None:
            score(last)
        index, left, last = index + 1, left - len(asked), asked
        yield asked
    if last is not None:
        score(last)
    while len((asked := planner.settle(rounds)).promoted_MP):
        score(asked)
        yield asked
