"""What rounds ask for, and the complete rounds that later ones are chosen from.

Notation: M masks, P players, I items (windows or questions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.masks import keys
from lpserve.plan.targets import Target
from lpserve.types import BoolArray, FloatArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """Masks that are to be scored together."""

    masks_MP: BoolArray
    """Masks that no earlier round has asked for."""
    full_M: BoolArray
    """Which of them are wanted on all items; the others on the screen alone."""
    promoted_MP: BoolArray
    """Masks that were scored on the screen: now wanted on all items."""
    overlap: bool = False
    """Whether the overlap of single players' effects is wanted too: the masks begin with the full
    one and all that drop one player."""

    def __len__(self) -> int:
        """Number of new masks, which the budget counts."""
        return len(self.masks_MP)

    @property
    def all_masks(self) -> BoolArray:
        """New masks, then promoted ones: the order of a `CompletedRound`'s scores."""
        return np.concatenate([self.masks_MP, self.promoted_MP])

    def first(self, count: int) -> Round:
        """The round with at most `count` new masks, as the budget allows."""
        return replace(self, masks_MP=self.masks_MP[:count], full_M=self.full_M[:count])


@dataclass(frozen=True, slots=True, eq=False)
class CompletedRound:
    """A round whose masks have every score that they will get."""

    masks_MP: BoolArray
    nll_MI: NDArray[Any]
    """Stored NLLs in nats, used to report perplexity; NaN where a mask was not scored on an item,
    or given up. Of questions, those of the correct answers."""
    loss_MI: NDArray[Any]
    """What every decision reads (`Utility`): NLLs, or losses of another kind."""
    overlap_PP: FloatArray | None = None
    """Of the first round: how the effects of single players overlap (`types.Scores.overlap_MM`),
    nats per token; None where the engines do not measure it."""


def latest_scores(rounds: Sequence[CompletedRound]) -> CompletedRound:
    """Distinct masks of all rounds, in the order in which they were first asked for, each with the
    scores of the last round that it was in."""
    masks_MP = np.concatenate([done.masks_MP for done in rounds])
    nll_MI = np.concatenate([done.nll_MI for done in rounds])
    same = all(done.loss_MI is done.nll_MI for done in rounds)
    loss_MI = nll_MI if same else np.concatenate([done.loss_MI for done in rounds])
    last_of = {key: row for row, key in enumerate(keys(masks_MP))}
    if len(last_of) < len(masks_MP):
        last = list(last_of.values())
        masks_MP, nll_MI = masks_MP[last], nll_MI[last]
        loss_MI = nll_MI if same else loss_MI[last]
    return CompletedRound(masks_MP, nll_MI, loss_MI)


class AskedMasks:
    """Every mask that a run has asked for: none is asked for twice."""

    def __init__(self, num_players: int) -> None:
        self.sources: dict[bytes, str] = {}
        """How each mask was found, by key."""
        self.screened: set[bytes] = set()
        """Keys of the masks that were asked for on the screen alone."""
        self.last_MP: BoolArray = np.empty((0, num_players), dtype=bool)
        """The round proposed last: its masks are being scored while the next round is chosen."""

    def unseen(self, masks_MP: BoolArray) -> BoolArray:
        """Those of some masks that were never asked for, in their order."""
        return masks_MP[[key not in self.sources for key in keys(masks_MP)]]

    def add(
        self,
        masks: Sequence[BoolArray] | BoolArray,
        source: str,
        *,
        max_count: int | None = None,
        screened: bool = False,
    ) -> list[BoolArray]:
        """The first `max_count` masks that were never asked for; they are now."""
        fresh: list[BoolArray] = []
        if not len(masks):
            return fresh
        for mask_P, key in zip(masks, keys(np.asarray(masks)), strict=True):
            if key not in self.sources and (max_count is None or len(fresh) < max_count):
                self.sources[key] = source
                if screened:
                    self.screened.add(key)
                fresh.append(mask_P)
        return fresh

    def on_screen_alone(self, masks_MP: BoolArray) -> BoolArray:
        """Which masks were asked for on the screen alone, `bool[M]`."""
        return np.array([key in self.screened for key in keys(masks_MP)], dtype=bool)

    def pending(self, chosen: Sequence[BoolArray]) -> BoolArray:
        """Masks whose scores are still to come: the last round's, and what this round has
        chosen."""
        players = self.last_MP.shape[1]
        return np.concatenate([self.last_MP, np.array(chosen, dtype=bool).reshape(-1, players)])


@dataclass(frozen=True, slots=True, eq=False)
class KnownUtilities:
    """Utilities of the masks that are scored when a round is chosen."""

    masks_MP: BoolArray
    utilities_M: FloatArray
    """The run's utility; NaN where a mask is not scored on all items."""
    search_M: FloatArray
    """The utility that sets are searched on (`UtilityView.search`); NaN as above."""
    guess_M: FloatArray
    """`search_M`, estimated where a mask is scored on the screen alone."""
    noise_M: FloatArray | None = None
    """Variances of `guess_M`; None: no mask is screened."""

    def best_for(self, targets: Sequence[Target]) -> FloatArray:
        """For each target the best `search_M` that meets it, -inf where there is none."""
        finite_M = np.where(np.isfinite(self.search_M), self.search_M, -np.inf)
        best = [finite_M[t.holds(self.masks_MP)].max(initial=-np.inf) for t in targets]
        return np.array(best, dtype=np.float64)
