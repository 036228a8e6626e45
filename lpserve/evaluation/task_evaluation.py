"""lm-eval's tasks under every mask of an evaluation."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, cast

from lpserve.data.tasks import TaskLoader
from lpserve.engine.base import Generates
from lpserve.engine.registry import engine_kind
from lpserve.errors import InputError
from lpserve.evaluation.results import Result
from lpserve.evaluation.settings import EvalConfig
from lpserve.plan.layer_sets import LayerSet
from lpserve.scoring.session import ScoringSession
from lpserve.types import BoolArray

LIKELIHOOD_KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
"""lm-eval's kinds of tasks that need nothing but likelihoods."""
BOOTSTRAP_DRAWS = 1000
"""For standard errors of metrics that are no means (lm-eval's perplexity): 2% of them is noise."""


class TaskEvaluation:
    """lm-eval's tasks, loaded with their data before an engine starts.

    Raises:
        InputError: lm-eval is not installed, or a task is unknown, has no data or is of a kind
            that these engines cannot answer.
    """

    def __init__(self, config: EvalConfig) -> None:
        loader = TaskLoader(config.tasks, config.include_path)
        from lpserve.data.task_requests import max_input_length
        from lpserve.evaluation.lm_eval_model import CANNOT_GENERATE

        self._config = config
        self.max_length = config.max_length or max_input_length(config.model)
        self._manager, loaded = loader.manager, loader.load(config.tasks)
        can_generate = config.pool == "local" and (
            Generates in engine_kind(config.engine).capabilities
        )
        for name, task in loaded.items():
            kind = task.get_config("output_type")
            if kind == "generate_until" and can_generate:
                continue
            if kind == "generate_until":
                raise InputError(f"task {name!r} generates text: {CANNOT_GENERATE}")
            if kind not in LIKELIHOOD_KINDS:
                raise InputError(
                    f"task {name!r} is of kind {kind!r}: under masks only "
                    f"{', '.join(LIKELIHOOD_KINDS)} are served; export the checkpoint "
                    "and evaluate it with lm-eval's own models"
                )

    def run(
        self, session: ScoringSession, tokenizer: Any, sets: Sequence[LayerSet], masks_MP: BoolArray
    ) -> tuple[list[Result], int]:
        """Evaluate every task under every mask, one set after another.

        Args:
            masks_MP: bool [M, P], the masks of `sets`.

        Returns:
            The figures, and how many different requests lost their beginning. A set under which
            log-likelihoods are not finite has no figures; the progress says so.
        """
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
    """Figures of one task from lm-eval's dict: `acc,none` comes with `acc_stderr,none`."""
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
