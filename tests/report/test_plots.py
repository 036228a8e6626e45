"""How figures name players: by layer, and by the part of it where players are parts of layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lpserve
from lpserve.errors import InputError
from lpserve.report.plots import plot_interactions, plot_plan, plot_values
from lpserve.testing.runs import plan_of_another_model
from lpserve.types import Player

VALUES = lpserve.ShapleyValues(
    values_P=np.array([1.0, 2.0, 3.0, 4.0]), stderr_P=np.zeros(4), sizes=(0, 3), estimator="test"
)
LAYERS = [Player(index=i, layer=i) for i in range(4)]
PARTS = [Player(index=i, layer=i // 2, part=("attention", "mlp")[i % 2]) for i in range(4)]


def labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def test_players_that_are_all_layers_in_order_need_no_labels_of_their_own():
    plain, named = (plot_values(VALUES, players).axes[0] for players in (None, LAYERS))
    assert plain.get_xlabel() == named.get_xlabel() == "layer"
    assert labels(plain.xaxis) == labels(named.xaxis)


def test_parts_of_layers_are_named_on_every_axis():
    wanted = ["0.attention", "0.mlp", "1.attention", "1.mlp"]
    axes = plot_values(VALUES, PARTS).axes[0]
    assert labels(axes.xaxis) == wanted
    assert axes.get_xlabel() == "layer and part"
    axes = plot_interactions(np.zeros((4, 4)), PARTS).axes[0]
    assert labels(axes.xaxis) == labels(axes.yaxis) == wanted


def test_as_many_players_as_values():
    with pytest.raises(InputError, match="players must be 4"):
        plot_values(VALUES, LAYERS[:3])


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
