"""What configs make of values from Python and from files."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest

from lpserve.config import RunConfig, config_from
from lpserve.errors import InputError
from lpserve.inputs.plain import plain_value


def test_python_gives_what_a_file_gives():
    plain = RunConfig(model="m", calibration={"t": "t.txt"}, seed=3, out="o", sizes=(1, 2))
    for calibration in ("t.txt", Path("t.txt"), [Path("t.txt")], {"t": Path("t.txt")}):
        given = RunConfig(
            model=Path("m"),  # pyright: ignore[reportArgumentType]
            calibration=calibration,  # pyright: ignore[reportArgumentType]
            seed=np.int64(3),  # pyright: ignore[reportArgumentType]
            out=Path("o"),  # pyright: ignore[reportArgumentType]
            sizes=(np.int32(1), np.uint8(2)),  # pyright: ignore[reportArgumentType]
        )
        assert given == plain
        assert type(given.seed) is int


KEYS = {
    "model": [0, [], True, b"m", "", "m\0", "m" * 5000, float("nan")],
    "calibration": [0, 1.5, True, datetime.date(2026, 1, 1), [], [1], [["t"]], {"t": 1}, "", b"t"],
    "heldout": [0, [3], {"t": []}],
    "device": [3.5, b"cpu", [], None],
    "engine": [[], {}, 1],
    "store": [[], 1, "", {"a": 1}],
    "surrogate": [[], {}, 1, True],
    "dtype": [[], None, 32, "float32\n"],
    "goal": ["values\n", "Values", ""],
    "pool": ["local\n", None],
    "utility": [[], 1, None],
    "budget": [True, 1.5, "400", 0, 10**30, None, [400]],
    "seed": [-1, 10**40, "0", float("inf")],
    "grace_s": [True, "30", 0, float("nan"), []],
    "stop_gain": [True, "x", [], 1],
    "engine_options": [[], "x", 1],
    "bos": [1, "true", None],
    "out": [1, None, "", "a\0b"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in KEYS.items() for value in values]
)
def test_values_of_another_kind_are_refused_in_one_line(key, value):
    values = {"model": "m", "calibration": "t.txt"} | {key: value}
    with pytest.raises(InputError) as caught:
        config_from(values, "run.toml")
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_containers_are_made_plain_inside():
    got = plain_value({"a": [np.float64(0.5), Path("x")], 3: (np.int8(1), True)}, "key")
    assert got == {"a": [0.5, "x"], "3": (1, True)}
    assert type(got["a"][0]) is float


@pytest.mark.parametrize(("key", "value"), [("out", "run"), ("store", "scores.sqlite")])
def test_a_ray_job_keeps_nothing_in_its_temporary_folder(key, value, tmp_path, monkeypatch):
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    values = {"model": "m", "calibration": "t.txt", "out": "/o"}
    assert config_from(values | {key: f"/{value}"}, "run.toml")
    with pytest.raises(InputError, match=f"{key} must be an absolute path in a Ray job"):
        config_from(values | {key: value}, "run.toml")
