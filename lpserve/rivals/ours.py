"""lpserve's own search, the rounds of `lpserve run --goal plan`, as a proposer."""

from __future__ import annotations

import itertools

import numpy as np

from lpserve.errors import InputError
from lpserve.inputs.rules import default_round_size
from lpserve.rivals.proposer import Ask, Proposer, SearchSetting
from lpserve.rounds.history import CompletedRound
from lpserve.rounds.planner import RoundPlanner
from lpserve.rounds.settings import RoundSettings
from lpserve.types import FloatArray
from lpserve.utility import utility_named


def propose(setting: SearchSetting) -> Proposer:
    """The proposer of the registry.

    Raises:
        InputError: the budget is smaller than lpserve's own smallest.
    """
    players, max_removed = setting.num_players, setting.max_removed
    settings = RoundSettings(
        num_players=players,
        max_removed=max_removed,
        sizes=(players - max_removed, players - 1),
        seed=setting.seed,
        surrogate="auto",
        round_size=default_round_size(players, "plan"),
        goal="plan",
        costs=setting.costs,
    )
    minimum = settings.minimum_budget()
    if setting.budget < minimum:
        raise InputError(f"budget must be at least {minimum} for lpserve: got {setting.budget}")
    return ours(settings, setting.measured)


def ours(settings: RoundSettings, overlap_PP: FloatArray | None = None) -> Proposer:
    """lpserve's own rounds, as a run plays them: round n is chosen from rounds up to n - 2.

    Args:
        overlap_PP: see `lpserve.rounds.history.CompletedRound`.
    """
    planner = RoundPlanner(
        settings,
        utility_named("neg_nll"),
        np.ones(1, dtype=np.int64),
        overlap=overlap_PP is not None,
    )
    rounds: list[CompletedRound] = []
    last: CompletedRound | None = None
    for index in itertools.count():
        asked = planner.propose(index, rounds)
        if not len(asked.all_masks):
            return
        if last is not None:
            rounds.append(last)
        nll_M = yield Ask(asked.all_masks)
        nll_column = nll_M[:, None]  # means, not rounded as a store would round them
        overlap = overlap_PP if asked.overlap else None
        last = CompletedRound(asked.all_masks, nll_column, nll_column, overlap)
