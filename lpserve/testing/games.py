"""Games with known answers: tables of random numbers, and values by their definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lpserve.masks import keys, without
from lpserve.plan.constraint import Constraint
from lpserve.plan.targets import removing
from lpserve.rivals.proposer import Answer, best_sets
from lpserve.types import BoolArray, FloatArray

NUM_WINDOWS = 16
"""Windows of a `TableGame`."""


def mask_text(mask: np.ndarray) -> str:
    """A mask as 0 and 1; sorts as the keys do."""
    return "".join("01"[int(bit)] for bit in mask)


def table_game(
    num_players: int, rng: np.random.Generator, *, ties: bool = False
) -> Callable[[BoolArray], FloatArray]:
    """Mask -> utility from a table of independent numbers; with ties, of five different ones."""
    size = 1 << num_players
    table = rng.integers(5, size=size).astype(np.float64) if ties else rng.normal(size=size)
    return lambda masks: np.array(table[masks @ (1 << np.arange(num_players))], dtype=np.float64)


class _Request(Protocol):
    """Masks `bool[M, P]`, and the windows to score them on; None: all."""

    @property
    def masks_MP(self) -> BoolArray: ...

    @property
    def windows(self) -> range | None: ...


class _Masks(NamedTuple):
    masks_MP: BoolArray
    windows: range | None = None


class TableGame:
    """Independent random NLLs for every mask and window; a share of the masks fails."""

    def __init__(self, num_players: int, rng: np.random.Generator, failing: float = 0.0) -> None:
        self.num_players = num_players
        self.nll_MN = rng.gamma(2.0, size=(1 << num_players, NUM_WINDOWS))
        failed = rng.random(1 << num_players) < failing
        self.nll_MN[failed] = rng.choice([np.nan, np.inf, -np.inf], (failed.sum(), 1))

    def score(self, ask: _Request) -> FloatArray:
        """Mean NLL over the windows asked for, `float64[M]`."""
        nll_MN = self.nll_MN[ask.masks_MP @ (1 << np.arange(self.num_players))]
        return (nll_MN if ask.windows is None else nll_MN[:, ask.windows]).mean(axis=1)

    def of(self, removed: Sequence[int]) -> float:
        """Mean NLL over all windows without these players."""
        return float(self.score(_Masks(without(self.num_players, removed)[None]))[0])


def shapley_by_hand(loss: dict[bytes, float], num_players: int) -> FloatArray:
    """The definition: every coalition's marginal contribution, weighted."""
    values = np.zeros(num_players)
    for player in range(num_players):
        others = [p for p in range(num_players) if p != player]
        for size in range(num_players):
            weight = 1 / (num_players * math.comb(num_players - 1, size))
            for chosen in itertools.combinations(others, size):
                without = np.zeros(num_players, dtype=bool)
                without[list(chosen)] = True
                joined = without.copy()
                joined[player] = True
                gain = loss[keys(without[None])[0]] - loss[keys(joined[None])[0]]
                values[player] += weight * gain
    return values


def best_by_size(record: Sequence[Answer]) -> dict[int, tuple[BoolArray, float]]:
    """Number removed -> the best set that a search has scored, and its loss (`best_sets`)."""
    if not record:
        return {}
    players = record[0].ask.masks_MP.shape[1]
    sizes = [removing(r, Constraint(players)) for r in range(players + 1)]
    found = best_sets(record, sizes)
    return {target.sizes[0]: best for target, best in found.items()}
