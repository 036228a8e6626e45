"""Work units on their way through the dispatcher: their failures, and their parts by windows.

What follows a failure is decided here (`after_failure`); so is how a mask is split over windows and
joined again. Nothing here knows engines or time.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.scoring.pool import UnitResult, WorkUnit
from lpserve.types import FloatArray, Scores, Work


@dataclass(frozen=True, kw_only=True, slots=True)
class GivenUp:
    """A mask that no engine could score: alone in its unit it failed twice. Or masks whose overlap
    none could measure."""

    unit: WorkUnit
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QueuedUnit(WorkUnit):
    """A work unit with its failure history."""

    failures: int = 0
    failed_at: frozenset[str] = frozenset()
    """Hardware of the engines at which it failed."""
    window_slice: WindowSlice | None = None
    """Set where the unit is a part of one mask's windows."""


@dataclass(slots=True, eq=False)
class SplitUnit:
    """A unit of one mask whose windows are scored in several parts, and the scores so far."""

    unit: QueuedUnit
    values_MN: FloatArray
    """One row for each metric, NLL first; a column for each window."""
    missing: int
    """Parts whose scores have not come."""
    work: Work = field(default_factory=Work)
    ended: bool = False
    """Whether the mask was given up: its other parts are dropped."""


@dataclass(frozen=True, slots=True, eq=False)
class WindowSlice:
    """Consecutive windows of a split unit."""

    split: SplitUnit
    rows: slice


def after_failure(
    unit: QueuedUnit, failed_at: Collection[str], reason: str
) -> list[QueuedUnit] | GivenUp:
    """What follows when no engine scored a unit: the units to queue instead, or the mask given up.

    A first failure: the unit once more. A second: its halves, so that the mask that cannot be
    scored is found by bisection. A second failure of a single mask: it is given up.

    Args:
        failed_at: hardware of the engines at which it failed just now, one entry for each failure
            it is blamed for; none where it is not to blame.
    """
    failures, places = unit.failures + len(failed_at), unit.failed_at.union(failed_at)
    if not failed_at or failures < 2:
        return [replace(unit, failures=failures, failed_at=places)]
    if len(unit.masks_MP) == 1 or unit.overlap:
        if unit.window_slice:  # the mask is given up on all its windows
            unit.window_slice.split.ended = True
            unit = unit.window_slice.split.unit
        return GivenUp(unit=unit, reason=reason)
    half = len(unit.masks_MP) // 2
    # A half counts one failure, so that its next one bisects it at once. A single mask counts none:
    # it is not given up because of its neighbours.
    return [
        replace(unit, masks_MP=masks_MP, failures=1 if len(masks_MP) > 1 else 0, failed_at=places)
        for masks_MP in (unit.masks_MP[:half], unit.masks_MP[half:])
    ]


def split_over_windows(
    unit: QueuedUnit,
    windows: TokenWindows,
    num_parts: int,
    register: Callable[[TokenWindows], str],
) -> list[QueuedUnit]:
    """Parts of a unit of one mask, each on consecutive windows, of nearly equal numbers.

    Args:
        windows: the unit's windows.
        register: makes windows known to the engines; returns their hash.
    """
    num_windows = windows.num_windows
    values_MN = np.empty((1 + len(unit.extra_metrics), num_windows))
    split = SplitUnit(unit=unit, values_MN=values_MN, missing=num_parts)
    bounds = np.linspace(0, num_windows, num_parts + 1).astype(int).tolist()
    parts = []
    for start, stop in pairwise(bounds):
        key = register(windows.select(np.arange(start, stop)))
        window_slice = WindowSlice(split, slice(start, stop))
        parts.append(replace(unit, windows=key, window_slice=window_slice))
    return parts


def joined(result: UnitResult, windows_of: Callable[[str], TokenWindows]) -> UnitResult | None:
    """The result of a full unit: the given one or, once its last part has come, of a split unit.

    None while other parts are missing, and for parts of a mask that was given up.
    """
    unit, scores = result.unit, result.scores
    assert isinstance(unit, QueuedUnit)
    if unit.window_slice is None or scores is None:
        return result
    split = unit.window_slice.split
    for values_N, metric in zip(split.values_MN, ("nll", *unit.extra_metrics), strict=True):
        values_N[unit.window_slice.rows] = scores.of(metric)[0]
    split.missing -= 1
    split.work += scores.work
    if split.missing or split.ended:
        return None
    # One mask was scored: a layer-forward counts once for all windows.
    work = replace(scores.work, tokens=split.work.tokens, seconds=split.work.seconds)
    nll_1N, *others = split.values_MN[:, None]
    full = Scores(
        nll_MN=nll_1N,
        num_tokens_N=windows_of(split.unit.windows).num_tokens_N,
        work=work,
        others=dict(zip(unit.extra_metrics, others, strict=True)),
    )
    return replace(result, unit=split.unit, scores=full)
