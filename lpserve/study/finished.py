"""What is known of a finished or failed point, and point.json, which marks a point finished."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lpserve.data.items import ItemSet
from lpserve.inputs.documents import read_json
from lpserve.runner.run import RunResult
from lpserve.store.files import write_text
from lpserve.study.study import Point, Study
from lpserve.study.windows import StudyWindows

POINT_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What is known of a point, or of a run that chose masks for others."""

    point: Point
    in_study: bool
    """Whether it is a point of the study; if not, it only chose masks for points."""
    masks_of: str
    """Id of the run that chose its masks; its own id where it chose them itself."""
    failed: str
    """Why there is no result; empty: there is one."""
    masks: int = 0
    """Masks on calibration windows."""
    scores: int = 0
    """Scores of a mask on a window that it used, held-out ones included."""
    scores_new: int = 0
    """How many of them engines gave for it; the others were in the store."""
    layer_forwards: int = 0
    seconds: float = 0.0

    @classmethod
    def from_result(
        cls,
        result: RunResult,
        point: Point,
        *,
        in_study: bool,
        masks_of: str,
        calibration: ItemSet,
        heldout: ItemSet,
        seconds: float,
    ) -> Finished:
        """What a run of the point just gave, on these windows."""
        record = result.outcome.scored
        scores = len(record.masks_MP) * calibration.windows.num_windows
        scores += len(record.heldout_masks_MP) * heldout.windows.num_windows
        return cls(
            point=point,
            in_study=in_study,
            masks_of=masks_of,
            failed="",
            masks=len(record.masks_MP),
            scores=scores,
            scores_new=result.scores_new,
            layer_forwards=result.work.layer_forwards,
            seconds=round(seconds, 3),
        )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.point.config.out)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """Every point of a study, finished or failed."""

    study: Study
    runs: tuple[Finished, ...]
    """Runs that only chose masks, then the points in the study's order."""
    scores_held: int
    """Distinct scores of a mask on a window that the study's store holds."""
    scores_twice: int
    """Scores that were made although the store held them: 0, unless a study grew by windows that
    partly overlap with stored ones."""

    @property
    def points(self) -> list[Finished]:
        """The points, without runs that only chose masks."""
        return [run for run in self.runs if run.in_study]

    @property
    def failed(self) -> list[Finished]:
        """Points without a result."""
        return [run for run in self.points if run.failed]

    @property
    def scores_new(self) -> int:
        """Scores that engines gave, over all runs."""
        return sum(run.scores_new for run in self.runs)

    @property
    def scores_read(self) -> int:
        """Scores that were read from the store, over all runs."""
        return sum(run.scores for run in self.runs) - self.scores_new


def write_finished(
    run: Finished, calibration: ItemSet, heldout: ItemSet, metrics: Sequence[str]
) -> None:
    """Write point.json into the point's folder, which makes the point a finished one."""
    record = {
        "format": POINT_FORMAT,
        "point": run.point.id,
        "levels": run.point.levels,
        "masks_of": run.masks_of,
        "masks": run.masks,
        "scores": run.scores,
        "scores_new": run.scores_new,
        "layer_forwards": run.layer_forwards,
        "seconds": run.seconds,
        "metrics": sorted(metrics),
        "calibration": calibration.content_hash,
        "heldout": heldout.content_hash,
    }
    write_text(run.folder / "point.json", json.dumps(record, indent=1) + "\n")
    (run.folder / "failure.txt").unlink(missing_ok=True)


def read_finished(
    point: Point,
    windows: StudyWindows,
    metrics: Sequence[str],
    *,
    in_study: bool,
    masks_of: str,
) -> Finished | None:
    """What an earlier sweep left of a point; None: the point is still to be run.

    A point is finished if it read the same masks on the same windows, and was scored for every
    metric that the study's utilities need.
    """
    path = Path(point.config.out) / "point.json"
    try:
        record = read_json(path)
        calibration, heldout = windows.of(point.config)
        same = {
            "format": POINT_FORMAT,
            "masks_of": masks_of,
            "calibration": calibration.content_hash,
            "heldout": heldout.content_hash,
        }
        if any(record[key] != value for key, value in same.items()):
            return None
        if masks_of == point.id and not set(metrics) <= set(record["metrics"]):
            return None  # others may read its masks
        return Finished(
            point=point,
            in_study=in_study,
            masks_of=masks_of,
            failed="",
            **{
                k: record[k] for k in ("masks", "scores", "scores_new", "layer_forwards", "seconds")
            },
        )
    except (ValueError, KeyError, TypeError):
        return None
