"""A study: one file that describes many runs, and which of them share their masks.

The file holds the keys of `lpserve run`, the same for every point, and a table `sweep` (or a list
of such tables) of keys with several levels: a table's points are the product of its lists. Points
that differ only in what can be read off stored scores (`REREAD`) are a family: its masks are chosen
once, on all windows of the family, and its points read them again. With `masks: own` every point
chooses its own masks, as `lpserve run` would, and scores what the store lacks.

Imports no torch; nothing here opens an engine.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lpserve.config import RunConfig, as_json, config_from, corpora
from lpserve.data.corpora import WindowRequest
from lpserve.data.items import ItemSet
from lpserve.data.prepare import check_utility
from lpserve.data.tasks import cut_item_sets
from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.runner.setup import check_model, check_sides
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
"""What may have several levels, in the order of the tables."""
REREAD = ("calibration", "num_windows", "utility", "surrogate", "budget")
"""What a point may change and still be read off another point's scores."""
MASKS = ("shared", "own")
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
"""Keys that say how and where, not what: two points that differ in them alone are one point."""


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
    """Points that share masks, and the run that chooses these."""

    leader: Point
    """One of the points where one has all windows of the family, else a run of its own."""
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """All points of a study, in the order of the file."""

    base: RunConfig
    """What all points have in common, with every corpus."""
    points: tuple[Point, ...]
    masks: str
    removed: tuple[int, ...]
    """Numbers of removed layers that the tables tell; empty: all that every point plans."""
    out: Path

    @property
    def varied(self) -> tuple[str, ...]:
        """Dimensions with more than one level."""
        return tuple(d for d in DIMENSIONS if len({p.levels[d] for p in self.points}) > 1)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the utilities are made of: every mask is scored for all of them at once."""
        return tuple(dict.fromkeys(utility_named(p.config.utility).metric for p in self.points))

    @property
    def num_runs(self) -> int:
        """Points, and runs that only choose masks."""
        return len({p.id for p in self.points} | {f.leader.id for f in self.families()})

    def groups(self) -> list[list[Family]]:
        """Families by the engines they need: one group for each model and dtype."""
        found: dict[tuple[str, str], list[Family]] = {}
        for family in self.families():
            key = family.leader.config.model, family.leader.config.dtype
            found.setdefault(key, []).append(family)
        return list(found.values())

    def families(self) -> list[Family]:
        """Points by the masks that they share."""
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
        return Family(leader=self._placed(config, levels), points=tuple(points))

    def _placed(self, config: RunConfig, levels: dict[str, str]) -> Point:
        return _placed(config, levels, self.masks, self.out)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StudyWindows:
    """The windows of one model's points: held-out ones are the same for all of them."""

    heldout: ItemSet
    cells: dict[tuple[int, bool, int], dict[str, ItemSet]]
    """(length, bos, window_seed) -> corpus -> as many calibration windows (of a task, questions) as
    any point needs."""
    wholes: frozenset[str]
    """Corpora that are used whole (.npz)."""

    @property
    def longest(self) -> TokenWindows:
        """The set with the longest windows."""
        sides = [sample for corpora in self.cells.values() for sample in corpora.values()]
        return max((s.windows for s in [self.heldout, *sides]), key=lambda windows: windows.length)

    def of(self, config: RunConfig) -> tuple[ItemSet, ItemSet]:
        """Calibration and held-out sample of a point: the first units of each of its corpora.

        Raises:
            InputError: two corpora of the point have a window in common.
        """
        parts = [
            sample if name in self.wholes else sample.first(config.num_windows)
            for name, sample in self.cells[_cell_of(config)].items()
            if name in config.calibration
        ]
        return ItemSet.concatenate(parts), self.heldout

    def atoms(self, configs: Sequence[RunConfig]) -> list[TokenWindows]:
        """Windows in parts that every point has whole or not at all.

        Stored in such parts, no score of a mask on a window is ever made twice, whichever points
        ask for it in whichever order.
        """
        found: list[TokenWindows] = []
        mine = {s.content_hash: s for s in (self.of(config)[0] for config in configs)}
        sets = [set(sample.windows.window_hashes) for sample in mine.values()]
        seen: set[str] = set()
        for corpora_of in self.cells.values():
            for sample in corpora_of.values():
                parts: dict[tuple[bool, ...], list[int]] = {}
                for row, name in enumerate(sample.windows.window_hashes):
                    pattern = tuple(name in own for own in sets)
                    if any(pattern) and name not in seen:
                        parts.setdefault(pattern, []).append(row)
                    seen.add(name)
                found += [sample.windows.select(rows) for rows in parts.values()]
        return found


