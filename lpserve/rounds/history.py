"""What rounds ask for, and what has come of those that are complete.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lpserve.masks import keys
from lpserve.types import BoolArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What is to be scored together."""

    masks_MP: BoolArray
    """Masks that no round has asked for."""
    whole_M: BoolArray
    """False: on the screen alone."""
    promoted_QP: BoolArray
    """Masks that were scored on the screen: now on all windows."""

    def __len__(self) -> int:
        """New masks."""
        return len(self.masks_MP)

    @property
    def all_masks(self) -> BoolArray:
        """New and promoted ones, in the order in which `History` takes their losses."""
        return np.concatenate([self.masks_MP, self.promoted_QP])

    def first(self, count: int) -> Round:
        """With no more new masks than the budget allows."""
        return replace(self, masks_MP=self.masks_MP[:count], whole_M=self.whole_M[:count])


@dataclass(slots=True)
class History:
    """Complete rounds, in order: masks as proposed and their stored losses."""

    masks: list[BoolArray] = field(default_factory=list)
    """One `bool[M, P]` for each round."""
    loss: list[NDArray[np.float32]] = field(default_factory=list)
    """One `float32[M, N]` for each round: NLLs, or what else the utility is made of; NaN
    where a mask was not scored, or given up."""

    def upto(self, num_rounds: int) -> tuple[BoolArray, NDArray[np.float32]]:
        """Distinct masks of the first `num_rounds` rounds, in order, and their last losses."""
        masks_MP = np.concatenate(self.masks[:num_rounds])
        loss_MN = np.concatenate(self.loss[:num_rounds])
        mask_keys = keys(masks_MP)
        last_of = {key: row for row, key in enumerate(mask_keys)}  # in the order of first asking
        if len(last_of) == len(masks_MP):
            return masks_MP, loss_MN
        last = list(last_of.values())
        return masks_MP[last], loss_MN[last]
