"""Settling a plan: for every target the best scored sets race on windows that chose none of them.

The windows are those that a larger `num_windows` would have added, so that a run with more windows
later reads the scores again. Scores of a race are stored like all others.

Notation: M contenders, N windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from lpserve.analysis.record import RunRecord
from lpserve.config import RunConfig
from lpserve.data.corpora import check_no_overlap
from lpserve.data.items import ItemSet
from lpserve.data.prepare import cut_run_items
from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.masks import keys, removed_list
from lpserve.plan.plan import Settlement
from lpserve.plan.race import MAX_CONTENDERS, MIN_WINDOWS, RaceRule, Standing, look_sizes, standing
from lpserve.runner.coordinator import RunLoop
from lpserve.types import BoolArray, FloatArray
from lpserve.utility import utility_named


def race_windows(config: RunConfig, calibration: ItemSet, heldout: ItemSet) -> TokenWindows | None:
    """The windows of a run's races, those of each corpus in turn; None where none is asked for.

    Raises:
        InputError: the run's utility, corpora or numbers of windows allow no race, or its windows
            share text with those held out.
    """
    if config.settle is None:
        if config.max_windows is not None:
            raise InputError("max_windows is for races: give settle too, 0.9 say")
        return None
    if config.goal == "values":
        raise InputError("settle is about the plan, and goal values searches none")
    least = config.num_windows + MIN_WINDOWS
    if config.max_windows is None or config.max_windows < least:
        raise InputError(
            f"settle needs max_windows of at least {least}, {MIN_WINDOWS} more than num_windows "
            f"({config.num_windows}): got {config.max_windows}"
        )
    if not utility_named(config.utility).in_nats:
        raise InputError(
            f"settle compares losses in nats per token, and utility {config.utility} has none: "
            "leave it out, or use neg_nll, ppl_ratio or neg_kl"
        )
    for name, path in config.calibration.items():
        if path.endswith(".npz"):
            raise InputError(
                f"settle draws more windows of each text, and {name!r} is an .npz, whose windows "
                "are all used: name a text"
            )
    alone = replace(config, num_windows=config.max_windows, settle=None, max_windows=None)
    try:
        larger, _ = cut_run_items(alone)
    except InputError as error:  # a text is too short for them
        raise InputError(str(error).replace("num_windows", "max_windows")) from None
    fresh, start = [], 0
    for _, count in larger.corpora:
        fresh.append(np.arange(start + config.num_windows, start + count))
        start += count
    seen = set(calibration.windows.window_hashes)
    rows = np.stack(fresh, axis=1).ravel()  # a window of each corpus in turn
    rows = rows[[larger.windows.window_hashes[row] not in seen for row in rows]]
    windows = larger.windows.select(rows)
    check_no_overlap(windows, heldout.windows)
    return windows


@dataclass(slots=True, eq=False)
class _Race:
    """The contenders of one target, and where they stand."""

    share: float | None
    """Of a cost, if the target is one."""

    masks_MP: BoolArray
    alive_M: BoolArray
    loss_MN: FloatArray = field(default_factory=lambda: np.empty((0, 0)))
    last: Standing | None = None
    windows: int = 0

    @property
    def over(self) -> bool:
        return self.alive_M.sum() < 2 or (self.last is not None and self.last.decided)


def settle(
    loop: RunLoop, record: RunRecord, utilities_M: FloatArray, windows: TokenWindows
) -> tuple[Settlement, ...]:
    """Race the best sets of every target.

    Raises:
        RunInterrupted: a signal came; what was scored is kept.
    """
    config = loop.config
    assert config.settle is not None
    races = _contenders(record, utilities_M)
    corpora = len(record.corpora)
    looks = look_sizes(min(config.num_windows * corpora, windows.num_windows), windows.num_windows)
    rule = RaceRule(error=1 - config.settle, tie=math.log1p(config.tie), looks=len(looks))
    before = 0
    for number, size in enumerate(looks, start=1):
        at_work = [race for race in races if not race.over]
        if not at_work:
            break
        masks_MP = np.unique(
            np.concatenate([race.masks_MP[race.alive_M] for race in at_work]), axis=0
        )
        part = windows.select(np.arange(before, size))
        loss_MN = _scored(loop, masks_MP, part, f"race, look {number} of {len(looks)}")
        row_of = {key: row for row, key in enumerate(keys(masks_MP))}
        for race in at_work:
            rows = [row_of.get(key, -1) for key in keys(race.masks_MP)]
            new_MN = np.where(race.alive_M[:, None], loss_MN[rows], np.nan)
            race.loss_MN = np.concatenate([race.loss_MN, new_MN], axis=1)
            race.alive_M &= np.isfinite(race.loss_MN).all(axis=1)
            race.windows = size
            if race.alive_M.any():
                weight_N = windows.num_tokens_N[:size]
                race.last = standing(race.loss_MN, weight_N, race.alive_M, rule)
                race.alive_M = race.last.alive_M
        before = size
    return _settlements(races, config.settle)


def _contenders(record: RunRecord, utilities_M: FloatArray) -> list[_Race]:
    """For every target, in order, the best scored sets, best first."""
    races = []
    for target in record.targets:
        rows = np.flatnonzero(np.isfinite(utilities_M) & target.holds(record.masks_MP))
        rows = rows[np.argsort(-utilities_M[rows], kind="stable")[:MAX_CONTENDERS]]
        if len(rows):
            alive_M, none_MN = np.ones(len(rows), dtype=bool), np.empty((len(rows), 0))
            races.append(_Race(target.share, record.masks_MP[rows], alive_M, none_MN))
    return races


def _scored(loop: RunLoop, masks_MP: BoolArray, windows: TokenWindows, stage: str) -> FloatArray:
    """Losses of masks on windows, `float64[M, N]`; NaN where one could not be scored."""
    calibration = loop.tracker
    request = loop.score_apart(masks_MP, ItemSet(windows), stage)
    loop.tracker = calibration
    return request.values[loop.utility.metric].astype(np.float64)


def _settlements(races: list[_Race], confidence: float) -> tuple[Settlement, ...]:
    """How every race ended. Among sets that tie the first choice is the one that holds the smaller
    plan's, if one does."""
    found: list[Settlement] = []
    smaller: set[int] = set()
    for race in races:
        left = np.flatnonzero(race.alive_M)
        if not len(left):
            continue
        if race.last is not None:
            left = left[np.argsort(race.last.behind_M[left], kind="stable")]
        sets = [removed_list(race.masks_MP[row]) for row in left]
        nested = [place for place, removed in enumerate(sets) if smaller <= set(removed)]
        first = nested[0] if smaller and nested else 0
        chosen = sets.pop(first)
        behind, half = 0.0, None
        if race.last is not None and race.windows:
            behind = float(race.last.behind_M[left[first]])
            widest = np.delete(race.last.half_width_M[left], first)
            half = float(widest.max()) if len(widest) and np.isfinite(widest).all() else None
        found.append(
            Settlement(
                removed=chosen,
                outcome="tie" if sets else "wins",
                ties=sets,
                contenders=len(race.masks_MP),
                windows=race.windows,
                confidence=confidence,
                behind=behind,
                half_width=half,
                target=race.share,
            )
        )
        smaller = set(chosen)
    return tuple(found)
