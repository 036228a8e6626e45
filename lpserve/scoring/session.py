"""A scoring session: engines, the store that keeps their scores, and what connects the two.

`run`, `sweep`, `evaluate` and `compare` each score through one session. Results that arrive
together are committed together, then counted. Every mask is looked up in the store first, so a job
that is started again resumes, and no score is made twice.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lpserve.config import EngineConfig
from lpserve.data.windows import TokenWindows
from lpserve.engine.base import Engine, check_extra_metrics
from lpserve.errors import EngineError, InputError, LpserveError, RunInterrupted
from lpserve.masks import drop_one, key_text, keys, sort_distinct
from lpserve.scoring.dispatcher import Dispatcher
from lpserve.scoring.local import LocalPool
from lpserve.scoring.open import engine_notes, engine_spec, open_pool
from lpserve.scoring.pool import UnitResult
from lpserve.scoring.progress import Progress
from lpserve.scoring.signals import Signals, trap_signals
from lpserve.scoring.tracker import ScoreRequest, ScoreTracker
from lpserve.scoring.units import GivenUp
from lpserve.store.blocks import WindowBlock
from lpserve.store.store import Store
from lpserve.types import BoolArray, EngineInfo, FloatArray, Work

POLL_S = 0.2
"""Seconds to wait for a result before progress and signals are looked at again."""
_COMMIT_TOGETHER = 64
SAME_LOSS = 5e-5
"""By this share the whole model's loss may differ between engines of one game: those that agree
stay below 1e-5 in float32, the nearest that does not was off by 9.7e-5."""
CHECKED_WINDOWS = 8
"""Windows that such a comparison reads."""


class ScoringSession:
    """Engines and a store, open for one job or for several that follow one another.

    The constructor opens the store, starts the engines and traps signals; `close` ends all of it.
    `at_work` shows a job's progress. As a context manager the session is at work from its beginning
    to its end.

    Args:
        windows: what the engines are opened with.
        store: the score store's path, or an open store, which stays open.
        holder: who has the store open, for those whom its lock refuses.
        longest: tokens of the longest window that will be scored.
        stored: config.json of an earlier run, whose engine settings are used again.
        progress: where the job is shown; None: a new one.
        signals: signals that are trapped already; None: trap them here.
        log: called with each message about the engines; None: the progress shows it.

    Raises:
        InputError, EngineError, StoreBusyError: the model, the store or the pool cannot be used.
        RunInterrupted: a signal came before the engines had started.
    """

    def __init__(
        self,
        config: EngineConfig,
        windows: TokenWindows,
        *,
        store: str | Path | Store,
        holder: str = "an lpserve process",
        longest: int | None = None,
        stored: dict[str, Any] | None = None,
        progress: Progress | None = None,
        signals: Signals | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.progress = progress or Progress(interval_s=config.progress_s)
        """Where the job at work is shown."""
        self._grace_s = config.grace_s
        with ExitStack() as stack:
            self.signals = signals or stack.enter_context(trap_signals())
            self.signals.at_work = False  # loading a model may be broken off
            if not isinstance(store, Store):
                store = stack.enter_context(Store(store, holder=holder))
            self.store = store
            spec = engine_spec(config, stored, max(windows.length, longest or 0))
            self.pool = open_pool(config, spec, windows, log or self.progress.note)
            stack.callback(self.pool.close)
            for line in engine_notes(self.store, self.info):
                (log or self.progress.note)(line)
            self._stack = stack.pop_all()
        self.dispatcher = Dispatcher(self.pool)
        self.masks_scored = 0
        """Masks that engines scored for `score`."""
        self.compares = False
        """Whether `score` still has to compare the whole model's loss (`compare_first`)."""
        self.masks_read = 0
        """Masks that `score` found in the store."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Show the progress of one job; a signal now waits for `check_signals`."""
        self.signals.at_work = True
        with self.progress, threadpool_limits(1, user_api="blas"):
            yield

    def close(self) -> None:
        """Stop the engines; close the store and restore signal handlers if opened here."""
        self._stack.close()

    def __enter__(self) -> ScoringSession:
        self._stack.enter_context(self.at_work())
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @cached_property
    def game(self) -> int:
        """The store's number of the game that the engines play."""
        return self.store.game_id(self.info.game)

    @property
    def info(self) -> EngineInfo:
        return self.pool.info

    @property
    def work(self) -> Work:
        """What the engines have done for the job so far."""
        return self.progress.state.work

    def with_engine(self, call: Callable[[Engine], Any]) -> Any:
        """Call something on the engine itself; None where engines are in other processes."""
        return self.pool.with_engine(call) if isinstance(self.pool, LocalPool) else None

    def drain(self, timeout_s: float, accept: Callable[[UnitResult | GivenUp], None]) -> None:
        """Hand the results that have arrived to `accept`, waiting up to `timeout_s` for the first.

        All of them share one commit: with many engines, results would otherwise wait for the disk
        one after the other.

        Args:
            accept: stores a result and counts it.

        Raises:
            EngineError: the dispatcher's; results that came before it are stored.
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
        """After a signal, store what arrives within the grace time, then raise RunInterrupted.

        A second signal ends the grace time. Without a signal this returns at once.

        Args:
            accept: as for `drain`.
            interrupted: called at the end; returns how many masks are scored.
        """
        if not self.signals.count:
            return
        self.dispatcher.stop()
        deadline = time.monotonic() + self._grace_s
        self.progress.note(f"stopping: up to {self._grace_s:g} s for scores in flight")
        with suppress(EngineError):  # engines lost meanwhile are not what ended the run
            while (
                self.dispatcher.in_flight and time.monotonic() < deadline and self.signals.count < 2
            ):
                self.drain(POLL_S, accept)
        raise RunInterrupted(
            f"interrupted; {interrupted()} masks are scored and kept in "
            f"{self.store.path}: give the same command again to resume"
        )

    def score(
        self,
        masks_MP: BoolArray,
        windows: TokenWindows,
        extra_metrics: tuple[str, ...] = (),
        *,
        stage: str = "scoring",
    ) -> dict[str, NDArray[np.float32]]:
        """Metric -> sums over each window, `float32[M, N]`: of the NLL and of `extra_metrics`.

        They are as stored; NaN where a mask could not be scored.

        Args:
            masks_MP: bool [M, P]; rows may repeat.
            stage: name of this step in the progress line.

        Raises:
            InputError: the engine has no such metric, or the windows do not fit the model.
            RunInterrupted: a signal came; what was scored is kept.
        """
        distinct_MP, inverse_M = sort_distinct(masks_MP)
        request = self.request(distinct_MP, windows, extra_metrics, stage)
        return {metric: values_MN[inverse_M] for metric, values_MN in request.values.items()}

    def request(
        self,
        masks_MP: BoolArray,
        windows: TokenWindows,
        extra_metrics: tuple[str, ...],
        stage: str,
        *,
        overlap: bool = False,
    ) -> ScoreRequest:
        """A complete request of distinct masks; see `score` and `ScoreTracker.request`."""
        check_extra_metrics(self.info, extra_metrics)
        if self.compares:
            self.check_same_scores(windows)
        tracker = ScoreTracker(
            self.store, self.game, windows, self.dispatcher, extra_metrics=extra_metrics
        )

        def accept(result: UnitResult | GivenUp) -> None:
            tracker.accept(result)
            if isinstance(result, GivenUp):
                self.progress.note(_told(result, self.info.num_players))
            elif result.scores is not None:
                self.progress.state.work += result.scores.work

        self.progress.begin(stage, len(masks_MP))
        request = tracker.request(masks_MP, overlap=overlap)
        while not request.complete:
            self.drain(POLL_S, accept)
            self._show(tracker)
            self.check_signals(accept, lambda: tracker.scored)
        self._show(tracker)
        self.masks_scored += tracker.scored - tracker.reused
        self.masks_read += tracker.reused
        return request

    def compare_first(self) -> None:
        """Have the whole model's loss compared before anything else is scored, if the store holds
        scores of this game: they may be another engine's."""
        self.compares = self.info.game.content_hash in self.store.games()

    def check_same_scores(self, windows: TokenWindows) -> None:
        """Compare the whole model's loss with what the store holds of it, made by another engine.

        Engines of one game give equal scores up to rounding, but for models that an engine does not
        run as transformers does. Without a stored score there is nothing to mix with. What is
        scored here is not stored.

        Raises:
            InputError: they differ; the scores of the two would be mixed.
            EngineError: the engines cannot score it.
        """
        full_MP = np.ones((1, self.info.num_players), dtype=bool)
        stored_MN, known_MN = self.store.get(self.game, windows, full_MP)
        rows = np.flatnonzero(known_MN[0] & np.isfinite(stored_MN[0]))[:CHECKED_WINDOWS]
        if not len(rows):
            return
        some = windows.select(rows)
        nll_N = _scored_apart(self, full_MP, some)
        self.compares = False
        tokens = int(some.num_tokens_N.sum())
        before, now = stored_MN[0, rows].sum() / tokens, nll_N.sum() / tokens
        if not abs(now - before) <= SAME_LOSS * before + 4 * self.info.noise_nll:
            raise InputError(
                f"{self.info.path} gives the whole model a loss of {now:.6g} nats per token, where "
                f"the scores in {self.store.path} say {before:.6g}: they do not mix; use the "
                "engine that made them, or another folder or store"
            )

    def _show(self, tracker: ScoreTracker) -> None:
        state = self.progress.state
        state.done, state.reused = tracker.scored, tracker.reused
        state.windows = tracker.windows if tracker.in_parts else (0, 0)
        state.quarantined = len(tracker.quarantined)
        if self.progress.update():
            self.pool.publish(state)


