"""The README's Python examples run as they are printed; figures show what they are given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lpserve
from lpserve.errors import InputError
from lpserve.report.plots import plot_interactions, plot_plan, plot_values
from lpserve.testing.runs import plan_of_another_model

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BUNDLED = "from lpserve.demo import FOLDER"


def examples() -> list[str]:
    """Python blocks that need nothing but the bundled model."""
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return [block for block in blocks if BUNDLED in block]


def test_the_notebook_example_runs(tmp_path, monkeypatch, capsys):
    (example,) = examples()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    for name in ("values.png", "plan.png", "pairs.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    values = names["values"]
    assert isinstance(values, lpserve.ShapleyValues)
    assert np.isfinite(values.values_P).all()
    assert (values.stderr_P > 0).any()
    plan = names["plan"]
    assert isinstance(plan, lpserve.Plan)
    assert (tmp_path / "pruned" / "config.json").exists()
    assert len(example.strip().splitlines()) < 35
    assert "masks/s" in capsys.readouterr().err


def test_figures_show_values_and_intervals(rng):
    values = lpserve.ShapleyValues(
        values_P=rng.normal(size=7),
        stderr_P=rng.random(7),
        sizes=(2, 5),
        estimator="test",
        window_stderr_P=rng.random(7),
    )
    axes: Any = plot_values(values).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(values.values_P)
    segments = axes.collections[0].get_segments()
    half = [(top - bottom) / 2 for (_, bottom), (_, top) in segments]
    assert half == pytest.approx(1.645 * values.total_stderr_P)
    assert "2 to 5" in axes.get_ylabel()


def test_figures_show_a_plan_without_held_out_windows(tmp_path):

    path = tmp_path / "plan.json"
    path.write_text(plan_of_another_model())
    plan = lpserve.load_plan(path)
    axes: Any = plot_plan(plan).axes[0]
    (line,) = axes.lines
    assert line.get_ydata().tolist() == [1.0, 2.0]
    assert line.get_label() == "calibration"


def test_interactions_must_be_square():
    with pytest.raises(InputError, match="must be"):
        plot_interactions(np.zeros((2, 3)))
    figure = plot_interactions(np.array([[0.0, -2.0], [-2.0, 0.0]]))
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-2.0, 2.0)
