"""What batches of masks cost, counted in the same way for every search.

A distinct mask counts once, on however few windows it was scored. Layer-forwards are those of the
trie of each batch (prefixes are shared inside a batch only) plus `HEAD_COST` for each mask,
weighted by the share of windows that the masks had not been scored on.

Notation: M masks, N windows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lpserve.masks import keys, trie_layer_forwards
from lpserve.rivals.proposer import Ask
from lpserve.rounds.acquisition import HEAD_COST
from lpserve.types import BoolArray, IntArray


@dataclass
class Spent:
    """Running totals of what a sequence of batches costs."""

    num_windows: int
    forwards: float = 0.0
    scored: dict[bytes, BoolArray] = field(default_factory=dict)
    """Mask key -> the windows on which it was scored, `bool[N]`."""

    @property
    def masks(self) -> int:
        """Distinct masks so far."""
        return len(self.scored)

    def tokens(self, tokens_N: IntArray) -> int:
        """Tokens that were scored, for windows of `tokens_N` tokens each."""
        return int(sum((tokens_N * scored_N).sum() for scored_N in self.scored.values()))

    def after(self, ask: Ask) -> tuple[int, float]:
        """Totals of masks and layer-forwards if this batch were added."""
        mask_keys = keys(ask.masks_MP)
        nothing_N = np.zeros(self.num_windows, dtype=bool)
        have_MN = np.array([self.scored.get(key, nothing_N) for key in mask_keys])
        # windows that the same masks lack are run together
        lacking = ~have_MN if ask.windows is None else ~have_MN[:, ask.windows]
        runs, counts = np.unique(lacking, axis=1, return_counts=True)
        forwards = self.forwards
        for run_M, count in zip(runs.T, counts, strict=True):
            layers = trie_layer_forwards(ask.masks_MP[run_M]) + HEAD_COST * run_M.sum()
            forwards += count / self.num_windows * layers
        return self.masks + sum(key not in self.scored for key in mask_keys), forwards

    def add(self, ask: Ask) -> None:
        """Add what this batch costs to the totals."""
        _, self.forwards = self.after(ask)
        for key in keys(ask.masks_MP):
            scored_N = self.scored.setdefault(key, np.zeros(self.num_windows, dtype=bool))
            scored_N[slice(None) if ask.windows is None else ask.windows] = True


def within(
    batches: Sequence[Ask],
    num_windows: int,
    *,
    masks: float = math.inf,
    forwards: float = math.inf,
) -> tuple[list[Ask], Spent]:
    """Cut a sequence of batches where a budget ends.

    Args:
        masks: budget of distinct masks.
        forwards: budget of layer-forwards, for all windows together.

    Returns:
        The batches before the first mask that a budget does not allow, and what they cost.
    """
    spent, kept = Spent(num_windows), []

    def too_much(ask: Ask) -> bool:
        masks_then, forwards_then = spent.after(ask)
        return masks_then > masks or forwards_then > forwards

    for ask in batches:
        if too_much(ask):
            parts = [Ask(ask.masks_MP[:count], ask.windows) for count in range(len(ask.masks_MP))]
            last = bisect_left(parts, True, lo=1, key=too_much) - 1
            if last:
                kept.append(parts[last])
                spent.add(parts[last])
            break
        kept.append(ask)
        spent.add(ask)
    return kept, spent
