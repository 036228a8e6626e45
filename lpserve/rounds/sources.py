"""Where a round's masks come from, besides a model: the sampled design.

Notation: M masks, P players, r = number removed.
"""

from __future__ import annotations

from lpserve.masks import StratifiedDesign
from lpserve.rounds.history import AskedMasks
from lpserve.rounds.settings import RoundSettings, design_strata
from lpserve.types import BoolArray


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
