"""Finished runs and studies in MLflow: parameters, metrics, files. Logging is off by default.

An MLflow run is found again by host and path of the run folder: giving the same command again
updates it instead of creating a second one. A server that cannot be reached is refused before a
model loads; if the server becomes unreachable during the run, only the log is lost.

No other module imports mlflow.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpserve.analysis.build_plan import Outcome
from lpserve.errors import InputError, first_line
from lpserve.plan.plan import Plan
from lpserve.redact import redact
from lpserve.store.filesystem import is_shared

FOLDER_TAG, ID_TAG = "lpserve.folder", "lpserve.id"
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""MLflow's own defaults wait for many minutes; variables that the user has set are kept."""
_PARAMS, _METRICS = 100, 1000  # what MLflow's API takes at once
_LONGEST = 6000  # characters of a parameter


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One number; `step` is the number of removed layers, or the layer."""

    name: str
    value: float
    step: int = 0


class Tracking:
    """An MLflow server, file or database, and an experiment in it.

    Raises:
        InputError: mlflow is missing, or the place cannot be used.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        try:
            with _patient():
                from mlflow.tracking import MlflowClient

                self._client = MlflowClient(tracking_uri=uri)
                self._experiment = self._experiment_id(experiment)
        except ImportError as error:
            raise InputError(f"mlflow needs MLflow ({error}): install lpserve[mlflow]") from None
        except Exception as error:  # requests', sqlalchemy's and mlflow's own kinds
            raise InputError(self._told("cannot be used", error)) from None

    def log(
        self,
        folder: Path,
        *,
        params: Mapping[str, Any],
        metrics: Sequence[Metric],
        files: Sequence[Path],
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Log a finished run, or bring its log up to date; returns MLflow's id of it.

        Args:
            folder: gives the run its name and its identity.
            params: MLflow keeps them as they were first logged.
            parent: MLflow's id of the study that the run is a point of.
            tags: values that may change when the same run is logged again.

        Raises:
            InputError: the server cannot be reached, or refuses.
        """
        try:
            with _patient():
                return self._log(
                    folder,
                    params=params,
                    metrics=metrics,
                    files=files,
                    parent=parent,
                    tags=tags or {},
                )
        except Exception as error:
            raise InputError(self._told("cannot be written to", error)) from None

    def _log(
        self,
        folder: Path,
        *,
        params: Mapping[str, Any],
        metrics: Sequence[Metric],
        files: Sequence[Path],
        parent: str | None,
        tags: Mapping[str, str],
    ) -> str:
        from mlflow.entities import Metric as Logged
        from mlflow.entities import Param, RunTag

        # a folder that hosts share is the same run from each of them
        host = "" if is_shared(folder) else f"{socket.gethostname()}:"
        place = f"{host}{folder.resolve()}"
        known_by = hashlib.sha256(place.encode()).hexdigest()
        found = self._client.search_runs(
            [self._experiment], f"tags.`{ID_TAG}` = '{known_by}'", max_results=1
        )
        if found:
            run = found[0].info.run_id
        else:
            run = self._client.create_run(self._experiment, run_name=folder.name).info.run_id
        own = {ID_TAG: known_by, FOLDER_TAG: place} | {_key(k): v for k, v in tags.items()}
        if parent:
            own["mlflow.parentRunId"] = parent
        self._client.log_batch(run, tags=[RunTag(k, v) for k, v in own.items()])
        known = found[0].data.params if found else {}
        # a parameter stays as it was first logged: a larger budget shows in a metric
        fresh = {_key(k): str(v)[:_LONGEST] for k, v in params.items()}
        new = [Param(k, v) for k, v in fresh.items() if k not in known]
        for part in _parts(new, _PARAMS):
            self._client.log_batch(run, params=part)
        now = int(1000 * time.time())
        finite = [Logged(m.name, m.value, now, m.step) for m in metrics if math.isfinite(m.value)]
        for part in _parts(finite, _METRICS):
            self._client.log_batch(run, metrics=part)
        for path in files:
            if path.exists():
                self._client.log_artifact(run, str(path))
        self._client.set_terminated(run, "FINISHED")
        return run

    def _told(self, trouble: str, error: BaseException) -> str:
        """A line about an error of MLflow's, without what is secret in the address."""
        return redact(f"mlflow {self.uri} {trouble}: {first_line(error)[:300]}", self.uri)

    def _experiment_id(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        if known is None:
            return self._client.create_experiment(name)
        if known.lifecycle_stage != "active":
            raise InputError(f"experiment {name!r} was deleted there; name another")
        return known.experiment_id


def log_run(
    tracking: Tracking,
    *,
    config: Mapping[str, Any],
    folder: Path,
    plan: Plan,
    values_P: Sequence[float],
    stderr_P: Sequence[float],
    parent: str | None = None,
) -> str:
    """Log what a run found: its config, plan, values and files; returns MLflow's id of the run.

    Args:
        values_P: values of the players, and `stderr_P` their standard errors.
        parent: MLflow's id of the study that the run is a point of.

    Raises:
        InputError: the server cannot be reached, or refuses.
    """
    pairs = [("value", values_P), ("value_stderr", stderr_P)]
    values = [
        Metric(name=name, value=float(number), step=player)
        for name, numbers in pairs
        for player, number in enumerate(numbers)
    ]
    return tracking.log(
        folder,
        params=flat(config),
        metrics=[*plan_metrics(plan), *values],
        files=run_files(folder),
        parent=parent,
    )


def log_finished_run(
    tracking: Tracking,
    folder: Path,
    outcome: Outcome,
    *,
    config: Mapping[str, Any],
    log: Callable[[str], None],
) -> None:
    """Log a run that just finished.

    Args:
        log: called with a line where the server has become unreachable; nothing is raised then.
    """
    values = outcome.analysis.values
    try:
        log_run(
            tracking,
            config=config,
            folder=folder,
            plan=outcome.plan,
            values_P=values.values_P.tolist(),
            stderr_P=values.total_stderr_P.tolist(),
        )
    except InputError as error:
        log(f"{error}; the run is finished: give the same command again to log it")


def plan_metrics(plan: Plan) -> list[Metric]:
    """Perplexities and utilities of a plan by the number of removed layers, or by the percentage of
    a cost that goes (0: all kept), and the number of masks scored."""
    found = [Metric(name="masks_scored", value=plan.masks_scored)]
    for name in ("calibration_ppl", "heldout_ppl", "calibration_utility", "heldout_utility"):
        values = [(0, getattr(plan, f"full_{name}"))]
        values += [(round(plan.place(entry)), getattr(entry, name)) for entry in plan.plans]
        found += [Metric(name=name, value=v, step=r) for r, v in values if v is not None]
    return found


def run_files(folder: Path) -> list[Path]:
    """The files of a run's folder that are logged: results without the scores."""
    names = ("plan.json", "shapley.csv", "interactions.csv", "report.html", "config.json")
    return [folder / name for name in names]


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's keys in one level: nested ones as `key.name`; keys that are None are left out."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif value is not None:
            found[key] = value
    return found


def _key(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w\-./ :]", "_", name)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _patient() -> Iterator[None]:
    """MLflow without its long waits and its notices; put back afterwards."""
    added = {k: v for k, v in _PATIENCE.items() if k not in os.environ}
    os.environ.update(added)
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name in added:
            os.environ.pop(name, None)
