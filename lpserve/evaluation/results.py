"""Figures of an evaluation, and the files that hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from lpserve.evaluation.settings import EvalConfig
from lpserve.inputs.documents import read_json_object
from lpserve.inputs.files import is_there
from lpserve.inputs.shapes import converted
from lpserve.report.csv_rows import csv_text
from lpserve.store.files import write_text
from lpserve.types import EngineInfo

RESULTS_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One figure of one set."""

    layer_set: str
    """Name of the set."""
    removed: tuple[int | str, ...]
    """Its removed layers and parts of layers, as of `LayerSet`."""
    measure: str
    """`ppl NAME`, or `TASK METRIC`."""
    value: float
    stderr: float | None
    """Standard error of a task's metric, as lm-eval gives it (over documents)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Every figure, and what it cost."""

    results: tuple[Result, ...]
    protocols: dict[str, str]
    """Text -> how its perplexity was measured."""
    masks_scored: int
    """Masks that engines scored, counted once for each set of windows."""
    masks_read: int
    """Masks whose scores the store already held, counted likewise."""
    layer_forwards: int
    """Layers run over all windows of a call, prefixes shared."""
    skip_layer_forwards: int
    """What running every mask alone, its removed layers skipped, would have taken."""
    requests_cut: int
    """Different requests of tasks that were longer than the model reads and lost their
    beginning."""

    def value(self, layer_set: str, measure: str) -> float:
        """One figure; raises KeyError."""
        for result in self.results:
            if (result.layer_set, result.measure) == (layer_set, measure):
                return result.value
        raise KeyError((layer_set, measure))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Earlier:
    """What results.json holds of earlier evaluations in the folder."""

    protocols: dict[str, str] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    asked: dict[str, Any] | None = None
    """How tasks were asked: `num_fewshot`, `limit` and `max_length`."""
    results: tuple[Result, ...] = ()


class _Row(TypedDict):
    """A figure as results.json holds it."""

    set: str
    removed: list[int | str]
    measure: str
    value: float
    stderr: float | None


def evaluated_by(folder: Path, info: EngineInfo) -> bool:
    """Whether results.json says that such an engine made the folder's scores."""
    path = folder / "results.json"
    return is_there(path) and read_json_object(path).get("engine") == _engine_of(info)


def _engine_of(info: EngineInfo) -> dict[str, str]:
    return {"kind": info.kind, "path": info.path, "dtype": info.dtype}


def _key(result: Result) -> tuple[str, tuple[int | str, ...], str]:
    return result.layer_set, result.removed, result.measure


def _earlier(path: Path, same: dict[str, Any], asked: dict[str, Any] | None) -> _Earlier:
    """Figures of earlier evaluations; none where they are of another model or engine.

    Args:
        asked: how tasks are asked now; figures of tasks that were asked otherwise are left out.
            None: no task is.

    Raises:
        InputError: the file is no results.json; it is left as it is.
    """
    if not is_there(path):
        return _Earlier()
    about = read_json_object(path)
    if any(about.get(key) != value for key, value in same.items()):
        return _Earlier()
    rows = converted(about.get("results"), list[_Row], f"{path}: results")
    before = {key: about.get(key) for key in ("num_fewshot", "limit", "max_length")}
    if asked is not None and asked != before:
        rows = [row for row in rows if row["measure"].startswith("ppl ")]
        about["tasks"] = []
    return _Earlier(
        asked=before,
        protocols=converted(about.get("protocols"), dict[str, str], f"{path}: protocols"),
        tasks=converted(about.get("tasks"), list[str], f"{path}: tasks"),
        results=tuple(
            Result(
                layer_set=row["set"],
                removed=tuple(row["removed"]),
                measure=row["measure"],
                value=row["value"],
                stderr=row["stderr"],
            )
            for row in rows
        ),
    )


def write_results(
    folder: Path, config: EvalConfig, info: EngineInfo, evaluation: Evaluation
) -> None:
    """Write results.json and results.csv into an existing folder.

    Figures of other sets and measures stay, if they are of the same model by the same engine; of
    the same set and measure the new one counts.
    """
    import lpserve

    engine = _engine_of(info)
    same = {"format": RESULTS_FORMAT, "model_hash": info.model_hash, "engine": engine}
    asked = {k: getattr(config, k) for k in ("num_fewshot", "limit", "max_length")}
    earlier = _earlier(folder / "results.json", same, asked if config.tasks else None)
    asked = asked if config.tasks else earlier.asked or asked
    protocols = {**earlier.protocols, **evaluation.protocols}
    # a text that is measured in another way now is another measure of the same name
    again = {f"ppl {n}" for n, p in evaluation.protocols.items() if earlier.protocols.get(n) != p}
    found = {_key(r): r for r in earlier.results if r.measure not in again}
    results = list((found | {_key(r): r for r in evaluation.results}).values())

    about = {
        **same,
        **asked,
        "model": info.model,
        "protocols": protocols,
        "tasks": [*dict.fromkeys([*earlier.tasks, *config.tasks])],
        "requests_cut": evaluation.requests_cut,
        "versions": {"lpserve": lpserve.__version__, **info.versions},
        "results": [
            {
                "set": r.layer_set,
                "removed": list(r.removed),
                "measure": r.measure,
                "value": r.value,
                "stderr": r.stderr,
            }
            for r in results
        ],
    }
    write_text(folder / "results.json", json.dumps(about, indent=1) + "\n")
    rows = [
        [r.layer_set, " ".join(map(str, r.removed)), r.measure, r.value, r.stderr] for r in results
    ]
    header = ["set", "removed", "measure", "value", "stderr"]
    write_text(folder / "results.csv", csv_text(header, rows))