def study_of(values: Mapping[str, Any], source: str) -> Study:
    """A study from plain values; every point is checked against its model's headers.

    Raises:
        InputError: an unknown key, level or point that cannot be run; names it and `source`.
    """
    values = dict(values)
    masks = values.pop("masks", "shared")
    if masks not in MASKS:
        raise InputError(f"{source}: masks must be one of {', '.join(MASKS)}: got {masks!r}")
    tables = values.pop("sweep", None)
    tables = tables if isinstance(tables, list) else [tables]
    if not tables or not all(isinstance(t, Mapping) and t for t in tables):
        raise InputError(f"{source}: sweep must be a table of keys with lists of levels")
    removed = _removed(values.pop("removed", ()), source)
    values.setdefault("out", "study")
    if values.get("store"):
        raise InputError(f"{source}: store is the study's own, in its folder; leave it out")
    if values.get("screen_windows"):
        raise InputError(f"{source}: screen_windows is not for studies; leave it out")
    levels = [_levels(table, values, source) for table in tables]
    names = _names(levels, source)
    first = {d: next(iter(named.values())) for d, named in levels[0].items() if d != "calibration"}
    base = config_from(values | first, source)  # refuses what is wrong in all points
    out, points = Path(base.out), {}
    for table in levels:
        for combination in itertools.product(*(named.items() for named in table.values())):
            chosen = dict(zip(table, combination, strict=True))
            point = _point(values, base.calibration, chosen, names, masks, out, source)
            points.setdefault(point.id, point)
    planned = min(int(p.config.max_removed or 0) for p in points.values())
    if removed and max(removed) > planned:
        raise InputError(
            f"{source}: removed asks for {max(removed)} layers, points plan {planned} at most "
            "(max_removed)"
        )
    return Study(base=base, points=tuple(points.values()), masks=masks, removed=removed, out=out)


def _removed(value: Any, source: str) -> tuple[int, ...]:
    listed = [value] if isinstance(value, int) else value
    if not isinstance(listed, list | tuple) or not all(type(r) is int and r > 0 for r in listed):
        raise InputError(f"{source}: removed must be numbers of layers, above 0: got {value!r}")
    return tuple(sorted(set(listed)))


def _levels(
    table: Mapping[str, Any], values: Mapping[str, Any], source: str
) -> dict[str, dict[str, Any]]:
    """Dimension -> name of a level -> value."""
    found: dict[str, dict[str, Any]] = {}
    for key, given in table.items():
        dimension = str(key).replace("-", "_")
        if dimension not in DIMENSIONS:
            near = difflib.get_close_matches(dimension, DIMENSIONS, n=1)
            hint = (
                f"; did you mean {near[0]!r}?" if near else f": known are {', '.join(DIMENSIONS)}"
            )
            raise InputError(f"{source}: unknown dimension {key!r} in sweep{hint}")
        named = _named(dimension, given, values, source)
        if not named:
            raise InputError(f"{source}: sweep {dimension} has no levels")
        found[dimension] = named
    return {d: found[d] for d in DIMENSIONS if d in found}


def _names(tables: list[dict[str, dict[str, Any]]], source: str) -> dict[tuple[str, str], str]:
    """(dimension, value) -> the name under which the value comes first; raises InputError where a
    name stands for two values."""
    names: dict[tuple[str, str], str] = {}
    values: dict[tuple[str, str], str] = {}
    for table in tables:
        for dimension, named in table.items():
            for name, value in named.items():
                known = _canonical(value)
                if values.setdefault((dimension, name), known) != known:
                    raise InputError(f"{source}: sweep {dimension} names two things {name!r}")
                names.setdefault((dimension, known), name)
    return names


def _canonical(value: Any) -> str:
    return json.dumps(sorted(value) if isinstance(value, list | tuple) else value)


