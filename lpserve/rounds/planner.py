"""Which masks each round asks for.

The masks of round n depend only on the settings (with their seed) and on the complete rounds up to
n-2, so that the engines work on round n-1 meanwhile; never on arrival order, on the number of
engines or on what a store already held. The budget cuts the sequence and changes nothing else in
it. Even rounds begin with a step of the greedy path until it is walked. The rest of a round goes to
sets of high expected improvement (`lpserve.plan.search`) and to masks that reduce the variance of
the values most (`lpserve.rounds.acquisition`). Until the path is walked, rounds are smaller and
what the path leaves of them is the search's alone, so that greedy's sets are scored early.

    round 0   all kept; every single player dropped (greedy step 1); none kept where the values
              need it; where players must be removed, the set of these
    round 1   stratified random masks
    round 2   greedy step 2; for every r, the r players whose removal alone cost least
    round 3   sets by expected improvement, for every r
    round 4   greedy step 3, without sets that cannot be its best; sets by expected improvement
    ...
    later     sets by expected improvement, rankings by value, masks for the values

Where the engines measure how single players' effects overlap (`lpserve.plan.expansion`), no greedy
path is walked: short lists by expansion reach its sets with a part of its masks.

    round 0   as above, with the overlap
    round 1   stratified random masks; with goal `plan` a few
    then      for every r, sets by expansions about the best scored sets, until eight of each size
              are asked for
    later     sets by expansion and by expected improvement, as each has earned
              (`lpserve.rounds.expanding`); with goal `both` rankings and masks for the values, with
              goal `plan` once half a round of random masks, for the surrogate

With a screen (`lpserve.rounds.screening`) greedy's sets, rankings and the search's sets are scored
on a few items first (with goal `plan` everything after round 1), and every round also asks for the
remaining items of those that may still be the best. Such a promotion is no new mask: the budget
counts masks, and once it is spent promotions go on until none is due.

Notation: M masks, P players, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lpserve.masks import drop_one, full_mask, keys
from lpserve.plan.expansion import EXPANSION
from lpserve.plan.search import MIN_EXPECTED_IMPROVEMENT
from lpserve.rounds.expanding import CORRECTED, SEARCH, ExpansionSource, earned_places
from lpserve.rounds.history import (
    AskedMasks,
    CompletedRound,
    KnownUtilities,
    Round,
    latest_scores,
)
from lpserve.rounds.model import FittedModel, RoundModel
from lpserve.rounds.screening import estimated
from lpserve.rounds.settings import RoundSettings
from lpserve.rounds.sources import DesignSource, GreedySource, single_loss_sets
from lpserve.rounds.stopping import StopCheck
from lpserve.types import BoolArray, IntArray
from lpserve.utility import SEARCH_UTILITY, Utility, UtilityView

_VALUES_SHARE = 3  # once the path is walked one in three masks is for the values, rounded down
_RANKING_SHARE = 4  # at most one in four of the others is a ranking's set
_ROUND_GROWTH = 0.05  # a round asks for at least this share of all masks before it
_WALK_SIZE, _WALK_SHARE = 8, 8
"""Masks of a round while the greedy path is walked: a minimum, and as a part of `round_size`."""
_PROMOTION_GAIN = 1e-3
"""Expected improvement above which a screened set is scored on all items at once. Most look worse
when more is known; the others are promoted in the end (`MIN_EXPECTED_IMPROVEMENT`)."""


class RoundPlanner:
    """Produces the rounds one after another."""

    def __init__(
        self,
        settings: RoundSettings,
        utility: Utility,
        num_tokens_I: IntArray,
        *,
        screen: IntArray | None = None,
        model: RoundModel | None = None,
        overlap: bool = False,
    ) -> None:
        """
        Args:
            utility: what values and rankings are about; sets are searched on `UtilityView.search`.
            num_tokens_I: scored tokens of the items (`UtilityView.num_tokens_I`).
            screen: rows of the items that masks may be scored on alone; None: no screening.
            model: what proposes masks from scores; None: surrogates fitted to them.
            overlap: whether the first round will bring the overlap of single players' effects.
        """
        self._overlap = overlap and settings.goal != "values"
        self._settings, self._utility, self._num_tokens_I = settings, utility, num_tokens_I
        self._screen = screen
        own_search_fit = utility != SEARCH_UTILITY or screen is not None
        self.model = model or FittedModel(settings, own_search_fit=own_search_fit)
        self.asked = AskedMasks(settings.num_players)
        self._design = DesignSource(settings)
        self._greedy = GreedySource(settings)
        self._expansion = ExpansionSource(settings)
        self._stop = StopCheck(settings.stop)
        self._num_proposed = 0
        self._surveyed = False
        """Whether random masks were asked for that come with the surrogate's first share."""

    @property
    def sources(self) -> dict[bytes, str]:
        """How each proposed mask was found, by key."""
        return self.asked.sources

    @property
    def pruned(self) -> set[bytes]:
        """Keys of greedy steps' masks that were not asked for, since they cannot be the best."""
        return self._greedy.pruned

    @property
    def stopped(self) -> str:
        """The rule that ended the run, "" if none did."""
        return self._stop.stopped

    def propose(self, index: int, rounds: Sequence[CompletedRound]) -> Round:
        """Round `index`; empty when there is nothing left to ask for.

        Args:
            rounds: complete rounds 0..index-2 at least; later ones are not read.
        """
        if index < 2:
            found = self._finish(self._first_rounds(index))
            return replace(found, overlap=self._overlap and index == 0)
        known = self._known(rounds[: index - 1])
        fitted = self.model.fit(known)
        goal = self._settings.goal
        expands = goal != "values" and self._expansion.fit(known, rounds[0].overlap_PP)
        if expands:
            walking = self._expansion.begins(self.asked)
            batch: list[BoolArray] = []
            if not walking and not self._surveyed and goal == "plan":
                # the surrogate has a share from here on, and has seen sets near the best alone
                batch = self._design.take(self.asked, self._settings.round_size // 2)
                self._surveyed = True
        else:
            walking = goal != "values" and index < 2 * len(self._settings.plan_sizes)
            batch = self._begin(index, known, walking=walking)
        waiting_MP = self._waiting(known)
        if (
            fitted
            and not walking
            and self._stop.may_stop(self.model, known, waiting_MP, self.asked)
        ):
            return self._finish([])
        promoted: list[BoolArray] = []
        if fitted and goal != "values":
            promoted = self._promotions(known, _PROMOTION_GAIN)
        size = self._size(walking=walking)
        room = size - len(batch)
        if expands and walking:
            batch += self._expansion.take(self.asked, room, screened=self._screens)
        elif fitted and room > 0 and goal != "values":
            earned = rounds[: index - 1] if expands else ()
            batch += self._searched(
                index, known, room, [*batch, *promoted], earned, walking=walking
            )
        batch += self._for_values(index, size - len(batch), batch)
        batch += self._design.take(
            self.asked, size - len(batch), screened=self._screens and goal == "plan"
        )
        return self._finish(batch, promoted)

    def settle(self, rounds: Sequence[CompletedRound]) -> Round:
        """The promotions that are due when nothing new is asked for, from all rounds; empty when
        none is due: no screened set is left that may be the best."""
        if not self.asked.screened or self._settings.goal == "values":
            return self._finish([])
        known = self._known(rounds)
        self.asked.last_MP = self.asked.last_MP[:0]
        if not self.model.fit(known):
            return self._finish([])
        return self._finish([], self._promotions(known, MIN_EXPECTED_IMPROVEMENT))

    @property
    def _screens(self) -> bool:
        return self._screen is not None

    def _first_rounds(self, index: int) -> list[BoolArray]:
        """Rounds 0 and 1, which depend on no score."""
        if index == 1:
            few = self._settings.goal == "plan" and self._overlap
            count = _WALK_SIZE if few else self._settings.round_size
            return self._design.take(self.asked, min(count, self._settings.round_size))
        full_P = full_mask(self._settings.num_players)
        batch = self.asked.add([full_P], "full") + self.asked.add(drop_one(full_P), "greedy")
        if self._settings.goal != "values":
            batch += self.asked.add([self._settings.within.first()], "greedy")
        if self._settings.sizes[0] == 0:
            batch += self.asked.add([~full_P], "values")
        return batch

    def _known(self, rounds: Sequence[CompletedRound]) -> KnownUtilities:
        latest = latest_scores(rounds)
        # the first mask of all keeps every player
        view = UtilityView(self._utility, self._num_tokens_I, rounds[0].loss_MI[0])
        utilities_M, search_M = view.of(latest.loss_MI), view.search(latest.loss_MI)
        if self._screen is None:
            return KnownUtilities(latest.masks_MP, utilities_M, search_M, search_M)
        on_screen_M = view.search(latest.loss_MI, self._screen)
        guess_M, noise_M = estimated(latest.masks_MP, search_M, on_screen_M)
        return KnownUtilities(latest.masks_MP, utilities_M, search_M, guess_M, noise_M)

    def _size(self, *, walking: bool) -> int:
        """Masks that the round asks for."""
        size = max(self._settings.round_size, int(_ROUND_GROWTH * self._num_proposed))
        return max(1, min(size // 2, max(_WALK_SIZE, size // _WALK_SHARE))) if walking else size

    def _begin(self, index: int, known: KnownUtilities, *, walking: bool) -> list[BoolArray]:
        """What does not depend on a fit: the one-shot ranking's sets and the greedy step."""
        batch: list[BoolArray] = []
        if index == 2:
            batch += self.asked.add(single_loss_sets(known, self._settings), "ranking")
        # a screened path may turn elsewhere once more is known: then it is walked from there
        if index % 2 == 0 and (walking or (self._screens and self._settings.goal != "values")):
            path_M = known.guess_M if self._screens else known.utilities_M
            batch += self._greedy.take(
                index // 2, self.model, known, path_M, self.asked, screened=self._screens
            )
        return batch

    def _searched(
        self,
        index: int,
        known: KnownUtilities,
        room: int,
        chosen: Sequence[BoolArray],
        rounds: Sequence[CompletedRound],
        *,
        walking: bool,
    ) -> list[BoolArray]:
        """Rankings by value, sets by expansion, and sets by expected improvement.

        Args:
            rounds: complete rounds, by which proposers earn their places; none: no expansion.
        """
        found: list[BoolArray] = []
        if not walking:
            room -= room // _VALUES_SHARE if self._settings.goal == "both" else 0
            share = max(1, room // _RANKING_SHARE)
            share = 0 if rounds and self._settings.goal == "plan" else share
            found = self.asked.add(
                self.model.rankings(index), "ranking", max_count=share, screened=self._screens
            )
        if rounds:
            targets = self._settings.targets
            places = earned_places(room - len(found), rounds, known, self.sources, targets)
            screened = self._screens
            found += self._expansion.take(self.asked, places[EXPANSION], screened=screened)
            found += self._expansion.corrected(
                known, self.asked, places[CORRECTED], screened=screened
            )
        pending_MP = self.asked.pending([*chosen, *found])
        sets_MP = self.model.by_improvement(known, self.asked, room - len(found), pending_MP)
        return found + self.asked.add(sets_MP, SEARCH, screened=self._screens)

    def _for_values(self, index: int, count: int, batch: Sequence[BoolArray]) -> list[BoolArray]:
        picks_MP = self.model.for_values(index, self.asked, count, self.asked.pending(batch))
        screened = self._screens and self._settings.goal == "plan"
        return self.asked.add(picks_MP, "values", screened=screened)

    def _waiting(self, known: KnownUtilities) -> BoolArray:
        """Masks that have a score on the screen alone, `bool[M, P]`."""
        if not self.asked.screened:
            return known.masks_MP[:0]
        screened_M = self.asked.on_screen_alone(known.masks_MP)
        return known.masks_MP[screened_M & np.isfinite(known.guess_M)]

    def _promotions(self, known: KnownUtilities, gain: float) -> list[BoolArray]:
        """Screened sets that may beat the best one of their size on all items."""
        picks_MP = self.model.promotions(known, self._waiting(known), self.asked, gain)
        self.asked.screened.difference_update(keys(picks_MP))
        return list(picks_MP)

    def _finish(self, batch: list[BoolArray], promoted: Sequence[BoolArray] = ()) -> Round:
        self._num_proposed += len(batch)
        players = self._settings.num_players
        masks_MP = np.array(batch, dtype=bool).reshape(len(batch), players)
        found = Round(
            masks_MP=masks_MP,
            full_M=~self.asked.on_screen_alone(masks_MP),
            promoted_MP=np.array(promoted, dtype=bool).reshape(len(promoted), players),
        )
        self.asked.last_MP = found.all_masks
        return found
