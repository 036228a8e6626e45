"""Which masks each round asks for, and when a run may end before its budget.

The masks of round n depend only on the settings (with their seed) and on the complete results of
rounds up to n-2, so that the engines work on round n-1 meanwhile; never on arrival order, on the
number of engines or on what a store already held. The budget cuts the sequence and changes nothing
else in it. Even rounds begin with a step of the greedy path until it is walked; what room a round
has left goes to sets that may beat the best (`lpserve.plan.search`) and to masks that say most
about the values (`lpserve.rounds.acquisition`). Until the path is walked, rounds are smaller and
their room is the search's alone, so that greedy's sets are there soon.

    round 0   all kept; every single player dropped (greedy step 1); none kept where the values
              need it
    round 1   stratified random masks
    round 2   greedy step 2; for every r, the r players whose single loss cost least
    round 3   hopes for every r
    round 4   greedy step 3, but for what cannot be its best; hopes
    ...
    later     hopes, rankings by value, masks for the values

With a screen (`lpserve.rounds.screening`) greedy's sets, rankings and hopes are scored on a few
windows first (with goal `plan` whatever comes after round 1), and every round also asks for the
other windows of those that may still be the best. A promotion is no new mask: the budget counts
masks, and once it is spent promotions go on until none is due.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpserve.config import STOP_GAIN
from lpserve.masks import StratifiedDesign, drop_one, full_mask, keys, removed_players, without
from lpserve.plan.greedy import greedy_path, unpruned_options
from lpserve.plan.search import (
    MIN_EXPECTED_IMPROVEMENT,
    best_predicted_sets,
    probability_of_improvement,
    select_by_expected_improvement,
    starts,
)
from lpserve.plan.sets import ranking_mask
from lpserve.rounds.acquisition import HEAD_COST, candidate_pool, select_for_values
from lpserve.rounds.history import History, Round
from lpserve.rounds.screening import estimated
from lpserve.surrogate import Surrogate, acquisition_model, make_surrogate
from lpserve.types import Z90, BoolArray, FloatArray
from lpserve.values.closed_form import kernel_values, value_calibration

_VALUES_SHARE = 3  # once the path is walked one in three masks is for the values, rounded down
_RANKING_SHARE = 4  # at most one in four of the others is a ranking's set
_ROUND_GROWTH = 0.05  # a round asks for at least this share of all masks before it
_REFIT_GROWTH = {"paper": 1.5, "boosting": 1.2, "ensemble": 1.2}
"""Surrogates whose training takes seconds are refitted when the masks have grown by so much."""
_WALK_SIZE, _WALK_SHARE = 8, 8
"""Masks of a round while the greedy path is walked, at least, and as a part of `round_size`."""
_LIKED = 4  # sets liked the round before that a beam search starts from
_PROMOTION_WORTH = 1e-3
"""Expected improvement (as `search.MIN_EXPECTED_IMPROVEMENT`) that is worth a screened set's other
windows at once: most will look worse when more is known, and the rest is promoted in the end."""
_RULE_ROUNDS = 2  # rounds in a row in which a stop rule must hold: one fit may be a fluke


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRules:
    """When a run may end before its budget: every rule that is given must hold."""

    chance: float | None = None
    """No unseen set has a higher probability than this of beating the plan by more than `gain`."""
    gain: float = STOP_GAIN
    """Share of perplexity."""
    width: float | None = None
    """Every value's 90% interval reaches at most this far to either side, in the utility's units;
    masks that were not scored alone, not other windows."""

    @property
    def given(self) -> bool:
        return self.chance is not None or self.width is not None

    def __str__(self) -> str:
        said = []
        if self.chance is not None:
            said.append(
                f"no unseen set has a higher probability than {self.chance:g} of beating the plan "
                f"by more than {100 * self.gain:g}%"
            )
        if self.width is not None:
            said.append(f"every value's 90% interval is within +- {self.width:g}")
        return " and ".join(said)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSettings:
    """What the sequence of rounds depends on, besides the scores."""

    num_players: int
    max_removed: int
    sizes: tuple[int, int]
    seed: int
    surrogate: str
    round_size: int
    """Masks of a round from the second on, at least; fewer while the greedy path is walked."""
    stop: StopRules = StopRules()
    goal: str = "both"
    """What masks are for: `plan`, `values` (no path is walked, no set is searched), or `both`."""

    def minimum_budget(self) -> int:
        """Masks of rounds 0 to 2 up to the first scored set for every r."""
        first = 1 + self.num_players + (self.sizes[0] == 0 and self.num_players > 1)
        return first + self.round_size + self.max_removed - 1


class RoundPlanner:
    """Produces the rounds one after another.

    `utility` and `search_utility` map losses `float32[M, N]` to `float64[M]`. Values and rankings
    are about the run's utility; sets are searched on `search_utility` (default: the same;
    `lpserve.plan.search.UTILITY` suits it best). `screen_utility` is the latter on the screen
    alone; None: every mask is scored on all windows.
    """

    def __init__(
        self,
        settings: RoundSettings,
        utility: Callable[[NDArray[np.float32]], FloatArray],
        search_utility: Callable[[NDArray[np.float32]], FloatArray] | None = None,
        screen_utility: Callable[[NDArray[np.float32]], FloatArray] | None = None,
    ) -> None:
        self._settings = settings
        self._screen_utility = screen_utility
        self._utility = utility
        self._search_utility = search_utility or utility
        self._designs = [
            StratifiedDesign(settings.num_players, strata, settings.seed)
            for strata in design_strata(settings)
        ]
        self._seen: set[bytes] = set()
        self._screened: set[bytes] = set()
        """Masks that were asked for on the screen alone."""
        self._num_proposed = 0
        self._last = np.empty((0, settings.num_players), dtype=bool)
        """The round proposed last: being scored while the next is chosen."""
        self._rule_held = 0
        self._fitted_masks = 0
        self._liked: dict[int, BoolArray] = {}
        """For every r the sets that the search liked best, best first."""
        self._liked_now = False
        """Whether those are this round's."""
        self._values_P: FloatArray | None = None
        """Values by this round's fit; None: not asked for yet, or no closed form."""
        self.passed_by: set[bytes] = set()
        """Masks of greedy steps that were not asked for: they had no chance to be the best."""
        self.stopped = ""
        """The rule that ended the run, if one did."""
        self.surrogate: Surrogate = make_surrogate(settings.surrogate, settings.seed, quick=True)
        self._searcher = self.surrogate
        if search_utility is not None or screen_utility is not None:
            self._searcher = make_surrogate(settings.surrogate, settings.seed, quick=True)
        self.sources: dict[bytes, str] = {}
        """How each proposed mask was found, by key."""

    def propose(self, index: int, history: History) -> Round:
        """Round `index`; empty when there is nothing left to ask.

        Args:
            history: complete rounds 0..index-2 at least; later ones are not read.
        """
        players = self._settings.num_players
        if index == 0:
            full = full_mask(players)
            batch = self._offer([full], "full") + self._offer(drop_one(full), "greedy")
            if self._settings.sizes[0] == 0:
                batch += self._offer([~full], "values")
            return self._finish(batch)
        if index == 1:
            return self._finish(self._take_design(self._settings.round_size))
        masks_MP, loss_MN = history.upto(index - 1)
        utilities_M, search_M = self._utility(loss_MN), self._search_utility(loss_MN)
        guess_M, noise_M = self._guessed(masks_MP, loss_MN, search_M)
        fitted = self._fit(masks_MP, utilities_M, guess_M, noise_M)
        size = max(self._settings.round_size, int(_ROUND_GROWTH * self._num_proposed))
        goal = self._settings.goal
        walking = goal != "values" and index < 2 * self._settings.max_removed
        if walking:
            size = max(1, min(size // 2, max(_WALK_SIZE, size // _WALK_SHARE)))
        batch = []
        if index == 2:
            sets = _single_loss_sets(masks_MP, utilities_M, self._settings)
            batch += self._offer(sets, "ranking")
        # a screened path may turn elsewhere once more is known: then it is walked from there
        if index % 2 == 0 and (walking or (self._screen_utility and goal != "values")):
            path_M = utilities_M if self._screen_utility is None else guess_M
            batch += self._walk(index, masks_MP, path_M)
        if fitted and not walking and self._may_stop(masks_MP, search_M, guess_M):
            return self._finish([])
        promoted: list[BoolArray] = []
        if fitted and goal != "values":
            promoted = self._promoted(masks_MP, search_M, guess_M, _PROMOTION_WORTH)
        room = size - len(batch)
        if fitted and room > 0 and goal != "values":
            found: list[BoolArray] = []
            if not walking:
                room -= room // _VALUES_SHARE if goal == "both" else 0
                share = max(1, room // _RANKING_SHARE)
                found = self._offer(self._rankings(index), "ranking", most=share, screened=True)
            chosen = [*batch, *promoted, *found]
            hopes_QP = self._hopes(masks_MP, search_M, room - len(found), chosen)
            batch += found + self._offer(hopes_QP, "search", screened=True)
        batch += self._telling(index, size - len(batch), batch)
        batch += self._take_design(size - len(batch), screened=goal == "plan")
        return self._finish(batch, promoted)

    def settle(self, history: History) -> Round:
        """The promotions that are due when nothing new is asked for, from all rounds; empty when
        none is: no screened set is left that may be the best."""
        masks_MP, loss_MN = history.upto(len(history.masks))
        if not self._screened or self._settings.goal == "values":
            return self._finish([])
        utilities_M, search_M = self._utility(loss_MN), self._search_utility(loss_MN)
        guess_M, noise_M = self._guessed(masks_MP, loss_MN, search_M)
        self._last = self._last[:0]
        if not self._fit(masks_MP, utilities_M, guess_M, noise_M):
            return self._finish([])
        return self._finish(
            [], self._promoted(masks_MP, search_M, guess_M, MIN_EXPECTED_IMPROVEMENT)
        )

    def _guessed(
        self, masks_MP: BoolArray, loss_MN: NDArray[np.float32], search_M: FloatArray
    ) -> tuple[FloatArray, FloatArray | None]:
        """Search utilities, screened masks' estimated, and their variances (None: no screen)."""
        if self._screen_utility is None:
            return search_M, None
        return estimated(masks_MP, search_M, self._screen_utility(loss_MN))

    def _fit(
        self,
        masks_MP: BoolArray,
        utilities_M: FloatArray,
        guess_M: FloatArray,
        noise_M: FloatArray | None,
    ) -> bool:
        """Refit to the finite scores; False where they are too few."""
        self._liked_now, self._values_P = False, None
        whole, known = np.isfinite(utilities_M), np.isfinite(guess_M)
        if whole.sum() < 3:
            return False
        if self._due(int(whole.sum())):
            self.surrogate.fit(masks_MP[whole], utilities_M[whole])
            if self._searcher is not self.surrogate:
                noise_K = None if noise_M is None else noise_M[known]
                self._searcher.fit(masks_MP[known], guess_M[known], noise_K)
        return True

    def _promoted(
        self, masks_MP: BoolArray, search_M: FloatArray, guess_M: FloatArray, min_improvement: float
    ) -> list[BoolArray]:
        """Screened sets that may beat the best one of their size on all windows."""
        waiting_QP = self._waiting(masks_MP, guess_M)
        picks_QP = select_by_expected_improvement(
            self._searcher,
            waiting_QP,
            self._best_of(masks_MP, search_M),
            self._settings.round_size,
            pending_MP=self._last,
            min_improvement=min_improvement,
        )
        self._screened.difference_update(keys(picks_QP))
        return list(picks_QP)

    def _waiting(self, masks_MP: BoolArray, guess_M: FloatArray) -> BoolArray:
        """Masks that have a score on the screen alone, `bool[Q, P]`."""
        if not self._screened:
            return masks_MP[:0]
        screened_M = np.array([key in self._screened for key in keys(masks_MP)])
        return masks_MP[screened_M & np.isfinite(guess_M)]

    def _walk(self, index: int, masks_MP: BoolArray, path_M: FloatArray) -> list[BoolArray]:
        """The next greedy step, without the sets that cannot be its best."""
        steps = min(index // 2, self._settings.max_removed - 1)
        path = greedy_path(masks_MP, path_M, steps, self.passed_by)
        if not path:
            return []
        chance_Q = self._can_be_best(path, masks_MP, path_M)
        options = drop_one(path[-1])
        self.passed_by |= {key for key in keys(options[~chance_Q]) if key not in self._seen}
        return self._offer(options[chance_Q], "greedy", screened=True)

    def _can_be_best(
        self, path: list[BoolArray], masks_MP: BoolArray, path_M: FloatArray
    ) -> BoolArray:
        return unpruned_options(path, masks_MP, path_M)

    def _may_stop(self, masks_MP: BoolArray, search_M: FloatArray, guess_M: FloatArray) -> bool:
        """Whether the stop rules have held for two rounds; notes them."""
        rules = self._settings.stop
        if not rules.given:
            return False
        holds = (rules.chance is None or self._settled(masks_MP, search_M, guess_M)) and (
            rules.width is None or self._narrow(rules.width)
        )
        self._rule_held = self._rule_held + 1 if holds else 0
        if self._rule_held >= _RULE_ROUNDS:
            self.stopped = str(rules)
        return bool(self.stopped)

    def _settled(self, masks_MP: BoolArray, search_M: FloatArray, guess_M: FloatArray) -> bool:
        rules, best_of = self._settings.stop, self._best_of(masks_MP, search_M)
        assert rules.chance is not None
        waiting_QP = self._waiting(masks_MP, guess_M)
        removed_Q = (~waiting_QP).sum(axis=1)
        for r, sets_QP in self._likely(masks_MP, search_M).items():
            if not np.isfinite(best_of[r]):
                return False
            rivals_QP = np.concatenate([sets_QP, waiting_QP[removed_Q == r]])
            chance_Q = probability_of_improvement(self._searcher, rivals_QP, best_of[r], rules.gain)
            if chance_Q.max(initial=0.0) > rules.chance:
                return False
        return True

    def _narrow(self, width: float) -> bool:
        kernel = acquisition_model(self.surrogate)
        if kernel is None:
            return False
        sizes = self._settings.sizes
        if Z90 * kernel_values(kernel, sizes).stderr_P.max() > width:
            return False  # the folds, which take time, would hardly narrow it
        values = kernel_values(kernel, sizes, calibration=value_calibration(kernel, sizes))
        return bool(Z90 * values.stderr_P.max() <= width)

    def _telling(self, index: int, count: int, batch: Sequence[BoolArray]) -> list[BoolArray]:
        """Masks that say most about the values; none from a surrogate that cannot tell."""
        kernel = acquisition_model(self.surrogate)
        if kernel is None or kernel.kernel is None or count < 1:
            return []
        settings = self._settings
        rng = np.random.default_rng([settings.seed, index])
        pool = candidate_pool(settings.num_players, settings.sizes, rng)
        pool = pool[[key not in self._seen for key in keys(pool)]]
        picks = select_for_values(
            kernel,
            settings.sizes,
            pool,
            count,
            pending_MP=self._pending(batch),
            head_cost=HEAD_COST,
        )
        return self._offer(picks, "values", screened=settings.goal == "plan")

    def _due(self, num_masks: int) -> bool:
        """Whether to refit."""
        if num_masks < _REFIT_GROWTH.get(self._settings.surrogate, 1.0) * self._fitted_masks:
            return False
        self._fitted_masks = num_masks
        return True

    def _best_of(self, masks_MP: BoolArray, search_M: FloatArray) -> dict[int, float]:
        """Number removed -> best scored search utility, -inf where there is none."""
        removed_M = (~masks_MP).sum(axis=1)
        finite_M = np.where(np.isfinite(search_M), search_M, -np.inf)
        return {
            r: float(finite_M[removed_M == r].max(initial=-np.inf))
            for r in range(1, self._settings.max_removed + 1)
        }

    def _likely(self, masks_MP: BoolArray, search_M: FloatArray) -> dict[int, BoolArray]:
        """For every r the unseen sets that the search's surrogate likes best, `bool[Q, P]`.

        Searched for once a round, from the best scored sets and what was liked the round before.
        """
        if not self._liked_now:
            for r in range(1, self._settings.max_removed + 1):
                self._liked[r] = self._search(r, starts(masks_MP, search_M, r))
            self._liked_now = True
        return {
            r: liked_QP[[key not in self._seen for key in keys(liked_QP)]]
            for r, liked_QP in self._liked.items()
        }

    def _search(self, num_removed: int, near_QP: BoolArray) -> BoolArray:
        """The sets of one size that the search's surrogate likes best, best first, `bool[Q, P]`."""
        players = self._settings.num_players
        begin = [without(players, range(num_removed)), *near_QP]
        values_P = self._current_values()
        if values_P is not None:
            begin.append(ranking_mask(values_P, num_removed))
        begin += list(self._liked.get(num_removed, [])[:_LIKED])
        return best_predicted_sets(self._searcher, players, num_removed, np.array(begin))

    def _current_values(self) -> FloatArray | None:
        """Values from the surrogate as it stands, where it has a closed form."""
        kernel = acquisition_model(self.surrogate)
        if self._values_P is None and kernel is not None:
            self._values_P = kernel_values(kernel, self._settings.sizes).values_P
        return self._values_P

    def _hopes(
        self, masks_MP: BoolArray, search_M: FloatArray, count: int, batch: Sequence[BoolArray]
    ) -> BoolArray:
        """Unseen sets that may beat the best scored one of their size; all r compete."""
        likely = self._likely(masks_MP, search_M)
        return select_by_expected_improvement(
            self._searcher,
            np.concatenate(list(likely.values())),
            self._best_of(masks_MP, search_M),
            count,
            pending_MP=self._pending(batch),
        )

    def _pending(self, batch: Sequence[BoolArray]) -> BoolArray:
        """What is being scored while this round is chosen, and what it has chosen so far."""
        return np.concatenate(
            [self._last, np.array(batch, dtype=bool).reshape(-1, self._settings.num_players)]
        )

    def _rankings(self, index: int) -> list[BoolArray]:
        """The sets of lowest values for every r; another r leads in every round."""
        values_P = self._current_values()
        if values_P is None:
            return []
        most = self._settings.max_removed
        return [ranking_mask(values_P, (r + index) % most + 1) for r in range(most)]

    def _take_design(self, count: int, *, screened: bool = False) -> list[BoolArray]:
        """The next `count` design masks that no round has asked for; fewer when none are left."""
        batch: list[BoolArray] = []
        for design in self._designs:
            while len(batch) < count:
                masks_MP = design.take(count - len(batch))
                if not len(masks_MP):
                    break
                batch += self._offer(masks_MP, "design", screened=screened)
        return batch

    def _offer(
        self,
        masks: Sequence[BoolArray] | BoolArray,
        source: str,
        most: int | None = None,
        *,
        screened: bool = False,
    ) -> list[BoolArray]:
        """The first of the masks that were never proposed; marks them proposed."""
        fresh: list[BoolArray] = []
        if not len(masks):
            return fresh
        for mask_P, key in zip(masks, keys(np.asarray(masks)), strict=True):
            if key not in self._seen and (most is None or len(fresh) < most):
                self._seen.add(key)
                self.sources[key] = source
                if screened and self._screen_utility is not None:
                    self._screened.add(key)
                fresh.append(mask_P)
        return fresh

    def _finish(self, batch: list[BoolArray], promoted: Sequence[BoolArray] = ()) -> Round:
        self._num_proposed += len(batch)
        players = self._settings.num_players
        masks_MP = np.array(batch, dtype=bool).reshape(len(batch), players)
        found = Round(
            masks_MP=masks_MP,
            whole_M=np.array([key not in self._screened for key in keys(masks_MP)], dtype=bool),
            promoted_QP=np.array(promoted, dtype=bool).reshape(len(promoted), players),
        )
        self._last = found.all_masks
        return found


def design_strata(settings: RoundSettings) -> list[list[int]]:
    """Kept counts of the design, and those of the design that follows where it is exhausted.

    The first are what the values need, k_min..k_max+1; the others what the plan needs besides:
    a run must not end before every number removed had its masks. The full set is in neither.
    """
    low, high = settings.sizes
    players = settings.num_players
    values = [k for k in range(high + 1, low - 1, -1) if k < players]
    plan = range(players - 1, players - settings.max_removed - 1, -1)
    return [strata for strata in (values, [k for k in plan if k not in values]) if strata]


def _single_loss_sets(
    masks_MP: BoolArray, utilities_M: FloatArray, settings: RoundSettings
) -> list[BoolArray]:
    """For every r, the r players whose single loss cost least."""
    loss_P = np.full(settings.num_players, np.inf)
    for mask_P, utility in zip(masks_MP, utilities_M, strict=True):
        removed = removed_players(mask_P)
        if len(removed) == 1 and np.isfinite(utility):
            loss_P[removed[0]] = -utility
    return [ranking_mask(loss_P, r) for r in range(1, settings.max_removed + 1)]
