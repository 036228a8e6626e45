"""The rounds of a run on a game whose scores are at hand, played as the coordinator plays them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lpserve.rounds import History, RoundPlanner, RoundSettings
from lpserve.types import BoolArray, FloatArray

Utility = Callable[[np.ndarray], FloatArray]


def played_rounds(
    settings: RoundSettings,
    nll_of: Callable[[BoolArray], np.ndarray],
    utility: Utility,
    search_utility: Utility | None,
    budget: int,
) -> Iterator[BoolArray]:
    """The masks of one round after another, `bool[M, P]` each, cut where the budget ends.

    Round n is chosen from complete rounds up to n-2, when it is asked for.

    Args:
        nll_of: masks -> `float32[M, N]`, nats.
        utility, search_utility: see `RoundPlanner`.
    """
    planner, history = RoundPlanner(settings, utility, search_utility), History()
    rounds: list[BoolArray] = []
    left = budget
    while left and len(masks_MP := planner.propose(len(rounds), history)[:left]):
        rounds.append(masks_MP)
        left -= len(masks_MP)
        if len(rounds) > 1:
            history.masks.append(rounds[-2])
            history.nll.append(nll_of(rounds[-2]))
        yield masks_MP