def _named(dimension: str, given: Any, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    if dimension == "calibration":
        return _mixtures(given, values, source)
    if dimension == "model" and isinstance(given, Mapping):
        return {str(name): path for name, path in given.items()}
    if not isinstance(given, list):
        raise InputError(f"{source}: sweep {dimension} must be a list: got {given!r}")
    names = [Path(str(v)).name if dimension == "model" else _name(v) for v in given]
    if len(set(names)) != len(names):
        raise InputError(f"{source}: sweep {dimension} repeats a level: {', '.join(names)}")
    return dict(zip(names, given, strict=True))


def _name(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _mixtures(given: Any, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Mixtures of the study's corpora: name -> the corpora's names."""
    known = corpora(values.get("calibration") or {}, f"{source}: calibration")
    if isinstance(given, list):
        lists = [[m] if isinstance(m, str) else m for m in given]
        given = {"+".join(map(str, m)) if isinstance(m, list) else str(m): m for m in lists}
    if not isinstance(given, Mapping):
        raise InputError(f"{source}: sweep calibration must be mixtures: got {given!r}")
    for name, mixture in given.items():
        listed = isinstance(mixture, list) and all(isinstance(c, str) for c in mixture)
        if not listed or not mixture:
            raise InputError(
                f"{source}: mixture {name!r} must be a list of corpora: got {mixture!r}"
            )
        for corpus in mixture:
            if corpus not in known:
                raise InputError(
                    f"{source}: mixture {name!r} names {corpus!r}; calibration has "
                    f"{', '.join(known) or 'nothing'}"
                )
    return {str(name): mixture for name, mixture in given.items()}


def _point(
    values: Mapping[str, Any],
    texts: Mapping[str, str],
    chosen: dict[str, tuple[str, Any]],
    names: Mapping[tuple[str, str], str],
    masks: str,
    out: Path,
    source: str,
) -> Point:
    values = {**values, **{d: v for d, (_, v) in chosen.items() if d != "calibration"}}
    mixture = chosen.get("calibration", ("", list(texts)))[1]
    values["calibration"] = {name: path for name, path in texts.items() if name in mixture}
    described = ", ".join(f"{d} {name}" for d, (name, _) in chosen.items())
    try:
        config = check_model(config_from(values, source))
    except InputError as error:
        raise InputError(f"{source}: point {described}: {error}") from None
    plain = as_json(config)
    levels = {}
    for dimension in DIMENSIONS:
        value = list(config.calibration) if dimension == "calibration" else plain[dimension]
        default = {"calibration": "+".join(config.calibration), "model": Path(config.model).name}
        known = names.get((dimension, _canonical(value)))
        levels[dimension] = known or default.get(dimension) or _name(value)
    return _placed(config, levels, masks, out)


def _placed(config: RunConfig, levels: dict[str, str], masks: str, out: Path) -> Point:
    """A point with its folder, which is named by what the point is."""
    identity = {k: v for k, v in as_json(config).items() if k not in _WHERE}
    name = _digest({"masks": masks, **identity})[:10]
    placed = replace(
        config, out=str(out / "points" / name), store=str(out / "scores.sqlite"), mlflow=None
    )
    return Point(id=name, levels=levels, config=placed)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _cell_of(config: RunConfig) -> tuple[int, bool, int]:
    return config.length, config.bos, config.window_seed


def study_windows(study: Study, configs: Sequence[RunConfig]) -> StudyWindows:
    """The windows of the points of one model.

    Held-out windows are cut once, as long as the longest calibration windows, with the first
    point's BOS and seed: one yardstick for all points. Without held-out texts they come from the
    last fifth of every corpus of the study.

    Raises:
        InputError: a text is unreadable or too short, windows of the two sides share text, or they
            do not fit the model.
    """
    base = configs[0]
    counts: dict[tuple[int, bool, int], dict[str, int]] = {}
    for config in configs:
        own = counts.setdefault(_cell_of(config), {})
        for name in config.calibration:
            own[name] = max(own.get(name, 1), config.num_windows)
    used = {name for own in counts.values() for name in own}
    texts = {n: p for n, p in study.base.calibration.items() if n in used}
    longest = max(length for length, _, _ in counts)
    yardstick = (longest, base.bos, base.window_seed)
    cells: dict[tuple[int, bool, int], dict[str, ItemSet]] = {}
    heldout: list[ItemSet] = []
    for cell in dict.fromkeys([*counts, yardstick]):
        own = counts.get(cell, {})
        length, bos, seed = cell
        request = WindowRequest(
            calibration=texts,
            heldout=base.heldout,
            num_windows={n: own.get(n, 1) for n in texts},
            heldout_windows=base.heldout_windows,
            length=length,
            seed=seed,
            bos=bos,
            field=base.text_field,
        )
        calibration, held = cut_item_sets(
            request, base.model, include_path=base.include_path, num_fewshot=base.num_fewshot
        )
        if cell == yardstick:
            heldout = held
        if own:
            cut = dict(zip(texts, calibration, strict=True))
            cells[cell] = {name: cut[name] for name in texts if name in own}
    wholes = frozenset(n for n, p in texts.items() if p.endswith(".npz"))
    windows = StudyWindows(heldout=ItemSet.concatenate(heldout), cells=cells, wholes=wholes)
    told: set[str] = set()
    for config in configs:
        config.check_unused_keys(num_fewshot=False)
        calibration, held = windows.of(config)
        check_utility(utility_named(config.utility), calibration, held)
        if calibration.content_hash not in told:
            check_sides(base, calibration, held)
        told.add(calibration.content_hash)
    return windows
