"""What a plan's entries ask for: a number of removed players, or at most a share of a cost kept.

Sets compete with those that meet the same target. With numbers removed every set meets one target.
With shares of a cost (`lpserve.model.costs`) a set meets every share that it reaches, and players
of different costs may reach one in different numbers; sets are then searched among all numbers that
can be needed, since a set of which a player could be brought back is seldom the best.

A set is given by the mask that keeps the rest. Notation: M masks, P players.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lpserve.errors import InputError
from lpserve.inputs.rules import COSTS, TARGETS
from lpserve.plan.constraint import Constraint
from lpserve.types import BoolArray, FloatArray

_ROUNDING = 1e-9
"""Shares are sums of many numbers: a set that reaches one exactly must not miss it by rounding."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the sets of one entry meet."""

    within: Constraint
    sizes: range
    """Numbers of removed players among which sets are searched."""
    share: float | None = None
    """Sets keep at most so much of the cost of all players; None: they remove `sizes[0]`."""
    cost_P: tuple[float, ...] = ()
    """With a share: what each player costs, as a share of what all cost."""

    def holds(self, masks_MP: BoolArray) -> BoolArray:
        """Which masks meet the target, `bool[M]`."""
        within_M = self.within.holds(masks_MP)
        if self.share is None:
            return within_M & ((~masks_MP).sum(axis=1) == self.sizes[0])
        return within_M & self.reached(self.kept_cost(masks_MP))

    def reached(self, kept_cost: FloatArray) -> BoolArray:
        """Whether sets that keep so much of the cost meet its share; of numbers removed, True."""
        return kept_cost <= (np.inf if self.share is None else self.share + _ROUNDING)

    def kept_cost(self, masks_MP: BoolArray) -> FloatArray:
        """What masks keep of the cost, `float64[M]`; 0 where the target is a number removed."""
        if self.share is None:
            return np.zeros(len(masks_MP))
        return masks_MP.astype(np.float64) @ np.array(self.cost_P)

    def ranking(self, values_P: FloatArray) -> BoolArray:
        """The mask that drops the players of the lowest values, `bool[P]`; ties drop the earlier.

        With a share these are the lowest values for their cost, until the share is reached, and
        then all that are not needed are brought back, the most valuable first.
        """
        if self.share is None:
            return self.within.ranking(values_P, self.sizes[0])
        free = np.array([p for p in self.within.free if self.cost_P[p] > 0], dtype=np.int64)
        price = values_P[free] / np.array(self.cost_P)[free]
        mask_P, dropped = self._reached_by(free[np.argsort(price, kind="stable")].tolist())
        for player in reversed(dropped):
            mask_P[player] = True
            mask_P[player] = bool(self.holds(mask_P[None])[0])
        return mask_P

    def largest_first(self) -> BoolArray:
        """The mask that meets it with the fewest players removed, the costliest, `bool[P]`."""
        if self.share is None:
            return self.ranking(np.zeros(self.within.num_players))
        return self._reached_by(sorted(self.within.free, key=lambda p: -self.cost_P[p]))[0]

    def _reached_by(self, order: Sequence[int]) -> tuple[BoolArray, list[int]]:
        """The mask that drops players in this order until it meets the target, and these."""
        mask_P = self.within.first()
        dropped: list[int] = []
        for player in order:
            if self.holds(mask_P[None])[0]:
                break
            mask_P[player] = False
            dropped.append(player)
        return mask_P, dropped


def removing(num_removed: int, within: Constraint) -> Target:
    """The target of the sets within a constraint that remove so many players."""
    return Target(within, range(num_removed, num_removed + 1))


def size_targets(within: Constraint, max_removed: int) -> tuple[Target, ...]:
    """A target for each number of removed players that sets within a constraint have."""
    return tuple(removing(r, within) for r in within.sizes(max_removed))


def cost_targets(
    within: Constraint, shares: Sequence[float], costs: Sequence[float], name: str
) -> tuple[Target, ...]:
    """A target for each share of a cost, the largest share first.

    Args:
        costs: of each player.
        name: of the cost, for messages.

    Raises:
        InputError: the constraint contradicts itself, no player costs anything, or a share cannot
            be reached while a player is left.
    """
    within.check(len(within.forced))
    total = float(sum(costs))
    if not total > 0:
        raise InputError(f"target {name}: none of the {len(costs)} players has any")
    cost_P = np.array(costs, dtype=np.float64) / total
    start = float(cost_P[list(within.forced)].sum())
    by_cost = np.sort(cost_P[within.free])
    by_cost = by_cost[by_cost > 0]
    found = []
    for share in sorted(set(shares), reverse=True):
        need = 1.0 - share - start - _ROUNDING
        fewest = 1 + int(np.searchsorted(np.cumsum(by_cost[::-1]), need)) if need > 0 else 0
        most = 1 + int(np.searchsorted(np.cumsum(by_cost), need)) if need > 0 else 0
        first = len(within.forced)
        if fewest > len(by_cost) or first + fewest >= len(cost_P):
            least = 1.0 - start - float(by_cost.sum())
            raise InputError(
                f"target {name}={share:g} cannot be reached: "
                + (
                    f"what is protected keeps {least:.3g} of it"
                    if least > share
                    else "it leaves no player"
                )
            )
        last = min(first + most, len(cost_P) - 1)
        sizes = range(max(1, first + fewest), max(1, last) + 1)
        found.append(Target(within, sizes, share, tuple(cost_P.tolist())))
    return tuple(found)


def read_targets(text: str) -> tuple[str, tuple[float, ...]]:
    """The cost and the shares of a text such as `params=0.9,0.8`.

    Raises:
        InputError: it is no such text.
    """
    if not re.match(TARGETS, text):
        raise InputError(
            f"a target is one of {', '.join(COSTS)}, = and shares above 0 and below 1, such as "
            f"params=0.9,0.8: got {text!r}"
        )
    cost, _, shares = text.partition("=")
    return cost, tuple(float(share) for share in shares.split(","))
