"""Figures of an evaluation, and the files that hold them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lpserve.evaluation.settings import EvalConfig
from lpserve.report.csv_rows import csv_text
from lpserve.store.files import write_text
from lpserve.types import EngineInfo

RESULTS_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One figure of one set."""

    layer_set: str
    """Name of the set."""
    removed: tuple[int, ...]
    """Its removed layers, 0-based and sorted."""
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


def write_results(
    folder: Path, config: EvalConfig, info: EngineInfo, evaluation: Evaluation
) -> None:
    """Write results.json and results.csv into an existing folder."""
    import lpserve

    about = {
        "format": RESULTS_FORMAT,
        "model": info.model,
        "model_hash": info.model_hash,
        "engine": {"kind": info.kind, "path": info.path, "dtype": info.dtype},
        "protocols": evaluation.protocols,
        "tasks": list(config.tasks),
        "num_fewshot": config.num_fewshot,
        "limit": config.limit,
        "max_length": config.max_length,
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
            for r in evaluation.results
        ],
    }
    write_text(folder / "results.json", json.dumps(about, indent=1) + "\n")
    rows = [
        [r.layer_set, " ".join(map(str, r.removed)), r.measure, r.value, r.stderr]
        for r in evaluation.results
    ]
    header = ["set", "removed", "measure", "value", "stderr"]
    write_text(folder / "results.csv", csv_text(header, rows))
