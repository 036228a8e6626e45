"""What a planner asks of a model of the utility: which sets may be better, which masks say most.

`FittedModel` answers with surrogates that are refitted to every round's scores. A count of a run's
work, which has no scores, answers with a stand-in (`lpserve.runner.cost`).

Notation: M masks, P players.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from lpserve.masks import sort_distinct
from lpserve.plan.search import (
    best_predicted_sets,
    grown_sets,
    probability_of_improvement,
    select_by_expected_improvement,
    starts,
)
from lpserve.plan.targets import Target
from lpserve.rounds.acquisition import HEAD_COST, candidate_pool, select_for_values
from lpserve.rounds.history import AskedMasks, KnownUtilities
from lpserve.rounds.settings import RoundSettings
from lpserve.surrogate import Surrogate, acquisition_model, make_surrogate
from lpserve.types import Z90, BoolArray, FloatArray
from lpserve.values.closed_form import kernel_values, value_calibration

_REFIT_GROWTH = {"paper": 1.5, "boosting": 1.2, "ensemble": 1.2}
"""Surrogates whose training takes seconds are refitted when the masks have grown by this factor."""
_NUM_WARM_STARTS = 4  # best predicted sets of the round before that a beam search starts from
_MIN_FINITE = 3  # with fewer finite scores nothing is fitted


class RoundModel(Protocol):
    """What the planner needs; every method is about the masks of the last `fit`."""

    surrogate: Surrogate | None
    """Whose held-out error progress shows; None: there is none."""

    def fit(self, known: KnownUtilities) -> bool:
        """Take in the scores; False where they are too few to say anything."""
        ...

    def grown(self, known: KnownUtilities, target: Target) -> BoolArray:
        """Sets that meet a target and differ by little from the best scored ones, best predicted
        first (`lpserve.plan.search.grown_sets`)."""
        ...

    def rankings(self, index: int) -> list[BoolArray]:
        """The sets of lowest values for every target; another one comes first in every round."""
        ...

    def by_improvement(
        self,
        known: KnownUtilities,
        asked: AskedMasks,
        count: int,
        pending_MP: BoolArray,
        *,
        reached_alone: bool = False,
    ) -> BoolArray:
        """Sets that may beat the best scored one of their target, `bool[<=count, P]`.

        Args:
            reached_alone: of targets for which no set is scored none is searched for.
        """
        ...

    def promotions(
        self, known: KnownUtilities, waiting_MP: BoolArray, asked: AskedMasks, gain: float
    ) -> BoolArray:
        """Screened sets whose expected improvement on all items is above `gain`."""
        ...

    def for_values(
        self, index: int, asked: AskedMasks, count: int, pending_MP: BoolArray
    ) -> BoolArray:
        """Masks that reduce the variance of the values most, for what they cost."""
        ...

    def settled(
        self,
        known: KnownUtilities,
        waiting_MP: BoolArray,
        asked: AskedMasks,
        *,
        chance: float,
        gain: float,
    ) -> bool:
        """Whether no unscored set beats the best of its target by a share `gain` with a higher
        probability than `chance`."""
        ...

    def narrow(self, width: float) -> bool:
        """Whether every value's 90% interval reaches at most `width` to either side."""
        ...


