"""A run from its config to its finished folder: checked, opened, scored, concluded."""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpserve.analysis.build_plan import Outcome
from lpserve.analysis.record import RunRecord
from lpserve.config import RunConfig, as_json
from lpserve.data.items import ItemSet
from lpserve.data.windows import TokenWindows
from lpserve.engine.base import check_extra_metrics
from lpserve.report.tracking import Tracking, log_finished_run
from lpserve.rounds.screening import screen_rows
from lpserve.runner.conclusion import conclude
from lpserve.runner.coordinator import RunLoop
from lpserve.runner.manifest import check_same_game, check_same_windows, made_by
from lpserve.runner.settling import race_windows
from lpserve.runner.setup import (
    check_budget,
    check_model,
    costs_of,
    item_sets_of,
    round_settings,
)
from lpserve.scoring.progress import Progress
from lpserve.scoring.session import ScoringSession
from lpserve.store.run_folder import RunFolder
from lpserve.types import Work
from lpserve.utility import utility_named


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    outcome: Outcome
    scores_new: int
    """Scores of a mask on a window that engines gave; all others were in the store."""
    work: Work
    """What that took the engines."""


def run(config: RunConfig, progress: Progress | None = None) -> RunResult:
    """Score masks within the budget, estimate values, choose and check a plan, write the folder.

    The same config resumes an interrupted run and extends a finished one when the budget grew.

    Raises:
        InputError: something in the config, the model, the texts, the folder or the store cannot
            be used; raised before a model loads, and nothing is left behind.
        RunInterrupted: a signal stopped the run.
        EngineError: no engine could start.
    """
    config = check_model(config)
    calibration, heldout = item_sets_of(config)
    if config.screen_windows:
        screen_rows(calibration.corpora, config.screen_windows)  # refused before an engine starts
    race = race_windows(config, calibration, heldout)
    progress = progress or Progress(interval_s=config.progress_s)
    tracking = Tracking(config.mlflow, config.experiment) if config.mlflow else None
    with ExitStack() as stack:
        folder = stack.enter_context(closing(RunFolder(config.out)))
        stored = _same_run(folder, config, calibration, heldout)
        session = ScoringSession(
            config,
            calibration.windows,
            store=config.store_path,
            holder=f"a run in {config.out}",
            longest=heldout.windows.length,
            stored=stored,
            progress=progress,
        )
        stack.callback(session.close)
        if config.store or (stored and not made_by(stored, session.info)):
            session.check_same_scores(calibration.windows)
        sides = calibration, heldout
        result = _at_work(config, folder, stored, sides, session, None, (), race)
        if tracking is not None:
            log_finished_run(
                tracking, result.folder, result.outcome, config=as_json(config), log=progress.note
            )
        return result


def run_at(
    config: RunConfig,
    item_sets: tuple[ItemSet, ItemSet],
    session: ScoringSession,
    *,
    masks_of: RunRecord | None = None,
    extra_metrics: tuple[str, ...] = (),
) -> RunResult:
    """A run at engines that are open, on calibration and held-out item_sets that are cut already.

    Args:
        config: with every default filled in (`setup.check_model`).
        masks_of: another run of the same game whose windows hold these: its first `budget` masks
            are read again and no other mask is scored, but for the held-out check.
        extra_metrics: metrics that others will ask of the same masks: scored in the same pass.

    Raises: as `run`.
    """
    session.progress = Progress(interval_s=config.progress_s)
    with closing(RunFolder(config.out)) as folder:
        stored = _same_run(folder, config, item_sets[0], None)
        if session.compares:
            session.check_same_scores(item_sets[0].windows)
        return _at_work(config, folder, stored, item_sets, session, masks_of, extra_metrics)


def _same_run(
    folder: RunFolder, config: RunConfig, calibration: ItemSet, heldout: ItemSet | None
) -> dict[str, Any] | None:
    """What an earlier run left in the folder, if it is this run's to go on with.

    Without `heldout` whoever has opened the engines decides on held-out windows, store and device.
    """
    stored = folder.read_config()
    if stored is not None:
        folder.check_same_config(stored, as_json(config), () if heldout else ("store", "device"))
        check_same_windows(folder, stored, calibration, heldout)
    return stored


def _at_work(
    config: RunConfig,
    folder: RunFolder,
    stored: dict[str, Any] | None,
    item_sets: tuple[ItemSet, ItemSet],
    session: ScoringSession,
    masks_of: RunRecord | None,
    extra_metrics: tuple[str, ...],
    race: TokenWindows | None = None,
) -> RunResult:
    if stored is not None:
        check_same_game(folder, stored, session.info)
    metric = utility_named(config.utility).metric
    metrics = tuple(dict.fromkeys(m for m in (metric, *extra_metrics) if m != "nll"))
    check_extra_metrics(session.info, metrics)  # before the folder is this run's
    length = item_sets[0].windows.length
    costs = costs_of(
        config.model,
        session.info,
        length,
        needed=config.target is not None,
        note=session.progress.note,
    )
    settings = round_settings(config, session.info.players, costs)
    check_budget(config, settings)
    folder.begun = True
    loop = RunLoop(config, folder, session, *item_sets, metrics, settings, costs)
    loop.race = race
    session.signals.at_work = True
    loop.write_config(stored)
    with session.at_work():
        if masks_of is None:
            loop.score_rounds()
        else:
            loop.adopt(masks_of)
        outcome = conclude(loop)
    return RunResult(
        folder=folder.path, outcome=outcome, scores_new=loop.scores_new, work=session.work
    )
