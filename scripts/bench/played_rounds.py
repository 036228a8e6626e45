"""The rounds of a run on a game whose scores are at hand, played as the coordinator plays them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lpserve.rounds.history import History, Round
from lpserve.rounds.planner import RoundPlanner, RoundSettings
from lpserve.types import BoolArray, FloatArray

Utility = Callable[[np.ndarray], FloatArray]


def played_rounds(
    settings: RoundSettings,
    nll_of: Callable[[BoolArray], np.ndarray],
    utility: Utility,
    search_utility: Utility | None,
    budget: int,
    *,
    screen: tuple[np.ndarray, Utility] | None = None,
) -> Iterator[Round]:
    """One round after another, cut where the budget ends.

    Round n is chosen from complete rounds up to n-2, when it is asked for.

    Args:
        nll_of: masks -> `float32[M, N]`, nats.
        utility, search_utility: see `RoundPlanner`.
        screen: rows of the screen's windows, and the search utility on them.
    """
    rows, of_screen = screen or (None, None)
    planner, history = RoundPlanner(settings, utility, search_utility, of_screen), History()

    def score(asked: Round) -> None:
        nll_MN = nll_of(asked.all_masks)
        if rows is not None:
            others_N = ~np.isin(np.arange(nll_MN.shape[1]), rows)
            screened = np.flatnonzero(~asked.whole_M)
            nll_MN[np.ix_(screened, np.flatnonzero(others_N))] = np.nan
        history.masks.append(asked.all_masks)
        history.loss.append(nll_MN)

    index, left, last = 0, budget, None
    while left:
        asked = planner.propose(index, history).first(left)
        if not len(asked.all_masks):
            break
        if last is not None:
            score(last)
        index, left, last = index + 1, left - len(asked), asked
        yield asked
    if last is not None:
        score(last)
    while len((asked := planner.settle(history)).promoted_QP):
        score(asked)
        yield asked
