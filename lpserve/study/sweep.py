"""Running a study: engines are opened once for each model, every family's masks scored once.

A point is finished when its folder holds point.json, the last file written there. The same study
continues where it was stopped; a point that fails is reported and tried again the next time, and
the others finish. The scores of all points are in one store, in parts that no two points overlap in
(`StudyWindows.atoms`).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lpserve.analysis.record import RunRecord, read_record
from lpserve.config import RunConfig
from lpserve.errors import (
    DiskFullError,
    InputError,
    LpserveError,
    RunInterrupted,
    StoreBusyError,
    StoreCorruptError,
)
from lpserve.runner.run import run_at
from lpserve.scoring.session import ScoringSession
from lpserve.scoring.signals import Signals, trap_signals
from lpserve.store.files import make_folder, write_text
from lpserve.store.lock import PathLock
from lpserve.store.run_folder import read_run_config
from lpserve.store.store import Store
from lpserve.study.finished import Finished, SweepResult, read_finished, write_finished
from lpserve.study.study import Family, Point, Study
from lpserve.study.windows import StudyWindows, all_windows

_ENDS_ALL = (RunInterrupted, DiskFullError, StoreBusyError, StoreCorruptError)


def sweep(
    study: Study,
    windows: Mapping[str, StudyWindows] | None = None,
    *,
    log: Callable[[str], None] = lambda line: None,
) -> SweepResult:
    """Run every point that is not finished; raises what ends all of them.

    Args:
        windows: what `all_windows` cut; None: cut now.
        log: called with a line before every point, and where one fails.

    Raises:
        InputError: a text cannot be used; raised before an engine starts.
        RunInterrupted: a signal came; what was scored is kept.
        StoreBusyError, StoreCorruptError, DiskFullError: the store can take no more.
    """
    windows = windows or all_windows(study)
    make_folder(study.out / "points", "study folder")
    with ExitStack() as stack:
        lock = PathLock(study.out / "study", holder=f"a sweep in {study.out}")
        stack.callback(lock.release)
        signals = stack.enter_context(trap_signals())
        store = stack.enter_context(
            Store(study.out / "scores.sqlite", holder=f"a sweep in {study.out}")
        )
        work = _Sweep(study, windows, store, signals, log)
        stack.callback(work.close)
        for group in study.groups():
            work.run(group)
        held = distinct = 0
        for scores in store.read_all():
            if scores.metric != "nll":  # others are made in the same pass
                continue
            held += scores.first_MN.size
            distinct += int(scores.first_MN.sum())
        place = {point.id: i for i, point in enumerate(study.points)}
        runs = sorted(work.found, key=lambda run: place.get(run.point.id, -1))
        return SweepResult(
            study=study, runs=tuple(runs), scores_held=distinct, scores_twice=held - distinct
        )


@dataclass(slots=True)
class _Sweep:
    study: Study
    windows: Mapping[str, StudyWindows]
    store: Store
    signals: Signals
    log: Callable[[str], None]
    found: list[Finished] = field(default_factory=list)
    _session: ScoringSession | None = None

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def run(self, group: Sequence[Family]) -> None:
        """The families of one model and dtype; its engines are closed at the end."""
        configs = [p.config for family in group for p in (family.leader, *family.points)]
        windows = self.windows[group[0].leader.config.model]
        for atom in [*windows.atoms(configs), windows.heldout.windows]:
            self.store.blocks_for(atom)
        for family in group:
            self._family(family, windows)
        self.close()

    def _family(self, family: Family, windows: StudyWindows) -> None:
        leader = family.leader
        in_study = leader in family.points
        led = self._one(leader, windows, in_study, masks_of=None)
        source = None
        for point in family.points:
            if point is leader:
                continue
            if led.failed:
                reason = f"its masks are those of point {leader.id}, which failed"
                self._add(Finished(point=point, in_study=True, masks_of=leader.id, failed=reason))
                continue
            source = source or read_record(leader.config.out)
            self._one(point, windows, True, masks_of=(leader.id, source))

    def _one(
        self,
        point: Point,
        windows: StudyWindows,
        in_study: bool,
        masks_of: tuple[str, RunRecord] | None,
    ) -> Finished:
        whose = masks_of[0] if masks_of else point.id
        if self.signals.count:
            raise RunInterrupted(
                f"interrupted; what was scored is kept in {self.study.out}: give the same command "
                "again to resume"
            )
        known = read_finished(point, windows, self.study.metrics, in_study=in_study, masks_of=whose)
        if known is not None:
            return self._add(known)
        named = ", ".join(f"{d} {point.levels[d]}" for d in self.study.varied)
        what = named if in_study else f"masks for {named}"
        place = f"{len(self.found) + 1}/{self.study.num_runs}"
        self.log(f"[{place}] {point.id}: {what or 'the only point'}")
        started = time.monotonic()
        try:
            calibration, heldout = windows.of(point.config)
            result = run_at(
                point.config,
                (calibration, heldout),
                self._opened(point, windows),
                masks_of=masks_of[1] if masks_of else None,
                extra_metrics=self.study.metrics,
            )
        except _ENDS_ALL:
            raise
        except Exception as error:
            self.close()  # scores in flight are of no use to the next point
            reason = _reason(error)
            _record_failure(point, error)
            self.log(f"    failed: {reason}")
            failure = Finished(point=point, in_study=in_study, masks_of=whose, failed=reason)
            return self._add(failure)
        run = Finished.from_result(
            result,
            point,
            in_study=in_study,
            masks_of=whose,
            calibration=calibration,
            heldout=heldout,
            seconds=time.monotonic() - started,
        )
        write_finished(run, calibration, heldout, self.study.metrics)
        return self._add(run)

    def _opened(self, point: Point, windows: StudyWindows) -> ScoringSession:
        if self._session is None:
            self._session = ScoringSession(
                point.config,
                windows.longest,
                store=self.store,
                stored=self._settings_before(point.config),
                signals=self.signals,
                log=self.log,
            )
            self._session.compare_first()
        return self._session

    def _settings_before(self, config: RunConfig) -> dict[str, Any] | None:
        """config.json of a finished run of this model and dtype, whose settings engines keep."""
        for run in self.found:
            path, other = run.folder / "config.json", run.point.config
            same = (other.model, other.dtype) == (config.model, config.dtype)
            if same and not run.failed and path.exists():
                return read_run_config(path)
        return None

    def _add(self, run: Finished) -> Finished:
        self.found.append(run)
        return run


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no more is known"]
    return lines[0] if isinstance(error, LpserveError) else f"{type(error).__name__}: {lines[0]}"


def _record_failure(point: Point, error: Exception) -> None:
    """Write failure.txt with the traceback into the point's folder, where that is possible."""
    folder = Path(point.config.out)
    with suppress(InputError):
        make_folder(folder, "folder")
        text = "".join(traceback.format_exception(error))
        write_text(folder / "failure.txt", text)
