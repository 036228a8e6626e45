"""The HTML page of a run: one self-contained file, its figures as SVG.

Notation: P players; coordinates are in pixels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from lpserve.analysis.build_plan import Outcome
from lpserve.analysis.heldout import heldout_objective
from lpserve.analysis.stability import SETTLED, Stability
from lpserve.model.players import player_label
from lpserve.plan.plan import COST_WORDS, Plan, PlanEntry
from lpserve.report.tables import strongest_pairs
from lpserve.types import Z90

SHOWN_PAIRS = 8
SVG_WIDTH, SVG_HEIGHT, SVG_PAD = 640, 260, 48


def report_page(outcome: Outcome, config_json: dict[str, Any]) -> str:
    """The page as HTML; it needs no network and no script."""
    values = outcome.analysis.values
    return fill_template(
        "report.html.j2",
        plan=outcome.plan,
        analysis=outcome.analysis,
        values=values,
        config=config_json,
        curve=_curve(outcome),
        bars=_bars(outcome),
        first="at most" if outcome.plan.target_cost else "removed",
        cost_words=COST_WORDS.get(outcome.plan.target_cost, ""),
        max_removed=outcome.scored.max_removed,
        labels=[player_label(player) for player in outcome.scored.players],
        quarantined=outcome.quarantined,
        pairs=strongest_pairs(outcome)[:SHOWN_PAIRS],
        stability=stability_rows(outcome.plan),
        num_windows=len(outcome.scored.num_tokens_I),
        screen_windows=len(outcome.scored.screen),
        settled_share=SETTLED,
        drawn=outcome.scored.objective.items,
        unit=outcome.scored.objective.loss_unit,
        heldout_unit=heldout_objective(outcome.scored).loss_unit,
        z90=Z90,
        width=SVG_WIDTH,
        height=SVG_HEIGHT,
        pad=SVG_PAD,
    )


def fill_template(template: str, **values: Any) -> str:
    """Render a page of `templates/`; raises jinja2's UndefinedError where a value is missing."""
    environment = Environment(
        loader=PackageLoader("lpserve.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def stability_rows(plan: Plan) -> list[tuple[PlanEntry, Stability]]:
    """Plan entries with a known dependence on the windows, and that dependence."""
    return [(e, Stability(**e.stability)) for e in plan.plans if e.stability is not None]


def _curve(outcome: Outcome) -> dict[str, Any]:
    """Perplexity on a log scale, or the utility, against layers removed: points and ticks in
    pixels."""
    plan = outcome.plan
    measure = "utility" if plan.reports_utility else "ppl"
    scale = (float, float) if plan.reports_utility else (math.log, math.exp)
    series: dict[str, list[tuple[float, float]]] = {}
    for name, side in (("calibration", "calibration"), ("held-out", "heldout")):
        points = [(0.0, getattr(plan, f"full_{side}_{measure}"))]
        points += [(plan.place(e), getattr(e, f"{side}_{measure}")) for e in plan.plans]
        series[name] = [(r, v) for r, v in points if v is not None and math.isfinite(v)]
    drawn = [scale[0](value) for points in series.values() for _, value in points]
    low, high = min(drawn), max(drawn)
    span = max(high - low, 1e-9)
    largest = plan.place(plan.plans[-1])
    places = [0.0, *(plan.place(e) for e in plan.plans)]

    def place(removed: float, height: float) -> tuple[float, float]:
        x = SVG_PAD + removed / largest * (SVG_WIDTH - 2 * SVG_PAD)
        y = SVG_HEIGHT - SVG_PAD - (height - low) / span * (SVG_HEIGHT - 2 * SVG_PAD)
        return round(x, 1), round(float(y), 1)

    ticks = np.linspace(low, high, 5).tolist()
    return {
        "title": plan.utility if plan.reports_utility else "Perplexity",
        "series": {
            name: [(*place(r, scale[0](value)), r, value) for r, value in points]
            for name, points in series.items()
        },
        "x_ticks": [(place(r, low)[0], f"{r:g}") for r in places],
        "y_ticks": [(place(0, tick)[1], f"{scale[1](tick):.3g}") for tick in ticks],
    }


def _bars(outcome: Outcome) -> dict[str, Any]:
    """Values with 90% intervals, in pixels."""
    values = outcome.analysis.values
    half_P = Z90 * np.nan_to_num(values.total_stderr_P)
    low = min(0.0, float((values.values_P - half_P).min()))
    high = max(0.0, float((values.values_P + half_P).max()))
    span = max(high - low, 1e-12)
    step = (SVG_WIDTH - 2 * SVG_PAD) / len(values.values_P)

    def y(value: float) -> float:
        return round(SVG_HEIGHT - SVG_PAD - (value - low) / span * (SVG_HEIGHT - 2 * SVG_PAD), 1)

    bars = []
    for i, (player, value) in enumerate(zip(outcome.scored.players, values.values_P, strict=True)):
        top, bottom = y(max(float(value), 0.0)), y(min(float(value), 0.0))
        bars.append(
            {
                "x": round(SVG_PAD + i * step + 0.15 * step, 1),
                "width": round(0.7 * step, 1),
                "y": top,
                "height": round(max(bottom - top, 0.5), 1),
                "middle": round(SVG_PAD + (i + 0.5) * step, 1),
                "low": y(float(value - half_P[i])),
                "high": y(float(value + half_P[i])),
                "player": player_label(player),
            }
        )
    ticks = [(y(float(t)), f"{t:.3g}") for t in np.linspace(low, high, 5)]
    return {"bars": bars, "zero": y(0.0), "y_ticks": ticks}
