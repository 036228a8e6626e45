"""Random sets: the search that any other has to beat."""

from __future__ import annotations

from lpserve.masks import StratifiedDesign
from lpserve.rivals.proposer import Ask, Proposer, SearchSetting

RANDOM_BATCH = 256
"""Masks of an `Ask` of `random_search`: no choice depends on a score, so batches may be large."""


def random_search(num_players: int, max_removed: int, seed: int) -> Proposer:
    """Uniform random sets of 1..max_removed players, of every size in turn.

    No set comes twice; the search ends when there are no more.
    """
    strata = range(num_players - 1, num_players - max_removed - 1, -1)
    design = StratifiedDesign(num_players, list(strata), seed)
    while len(masks_MP := design.take(RANDOM_BATCH)):
        yield Ask(masks_MP)


def propose(setting: SearchSetting) -> Proposer:
    """The proposer of the registry."""
    return random_search(setting.num_players, setting.max_removed, setting.seed)
