"""How figures name players: by layer, and by the part of it where players are parts of layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lpserve
from lpserve.errors import InputError
from lpserve.report.plots import plot_interactions, plot_values
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
    wanted = ["0 attention", "0 mlp", "1 attention", "1 mlp"]
    axes = plot_values(VALUES, PARTS).axes[0]
    assert labels(axes.xaxis) == wanted
    assert axes.get_xlabel() == "layer and part"
    axes = plot_interactions(np.zeros((4, 4)), PARTS).axes[0]
    assert labels(axes.xaxis) == labels(axes.yaxis) == wanted


def test_as_many_players_as_values():
    with pytest.raises(InputError, match="players must be 4"):
        plot_values(VALUES, LAYERS[:3])
