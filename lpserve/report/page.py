"""What a run leaves: plan.json, shapley.csv, scores.npz and one self-contained HTML page."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from lpserve.analysis.analyse import Outcome
from lpserve.analysis.record import write_record_file
from lpserve.analysis.stability import SETTLED, Stability
from lpserve.plan.plan import Plan, PlanEntry
from lpserve.store.run_folder import RunFolder
from lpserve.types import Z90

SHOWN_PAIRS = 8
SVG_WIDTH, SVG_HEIGHT, SVG_PAD = 640, 260, 48


def write_outputs(folder: RunFolder, outcome: Outcome, *, config_json: dict[str, Any]) -> None:
    """Write every result file, each whole or not at all; plan.json last."""
    write_record_file(folder.path / "scores.npz", outcome.scored)
    folder.write("shapley.csv", shapley_csv(outcome))
    if outcome.analysis.interactions_PP is not None:
        folder.write("interactions.csv", interactions_csv(outcome))
    folder.write("report.html", render(outcome, config_json))
    folder.write("plan.json", outcome.plan.to_json())


def shapley_csv(outcome: Outcome) -> str:
    """One row a player: value, standard errors, 90% interval, chance of being among the lowest."""
    values = outcome.analysis.values
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "player",
            "layer",
            "part",
            "value",
            "stderr",
            "window_stderr",
            "total_stderr",
            "low90",
            "high90",
            "p_lowest",
            "k_min",
            "k_max",
            "estimator",
        ]
    )
    window_P = values.window_stderr_P
    for player in outcome.scored.players:
        i = player.index
        value, total = float(values.values_P[i]), float(values.total_stderr_P[i])
        writer.writerow(
            [
                i,
                player.layer,
                player.part,
                repr(value),
                repr(float(values.stderr_P[i])),
                "" if window_P is None else repr(float(window_P[i])),
                repr(total),
                repr(value - Z90 * total),
                repr(value + Z90 * total),
                float(outcome.analysis.lowest_probability_P[i]),
                *values.sizes,
                values.estimator,
            ]
        )
    return text.getvalue()


def interactions_csv(outcome: Outcome) -> str:
    """One row a pair of players and its interaction index, the strongest first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["player", "other", "interaction", "k_min", "k_max"])
    sizes = outcome.analysis.values.sizes
    for i, j, index in _strongest_pairs(outcome):
        writer.writerow([i, j, repr(index), *sizes])
    return text.getvalue()


def _strongest_pairs(outcome: Outcome) -> list[tuple[int, int, float]]:
    index_PP = outcome.analysis.interactions_PP
    if index_PP is None:
        return []
    first, second = np.triu_indices(len(index_PP), 1)
    order = np.argsort(-np.abs(index_PP[first, second]), kind="stable")
    return [(int(first[n]), int(second[n]), float(index_PP[first[n], second[n]])) for n in order]


def render(outcome: Outcome, config_json: dict[str, Any]) -> str:
    """The HTML page; needs no network and no script."""
    values = outcome.analysis.values
    return page(
        "report.html.j2",
        plan=outcome.plan,
        analysis=outcome.analysis,
        values=values,
        config=config_json,
        curve=_curve(outcome),
        bars=_bars(outcome),
        quarantined=outcome.quarantined,
        pairs=_strongest_pairs(outcome)[:SHOWN_PAIRS],
        stability=stability_rows(outcome.plan),
        num_windows=len(outcome.scored.num_tokens_I),
        screen_windows=len(outcome.scored.screen),
        settled_share=SETTLED,
        drawn=outcome.scored.objective.items,
        unit=outcome.scored.objective.loss_unit,
        z90=Z90,
        width=SVG_WIDTH,
        height=SVG_HEIGHT,
        pad=SVG_PAD,
    )


def page(template: str, **values: Any) -> str:
    """A page of `templates/`, filled in; a value that is missing is an error."""
    environment = Environment(
        loader=PackageLoader("lpserve.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def stability_rows(plan: Plan) -> list[tuple[PlanEntry, Stability]]:
    """Entries whose dependence on the windows is known."""
    return [(e, Stability(**e.stability)) for e in plan.plans if e.stability is not None]


def _curve(outcome: Outcome) -> dict[str, Any]:
    """Perplexity on a log scale, or the utility, against layers removed: points and ticks in
    pixels."""
    plan = outcome.plan
    measure = "utility" if plan.tells_utility else "ppl"
    scale = (float, float) if plan.tells_utility else (math.log, math.exp)
    series: dict[str, list[tuple[int, float]]] = {}
    for name, side in (("calibration", "calibration"), ("held-out", "heldout")):
        points = [(0, getattr(plan, f"full_{side}_{measure}"))]
        points += [(e.num_removed, getattr(e, f"{side}_{measure}")) for e in plan.plans]
        series[name] = [(r, v) for r, v in points if v is not None and math.isfinite(v)]
    drawn = [scale[0](value) for points in series.values() for _, value in points]
    low, high = min(drawn), max(drawn)
    span = max(high - low, 1e-9)
    most = plan.plans[-1].num_removed

    def place(removed: float, height: float) -> tuple[float, float]:
        x = SVG_PAD + removed / most * (SVG_WIDTH - 2 * SVG_PAD)
        y = SVG_HEIGHT - SVG_PAD - (height - low) / span * (SVG_HEIGHT - 2 * SVG_PAD)
        return round(x, 1), round(float(y), 1)

    ticks = np.linspace(low, high, 5).tolist()
    return {
        "title": plan.utility if plan.tells_utility else "Perplexity",
        "series": {
            name: [(*place(r, scale[0](value)), r, value) for r, value in points]
            for name, points in series.items()
        },
        "x_ticks": [(place(r, low)[0], r) for r in range(most + 1)],
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
    for i, value in enumerate(values.values_P):
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
                "player": i,
            }
        )
    ticks = [(y(float(t)), f"{t:.3g}") for t in np.linspace(low, high, 5)]
    return {"bars": bars, "zero": y(0.0), "y_ticks": ticks}
