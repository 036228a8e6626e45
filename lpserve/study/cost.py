"""What a study will do at most, before an engine starts: `lpserve.runner.cost` for every family.

Points that read masks again are counted with their held-out check alone. Points that share scores
take less than told here: nothing is subtracted for what the store holds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.runner.cost import CostSettings, cost
from lpserve.study.study import Point, Study, StudyWindows
from lpserve.study.sweep import finished

ASK_ABOVE_PFLOP = 10.0
"""Work above which a sweep wants to be told `--yes`: 17 s of an H100 at 600 TFLOP/s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyCost:
    """Upper bounds of what is left to do."""

    points: int
    points_left: int
    families: int
    """Times that masks are chosen."""
    masks: int
    """Masks on calibration windows."""
    scores: int
    """Scores of a mask on a window, held-out ones included."""
    pflop: float | None
    """1e15 floating-point operations; None: not to be told."""
    why_unknown: str = ""

    @property
    def ask(self) -> bool:
        """Whether this is to be confirmed."""
        return self.pflop is None or self.pflop > ASK_ABOVE_PFLOP

    def describe(self) -> str:
        """One line."""
        work = f"{self.pflop:.3g} PFLOP" if self.pflop is not None else "FLOP not known "
        if self.pflop is None:
            work += f"({self.why_unknown})"
        return (
            f"{self.points} points, {self.points_left} left to do; times that masks are chosen: "
            f"{self.families}; at most {self.masks:,} masks, {self.scores:,} scores of a mask on a "
            f"window, {work}"
        )


def study_cost(study: Study, windows: Mapping[str, StudyWindows]) -> StudyCost:
    """Count what is not finished; every family's masks on its windows, and every held-out check."""
    masks = scores = families = left = 0
    pflop: float | None = 0.0
    why = ""
    counted = functools.cache(cost)  # points mostly differ in what does not count
    for family in study.families():
        followers = [p for p in family.points if p is not family.leader]
        own = windows[family.leader.config.model]
        first = family.leader.id
        open_points = [p for p in followers if finished(p, True, first, own, study.metrics) is None]
        leads = finished(family.leader, True, first, own, study.metrics) is None
        families += leads
        left += len(open_points) + (leads and family.leader in family.points)
        for point in [family.leader] * leads + open_points:
            calibration, heldout = (sample.windows for sample in own.of(point.config))
            leading = point is family.leader
            try:
                held = counted(_settings(point, calibration.select([0]), heldout, heldout.length))
                told = counted(_settings(point, calibration, heldout, calibration.length))
            except InputError as error:
                pflop, why = None, str(error)
                continue
            scores += held.heldout.masks * heldout.num_windows
            flop = held.heldout.flop
            if leading:
                masks += told.scoring.masks
                scores += told.scoring.masks * calibration.num_windows
                flop += told.scoring.flop
                # the whole model's head once more beside every mask's
                heads = sum(metric == "kl" for metric in study.metrics) * told.scoring.masks
                flop += heads * told.scoring.tokens * told.size.head_flop()
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
