"""Which masks each round asks for.

The masks of round n depend only on the settings (with their seed) and on the complete results of
rounds up to n-2, so that the engines work on round n-1 meanwhile; never on arrival order, on the
number of engines or on what a store already held. The budget cuts the sequence and changes nothing
else in it. Even rounds walk the greedy path, odd ones mix sets that the surrogate hopes for with
masks that say most about the values (`lpserve.acquisition`); once the path is walked every round is
a mix.

    round 0   all kept; every single player dropped (greedy step 1); none kept where the values
              need it
    round 1   stratified random masks
    round 2   greedy step 2; for every r, the r players whose single loss cost least
    round 3   hopes for every r, masks for the values
    ...

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from lpserve.acquisition import HEAD_COST, candidate_pool, most_telling
from lpserve.masks import StratifiedDesign, drop_one, full_mask, keys, removed_players, without
from lpserve.plan import greedy_path, likely_best, ranking_mask
from lpserve.shapley import kernel_values
from lpserve.surrogate import Surrogate, kernel_of, make_surrogate
from lpserve.types import BoolArray, FloatArray

_VALUES_SHARE = 3  # at least one in three masks of a mixed round is for the values
_RANKING_SHARE = 4  # at most one in four of the others is a ranking's set
_ROUND_GROWTH = 0.05  # a mixed round asks for at least this share of all masks before it
_PAPER_REFIT_GROWTH = 1.5
_DOUBT = 1.5  # the search's standard deviations are this much wider than leave-one-out says
_WORTH = 1e-4  # expected improvement (share of perplexity, or nats) that is worth a score


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSettings:
    """What the sequence of rounds depends on, besides the scores."""

    num_players: int
    max_removed: int
    sizes: tuple[int, int]
    seed: int
    surrogate: str
    round_size: int
    """Masks of a mixed round, at least."""
    stop_when_stable: bool

    def minimum_budget(self) -> int:
        """Masks of rounds 0 to 2 up to the first scored set for every r."""
        first = 1 + self.num_players + (self.sizes[0] == 0 and self.num_players > 1)
        return first + self.round_size + self.max_removed - 1


@dataclass(slots=True)
class History:
    """Complete rounds, in order: masks as proposed and their stored NLLs."""

    masks: list[BoolArray] = field(default_factory=list)
    """One `bool[M, P]` for each round."""
    nll: list[NDArray[np.float32]] = field(default_factory=list)
    """One `float32[M, N]` for each round; NaN rows for quarantined masks."""

    def upto(self, num_rounds: int) -> tuple[BoolArray, NDArray[np.float32]]:
        """All masks of the first `num_rounds` rounds and their NLLs."""
        return np.concatenate(self.masks[:num_rounds]), np.concatenate(self.nll[:num_rounds])


class RoundPlanner:
    """Produces the rounds one after another.

    `utility` and `search_utility` map `float32[M, N]` NLLs to `float64[M]`. Values and rankings are
    about the run's utility; sets are searched on `search_utility` (default: the same). The
    perplexity ratio suits the search best: it flattens collapsed masks, whose large losses would
    otherwise rule the fit.
    """

    def __init__(
        self,
        settings: RoundSettings,
        utility: Callable[[NDArray[np.float32]], FloatArray],
        search_utility: Callable[[NDArray[np.float32]], FloatArray] | None = None,
    ) -> None:
        self._settings = settings
        self._utility = utility
        self._search_utility = search_utility or utility
        self._designs = [
            StratifiedDesign(settings.num_players, strata, settings.seed)
            for strata in design_strata(settings)
        ]
        self._seen: set[bytes] = set()
        self._num_proposed = 0
        self._last = np.empty((0, settings.num_players), dtype=bool)
        """The round proposed last: being scored while the next is chosen."""
        self._quiet_rounds = 0
        self._fitted_masks = 0
        self.surrogate: Surrogate = make_surrogate(settings.surrogate, settings.seed)
        self._searcher = self.surrogate
        if search_utility is not None:
            self._searcher = make_surrogate(settings.surrogate, settings.seed)
        self.sources: dict[bytes, str] = {}
        """How each proposed mask was found, by key."""

    def propose(self, index: int, history: History) -> BoolArray:
        """Masks of round `index`, none proposed before; empty when there is nothing left to ask.

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
        masks_MP, nll_MN = history.upto(index - 1)
        utilities_M = self._utility(nll_MN)
        if index % 2 == 0 and index // 2 < self._settings.max_removed:
            batch = []
            if index == 2:
                batch += self._offer(
                    _single_loss_sets(masks_MP, utilities_M, self._settings), "ranking"
                )
            path = greedy_path(masks_MP, utilities_M, index // 2)
            if len(path) == index // 2:
                batch += self._offer(drop_one(path[-1]), "greedy")
            if batch:
                return self._finish(batch)
        return self._mixed(index, masks_MP, nll_MN)

    def _mixed(self, index: int, masks_MP: BoolArray, nll_MN: NDArray[np.float32]) -> BoolArray:
        utilities_M, search_M = self._utility(nll_MN), self._search_utility(nll_MN)
        settings = self._settings
        size = max(settings.round_size, int(_ROUND_GROWTH * self._num_proposed))
        walking = index < 2 * settings.max_removed
        batch: list[BoolArray] = []
        finite = np.isfinite(utilities_M) & np.isfinite(search_M)
        if finite.sum() >= 3:
            if self._due(int(finite.sum())):
                self.surrogate.fit(masks_MP[finite], utilities_M[finite])
                if self._searcher is not self.surrogate:
                    self._searcher.fit(masks_MP[finite], search_M[finite])
            room = size - max(1, size // _VALUES_SHARE)
            share = max(1, room // _RANKING_SHARE)
            batch += self._offer(self._rankings(index), "ranking", most=share)
            batch += self._offer(self._hopes(masks_MP, search_M), "search", most=room - len(batch))
        self._quiet_rounds = 0 if batch or walking else self._quiet_rounds + 1
        if settings.stop_when_stable and self._quiet_rounds >= 2:
            return np.empty((0, settings.num_players), dtype=bool)
        batch += self._telling(index, size - len(batch), batch)
        batch += self._take_design(size - len(batch))
        return self._finish(batch)

    def _telling(self, index: int, count: int, batch: Sequence[BoolArray]) -> list[BoolArray]:
        """Masks that say most about the values; none from a surrogate that cannot tell."""
        kernel = kernel_of(self.surrogate)
        if kernel is None or kernel.kernel is None or count < 1:
            return []
        settings = self._settings
        rng = np.random.default_rng([settings.seed, index])
        pool = candidate_pool(settings.num_players, settings.sizes, rng)
        pool = pool[[key not in self._seen for key in keys(pool)]]
        pending = [*self._last, *batch]
        picks = most_telling(
            kernel, settings.sizes, pool, count,
            pending_MP=np.array(pending, dtype=bool).reshape(len(pending), settings.num_players),
            head_cost=HEAD_COST,
        )  # fmt: skip
        return self._offer(picks, "values")

    def _due(self, num_masks: int) -> bool:
        """Whether to refit: always, but for the paper's network, whose training takes seconds."""
        growth = _PAPER_REFIT_GROWTH if self._settings.surrogate == "paper" else 1.0
        if num_masks < growth * self._fitted_masks:
            return False
        self._fitted_masks = num_masks
        return True

    def _hopes(self, masks_MP: BoolArray, search_M: FloatArray) -> BoolArray:
        """Unseen sets by expected improvement on the best scored set of their size, `bool[Q, P]`.

        All r compete; improvements below `_WORTH` are not worth a score.
        """
        settings = self._settings
        removed_M = (~masks_MP).sum(axis=1)
        values_P = current_values(self.surrogate, settings.sizes)
        sets, gains = [], []
        for r in range(1, settings.max_removed + 1):
            rows = np.flatnonzero((removed_M == r) & np.isfinite(search_M))
            starts = [without(settings.num_players, range(r))]
            if values_P is not None:
                starts.append(ranking_mask(values_P, r))
            top = rows[np.argsort(-search_M[rows], kind="stable")[:4]]
            starts += list(masks_MP[top])
            likely = likely_best(self._searcher.mean, settings.num_players, r, np.array(starts))
            likely = likely[[key not in self._seen for key in keys(likely)]]
            if len(likely):
                mean_Q, std_Q = self._searcher.predict(likely)
                best = float(search_M[top[0]]) if len(top) else -np.inf
                sets.append(likely)
                gains.append(expected_improvement(mean_Q, _DOUBT * std_Q, best))
        if not sets:
            return np.empty((0, settings.num_players), dtype=bool)
        pool_QP, gain_Q = np.concatenate(sets), np.concatenate(gains)
        order = np.argsort(-gain_Q, kind="stable")
        return pool_QP[order[gain_Q[order] > _WORTH]]

    def _rankings(self, index: int) -> list[BoolArray]:
        """The sets of lowest values for every r; another r leads in every round."""
        values_P = current_values(self.surrogate, self._settings.sizes)
        if values_P is None:
            return []
        most = self._settings.max_removed
        return [ranking_mask(values_P, (r + index) % most + 1) for r in range(most)]

    def _take_design(self, count: int) -> list[BoolArray]:
        """The next `count` design masks that no round has asked for; fewer when none are left."""
        batch: list[BoolArray] = []
        for design in self._designs:
            while len(batch) < count:
                masks_MP = design.take(count - len(batch))
                if not len(masks_MP):
                    break
                batch += self._offer(masks_MP, "design")
        return batch

    def _offer(
        self, masks: Sequence[BoolArray] | BoolArray, source: str, most: int | None = None
    ) -> list[BoolArray]:
        """The first of the masks that were never proposed; marks them proposed."""
        fresh: list[BoolArray] = []
        if not len(masks):
            return fresh
        for mask_P, key in zip(masks, keys(np.asarray(masks)), strict=True):
            if key not in self._seen and (most is None or len(fresh) < most):
                self._seen.add(key)
                self.sources[key] = source
                fresh.append(mask_P)
        return fresh

    def _finish(self, batch: list[BoolArray]) -> BoolArray:
        self._num_proposed += len(batch)
        self._last = np.array(batch, dtype=bool).reshape(len(batch), self._settings.num_players)
        return self._last


def expected_improvement(mean_Q: FloatArray, std_Q: FloatArray, best: float) -> FloatArray:
    """E max(u - best, 0) for u ~ N(mean, std^2) (Mockus 1975); infinite where nothing is scored."""
    if not np.isfinite(best):
        return np.full(len(mean_Q), np.inf)
    std_Q = np.maximum(std_Q, 1e-12)
    z_Q = (mean_Q - best) / std_Q
    return std_Q * (z_Q * norm.cdf(z_Q) + norm.pdf(z_Q))


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


def current_values(surrogate: Surrogate, sizes: tuple[int, int]) -> FloatArray | None:
    """Values from the surrogate as it stands, where it has a closed form."""
    kernel = kernel_of(surrogate)
    return kernel_values(kernel, sizes).values_P if kernel is not None else None


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
