"""What the sequence of rounds depends on, besides the scores.

Notation: P players, r = number removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lpserve.config import STOP_GAIN
from lpserve.masks import StratifiedDesign
from lpserve.plan.constraint import Constraint
from lpserve.plan.targets import Target, cost_targets, size_targets
from lpserve.types import BoolArray

FIRST_PAIRS = 2
"""Random masks of the second round of a search, for which no scores are known yet."""


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
    """Masks of a round once the walk outwards has ended, at least."""
    stop: StopRules = StopRules()
    goal: str = "both"
    """What masks are for: `plan`, `values` (no path is walked, no set is searched), or `both`."""
    constraint: Constraint | None = None
    """Which sets are searched; None: all."""
    costs: tuple[Target, ...] = ()
    """Shares of a cost that sets are searched for; empty: sets of 1 to `max_removed` players."""

    @property
    def within(self) -> Constraint:
        """Which sets are searched."""
        return self.constraint or Constraint(self.num_players)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What sets are searched for."""
        return self.costs or size_targets(self.within, self.max_removed)

    @property
    def plan_sizes(self) -> range:
        """Numbers of removed players that sets which are searched for may have."""
        return self.within.sizes(self.max_removed)

    @property
    def walk_sizes(self) -> tuple[int, int]:
        """Sets of a step of the walk outwards, and of a round between two steps."""
        return max(3, self.round_size // 8), max(2, self.round_size // 12)

    def random_pairs(self) -> BoolArray:
        """The masks of round 1 of a search: two random players removed beside those that must be,
        `bool[<=2, P]`; none where so many may not be removed.

        A surrogate needs sets near the whole model: random ones of many players collapse, and what
        these teach about size drowns the rest.
        """
        free, within = len(self.within.free), self.within
        if len(within.forced) + 2 > self.max_removed or free < 3:
            return np.empty((0, self.num_players), dtype=bool)
        return within.embed(StratifiedDesign(free, [free - 2], self.seed).take(FIRST_PAIRS))

    def minimum_budget(self) -> int:
        """Masks of the rounds up to the first scored set for every target."""
        first = 1 + self.num_players + (self.sizes[0] == 0 and self.num_players > 1)
        first += len(self.within.forced) > 1
        if self.goal == "values":
            return first + self.round_size
        return first + FIRST_PAIRS + max(0, len(self.walk_targets) - 2) * sum(self.walk_sizes) + 1

    @property
    def walk_targets(self) -> tuple[Target, ...]:
        """The targets of the walk outwards, in order: what sets are searched for and, where these
        are shares of a cost, shares between them, about a player apart."""
        if not self.costs or self.costs[0].share is None:
            return self.targets
        within = self.within
        cost_P = np.array(self.costs[0].cost_P)
        free_P = cost_P[within.free]
        player = float(free_P[free_P > 0].mean())
        share = 1.0 - float(cost_P[list(within.forced)].sum())
        shares: list[float] = []
        for target in self.costs:
            assert target.share is not None
            steps = max(1, int((share - target.share) / player))
            shares += [*np.linspace(share, target.share, steps + 1)[1:-1].tolist(), target.share]
            share = target.share
        return cost_targets(within, shares, cost_P.tolist(), "shares")


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
