"""Masks scored on windows, durably: what a run, an evaluation and a comparison of rivals share.

`Scoring` is a dispatcher with its store and signals: results that came together are committed
together, then counted. `ScoringSession` opens all of it for a job that is no run: it scores
whatever it is asked, in the store first, so that the same job resumes and no score is made twice.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lpserve.config import EngineConfig
from lpserve.data.windows import TokenWindows
from lpserve.engine.base import Engine, check_extra_metrics
from lpserve.errors import EngineError, LpserveError, RunInterrupted
from lpserve.masks import key_text, keys, sort_distinct
from lpserve.scoring.dispatcher import Dispatcher, GivenUp
from lpserve.scoring.open import engine_spec, open_pool
from lpserve.scoring.pool import EnginePool, LocalPool, UnitResult
from lpserve.scoring.progress import Progress
from lpserve.scoring.signals import Signals, trap_signals
from lpserve.scoring.tracker import ScoreTracker
from lpserve.store.store import Store
from lpserve.types import BoolArray, EngineInfo, Work

POLL_S = 0.2
_COMMIT_TOGETHER = 64


class Scoring:
    """Engines at work for a job, and the store that takes what they find."""

    def __init__(
        self, store: Store, pool: EnginePool, signals: Signals, progress: Progress, grace_s: float
    ) -> None:
        self.store, self.pool = store, pool
        self.dispatcher = Dispatcher(pool)
        self.game = store.game_id(pool.info.game)
        self._signals, self._progress, self._grace_s = signals, progress, grace_s

    def drain(self, timeout_s: float, accept: Callable[[UnitResult | GivenUp], None]) -> None:
        """Store the results that are there, waiting at most `timeout_s` for the first.

        Those that came meanwhile share its commit: many engines do not wait for the disk one after
        the other.
        """
        results: list[UnitResult | GivenUp] = []
        ended: LpserveError | None = None
        try:
            while len(results) < _COMMIT_TOGETHER:
                result = self.dispatcher.next(0.0 if results else timeout_s)
                if result is None:
                    break
                results.append(result)
        except LpserveError as error:  # what has come is kept
            ended = error
        if results:
            with self.store.together():
                for result in results:
                    accept(result)
        if ended is not None:
            raise ended

    def check_signals(
        self,
        accept: Callable[[UnitResult | GivenUp], None],
        interrupted: Callable[[], int],
    ) -> None:
        """After a signal: store what arrives within the grace time, then raise RunInterrupted.

        Args:
            interrupted: called then; says how many masks are scored.
        """
        if not self._signals.count:
            return
        self.dispatcher.stop()
        deadline = time.monotonic() + self._grace_s
        self._progress.note(f"stopping: up to {self._grace_s:g} s for scores in flight")
        with suppress(EngineError):  # engines lost meanwhile are not what ended the run
            while (
                self.dispatcher.in_flight
                and time.monotonic() < deadline
                and self._signals.count < 2
            ):
                self.drain(POLL_S, accept)
        raise RunInterrupted(
            f"interrupted; {interrupted()} masks are scored and kept in "
            f"{self.store.path}: give the same command again to resume"
        )


class ScoringSession:
    """Engines and a store, open for a job. Use as a context manager.

    Args:
        windows: what the engines are opened with.
        store: the score store's path.
        longest: tokens of the longest window that will be scored.

    Raises:
        InputError, EngineError, StoreBusyError: as a run does.
    """

    def __init__(
        self,
        config: EngineConfig,
        windows: TokenWindows,
        *,
        store: str | Path,
        holder: str,
        longest: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.progress = progress or Progress(interval_s=config.progress_s)
        with ExitStack() as stack:
            signals = stack.enter_context(trap_signals())
            opened = stack.enter_context(Store(store, holder=holder))
            spec = engine_spec(config, None, max(windows.length, longest or 0))
            pool = open_pool(config, spec, windows, self.progress.note)
            stack.callback(pool.close)
            self._scoring = Scoring(opened, pool, signals, self.progress, config.grace_s)
            signals.at_work = True
            stack.enter_context(self.progress)
            stack.enter_context(threadpool_limits(1, user_api="blas"))
            self._stack = stack.pop_all()
        self.masks_scored = 0
        """Masks that engines scored, over all windows that were asked for."""
        self.masks_read = 0
        """Masks that the store held."""

    @property
    def info(self) -> EngineInfo:
        return self._scoring.pool.info

    @property
    def work(self) -> Work:
        """What the engines did so far."""
        return self.progress.state.work

    def with_engine(self, call: Callable[[Engine], Any]) -> Any:
        """Call something on the engine itself; None where engines are in other processes."""
        pool = self._scoring.pool
        return pool.with_engine(call) if isinstance(pool, LocalPool) else None

    def score(
        self,
        masks_MP: BoolArray,
        windows: TokenWindows,
        extra_metrics: tuple[str, ...] = (),
        *,
        stage: str = "scoring",
    ) -> dict[str, NDArray[np.float32]]:
        """Metric -> sums `float32[M, N]` as stored: the NLL, and those of `extra_metrics`. NaN
        where a mask could not be scored.

        Args:
            masks_MP: bool [M, P]; may repeat.
            stage: what the progress line calls it.

        Raises:
            InputError: the engine has no such metric, or the windows do not fit the model.
            RunInterrupted: a signal came; what was scored is kept.
        """
        check_extra_metrics(self.info, extra_metrics)
        scoring = self._scoring
        distinct_DP, inverse_M = sort_distinct(masks_MP)
        board = ScoreTracker(
            scoring.store, scoring.game, windows, scoring.dispatcher, extra_metrics=extra_metrics
        )

        def accept(result: UnitResult | GivenUp) -> None:
            board.accept(result)
            if isinstance(result, GivenUp):
                mask = key_text(keys(result.unit.masks_MP)[0], self.info.num_players)
                self.progress.note(f"mask {mask} cannot be scored: {result.reason}")
            elif result.scores is not None:
                self.progress.state.work += result.scores.work

        self.progress.begin(stage, len(distinct_DP))
        request = board.request(distinct_DP)
        while not request.complete:
            scoring.drain(POLL_S, accept)
            self._show(board)
            scoring.check_signals(accept, lambda: board.scored)
        self._show(board)
        self.masks_scored += board.scored - board.reused
        self.masks_read += board.reused
        return {metric: values_DN[inverse_M] for metric, values_DN in request.values.items()}

    def _show(self, board: ScoreTracker) -> None:
        state = self.progress.state
        state.done, state.reused = board.scored, board.reused
        state.quarantined = len(board.quarantined)
        if self.progress.update():
            self._scoring.pool.publish(state)

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> ScoringSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
