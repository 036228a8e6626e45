"""A study: many runs that differ in single choices, and which of them share their masks.

Points that differ only in what can be computed again from stored scores (`REREAD`) are a family:
its masks are chosen once, on all windows of the family, and its points read them again. With
`masks: own` every point chooses its own masks, as `lpserve run` would, and scores what the store
lacks.

Imports no torch; nothing here opens an engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lpserve.config import RunConfig, as_json
from lpserve.utility import utility_named

DIMENSIONS = (
    "model",
    "dtype",
    "calibration",
    "num_windows",
    "length",
    "bos",
    "window_seed",
    "sizes",
    "utility",
    "surrogate",
    "budget",
    "seed",
)
"""Config keys that may have several levels, in the order of the tables."""
REREAD = ("calibration", "num_windows", "utility", "surrogate", "budget")
"""Dimensions in which points may differ and still be computed from the same stored scores."""
_WHERE = (
    "out",
    "store",
    "device",
    "pool",
    "engines",
    "engine",
    "engine_options",
    "grace_s",
    "progress_s",
    "mlflow",
    "experiment",
)
"""Keys of where and how a run is made: points that differ only in these are one point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run of a study."""

    id: str
    levels: dict[str, str]
    """Dimension -> its level's name, for every dimension."""
    config: RunConfig
    """With every default filled in; its calibration names the corpora of its mixture alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Points that share masks, and the run that chooses the masks."""

    leader: Point
    """A point that has all windows of the family, or a run of its own where none has."""
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """All points of a study, in the order of the file."""

    base: RunConfig
    """The config that all points have in common, with every corpus of the study."""
    points: tuple[Point, ...]
    masks: str
    removed: tuple[int, ...]
    """Numbers of removed layers that the tables list; empty: all that every point plans."""
    out: Path

    @property
    def varied(self) -> tuple[str, ...]:
        """Dimensions with more than one level."""
        return tuple(d for d in DIMENSIONS if len({p.levels[d] for p in self.points}) > 1)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that the utilities need; every mask is scored for all of them at once."""
        return tuple(dict.fromkeys(utility_named(p.config.utility).metric for p in self.points))

    @property
    def num_runs(self) -> int:
        """Number of runs: the points, and the runs that only choose masks."""
        return len({p.id for p in self.points} | {f.leader.id for f in self.families()})

    def groups(self) -> list[list[Family]]:
        """Families by the engines they need: one group for each model and dtype."""
        found: dict[tuple[str, str], list[Family]] = {}
        for family in self.families():
            key = family.leader.config.model, family.leader.config.dtype
            found.setdefault(key, []).append(family)
        return list(found.values())

    def families(self) -> list[Family]:
        """The points in groups that share masks."""
        members: dict[str, list[Point]] = {}
        for point in self.points:
            shared = REREAD if self.masks == "shared" else ()
            config = as_json(point.config)
            kept = {k: v for k, v in config.items() if k not in (*shared, *_WHERE)}
            kept["tasks"] = utility_named(point.config.utility).item == "question"
            members.setdefault(_digest(kept), []).append(point)
        return [self._family(points) for points in members.values()]

    def _family(self, points: list[Point]) -> Family:
        names = {name for point in points for name in point.config.calibration}
        config = replace(
            points[0].config,
            calibration={n: p for n, p in self.base.calibration.items() if n in names},
            num_windows=max(point.config.num_windows for point in points),
            budget=max(point.config.budget for point in points),
        )
        for point in points:
            mine = point.config
            same = mine.calibration == config.calibration and mine.num_windows == config.num_windows
            if same and mine.budget == config.budget:
                return Family(leader=point, points=tuple(points))
        levels = {
            **points[0].levels,
            "calibration": "+".join(config.calibration),
            "num_windows": str(config.num_windows),
            "budget": str(config.budget),
        }
        leader = placed_point(config, levels, masks=self.masks, out=self.out)
        return Family(leader=leader, points=tuple(points))


def placed_point(config: RunConfig, levels: dict[str, str], *, masks: str, out: Path) -> Point:
    """A point with its folder, which is named by a hash of the point's config.

    Args:
        levels: dimension -> its level's name, for every dimension.
        masks: `shared` or `own`, as in the study.
        out: folder of the study.
    """
    identity = {k: v for k, v in as_json(config).items() if k not in _WHERE}
    name = _digest({"masks": masks, **identity})[:10]
    placed = replace(
        config, out=str(out / "points" / name), store=str(out / "scores.sqlite"), mlflow=None
    )
    return Point(id=name, levels=levels, config=placed)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
