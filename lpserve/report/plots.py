"""Figures of values, plans and interactions, for notebooks and papers (extra `plots`: matplotlib).

Every function returns a `matplotlib.figure.Figure` of its own, made without pyplot: nothing is
shown, no global state is touched, and a notebook displays what a cell returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lpserve.errors import InputError
from lpserve.model.players import kinds_of, player_label
from lpserve.plan.plan import Plan
from lpserve.types import Z90, FloatArray, Player
from lpserve.values.result import ShapleyValues

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f6feb", "#d1730b", "#51606f"


def plot_values(values: ShapleyValues, players: Sequence[Player] | None = None) -> Figure:
    """Every player's value with its 90% interval (`total_stderr_P`).

    Args:
        players: what the values belong to, for the labels; None: decoder layers 0 to P-1.
    """
    figure, axes = _figure()
    places = np.arange(len(values.values_P))
    axes.bar(places, values.values_P, color="#8db6f2")
    axes.errorbar(
        places,
        values.values_P,
        yerr=Z90 * np.nan_to_num(values.total_stderr_P),
        fmt="none",
        ecolor="#1c2733",
        elinewidth=1,
        capsize=2,
    )
    axes.axhline(0, color=GREY, linewidth=0.8)
    _name_players(axes.xaxis, players, len(places))
    axes.set_ylabel(
        "Shapley value"
        if values.is_shapley
        else f"value, coalitions of {values.sizes[0]} to {values.sizes[1]}"
    )
    axes.set_title("90% intervals", fontsize="small", loc="left")
    return figure


def plot_plan(plan: Plan) -> Figure:
    """A line over the number of removed layers, or the percentage of a cost that goes: calibration,
    and held out where it was measured.

    Perplexities are on a log scale; a plan for another kind of utility shows the utility itself.
    """
    figure, axes = _figure()
    removed = [0, *(plan.place(entry) for entry in plan.plans)]
    measure = "utility" if plan.reports_utility else "ppl"
    sides = {"calibration": ("calibration", BLUE), "heldout": ("held out", ORANGE)}
    for side, (name, colour) in sides.items():
        values = [getattr(plan, f"full_{side}_{measure}")]
        values += [getattr(entry, f"{side}_{measure}") for entry in plan.plans]
        if all(value is None for value in values):
            continue
        known = [np.nan if value is None else value for value in values]
        axes.plot(removed, known, marker="o", markersize=4, color=colour, label=name)
    if not plan.reports_utility:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.set_xticks(removed)
    axes.set_xlabel(plan.axis)
    axes.set_ylabel(plan.utility if plan.reports_utility else "perplexity")
    axes.legend(frameon=False)
    return figure


def plot_interactions(
    interactions_PP: FloatArray, players: Sequence[Player] | None = None
) -> Figure:
    """Pairwise interaction indices: red where two layers need each other, blue where one can stand
    in for the other.

    Args:
        interactions_PP: symmetric `float64[P, P]`, as `interactions.csv` and `Analysis` hold them;
            the diagonal is left white.
        players: what rows and columns belong to, for the labels; None: decoder layers 0 to P-1.

    Raises:
        InputError: the array is not square, or matplotlib is missing.
    """
    index_PP = np.array(interactions_PP, dtype=np.float64)
    if index_PP.ndim != 2 or index_PP.shape[0] != index_PP.shape[1]:
        raise InputError(f"interactions must be [P, P]: got {list(index_PP.shape)}")
    np.fill_diagonal(index_PP, np.nan)
    figure, axes = _figure(square=True)
    limit = float(np.nanmax(np.abs(index_PP))) if np.isfinite(index_PP).any() else 1.0
    image = axes.imshow(index_PP, cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.colorbar(image, ax=axes, label="interaction index")
    for axis in (axes.xaxis, axes.yaxis):
        _name_players(axis, players, len(index_PP))
    return figure


def _name_players(axis: Any, players: Sequence[Player] | None, num_players: int) -> None:
    """Label an axis by the players; numbered decoder layers need no ticks of their own."""
    if players is not None and len(players) != num_players:
        raise InputError(f"players must be {num_players}, as the values are: got {len(players)}")
    labels = [player_label(player) for player in players or ()]
    if labels != [str(place) for place in range(len(labels))]:
        axis.set_ticks(range(len(labels)), labels)
    kind = kinds_of(players or ())
    axis.set_label_text({"layers": "layer", "groups": "group"}.get(kind, "layer and part"))


def _figure(*, square: bool = False) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"plots need matplotlib ({error}): install lpserve[plots]") from None
    figure = Figure(figsize=(5.5, 4.5) if square else (7, 3.5), layout="constrained")
    return figure, figure.add_subplot()
