"""lpserve's own search, the rounds of `lpserve run --goal plan`, as a proposer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from lpserve.errors import InputError
from lpserve.plan import search
from lpserve.rivals.proposer import Ask, Proposer, SearchSetting
from lpserve.rounds.history import History
from lpserve.rounds.planner import RoundPlanner, RoundSettings
from lpserve.types import FloatArray, known_utilities


def propose(setting: SearchSetting) -> Proposer:
    """The proposer of the registry.

    Raises:
        InputError: the budget is smaller than lpserve's own smallest.
    """
    players, most = setting.num_players, setting.max_removed
    settings = RoundSettings(
        num_players=players,
        max_removed=most,
        sizes=(players - most, players - 1),
        seed=setting.seed,
        surrogate="auto",
        round_size=players,
        goal="plan",
    )
    least = settings.minimum_budget()
    if setting.budget < least:
        raise InputError(f"budget must be at least {least} for lpserve: got {setting.budget}")
    return ours(settings)


def ours(settings: RoundSettings) -> Proposer:
    """lpserve's own rounds, as a run plays them: round n is chosen from rounds up to n - 2."""
    full: list[np.ndarray] = []

    def utility(name: str) -> Callable[[np.ndarray], FloatArray]:
        one = np.array([1])
        return lambda nll_MN: known_utilities(name, nll_MN, one, full[0])

    planner = RoundPlanner(settings, utility("neg_nll"), utility(search.UTILITY))
    history, last = History(), None
    for index in itertools.count():
        asked = planner.propose(index, history)
        if not len(asked.all_masks):
            return
        if last is not None:
            history.masks.append(last[0])
            history.loss.append(cast("Any", last[1]))  # means, not rounded as a store would
        nll_M = yield Ask(asked.all_masks)
        nll_M1 = nll_M[:, None]
        if not full:
            full.append(nll_M1[0])
        last = asked.all_masks, nll_M1
