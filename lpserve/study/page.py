"""sweep.html: which choices matter, with intervals over seeds; costs; every point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lpserve.report.page import fill_template
from lpserve.study.agreement import LEVEL, Choice, Estimate, PointAnswer, choices, tau
from lpserve.study.finished import SweepResult
from lpserve.study.study import DIMENSIONS
from lpserve.study.tables import PointResults

MAX_POINTS_IN_MAP = 64
"""Points up to which the page shows how every two of them agree."""


def point_answers(result: SweepResult, found: PointResults) -> list[PointAnswer]:
    """What every finished point found, in the form in which points are compared."""
    plans, values = found.plans, found.values
    wanted = result.study.removed
    return [
        PointAnswer(
            id=run.point.id,
            levels=run.point.levels,
            values_P=np.array([row["value"] for row in values[run.point.id]]),
            removed={
                e.num_removed: frozenset(e.removed)
                for e in plans[run.point.id].plans
                if not wanted or e.num_removed in wanted
            },
            heldout_nll={
                e.num_removed: math.log(e.heldout_ppl) if e.heldout_ppl else math.nan
                for e in plans[run.point.id].plans
            },
        )
        for run in result.points
        if not run.failed
    ]


def sweep_page(result: SweepResult, results: PointResults) -> str:
    """The page as HTML; it needs no network and no script."""
    import lpserve

    study = result.study
    answers = point_answers(result, results)
    found = choices(answers, study.varied)
    sizes = sorted(set.intersection(*(set(a.removed) for a in answers))) if answers else []
    return fill_template(
        "sweep.html.j2",
        result=result,
        study=study,
        varied=study.varied,
        constant={d: result.points[0].point.levels[d] for d in DIMENSIONS if d not in study.varied},
        choices=found,
        sizes=_some(sizes, 6),
        few_sizes=_some(sizes, 3),
        plans=results.plans,
        dots=_dots(found),
        agreement=_map(answers, study.varied),
        level=f"{100 * LEVEL:.0f}%",
        number=_number,
        seconds=sum(run.seconds for run in result.runs),
        version=lpserve.__version__,
        percents=_percents,
    )


def _some(sizes: Sequence[int], count: int) -> list[int]:
    """Sizes from the first to the last, no more than `count` of them."""
    places = np.linspace(0, len(sizes) - 1, count).round().astype(int)
    return list(sizes) if len(sizes) <= count else [sizes[place] for place in places]


def _number(estimate: Estimate, form: str = "%.2f") -> tuple[str, str]:
    """A mean and its interval; "" where there is none."""
    if math.isnan(estimate.mean):
        return "-", ""
    if estimate.low is None or estimate.high is None:
        return form % estimate.mean, ""
    return form % estimate.mean, f"{form % estimate.low} to {form % estimate.high}"


def _percents(difference: Estimate) -> tuple[str, str]:
    """A difference in nats as a change of perplexity in percent."""
    bounds = (difference.mean, difference.low, difference.high)
    percents = [None if b is None else 100 * math.expm1(b) for b in bounds]
    mean, low, high = percents
    return _number(Estimate(mean=math.nan if mean is None else mean, low=low, high=high), "%+.1f")


def _dots(found: Sequence[Choice]) -> dict[str, Any]:
    """Kendall's tau of every dimension on one axis from -1 to 1, in pixels."""
    width, left, right, step = 640, 130, 20, 28

    def x(value: float) -> float:
        return round(left + (max(-1.0, min(1.0, value)) + 1) / 2 * (width - left - right), 1)

    rows = [
        {
            "name": c.dimension,
            "y": 20 + step * i,
            "x": x(c.tau.mean),
            "low": None if c.tau.low is None else x(c.tau.low),
            "high": None if c.tau.high is None else x(c.tau.high),
            "text": " ".join(_number(c.tau)),
        }
        for i, c in enumerate(found)
        if not math.isnan(c.tau.mean)
    ]
    return {
        "rows": rows,
        "width": width,
        "height": 20 + step * len(rows) + 20,
        "left": left,
        "ticks": [(x(v), f"{v:g}") for v in (-1, -0.5, 0, 0.5, 1)],
    }


def _map(answers: Sequence[PointAnswer], varied: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of Kendall's tau between every two points of a model, the points in table order."""
    models = {a.levels["model"] for a in answers}
    if not 2 <= len(answers) <= MAX_POINTS_IN_MAP or len(models) > 1:
        return []
    return [
        {
            "name": ", ".join(a.levels[d] for d in varied),
            "id": a.id,
            "cells": [tau(a, b) for b in answers],
        }
        for a in answers
    ]