def _told(given_up: GivenUp, num_players: int) -> str:
    """What is told of masks that were given up."""
    if given_up.unit.overlap:
        return f"the overlap of single layers is not known: {given_up.reason}"
    mask = key_text(keys(given_up.unit.masks_MP)[0], num_players)
    return f"mask {mask} cannot be scored: {given_up.reason}"


def single_overlap(session: ScoringSession, windows: TokenWindows) -> FloatArray | None:
    """How the effects of single players overlap on windows, nats per token, `float64[P, P]`
    (`types.Scores.overlap_MM`); None where the engines do not measure it, or cannot."""
    if not session.info.has_overlap:
        return None
    full_P = np.ones(session.info.num_players, dtype=bool)
    masks_MP = np.concatenate([full_P[None], drop_one(full_P)])
    return session.request(masks_MP, windows, (), "single layers", overlap=True).overlap_PP


def _scored_apart(session: ScoringSession, full_MP: BoolArray, windows: TokenWindows) -> FloatArray:
    """NLLs of the whole model on windows, `float64[N]`, which are not stored.

    Raises:
        EngineError: the engines cannot score it.
    """
    results: list[UnitResult | GivenUp] = []
    block = WindowBlock(id=-1, rows=np.arange(windows.num_windows))
    session.dispatcher.add(full_MP, block, session.dispatcher.register(windows))
    while not results:
        results += filter(None, [session.dispatcher.next(POLL_S)])
        if session.signals.at_work:
            session.check_signals(lambda _result: None, lambda: 0)
    (result,) = results
    if isinstance(result, GivenUp) or result.scores is None:
        reason = result.reason if isinstance(result, GivenUp) else result.error
        raise EngineError(f"the whole model cannot be scored: {reason}")
    return result.scores.nll_MN[0]
