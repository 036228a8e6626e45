"""Sets by expansion (`lpserve.plan.expansion`), and how rounds are shared among proposers.

Three propose sets: expansions about scored sets, the expansion about the whole model corrected by
scored sets, and the surrogate of masks. Which finds better ones depends on the model and on how
much is scored. So a round's places go to those that have earned them in this run: a bandit whose
reward is a set that became the best of its target. It reads complete rounds alone, in their order,
so that the shares do not depend on the number of engines.

Notation: M masks, P players, Q candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lpserve.masks import keys
from lpserve.plan.correction import CorrectedExpansion
from lpserve.plan.expansion import EXPANSION, Expansion
from lpserve.plan.search import (
    best_predicted_sets,
    starts,
)
from lpserve.plan.targets import Target
from lpserve.rounds.history import AskedMasks, CompletedRound, KnownUtilities
from lpserve.rounds.settings import RoundSettings
from lpserve.types import BoolArray, FloatArray

CORRECTED, SEARCH = "corrected expansion", "search"
PROPOSERS = (EXPANSION, CORRECTED, SEARCH)
"""Names of the proposers, as sources of masks."""
_ASKED_BEFORE, _HITS_BEFORE = 8.0, 1.0  # what each is taken to have asked for and found at first
_FADING = 0.8  # weight of a round's finds after each further round: what was easy is found
_LEAST_SHARE = 0.15  # of each, so that all go on being tried


class ExpansionSource:
    """Short lists of every target, from expansions about the best scored sets."""

    def __init__(self, settings: RoundSettings) -> None:
        self._settings = settings
        self._expansion: Expansion | None = None
        self._corrected = CorrectedExpansion()
        self._none_MP = np.empty((0, settings.num_players), dtype=bool)
        self._lists: dict[Target, tuple[BoolArray, FloatArray]] = {}
        """For every target sets, best first, and by how much each is predicted to lose less than
        the best scored set that meets it (nats per token)."""

    def fit(self, known: KnownUtilities, overlap_PP: FloatArray | None) -> bool:
        """Take in the scores; False where the engines measure no overlap, or single players' losses
        are missing."""
        self._lists = {}
        if overlap_PP is None:
            return False
        if self._expansion is None:
            self._expansion = Expansion(overlap_PP, self._settings.within)
        with np.errstate(divide="ignore", invalid="ignore"):
            loss_M = -np.log(known.guess_M)  # what is searched on is exp of minus a loss
        if not self._expansion.fit(known.masks_MP, loss_M):
            return False
        targets = self._settings.targets
        for target, best in zip(targets, known.best_for(targets).tolist(), strict=True):
            sets_MP, losses = self._expansion.shortlist(target)
            self._lists[target] = sets_MP, (-np.log(best) if best > 0 else np.inf) - losses
        return True

    def take(self, asked: AskedMasks, count: int, *, screened: bool = False) -> list[BoolArray]:
        """The next `count` sets by expansions about scored sets that were never asked for."""
        return _in_turn(self._lists, EXPANSION, asked, count, screened=screened)

    def best_of(self, target: Target) -> BoolArray:
        """The short list of one target, best first, `bool[Q, P]`."""
        return self._lists[target][0] if target in self._lists else self._none_MP

    def corrected(
        self, known: KnownUtilities, asked: AskedMasks, count: int, *, screened: bool = False
    ) -> list[BoolArray]:
        """The next `count` sets that the corrected expansion predicts to cost least."""
        if self._expansion is None or count < 1:
            return []
        self._corrected.fit(self._expansion)
        best_for = known.best_for(list(self._lists)).tolist()
        lists = {}
        for (target, (sets_MP, _)), best in zip(self._lists.items(), best_for, strict=True):
            near_MP = np.concatenate([sets_MP, starts(known.masks_MP, known.guess_M, target)])
            if not len(near_MP) or not best > 0:
                continue
            sets_MP = asked.unseen(best_predicted_sets(self._corrected, target, near_MP))
            lists[target] = sets_MP, self._corrected.mean(sets_MP) - np.log(best)
        return _in_turn(lists, CORRECTED, asked, count, screened=screened)


def _in_turn(
    lists: Mapping[Target, tuple[BoolArray, FloatArray]],
    source: str,
    asked: AskedMasks,
    count: int,
    *,
    screened: bool,
) -> list[BoolArray]:
    """The first `count` sets that were never asked for, one of every target in turn; in each turn
    targets of the highest gains first."""
    left = {}
    for place, (sets_MP, gains) in enumerate(lists.values()):
        fresh = [row for row, key in enumerate(keys(sets_MP)) if key not in asked.sources]
        left[place] = [(gains[row], sets_MP[row]) for row in reversed(fresh)]
    batch: list[BoolArray] = []
    while len(batch) < count and any(left.values()):
        turn = sorted((-some[-1][0], place) for place, some in left.items() if some)
        sets = [left[place].pop()[1] for _, place in turn]
        batch += asked.add(sets, source, max_count=count - len(batch), screened=screened)
    return batch


def earned_places(
    count: int,
    rounds: Sequence[CompletedRound],
    known: KnownUtilities,
    sources: Mapping[bytes, str],
    targets: Sequence[Target],
) -> dict[str, int]:
    """Proposer -> how many of a round's `count` searched sets are its.

    Args:
        rounds: complete rounds, in order.
        known: utilities of their masks.
        sources: how each mask was found, by key.
        targets: what sets are searched for.
    """
    utility_of = dict(zip(keys(known.masks_MP), known.guess_M, strict=True))
    asked, hits = dict.fromkeys(PROPOSERS, 0.0), dict.fromkeys(PROPOSERS, 0.0)
    best: dict[int, float] = {}  # by the target's place
    for done in rounds:
        before = dict(best)
        finder: dict[int, str] = {}
        for figures in (asked, hits):
            for name in figures:
                figures[name] *= _FADING
        meets = np.array([target.holds(done.masks_MP) for target in targets])
        for row, key in enumerate(keys(done.masks_MP)):
            source = sources.get(key, "")
            if source in asked:
                asked[source] += 1
            for place in np.flatnonzero(meets[:, row]).tolist():
                if utility_of.get(key, -np.inf) > best.get(place, -np.inf):
                    best[place], finder[place] = utility_of[key], source
        for place, source in finder.items():
            if source in hits and place in before:  # the first set of a target is no find
                hits[source] += 1
    earned = np.array([(hits[p] + _HITS_BEFORE) / (asked[p] + _ASKED_BEFORE) for p in PROPOSERS])
    share = np.maximum(earned / earned.sum(), _LEAST_SHARE)
    ends = np.rint(count * np.cumsum(share / share.sum())).astype(int).tolist()
    return dict(zip(PROPOSERS, np.diff([0, *ends]).tolist(), strict=True))
