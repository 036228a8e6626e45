"""Segments of an exhaustive game: written ones come back bit by bit, others are refused."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.exhaustive import segments
from lpserve.exhaustive.family import SmallRemovals
from lpserve.exhaustive.segments import (
    Manifest,
    Segment,
    describe_difference,
    num_segments,
    read_manifest,
    read_segment,
    segment_path,
    segment_range,
    write_manifest,
    write_segment,
)


def manifest(**changes) -> Manifest:
    values = {
        "model": "m",
        "model_hash": "h",
        "game": "g",
        "players": [(i, "layer") for i in range(9)],
        "max_removed": 4,
        "metrics": ["nll", "kl"],
        "utility": "neg_kl",
        "windows": "w",
        "corpora": [("text", 3)],
        "engine": {"path": "synthetic"},
        "versions": {},
    }
    return Manifest(**values | changes)


def written(folder: Path, rng: np.random.Generator) -> tuple[SmallRemovals, Segment]:
    family = SmallRemovals(9, 4)
    (folder / "segments").mkdir(exist_ok=True)
    values = {
        name: rng.normal(300, 40, (family.count, 3)).astype(np.float32) for name in ("nll", "kl")
    }
    values["nll"][5] = [np.nan, np.inf, -np.inf]
    segment = Segment(values=values, reasons={5: "no such layer"})
    write_segment(folder, 0, family.masks(0, family.count), segment)
    return family, segment


def test_a_segment_comes_back_bit_by_bit(tmp_path, rng):
    family, segment = written(tmp_path, rng)
    found = read_segment(tmp_path, 0, family, ["nll", "kl"], 3)
    assert found.reasons == segment.reasons
    for metric, values_MN in segment.values.items():
        assert found.values[metric].tobytes() == values_MN.tobytes()
    assert read_segment(tmp_path, 0, family, ["kl"], 3).values.keys() == {"kl"}


def test_segments_cut_a_family_without_gaps(monkeypatch):
    monkeypatch.setattr(segments, "SEGMENT_MASKS", 10)
    for num_players, max_removed in ((4, 3), (5, 5), (9, 1), (3, 1)):
        family = SmallRemovals(num_players, max_removed)
        ends = [segment_range(family, number) for number in range(num_segments(family))]
        assert ends[0][0] == 0
        assert ends[-1][1] == family.count
        assert all(a[1] == b[0] for a, b in pairwise(ends))
        assert all(stop - start == 10 for start, stop in ends[:-1])
        assert all(stop > start for start, stop in ends)


def test_a_segment_of_another_game_is_refused(tmp_path, rng):
    family, _ = written(tmp_path, rng)
    cases = [
        (SmallRemovals(9, 3), ["nll"], 3, "its masks are others"),
        (SmallRemovals(10, 4), ["nll"], 3, "its masks are others"),
        (family, ["nll"], 4, "not of 4 floats"),
        (family, ["accuracy"], 3, "not this game's segment, or damaged"),
    ]
    for other, metrics, windows, reason in cases:
        with pytest.raises(InputError, match=reason) as caught:
            read_segment(tmp_path, 0, other, metrics, windows)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"000001\.parquet is missing"):
        read_segment(tmp_path, 1, family, ["nll"], 3)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "flipped"])
def test_a_damaged_segment_is_refused(damage, tmp_path, rng):
    family, segment = written(tmp_path, rng)
    path = segment_path(tmp_path, 0)
    content = bytearray(path.read_bytes())
    if damage == "flipped":  # anywhere: refused, or read as it was
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    else:
        content = {"cut": content[: len(content) // 2], "text": b"mask,nll\n", "empty": b""}[damage]
    path.write_bytes(content)
    try:
        found = read_segment(tmp_path, 0, family, ["nll", "kl"], 3)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert damage == "flipped"
        assert found.values["nll"].tobytes() == segment.values["nll"].tobytes()


def test_manifests_are_read_back_and_checked(tmp_path):
    write_manifest(tmp_path, manifest())
    assert read_manifest(tmp_path) == manifest()
    assert manifest().family.count == SmallRemovals(9, 4).count
    data = json.loads((tmp_path / "game.json").read_text())
    for change, reason in (
        ({"format": 2}, "its format is 2"),
        ({"max_removed": 40}, "max_removed must be 1..9"),
        ({"metrics": ["kl"]}, "names no players, no nll"),
        ({"players": []}, "names no players"),
        ({"utility": "colour"}, "utility must be"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"model": 3}, "model: expected str"),
    ):
        (tmp_path / "game.json").write_text(json.dumps(data | change))
        with pytest.raises(InputError, match=reason):
            read_manifest(tmp_path)
    with pytest.raises(InputError, match="`lpserve exhaustive` writes it"):
        read_manifest(tmp_path / "none")


def test_what_differs_between_games_is_named():
    assert describe_difference(manifest(), manifest(model="moved")) == ""
    for name, what in (
        ("game", "the model"),
        ("windows", "windows"),
        ("max_removed", "max_removed"),
        ("metrics", "utility"),
    ):
        value = 3 if name == "max_removed" else ["nll"] if name == "metrics" else "other"
        assert what in describe_difference(
            manifest(), dataclasses.replace(manifest(), **{name: value})
        )
