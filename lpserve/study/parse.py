"""A study from its file.

The file holds the keys of `lpserve run`, the same for every point, and a table `sweep` (or a list
of such tables) of keys with several levels: a table's points are the product of its lists.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpserve.config import as_json, config_from, corpora
from lpserve.errors import InputError
from lpserve.runner.setup import check_model
from lpserve.study.study import DIMENSIONS, Point, Study, placed_point

MASKS = ("shared", "own")
MAX_POINTS = 10_000
"""Of one study; each has a run folder and rows in the study's tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _StudyFile:
    """What all points of a study file have in common."""

    source: str
    """The file, as error messages name it."""
    values: Mapping[str, Any]
    """Keys of `lpserve run`."""
    texts: Mapping[str, str]
    """Corpus -> path, of all calibration corpora."""
    names: Mapping[tuple[str, str], str]
    """(dimension, value as JSON) -> the level's name."""
    masks: str
    out: Path


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
    if values.get("target"):
        raise InputError(f"{source}: target is not for studies, which compare by number removed")
    if values.get("screen_windows"):
        raise InputError(f"{source}: screen_windows is not for studies; leave it out")
    levels = [_levels(table, values, source) for table in tables]
    names = _names(levels, source)
    first = {d: next(iter(named.values())) for d, named in levels[0].items() if d != "calibration"}
    base = config_from(values | first, source)  # refuses what is wrong in all points
    out, points = Path(base.out), {}
    file = _StudyFile(
        source=source, values=values, texts=base.calibration, names=names, masks=masks, out=out
    )
    planned_points = sum(math.prod(map(len, table.values())) for table in levels)
    if planned_points > MAX_POINTS:
        raise InputError(f"{source}: sweep has {planned_points:,} points, {MAX_POINTS:,} at most")
    for table in levels:
        for combination in itertools.product(*(named.items() for named in table.values())):
            chosen = dict(zip(table, combination, strict=True))
            point = _point(file, chosen)
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


def _point(file: _StudyFile, chosen: Mapping[str, tuple[str, Any]]) -> Point:
    """The point of one combination: dimension -> (name of its level, value)."""
    values = {**file.values, **{d: v for d, (_, v) in chosen.items() if d != "calibration"}}
    mixture = chosen.get("calibration", ("", list(file.texts)))[1]
    values["calibration"] = {name: path for name, path in file.texts.items() if name in mixture}
    described = ", ".join(f"{d} {name}" for d, (name, _) in chosen.items())
    try:
        config = check_model(config_from(values, file.source))
    except InputError as error:
        raise InputError(f"{file.source}: point {described}: {error}") from None
    plain = as_json(config)
    levels = {}
    for dimension in DIMENSIONS:
        value = list(config.calibration) if dimension == "calibration" else plain[dimension]
        default = {"calibration": "+".join(config.calibration), "model": Path(config.model).name}
        known = file.names.get((dimension, _canonical(value)))
        levels[dimension] = known or default.get(dimension) or _name(value)
    return placed_point(config, levels, masks=file.masks, out=file.out)
