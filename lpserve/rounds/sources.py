"""Where a round's masks come from, besides a model: the sampled design and the greedy path.

Notation: M masks, P players, r = number removed.
"""

from __future__ import annotations

import numpy as np

from lpserve.masks import StratifiedDesign, keys, removed_players
from lpserve.plan.greedy import greedy_path
from lpserve.plan.targets import finds_more
from lpserve.rounds.history import AskedMasks, KnownUtilities
from lpserve.rounds.model import RoundModel
from lpserve.rounds.settings import RoundSettings, design_strata
from lpserve.types import BoolArray, FloatArray


class DesignSource:
    """Stratified random masks: those that the values need first, then those of the plan's sizes."""

    def __init__(self, settings: RoundSettings) -> None:
        self._within = settings.within
        self._designs: list[tuple[StratifiedDesign, bool]] = []
        """And whether a design is over the players that the constraint leaves free, alone."""
        bound = len(self._within.protected)
        for place, strata in enumerate(design_strata(settings)):
            alone = self._within.given and (settings.goal == "plan" or place > 0)
            players = len(self._within.free) if alone else settings.num_players
            counts = [k - bound for k in strata if 0 <= k - bound < players] if alone else strata
            if counts:
                self._designs.append((StratifiedDesign(players, counts, settings.seed), alone))

    def take(self, asked: AskedMasks, count: int, *, screened: bool = False) -> list[BoolArray]:
        """The next `count` masks that were never asked for; fewer when none are left."""
        batch: list[BoolArray] = []
        for design, free_alone in self._designs:
            while len(batch) < count:
                masks_MP = design.take(count - len(batch))
                if not len(masks_MP):
                    break
                if free_alone:
                    masks_MP = self._within.embed(masks_MP)
                batch += asked.add(masks_MP, "design", screened=screened)
        return batch


class GreedySource:
    """The greedy path (SLEB's rule), a step at a time."""

    def __init__(self, settings: RoundSettings) -> None:
        self._settings = settings
        self.pruned: set[bytes] = set()
        """Keys of a step's masks that were not asked for: they had no chance to be its best."""

    def take(
        self,
        step: int,
        model: RoundModel,
        known: KnownUtilities,
        path_M: FloatArray,
        asked: AskedMasks,
        *,
        screened: bool,
    ) -> list[BoolArray]:
        """The masks of a step, without those that cannot be its best.

        Args:
            path_M: the utility that the path is walked by.
        """
        within = self._settings.within
        steps = min(step, len(self._settings.plan_sizes) - 1)
        path = greedy_path(known.masks_MP, path_M, steps, self.pruned, within)
        if not path or not finds_more(self._settings.targets, path[-1]):
            return []
        may_be_best_M = model.may_be_best(path, known.masks_MP, path_M)
        options_MP = within.drops(path[-1])
        unseen_MP = asked.unseen(options_MP[~may_be_best_M])
        self.pruned |= set(keys(unseen_MP))
        return asked.add(options_MP[may_be_best_M], "greedy", screened=screened)


def single_loss_sets(known: KnownUtilities, settings: RoundSettings) -> list[BoolArray]:
    """For every target, the players whose removal alone cost least (one-shot ranking)."""
    loss_P = np.full(settings.num_players, np.inf)
    for mask_P, utility in zip(known.masks_MP, known.utilities_M, strict=True):
        removed = removed_players(mask_P)
        if len(removed) == 1 and np.isfinite(utility):
            loss_P[removed[0]] = -utility
    return [target.ranking(loss_P) for target in settings.targets]
