"""The walk outwards: sets of one target after another, from those near the whole model on.

What dropping a player costs changes with what is dropped already. A surrogate learns it from scored
sets that differ by little: it ranks sets that remove a player more than good ones, and says little
of those that remove six more. So the first sets that are searched for remove two players, the next
three, and so on, each predicted best among what the best scored sets grow to. Greedy removal (SLEB,
arXiv 2402.09025) scores all that its last set grows to; a step of this walk scores a few.

With shares of a cost there are steps between the shares as well, about a player apart.
"""

from __future__ import annotations

from lpserve.plan.expansion import EXPANSION
from lpserve.rounds.expanding import ExpansionSource
from lpserve.rounds.history import AskedMasks, KnownUtilities
from lpserve.rounds.model import RoundModel
from lpserve.rounds.settings import RoundSettings
from lpserve.types import BoolArray

OUTWARD = "outward"
"""How a set was found that a step of the walk asked for."""


class OutwardWalk:
    """The steps that are left."""

    def __init__(self, settings: RoundSettings) -> None:
        self._left = list(reversed(settings.walk_targets))

    @property
    def ended(self) -> bool:
        """Whether every target had its step."""
        return not self._left

    def take(
        self,
        model: RoundModel,
        known: KnownUtilities,
        asked: AskedMasks,
        count: int,
        expansion: ExpansionSource,
        *,
        screened: bool = False,
    ) -> list[BoolArray]:
        """The `count` sets of the next target that are predicted best among those never asked for,
        and the one that the expansion predicts best; targets without any are passed by. None: the
        walk has ended."""
        while self._left:
            target = self._left.pop()
            sets_MP = model.grown(known, target)
            batch = asked.add(sets_MP, OUTWARD, max_count=count, screened=screened)
            by_expansion_MP = expansion.best_of(target)
            batch += asked.add(by_expansion_MP, EXPANSION, max_count=1, screened=screened)
            if batch:
                return batch
        return []
