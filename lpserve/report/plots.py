"""Figures of values, plans and interactions, for notebooks and papers (extra `plots`: matplotlib).

Every function returns a `matplotlib.figure.Figure` of its own, made without pyplot: nothing is
shown, no global state is touched, and a notebook displays what a cell returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lpserve.errors import InputError
from lpserve.plan.plan import Plan
from lpserve.types import Z90, FloatArray
from lpserve.values.result import ShapleyValues

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#1f6feb", "#d1730b", "#51606f"


def plot_values(values: ShapleyValues) -> Figure:
    """Every player's value with its 90% interval (`total_stderr_P`)."""
    figure, axes = _figure()
    players = np.arange(len(values.values_P))
    axes.bar(players, values.values_P, color="#8db6f2")
    axes.errorbar(
        players,
        values.values_P,
        yerr=Z90 * np.nan_to_num(values.total_stderr_P),
        fmt="none",
        ecolor="#1c2733",
        elinewidth=1,
        capsize=2,
    )
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("layer")
    axes.set_ylabel(
        "Shapley value"
        if values.is_shapley
        else f"value, coalitions of {values.sizes[0]} to {values.sizes[1]}"
    )
    axes.set_title("90% intervals", fontsize="small", loc="left")
    return figure


def plot_plan(plan: Plan) -> Figure:
    """The plan's sets against layers removed: calibration, and held out where it was measured.
    Perplexities on a log scale, or the utility where that says no perplexity."""
    figure, axes = _figure()
    removed = [0, *(entry.num_removed for entry in plan.plans)]
    measure = "utility" if plan.tells_utility else "ppl"
    sides = {"calibration": ("calibration", BLUE), "heldout": ("held out", ORANGE)}
    for side, (name, colour) in sides.items():
        values = [getattr(plan, f"full_{side}_{measure}")]
        values += [getattr(entry, f"{side}_{measure}") for entry in plan.plans]
        if all(value is None for value in values):
            continue
        known = [np.nan if value is None else value for value in values]
        axes.plot(removed, known, marker="o", markersize=4, color=colour, label=name)
    if not plan.tells_utility:
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.set_xticks(removed)
    axes.set_xlabel("layers removed")
    axes.set_ylabel(plan.utility if plan.tells_utility else "perplexity")
    axes.legend(frameon=False)
    return figure


def plot_interactions(interactions_PP: FloatArray) -> Figure:
    """Pairwise interaction indices: red where two layers need each other, blue where one can stand
    in for the other.

    Args:
        interactions_PP: symmetric `float64[P, P]`, as `interactions.csv` and `Analysis` hold them;
            the diagonal is left white.
    """
    index_PP = np.array(interactions_PP, dtype=np.float64)
    if index_PP.ndim != 2 or index_PP.shape[0] != index_PP.shape[1]:
        raise InputError(f"interactions must be [P, P]: got {list(index_PP.shape)}")
    np.fill_diagonal(index_PP, np.nan)
    figure, axes = _figure(square=True)
    most = float(np.nanmax(np.abs(index_PP))) if np.isfinite(index_PP).any() else 1.0
    image = axes.imshow(index_PP, cmap="RdBu_r", vmin=-most, vmax=most)
    figure.colorbar(image, ax=axes, label="interaction index")
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    return figure


def _figure(*, square: bool = False) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"plots need matplotlib ({error}): install lpserve[plots]") from None
    figure = Figure(figsize=(5.5, 4.5) if square else (7, 3.5), layout="constrained")
    return figure, figure.add_subplot()
