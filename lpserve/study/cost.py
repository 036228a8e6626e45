"""Upper bounds of a study's work, before an engine starts: `lpserve.runner.cost` for every family.

A point that reads the masks of another is counted with its held-out check only. Points that share
scores take less than these bounds: nothing is subtracted for what the store holds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.model.players import FULL_LAYER
from lpserve.runner.cost import CostSettings, cost
from lpserve.study.finished import read_finished
from lpserve.study.study import Point, Study
from lpserve.study.windows import StudyWindows

ASK_ABOVE_PFLOP = 10.0
"""Work above which a sweep needs `--yes` to begin: 17 s of an H100 at 600 TFLOP/s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyCost:
    """Upper bounds of the work that is left."""

    points: int
    points_left: int
    families: int
    """How many times masks are chosen."""
    masks: int
    """Masks on calibration windows."""
    scores: int
    """Scores of a mask on a window, held-out ones included."""
    pflop: float | None
    """1e15 floating-point operations; None: unknown."""
    why_unknown: str = ""

    @property
    def ask(self) -> bool:
        """Whether the user has to confirm."""
        return self.pflop is None or self.pflop > ASK_ABOVE_PFLOP

    def describe(self) -> str:
        """One line for the terminal."""
        work = f"{self.pflop:.3g} PFLOP" if self.pflop is not None else "FLOP not known "
        if self.pflop is None:
            work += f"({self.why_unknown})"
        return (
            f"{self.points} points, {self.points_left} left to do; times that masks are chosen: "
            f"{self.families}; at most {self.masks:,} masks, {self.scores:,} scores of a mask on a "
            f"window, {work}"
        )


def study_cost(study: Study, windows: Mapping[str, StudyWindows]) -> StudyCost:
    """Count the unfinished work: every family's masks on its windows, and every held-out check."""
    masks = scores = families = left = 0
    pflop: float | None = 0.0
    why = ""
    counted = functools.cache(cost)  # points mostly differ in what does not count
    for family in study.families():
        followers = [p for p in family.points if p is not family.leader]
        own = windows[family.leader.config.model]
        first = family.leader.id

        def is_open(point: Point, own: StudyWindows = own, first: str = first) -> bool:
            found = read_finished(point, own, study.metrics, in_study=True, masks_of=first)
            return found is None

        open_points = [p for p in followers if is_open(p)]
        leads = is_open(family.leader)
        families += leads
        left += len(open_points) + (leads and family.leader in family.points)
        for point in [family.leader] * leads + open_points:
            calibration, heldout = (sample.windows for sample in own.of(point.config))
            leading = point is family.leader
            try:
                held = counted(_settings(point, calibration.select([0]), heldout, heldout.length))
                work = counted(_settings(point, calibration, heldout, calibration.length))
                if point.config.players != FULL_LAYER:
                    raise InputError("work over parts of layers is not counted")
            except InputError as error:
                pflop, why = None, str(error)
                continue
            scores += held.heldout.masks * heldout.num_windows
            flop = held.heldout.flop
            if leading:
                masks += work.scoring.masks
                scores += work.scoring.masks * calibration.num_windows
                flop += work.scoring.flop
                # KL compares with the full model, whose head runs once more for every mask
                heads = sum(metric == "kl" for metric in study.metrics) * work.scoring.masks
                flop += heads * work.scoring.tokens * work.size.head_flop()
            pflop = None if pflop is None else pflop + flop / 1e15
    return StudyCost(
        points=len(study.points),
        points_left=left,
        families=families,
        masks=masks,
        scores=scores,
        pflop=pflop,
        why_unknown=why,
    )


def _settings(
    point: Point, calibration: TokenWindows, heldout: TokenWindows, length: int
) -> CostSettings:
    config = point.config
    return CostSettings(
        model=config.model,
        budget=config.budget,
        max_removed=config.max_removed,
        round_size=config.round_size,
        num_windows=calibration.num_windows,
        heldout_windows=heldout.num_windows,
        length=length,
        seed=config.seed,
        dtype=config.dtype,
    )
