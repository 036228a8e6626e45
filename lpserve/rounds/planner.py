"""Which masks each round asks for.

The masks of round n depend only on the settings (with their seed) and on the complete rounds up to
n-2, so that the engines work on round n-1 meanwhile; never on arrival order, on the number of
engines or on what a store already held. The budget cuts the sequence and changes nothing else in
it. Even rounds take a step of a walk outwards (`lpserve.rounds.outward`) until it has ended, odd
ones ask for sets of high expected improvement (`lpserve.plan.search`) where the walk has been. Both
are small, so that the next step knows what the last one found.

    round 0   all kept; every single player dropped, with the overlap of their effects where the
              engines measure it; none kept where the values need it; where players must be removed,
              the set of these
    round 1   two random pairs of players dropped; with goal `values` stratified random masks
    round 2   of the sets that drop two players those that are predicted best, with an overlap the
              best by expansion too
    round 3   sets by expected improvement, of the sizes reached
    round 4   of the sets that drop three players, one more than good pairs do, the best
    ...
    later     sets by expected improvement and, with an overlap, by expansion, as each has earned
              (`lpserve.rounds.expanding`); with goal `both` also rankings by value and masks that
              reduce the variance of the values most (`lpserve.rounds.acquisition`)

With a screen (`lpserve.rounds.screening`) the walk's sets, rankings and the search's sets are
scored on a few items first (with goal `plan` everything after round 1), and every round also asks
for the remaining items of those that may still be the best. Such a promotion is no new mask: the
budget counts masks, and once it is spent promotions go on until none is due.

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
from lpserve.rounds.outward import OUTWARD, OutwardWalk
from lpserve.rounds.screening import estimated
from lpserve.rounds.settings import FIRST_PAIRS, RoundSettings
from lpserve.rounds.sources import DesignSource
from lpserve.rounds.stopping import StopCheck
from lpserve.types import BoolArray, IntArray
from lpserve.utility import SEARCH_UTILITY, Utility, UtilityView

_VALUES_SHARE = 3  # once the walk has ended one in three masks is for the values, rounded down
_RANKING_SHARE = 4  # at most one in four of the others is a ranking's set
_ROUND_GROWTH = 0.05  # a round asks for at least this share of all masks before it
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
        self._expansion = ExpansionSource(settings)
        self._walk = OutwardWalk(settings)
        self._stop = StopCheck(settings.stop)
        self._num_proposed = 0

    @property
    def sources(self) -> dict[bytes, str]:
        """How each proposed mask was found, by key."""
        return self.asked.sources

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
        fitted, searches = self.model.fit(known), self._settings.goal != "values"
        promoted: list[BoolArray] = []
        expands = searches and self._expansion.fit(known, rounds[0].overlap_PP)
        if fitted and searches:
            promoted = self._promotions(known, _PROMOTION_GAIN)
            if batch := self._step_outward(index, known, promoted):
                return self._finish(batch, promoted)
        waiting_MP = self._waiting(known)
        if fitted and self._stop.may_stop(self.model, known, waiting_MP, self.asked):
            return self._finish([])
        size = max(1, self._settings.round_size, int(_ROUND_GROWTH * self._num_proposed))
        batch = []
        if fitted and searches:
            earned = rounds[: index - 1] if expands else ()
            batch += self._searched(index, known, size, promoted, earned)
        batch += self._for_values(index, size - len(batch), batch)
        batch += self._design.take(
            self.asked,
            size - len(batch),
            screened=self._screens and self._settings.goal == "plan",
        )
        return self._finish(batch, promoted)

    def _step_outward(
        self, index: int, known: KnownUtilities, promoted: Sequence[BoolArray]
    ) -> list[BoolArray]:
        """A step of the walk, or in odd rounds sets where it has been; none once it has ended."""
        if self._walk.ended:
            return []
        step, beside = self._settings.walk_sizes
        batch: list[BoolArray] = []
        if index % 2:
            sets_MP = self.model.by_improvement(
                known, self.asked, beside, self.asked.pending(promoted), reached_alone=True
            )
            batch = self.asked.add(sets_MP, SEARCH, screened=self._screens)
        return batch or self._walk.take(
            self.model, known, self.asked, step, self._expansion, screened=self._screens
        )

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
            if self._settings.goal == "values":
                return self._design.take(self.asked, self._settings.round_size)
            pairs = self.asked.add(self._settings.random_pairs(), "design")
            return pairs or self._design.take(self.asked, FIRST_PAIRS)
        full_P = full_mask(self._settings.num_players)
        batch = self.asked.add([full_P], "full") + self.asked.add(drop_one(full_P), OUTWARD)
        if self._settings.goal != "values":
            batch += self.asked.add([self._settings.within.first()], OUTWARD)
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

    def _searched(
        self,
        index: int,
        known: KnownUtilities,
        room: int,
        chosen: Sequence[BoolArray],
        rounds: Sequence[CompletedRound],
    ) -> list[BoolArray]:
        """Rankings by value, sets by expansion, and sets by expected improvement.

        Args:
            rounds: complete rounds, by which proposers earn their places; none: no expansion.
        """
        room -= room // _VALUES_SHARE if self._settings.goal == "both" else 0
        share = max(1, room // _RANKING_SHARE) if self._settings.goal == "both" else 0
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
