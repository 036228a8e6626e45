"""Losses of sets predicted from single players' effects and their overlap: short lists to score.

To second order, what a set A of dropped players costs is the sum of what each costs alone and of
what each two add to that,

    L(A) - L(none) = sum_i l_i + sum_{i<j} c G_ij,    i, j in A,

with l_i the scored loss of dropping player i alone and G the overlap of their effects on the
model's predictions (`types.Scores.overlap_MM`), measured with those scores: the Gauss-Newton matrix
of the loss in the players' gates (1 kept, 0 dropped), with whole effects in place of derivatives.
The scale c is 1 where the loss is an NLL or a divergence; other losses are on a scale of their own,
and far from the whole model effects grow or saturate: c is fitted to the scored sets.

The expansion about the whole model is poor for large sets. So it is taken about scored sets as
well: a player more, one less, or another one in its place costs what the same formula says it adds
there, or, where that step was scored, what it really added. Predictions only say which sets are
worth a score: they enter no plan.

A set is given by the mask that keeps the rest. Deterministic; ties go to the smaller mask key.

Notation: M masks, P players, Q candidates, r = number removed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lpserve.masks import keys, pack, sort_distinct
from lpserve.plan.constraint import Constraint
from lpserve.plan.search import best_predicted_sets
from lpserve.plan.targets import Target
from lpserve.types import BoolArray, FloatArray

EXPANSION = "expansion"
"""How a set was found that a short list held."""
_ANCHORS = 4
"""Best scored sets of each size that expansions are taken about."""
_BEAM = (32, 60)
_SHORTLIST = 64
_REACH = 2
"""Players that an expansion about a scored set adds at most."""
_MIN_FITTED = 8  # sets that drop two players or more: with fewer the scale stays 1
_SCALES = (0.2, 3.0)
_NEAR_NATS = 0.1
"""A set may be near the best if it costs at most twice what the cheapest set of its size is
predicted to, or this much more."""
_UNKNOWN = 1e6  # nats that a player costs of which nothing finite is known
_ROUNDED_NATS = 0.01  # errors of smaller losses count alike


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """What changes a scored set by one player, and what that adds to its loss, `float64[P]`."""

    loss: float
    dropped_P: BoolArray
    change_P: FloatArray
    """Of dropping a kept player, or of bringing back a dropped one."""


class Expansion:
    """Second-order expansions of a game's loss about scored sets.

    Args:
        overlap_PP: nats per token; a player whose effect is not finite (its own entry) is in no
            set.
        within: which sets are asked about.
    """

    def __init__(self, overlap_PP: FloatArray, within: Constraint) -> None:
        finite_P = np.isfinite(overlap_PP.diagonal())
        between_PP = np.where(finite_P & finite_P[:, None], overlap_PP, 0.0)
        self._overlap_PP = between_PP - np.diag(between_PP.diagonal())
        self._finite_P = finite_P
        self._within = within
        self._free_P = np.isin(np.arange(len(overlap_PP)), within.free)
        self.scale = 1.0
        """The factor c."""

    def fit(self, masks_MP: BoolArray, loss_M: FloatArray) -> bool:
        """Take in scored sets; False where the loss of the whole model, or of every single player,
        is missing.

        Args:
            masks_MP: distinct; the first keeps every player.
            loss_M: mean losses, in nats per token where the loss is an NLL; NaN where a mask is not
                scored on all windows.
        """
        finite_M = np.isfinite(loss_M)
        self._steps_of: dict[int, _Steps] = {}
        self._dropped_MP, self._loss_M = ~masks_MP[finite_M], loss_M[finite_M] - loss_M[0]
        self._removed_M = self._dropped_MP.sum(axis=1)
        self._row_of = {key: row for row, key in enumerate(keys(~self._dropped_MP))}
        singles = np.flatnonzero(self._removed_M == 1)
        self._single_P = np.full(masks_MP.shape[1], np.nan)
        self._single_P[self._dropped_MP[singles].argmax(axis=1)] = self._loss_M[singles]
        # a player whose own loss is not finite is in no good set
        self._allowed_P = np.isfinite(self._single_P) & self._finite_P & self._free_P
        self._unknown_P = self._free_P & ~self._allowed_P
        self._single_P = np.where(np.isfinite(self._single_P), self._single_P, _UNKNOWN)
        self._fit_scale()
        return bool(np.isfinite(loss_M[0]) and self._allowed_P.any())

    def _fit_scale(self) -> None:
        """Least squares, relative errors counting alike, over the scored sets of two players and
        more that may be near the best: random ones break in other ways."""
        self.scale = 1.0
        cheapest_M = self._cheapest_losses()[self._removed_M]
        self._near_M = self._loss_M <= cheapest_M + np.maximum(np.abs(cheapest_M), _NEAR_NATS)
        rows = np.flatnonzero((self._removed_M > 1) & self._near_M)
        if len(rows) < _MIN_FITTED:
            return
        dropped = self._dropped_MP[rows].astype(np.float64)
        pairs = self._pairs(dropped)
        beyond = self._loss_M[rows] - dropped @ self._single_P
        weight = 1 / (np.abs(self._loss_M[rows]) + _ROUNDED_NATS) ** 2
        scale = float((weight * pairs) @ beyond / max((weight * pairs) @ pairs, 1e-12))
        self.scale = float(np.clip(scale, *_SCALES))

    def _cheapest_losses(self) -> FloatArray:
        """Number removed -> predicted loss of the set that grows by the cheapest player, with scale
        1, `float64[P + 1]`; infinite where no such set is within."""
        found = np.full(len(self._free_P) + 1, np.inf)
        dropped_P = ~self._within.first()
        while True:
            found[dropped_P.sum()] = self.predicted(~dropped_P[None])[0]
            added_P = self._added(dropped_P)
            if not np.isfinite(added_P.min()):
                return found
            dropped_P[int(added_P.argmin())] = True

    def _added(self, dropped_P: BoolArray) -> FloatArray:
        """What dropping one more player adds to the loss; infinite for those that may not be."""
        added_P = self._single_P + self.scale * self._overlap_PP @ dropped_P
        return np.where(dropped_P | ~self._allowed_P, np.inf, added_P)

    def near_best(self) -> tuple[BoolArray, FloatArray]:
        """Scored sets that may be near the best, and all single players; with their losses beyond
        the whole model's."""
        rows = self._near_M | (self._removed_M <= 1)
        return ~self._dropped_MP[rows], self._loss_M[rows]

    def swap_losses(self, mask_P: BoolArray) -> FloatArray:
        """Predicted loss of every swap of a kept for a dropped player, `float64[kept, dropped]`."""
        dropped_P = ~mask_P
        kept, dropped = np.flatnonzero(mask_P), np.flatnonzero(dropped_P)
        added_P = self._single_P + self.scale * self._overlap_PP @ dropped_P
        loss = self.predicted(mask_P[None])[0] + added_P[kept][:, None] - added_P[dropped]
        return loss - self.scale * self._overlap_PP[np.ix_(kept, dropped)]

    def predicted(self, masks_MP: BoolArray) -> FloatArray:
        """Losses by the expansion about the whole model, `float64[M]`."""
        dropped = (~masks_MP).astype(np.float64)
        return dropped @ self._single_P + self.scale * self._pairs(dropped)

    def _pairs(self, dropped_MP: FloatArray) -> FloatArray:
        """Overlaps of each two dropped players, summed, `float64[M]`."""
        return np.einsum("mi,ij,mj->m", dropped_MP, self._overlap_PP, dropped_MP) / 2

    def shortlist(self, target: Target) -> tuple[BoolArray, FloatArray]:
        """Unscored sets that meet a target with the lowest predicted losses, best first, `bool[Q,
        P]`, and these losses; each by the expansion that predicts it lowest."""
        found = [self._about_whole(target)]
        for size in target.sizes:
            for removed in range(size - _REACH, size + 2):
                for row in self._best_rows(removed, size - removed, target):
                    found.append(self._about(self._steps(row), size - removed, target))
        sets_MP, place = sort_distinct(np.concatenate([masks for masks, _ in found]))
        lowest = np.full(len(sets_MP), np.inf)
        np.minimum.at(lowest, place, np.concatenate([values for _, values in found]))
        unscored = np.array([key not in self._row_of for key in keys(sets_MP)], dtype=bool)
        allowed = ~(~sets_MP & self._unknown_P).any(axis=1)
        usable = unscored & allowed & target.holds(sets_MP) & np.isfinite(lowest)
        return _lowest(sets_MP[usable], lowest[usable])

    def _best_rows(self, num_removed: int, more: int, target: Target) -> list[int]:
        """The best scored sets of one size that may meet a target with `more` players removed."""
        rows = np.flatnonzero(self._removed_M == num_removed)
        if num_removed == 0 or not len(rows):  # the whole model has its own list
            return []
        usable = self._within.holds(~self._dropped_MP[rows])
        usable &= target.reached(
            target.kept_cost(~self._dropped_MP[rows])
            - max(more, int(more == 0)) * max(target.cost_P, default=0.0)
        )
        usable &= ~(self._dropped_MP[rows] & self._unknown_P).any(axis=1)
        rows = rows[usable]
        return rows[np.argsort(self._loss_M[rows], kind="stable")[:_ANCHORS]].tolist()

    def _steps(self, row: int) -> _Steps:
        if row not in self._steps_of:
            self._steps_of[row] = self._new_steps(row)
        return self._steps_of[row]

    def _new_steps(self, row: int) -> _Steps:
        dropped_P, loss = self._dropped_MP[row], float(self._loss_M[row])
        added_P = self._single_P + self.scale * self._overlap_PP @ dropped_P
        change_P = np.where(dropped_P, -added_P, added_P)
        near_PP = dropped_P[None] ^ np.eye(len(dropped_P), dtype=bool)
        for player, key in enumerate(keys(~near_PP)):
            scored = self._row_of.get(key)
            if scored is not None:
                change_P[player] = self._loss_M[scored] - loss
        return _Steps(loss, dropped_P, change_P)

    def _about(self, steps: _Steps, more: int, target: Target) -> tuple[BoolArray, FloatArray]:
        """Sets that drop `more` players more than a scored one (less, if below 0; with one swap, if
        0) and meet a target, and predicted losses: by beam search, a player at a time."""
        moves = [1] * more if more >= 0 else [-1] * -more
        if more == 0:
            moves = [-1, 1]
        changed = np.zeros((1, len(steps.change_P)), dtype=bool)
        value = np.array([steps.loss])
        signed_P = np.where(steps.dropped_P, -1.0, 1.0)
        cost_P = np.array(target.cost_P) if target.cost_P else np.zeros(len(signed_P))
        kept_cost = target.kept_cost(~steps.dropped_P[None])
        for left, move in zip(range(len(moves) - 1, -1, -1), moves, strict=True):
            may_P = (
                ~steps.dropped_P & self._allowed_P if move > 0 else steps.dropped_P & self._free_P
            )
            between = signed_P * ((changed * signed_P) @ self._overlap_PP)
            step = steps.change_P + self.scale * between
            step = np.where(may_P & ~changed, value[:, None] + step, np.inf)
            if not left:
                kept = kept_cost - changed @ (signed_P * cost_P)
                step[~target.reached(kept[:, None] - signed_P * cost_P)] = np.inf
            order = np.argsort(step, axis=None, kind="stable")[: 4 * _SHORTLIST]
            row, player = np.unravel_index(order[np.isfinite(step.ravel()[order])], step.shape)
            value = step[row, player]
            changed = changed[row]
            changed[np.arange(len(row)), player] = True
            if abs(more) > 1:  # the same players in another order
                changed, first = np.unique(changed, axis=0, return_index=True)
                value = value[first]
                order = np.argsort(value, kind="stable")
                changed, value = changed[order], value[order]
            changed, value = changed[: 2 * _SHORTLIST], value[: 2 * _SHORTLIST]
        return ~(changed ^ steps.dropped_P), value

    def _about_whole(self, target: Target) -> tuple[BoolArray, FloatArray]:
        """Sets of the lowest losses by the expansion about the whole model, by a search over swaps
        from the sets that grow by the cheapest player, alone and for its cost."""
        cost_P = np.array(target.cost_P) if target.cost_P else np.ones(len(self._free_P))
        begin = []
        for price_P in (np.ones(len(cost_P)), cost_P)[: 1 + bool(target.cost_P)]:
            dropped_P = ~self._within.first()
            while True:
                if int(dropped_P.sum()) in target.sizes and target.holds(~dropped_P[None])[0]:
                    begin.append(~dropped_P)
                added_P = self._added(dropped_P)
                if dropped_P.sum() >= target.sizes[-1] or not np.isfinite(added_P.min()):
                    break
                with np.errstate(divide="ignore", invalid="ignore"):
                    added_P = np.where(price_P > 0, added_P / price_P, np.inf)
                dropped_P[int(added_P.argmin())] = True
        begin_MP = np.array(begin, dtype=bool).reshape(len(begin), len(cost_P))
        sets_MP = best_predicted_sets(self, target, begin_MP, beam=_BEAM)
        return sets_MP, -self.mean(sets_MP)

    def mean(self, queried_MP: BoolArray) -> FloatArray:
        """Minus the losses by the expansion about the whole model, `float64[Q]`; sets of players of
        which nothing finite is known come last."""
        unknown_M = (~queried_MP & self._unknown_P).sum(axis=1)
        return -self.predicted(queried_MP) - _UNKNOWN * unknown_M

    def swap_means(self, mask_P: BoolArray) -> FloatArray:
        """See `lpserve.plan.search.PredictsSwaps`."""
        worse_P = _UNKNOWN * self._unknown_P
        return -self.swap_losses(mask_P) - worse_P[mask_P][:, None] + worse_P[~mask_P]


def _lowest(sets_MP: BoolArray, values: FloatArray) -> tuple[BoolArray, FloatArray]:
    """The masks of the lowest values and these values, best first, at most 64."""
    order = np.lexsort((*pack(sets_MP).T[::-1], values))[:_SHORTLIST]
    return sets_MP[order], values[order]
