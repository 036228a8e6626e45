"""What sets of layers do to a model: perplexity on any text, lm-eval's tasks; all sets at once.

Masks are scored as they are in a run: prefixes shared, every score durable before it counts, so an
evaluation that was stopped goes on where it was, and one more set or task costs only itself.

Everything is checked before an engine starts: sets, texts, tasks and their data.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from lpserve.config import EngineConfig
from lpserve.data.protocols import Protocol, ProtocolWindows, protocol_windows
from lpserve.data.tasks import TaskLoader
from lpserve.data.windows import TokenWindows, load_tokenizer
from lpserve.engine.base import check_windows
from lpserve.errors import InputError
from lpserve.model.checkpoint import checkpoint_hash, read_checkpoint
from lpserve.plan.layer_sets import LayerSet, full_model, layer_set_masks, read_sets
from lpserve.runner.setup import num_players_of
from lpserve.scoring.progress import Progress
from lpserve.scoring.session import ScoringSession
from lpserve.types import perplexity

RESULTS_FORMAT = 1
SERVED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
"""Kinds of tasks that ask for likelihoods alone."""
BOOTSTRAP_DRAWS = 1000
"""For standard errors of metrics that are no means (lm-eval's perplexity): 2% of them is noise."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(EngineConfig):
    """What to evaluate, and with which engines."""

    sets: tuple[LayerSet, ...] = ()
    """Beside the whole model, which is always evaluated."""
    texts: dict[str, str] = field(default_factory=dict)
    """Name -> text, folder of .txt or .jsonl, for perplexity."""
    protocol: Protocol = field(default_factory=Protocol)
    text_field: str = "text"
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    """Folder of task files that lm-eval should know beside its own."""
    num_fewshot: int | None = None
    limit: int | None = None
    """Most documents of each task."""
    max_length: int | None = None
    """Tokens of a request that the model is given; default: one less than its positions."""
    out: str = "eval"
    """Folder of the scores and results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One figure of one set."""

    layer_set: str
    removed: tuple[int, ...]
    measure: str
    """`ppl NAME`, or `TASK METRIC`."""
    value: float
    stderr: float | None
    """Of a task's metric, as lm-eval gives it (documents are the sampling unit)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Every figure, and what it cost."""

    results: tuple[Result, ...]
    protocols: dict[str, str]
    """Text -> how its perplexity was measured."""
    masks_scored: int
    masks_read: int
    """Scores that the store held."""
    layer_forwards: int
    skip_layer_forwards: int
    requests_cut: int
    """Different requests of tasks that were longer than the model reads: they lost their
    beginning."""

    def value(self, layer_set: str, measure: str) -> float:
        """One figure; raises KeyError."""
        for result in self.results:
            if (result.layer_set, result.measure) == (layer_set, measure):
                return result.value
        raise KeyError((layer_set, measure))


def evaluate(config: EvalConfig, progress: Progress | None = None) -> Evaluation:
    """Evaluate sets of layers; writes results.json and results.csv into the folder.

    Raises:
        InputError: an unknown task, missing data, a text or set that does not fit; before any
            engine starts.
        RunInterrupted: what was scored is kept, and the same call goes on from there.
    """
    num_players = num_players_of(config)
    sets = [full_model(), *(s for s in config.sets if s.removed)]
    if not config.texts and not config.tasks:
        raise InputError("nothing to evaluate: name a text (--text) or a task (--tasks)")
    names = [s.name for s in sets]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two sets are named {twice!r}")
    tokenizer = load_tokenizer(config.model)
    cuts = {
        name: protocol_windows(path, tokenizer, config.protocol, name=name, field=config.text_field)
        for name, path in config.texts.items()
    }
    for cut in cuts.values():
        check_windows(read_checkpoint(config.model), cut.windows)
    tasks = _Tasks(config) if config.tasks else None
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    probe = TokenWindows.from_tokens(np.array([[0, 1]]), name="probe")
    longest = max([cut.windows.length for cut in cuts.values()], default=2)
    if tasks is not None:
        longest = max(longest, tasks.max_length + 1)
    with ScoringSession(
        config,
        probe,
        store=folder / "scores.sqlite",
        holder=f"an evaluation in {folder}",
        longest=longest,
        progress=progress,
    ) as session:
        masks_MP = layer_set_masks(sets, num_players)
        results = _perplexities(session, sets, masks_MP, cuts)
        requests_cut = 0
        if tasks is not None:
            figures, requests_cut = tasks.run(session, tokenizer, sets, masks_MP)
            results += figures
        evaluation = Evaluation(
            results=tuple(results),
            protocols={name: str(cut) for name, cut in cuts.items()},
            masks_scored=session.masks_scored,
            masks_read=session.masks_read,
            layer_forwards=session.work.layer_forwards,
            skip_layer_forwards=session.work.skip_layer_forwards,
            requests_cut=requests_cut,
        )
        _write(folder, config, session, evaluation)
    return evaluation


def _perplexities(
    session: ScoringSession,
    sets: Sequence[LayerSet],
    masks_MP: Any,
    cuts: dict[str, ProtocolWindows],
) -> list[Result]:
    results = []
    for name, cut in cuts.items():
        nll_MN = session.score(masks_MP, cut.windows, stage=name)["nll"].astype(np.float64)
        ppl_M = perplexity(nll_MN.sum(axis=1) / cut.windows.num_tokens_N.sum())
        results += [
            Result(
                layer_set=s.name,
                removed=s.removed,
                measure=f"ppl {name}",
                value=float(ppl),
                stderr=None,
            )
            for s, ppl in zip(sets, ppl_M, strict=True)
        ]
    return results


class _Tasks:
    """lm-eval's tasks, loaded with their data before an engine starts."""

    def __init__(self, config: EvalConfig) -> None:
        loader = TaskLoader(config.tasks, config.include_path)
        from lpserve.data.task_requests import max_input_length
        from lpserve.evaluation.lm_eval_model import CANNOT_GENERATE

        self._config = config
        self.max_length = config.max_length or max_input_length(config.model)
        self._manager, loaded = loader.manager, loader.load(config.tasks)
        for name, task in loaded.items():
            kind = task.get_config("output_type")
            if kind == "generate_until" and (config.engine, config.pool) == ("vllm", "local"):
                continue
            if kind == "generate_until":
                raise InputError(f"task {name!r} generates text: {CANNOT_GENERATE}")
            if kind not in SERVED:
                raise InputError(
                    f"task {name!r} is of kind {kind!r}: under masks only {', '.join(SERVED)} are "
                    "served; export the checkpoint and evaluate it with lm-eval's own models"
                )

    def run(
        self, session: ScoringSession, tokenizer: Any, sets: Sequence[LayerSet], masks_MP: Any
    ) -> tuple[list[Result], int]:
        """Figures, and how many different requests lost their beginning."""
        import lm_eval

        from lpserve.evaluation.lm_eval_model import NotFiniteError, SetsLM

        lm = SetsLM(session, tokenizer, masks_MP, max_length=self.max_length)
        results = []
        for row, layer_set in enumerate(sets):
            lm.current = row
            try:
                with _in_one_process(), redirect_stdout(io.StringIO()):
                    found: Any = cast("Any", lm_eval.simple_evaluate)(
                        lm,
                        tasks=list(self._config.tasks),
                        num_fewshot=self._config.num_fewshot,
                        limit=self._config.limit,
                        task_manager=self._manager,
                        log_samples=False,
                        bootstrap_iters=BOOTSTRAP_DRAWS,
                    )
            except NotFiniteError as error:
                session.progress.note(f"{layer_set.name}: {error}; its tasks are left out")
                continue
            for task, metrics in found["results"].items():
                results += _figures(layer_set, task, metrics)
        return results, len(lm.cut)


@contextmanager
def _in_one_process() -> Iterator[None]:
    """lm-eval forks for its bootstrap: beside an engine's threads, a fork may never end."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        os.environ.pop("DISABLE_MULTIPROC")
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


def _figures(layer_set: LayerSet, task: str, metrics: dict[str, Any]) -> list[Result]:
    """lm-eval names its metrics `acc,none` with `acc_stderr,none` beside."""
    results = []
    for key, value in metrics.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = metrics.get(f"{name}_stderr,{filtered}")
        results.append(
            Result(
                layer_set=layer_set.name,
                removed=layer_set.removed,
                measure=f"{task} {name}" + (f" ({filtered})" if filtered != "none" else ""),
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
            )
        )
    return results


def _write(
    folder: Path, config: EvalConfig, session: ScoringSession, evaluation: Evaluation
) -> None:
    import lpserve

    info = session.info
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
    (folder / "results.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["set", "removed", "measure", "value", "stderr"])
    for r in evaluation.results:
        removed = " ".join(map(str, r.removed))
        writer.writerow([r.layer_set, removed, r.measure, repr(r.value), r.stderr])
    (folder / "results.csv").write_text(text.getvalue(), encoding="utf-8")


def sets_from(
    paths: Sequence[str], config: EngineConfig, remove: Sequence[int] = ()
) -> list[LayerSet]:
    """The sets of plans, run folders and other tools' files; of plans, only those that remove as
    many layers as `remove` says, if it says anything."""
    if not paths:
        return []
    num_players = num_players_of(config)
    model_hash = None
    if config.engine != "synthetic":
        model_hash = checkpoint_hash(read_checkpoint(config.model))
    found: list[LayerSet] = []
    for path in paths:
        some = read_sets(path, num_players, model_hash)
        kept = [s for s in some if not remove or len(s.removed) in remove]
        if not kept:
            raise InputError(f"{path} has no set of {', '.join(map(str, remove))} layers")
        found += kept
    return found