class FittedModel:
    """Surrogates of a run's utility and of the utility that sets are searched on."""

    def __init__(self, settings: RoundSettings, *, own_search_fit: bool) -> None:
        """
        Args:
            own_search_fit: the search has another utility, or other masks, than the values.
        """
        self._settings, self._within = settings, settings.within
        fitted = make_surrogate(settings.surrogate, settings.seed, quick=True)
        self.surrogate: Surrogate | None = fitted
        self._values_model: Surrogate = fitted
        self._searcher: Surrogate = fitted
        if own_search_fit:
            self._searcher = make_surrogate(settings.surrogate, settings.seed, quick=True)
        self._fitted_masks = 0
        self._best_predicted: dict[Target, BoolArray] = {}
        """For every target the sets of highest predicted utility, best first."""
        self._searched: set[Target] = set()
        """Targets whose `_best_predicted` are those of the last fit."""
        self._values_P: FloatArray | None = None
        """Values by the last fit; None: not asked for yet, or no closed form."""

    def fit(self, known: KnownUtilities) -> bool:
        self._searched, self._values_P = set(), None
        finite_M = np.isfinite(known.utilities_M)
        if finite_M.sum() < _MIN_FINITE:
            return False
        if self._is_due(int(finite_M.sum())):
            self._values_model.fit(known.masks_MP[finite_M], known.utilities_M[finite_M])
            if self._searcher is not self._values_model:
                guessed_M = np.isfinite(known.guess_M)
                noise = None if known.noise_M is None else known.noise_M[guessed_M]
                self._searcher.fit(known.masks_MP[guessed_M], known.guess_M[guessed_M], noise)
        return True

    def _is_due(self, num_masks: int) -> bool:
        """Whether to refit."""
        if num_masks < _REFIT_GROWTH.get(self._settings.surrogate, 1.0) * self._fitted_masks:
            return False
        self._fitted_masks = num_masks
        return True

    def rankings(self, index: int) -> list[BoolArray]:
        values_P = self._current_values()
        if values_P is None:
            return []
        targets = self._settings.targets
        return [
            targets[(place + index) % len(targets)].ranking(values_P)
            for place in range(len(targets))
        ]

    def grown(self, known: KnownUtilities, target: Target) -> BoolArray:
        return grown_sets(self._searcher, known.masks_MP, known.guess_M, target)

    def by_improvement(
        self,
        known: KnownUtilities,
        asked: AskedMasks,
        count: int,
        pending_MP: BoolArray,
        *,
        reached_alone: bool = False,
    ) -> BoolArray:
        targets = self._settings.targets
        best = known.best_for(targets)
        if reached_alone:
            reached = np.flatnonzero(np.isfinite(best))
            targets, best = tuple(targets[place] for place in reached), best[reached]
        candidates = self._unscored_candidates(known, asked, targets)
        sets = [pending_MP[:0], *candidates.values()]
        return select_by_expected_improvement(
            self._searcher,
            sort_distinct(np.concatenate(sets))[0],
            targets,
            best,
            count,
            pending_MP=pending_MP,
        )

    def promotions(
        self, known: KnownUtilities, waiting_MP: BoolArray, asked: AskedMasks, gain: float
    ) -> BoolArray:
        targets = self._settings.targets
        return select_by_expected_improvement(
            self._searcher,
            waiting_MP,
            targets,
            known.best_for(targets),
            self._settings.round_size,
            pending_MP=asked.last_MP,
            min_improvement=gain,
        )

    def for_values(
        self, index: int, asked: AskedMasks, count: int, pending_MP: BoolArray
    ) -> BoolArray:
        kernel = acquisition_model(self._values_model)
        if kernel is None or kernel.kernel is None or count < 1:
            return pending_MP[:0]
        settings = self._settings
        rng = np.random.default_rng([settings.seed, index])
        pool_MP = asked.unseen(candidate_pool(settings.num_players, settings.sizes, rng))
        return select_for_values(
            kernel, settings.sizes, pool_MP, count, pending_MP=pending_MP, head_cost=HEAD_COST
        )

    def settled(
        self,
        known: KnownUtilities,
        waiting_MP: BoolArray,
        asked: AskedMasks,
        *,
        chance: float,
        gain: float,
    ) -> bool:
        found = self._unscored_candidates(known, asked, self._settings.targets)
        for (target, sets_MP), best in zip(found.items(), known.best_for(list(found)), strict=True):
            if not np.isfinite(best):
                return False
            open_MP = np.concatenate([sets_MP, waiting_MP[target.holds(waiting_MP)]])
            chance_M = probability_of_improvement(self._searcher, open_MP, best, gain)
            if chance_M.max(initial=0.0) > chance:
                return False
        return True

    def narrow(self, width: float) -> bool:
        kernel = acquisition_model(self._values_model)
        if kernel is None:
            return False
        sizes = self._settings.sizes
        if Z90 * kernel_values(kernel, sizes).stderr_P.max() > width:
            return False  # calibration by folds takes time and would hardly narrow it
        values = kernel_values(kernel, sizes, calibration=value_calibration(kernel, sizes))
        return bool(Z90 * values.stderr_P.max() <= width)

    def _unscored_candidates(
        self, known: KnownUtilities, asked: AskedMasks, targets: Sequence[Target]
    ) -> dict[Target, BoolArray]:
        """For every target the best predicted sets that were never asked for.

        Searched for once a fit, from the best scored sets and the best predicted of the fit before.
        """
        for target in targets:
            if target not in self._searched:
                near_MP = starts(known.masks_MP, known.search_M, target)
                self._best_predicted[target] = self._search(target, near_MP)
                self._searched.add(target)
        return {target: asked.unseen(self._best_predicted[target]) for target in targets}

    def _search(self, target: Target, near_MP: BoolArray) -> BoolArray:
        """The sets that meet a target of highest predicted utility, best first."""
        begin = [target.largest_first(), *near_MP]
        values_P = self._current_values()
        if values_P is not None:
            begin.append(target.ranking(values_P))
        begin += list(self._best_predicted.get(target, [])[:_NUM_WARM_STARTS])
        return best_predicted_sets(self._searcher, target, np.array(begin))

    def _current_values(self) -> FloatArray | None:
        """Values from the surrogate as it stands, where it has a closed form."""
        kernel = acquisition_model(self._values_model)
        if self._values_P is None and kernel is not None:
            self._values_P = kernel_values(kernel, self._settings.sizes).values_P
        return self._values_P
