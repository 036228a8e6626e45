"""An exhaustive game read back: arrays, utilities, and the best set of every size.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.exhaustive.family import SmallRemovals
from lpserve.exhaustive.segments import (
    Manifest,
    Segment,
    num_segments,
    read_manifest,
    read_segment,
    segment_range,
)
from lpserve.masks import removed_players
from lpserve.types import BoolArray, FloatArray, IntArray, perplexity
from lpserve.utility import Utility, UtilityView, utility_named

NEAR = 0.01
"""Sets within this share of the lowest perplexity are counted as near the best."""


@dataclass(frozen=True, eq=False)
class ExhaustiveGame:
    """Every set of up to `family.max_removed` players, scored; in the order of their masks."""

    manifest: Manifest
    windows: TokenWindows
    family: SmallRemovals
    masks_MP: BoolArray
    values: dict[str, NDArray[np.float32]]
    """Metric -> sums over each window, `float32[M, N]`; NaN where a mask could not be scored."""
    reasons: dict[int, str]
    """Row -> why its mask could not be scored."""

    @property
    def utility(self) -> Utility:
        """The utility that the game was scored for."""
        return utility_named(self.manifest.utility)

    @cached_property
    def mean_nll_M(self) -> FloatArray:
        """Nats per token of each mask, `float64[M]`."""
        sums_M = self.values["nll"].astype(np.float64).sum(axis=1)
        return np.asarray(sums_M / self.windows.num_tokens_N.sum(), dtype=np.float64)

    def utilities_M(self, utility: str | None = None) -> FloatArray:
        """What each mask is worth, `float64[M]`, higher is better; NaN where it has no score.

        Args:
            utility: another one; None: the one that the game was scored for.

        Raises:
            InputError: the utility is unknown, or its metric was not scored.
        """
        chosen = utility_named(utility or self.manifest.utility)
        if chosen.metric not in self.values:
            raise InputError(
                f"utility {chosen.name} needs {chosen.metric}, and the game holds "
                f"{', '.join(self.values)}: score it with `lpserve exhaustive --utility "
                f"{chosen.name}`"
            )
        loss_MN = self.values[chosen.metric]
        full_N = loss_MN[-1]  # the last mask in order keeps all players
        return UtilityView(chosen, self.windows.num_tokens_N, full_N).of(loss_MN)

    def rows(self, masks_MP: BoolArray) -> IntArray:
        """The row of each mask, `int64[M]`; -1 for a mask that the game does not hold."""
        return self.family.ranks(masks_MP)


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimum:
    """The best of all sets of one size."""

    num_removed: int
    removed: tuple[int, ...]
    ppl: float
    near: int
    """Sets of the size whose perplexity is at most `NEAR` above, this one included."""
    sets: int
    """Sets of the size that have a score."""


def read_exhaustive(folder: str | Path) -> ExhaustiveGame:
    """A complete game as arrays.

    Raises:
        InputError: the folder holds none, or its scoring has not ended.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    family = manifest.family
    parts = list(_segments(folder, manifest, family))
    reasons = {start + row: reason for start, part in parts for row, reason in part.reasons.items()}
    return ExhaustiveGame(
        manifest=manifest,
        windows=_windows(folder, manifest),
        family=family,
        masks_MP=family.masks(0, family.count),
        values={
            metric: np.concatenate([part.values[metric] for _, part in parts])
            for metric in manifest.metrics
        },
        reasons=reasons,
    )


def optima(folder: str | Path) -> list[Optimum]:
    """The set of the lowest perplexity of every size, from a game of any number of masks: its
    segments are read one after the other. Ties go to the smaller mask key.

    Raises: as `read_exhaustive`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    family, num_tokens = manifest.family, _windows(folder, manifest).num_tokens_N.sum()
    sizes = {removed: _Size() for removed in range(1, family.max_removed + 1)}
    for start, part in _segments(folder, manifest, family):
        mean_M = part.values["nll"].astype(np.float64).sum(axis=1) / num_tokens
        masks_MP = family.masks(start, start + len(mean_M))
        removed_M = (~masks_MP).sum(axis=1)
        for removed, size in sizes.items():
            rows = np.flatnonzero((removed_M == removed) & np.isfinite(mean_M))
            if len(rows):
                size.add(masks_MP[rows], mean_M[rows])
    return [
        Optimum(
            num_removed=removed,
            removed=size.removed,
            ppl=float(perplexity(np.float64(size.lowest))),
            near=len(size.near_M),
            sets=size.count,
        )
        for removed, size in sizes.items()
        if size.count
    ]


class _Size:
    """The best of the sets of one size so far."""

    def __init__(self) -> None:
        self.removed: tuple[int, ...] = ()
        self.lowest = np.inf
        self.count = 0
        self.near_M: FloatArray = np.empty(0)

    def add(self, masks_MP: BoolArray, mean_M: FloatArray) -> None:
        """Take in further sets with finite means, after those before in order."""
        self.count += len(mean_M)
        place = int(mean_M.argmin())
        if mean_M[place] < self.lowest:
            self.lowest, self.removed = float(mean_M[place]), removed_players(masks_MP[place])
        both_M = np.concatenate([self.near_M, mean_M])
        self.near_M = both_M[both_M <= self.lowest + np.log1p(NEAR)]


def _segments(
    folder: Path, manifest: Manifest, family: SmallRemovals
) -> Iterator[tuple[int, Segment]]:
    """(number of the first mask, segment) of every segment, in order."""
    for number in range(num_segments(family)):
        start, _ = segment_range(family, number)
        metrics = manifest.metrics
        yield start, read_segment(folder, number, family, metrics, manifest.num_windows)


def _windows(folder: Path, manifest: Manifest) -> TokenWindows:
    """The game's windows; raises InputError where windows.npz holds others."""
    path = folder / "windows.npz"
    found = TokenWindows.from_npz(path, name="calibration")
    windows = TokenWindows(found.tokens_NT, found.scored_NT, tuple(manifest.corpora))
    if windows.num_windows != manifest.num_windows or windows.content_hash != manifest.windows:
        raise InputError(f"{path} holds other windows than the game was scored on")
    return windows
