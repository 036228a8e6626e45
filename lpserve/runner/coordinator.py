"""The only loop: propose -> submit -> store -> refit -> decide. Wires everything, owns nothing.

    planner --round n--> dispatcher --units--> pool --results--> store --> tracker
       ^                                                                    |
       +---------------- complete rounds, up to n - 2 ----------------------+

Round n is proposed (the surrogate refitted) as soon as round n-2 is complete, while the engines
work on round n-1; on a thread of its own, so that results are stored and engines fed meanwhile. A
round's masks are counted once the store has committed them.

Stopping (SIGINT, SIGTERM): nothing more is submitted, what is in flight within the grace time is
stored, and the same command resumes. A second signal ends the wait.
"""

from __future__ import annotations

import json
import os
from collections import deque
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.analysis.record import RunRecord
from lpserve.config import RunConfig, as_json
from lpserve.data.items import ItemSet
from lpserve.data.windows import TokenWindows
from lpserve.errors import LpserveError
from lpserve.masks import key_text, keys
from lpserve.rounds.history import CompletedRound, Round
from lpserve.rounds.planner import RoundPlanner
from lpserve.rounds.screening import screen_rows
from lpserve.rounds.settings import RoundSettings
from lpserve.runner.background import in_background
from lpserve.runner.manifest import described, holds_windows, write_windows_file
from lpserve.runner.setup import Costs
from lpserve.scoring.pool import UnitResult
from lpserve.scoring.session import POLL_S, ScoringSession
from lpserve.scoring.tracker import ScoreRequest, ScoreTracker
from lpserve.scoring.units import GivenUp
from lpserve.store.run_folder import RunFolder
from lpserve.types import BoolArray, FloatArray, IntArray, perplexity
from lpserve.utility import utility_named

_PROPOSAL_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class _Asked:
    """A round that is being scored."""

    round: Round
    requests: list[ScoreRequest]
    """New masks, and promoted ones if there are any."""

    @property
    def complete(self) -> bool:
        return all(request.complete for request in self.requests)

    @property
    def values(self) -> dict[str, NDArray[np.float32]]:
        """Metric -> stored sums, `float32[M, N]`."""
        return {
            metric: np.concatenate([request.values[metric] for request in self.requests])
            for metric in self.requests[0].values
        }


class RunLoop:
    """One run at work: rounds proposed, scored, and counted."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        session: ScoringSession,
        calibration: ItemSet,
        heldout: ItemSet,
        metrics: tuple[str, ...],
        settings: RoundSettings,
        costs: Costs,
    ) -> None:
        """
        Args:
            metrics: scored beside the NLL.
            settings: what the rounds depend on.
            costs: of the players, for the record.
        """
        store, pool = session.store, session.pool
        self.config, self.folder, self.store, self.pool = config, folder, store, pool
        self.calibration, self.heldout, self.progress = calibration, heldout, session.progress
        self.metrics = metrics
        self.info = pool.info
        self.session, self.dispatcher, self.game = session, session.dispatcher, session.game
        screened = config.screen_windows
        self.screen = screen_rows(calibration.corpora, screened) if screened else None
        self.tracker = self.make_tracker(calibration, self.screen)
        self.settings, self.costs = settings, costs
        self.utility = utility_named(config.utility)
        self.planner = RoundPlanner(
            self.settings,
            self.utility,
            calibration.num_tokens_I,
            screen=self.screen,
            overlap=pool.info.has_overlap and self.utility.in_nats,
        )
        self.rounds: list[CompletedRound] = []
        """Complete rounds, in order."""
        self.race: TokenWindows | None = None
        """Windows on which the plan's sets race once the rounds are done; None: they do not."""
        self.adopted = ""
        """Why no round was asked for, if the masks are those of another run."""
        self.noise_loss = 0.0
        """Noise of a mask's mean loss, root mean square."""
        self.scores_new = 0

    def make_tracker(self, sample: ItemSet, screen: IntArray | None) -> ScoreTracker:
        rows = None if screen is None else sample.window_rows(screen)
        where = (self.store, self.game, sample.windows, self.dispatcher)
        return ScoreTracker(*where, screen=rows, extra_metrics=self.metrics)

    # -- scoring -------------------------------------------------------------------------------

    def score_rounds(self) -> None:
        """Rounds until the budget is spent, nothing is left to ask, or a signal stops the run."""
        self.progress.begin("scoring", self.config.budget)
        pending: deque[_Asked] = deque()
        proposal: Future[Round] | None = None
        next_round, asked, exhausted = 0, 0, False
        while pending or not exhausted:
            due = not exhausted and next_round <= len(self.rounds) + 1
            if due and proposal is None:
                proposal = in_background(self.planner.propose, next_round, tuple(self.rounds))
            if proposal is not None and proposal.done():
                found = proposal.result().first(self.config.budget - asked)
                proposal = None
                asked += len(found)
                exhausted = not len(found.all_masks) or asked == self.config.budget
                if len(found.all_masks):
                    pending.append(self._ask(found))
                    self.folder.event(
                        "round",
                        round=next_round,
                        masks=len(found),
                        asked=asked,
                        screened=int((~found.full_M).sum()),
                        promoted=len(found.promoted_MP),
                    )
                    next_round += 1
            elif proposal is not None and self.dispatcher.idle:
                wait([proposal], POLL_S)
            else:
                self.drain(POLL_S if proposal is None else _PROPOSAL_POLL_S)
            self._complete(pending)
            self.check_signals()
        self._settle(pending)
        self.progress.state.total = self.progress.state.done

    def _settle(self, pending: deque[_Asked]) -> None:
        """Promotions that are still due once no new mask is asked for."""
        while len((found := self.planner.settle(self.rounds)).promoted_MP):
            pending.append(self._ask(found))
            self.folder.event("round", promoted=len(found.promoted_MP))
            while pending:
                self.drain(POLL_S)
                self._complete(pending)
                self.check_signals()

    def _ask(self, asked: Round) -> _Asked:
        requests = [self.tracker.request(asked.masks_MP, asked.full_M, overlap=asked.overlap)]
        if len(asked.promoted_MP):
            requests.append(self.tracker.request(asked.promoted_MP, promoted=True))
        return _Asked(asked, requests)

    def _complete(self, pending: deque[_Asked]) -> None:
        """Move rounds that are complete, in order, to `rounds`."""
        while pending and pending[0].complete:
            asked = pending.popleft()
            self._take(asked.round.all_masks, asked.values, asked.requests[0].overlap_PP)
            self._show_best(self.rounds[-1])
        self.show()

    def _take(
        self,
        masks_MP: BoolArray,
        values: dict[str, NDArray[np.float32]],
        overlap_PP: FloatArray | None = None,
    ) -> None:
        """Add a complete round, from its sums `[M, N]`; the first mask of all is the full model."""
        nll_MI = self.calibration.ppl_nll(values)
        loss_MI = nll_MI
        if not self.utility.reports_perplexity:
            loss_MI = self.calibration.losses(self.utility, values)
        if not self.rounds:
            of_nll = self.pool.info.noise_nll
            self.noise_loss = self.calibration.noise(self.utility, of_nll, values["nll"][0])
            if not np.isfinite([nll_MI[0], loss_MI[0]]).all():
                what = "the full model's own score is not finite"
                raise LpserveError(f"{what}: check the model and the dtype")
        self.rounds.append(CompletedRound(masks_MP, nll_MI, loss_MI, overlap_PP))

    def adopt(self, other: RunRecord) -> None:
        """Take the first `budget` masks of another run, with their scores on these windows.

        Greedy steps that the other run pruned are not taken over: a set that could not be the best
        there may be the best here.
        """
        asked = other.masks_MP[: self.config.budget]
        # perhaps on some windows; of questions, perhaps on those of wrong answers
        given_up_M = np.isnan(other.nll_MI + other.loss_MI)[: len(asked)].any(axis=1)
        values, windows = {}, self.calibration.windows
        for metric in ("nll", *self.metrics):
            values[metric], known_MN = self.store.get(self.game, windows, asked, metric)
            if not known_MN[~given_up_M].all():
                raise LpserveError(
                    f"{self.store.path} lacks {metric} of the masks that are to be read again"
                )
        self._take(asked, values)
        self.planner.sources.update(zip(keys(asked), other.sources, strict=False))
        self.adopted = f"the {len(asked)} masks are those of another run"
        self.folder.event("masks read again", masks=len(asked))

    def score_apart(self, masks_MP: BoolArray, items: ItemSet, stage: str) -> ScoreRequest:
        """A complete request of masks on other items than the rounds'; their tracker stays in
        `tracker`.

        Raises:
            RunInterrupted: a signal came; what was scored is kept.
        """
        self.tracker = self.make_tracker(items, None)
        self.progress.begin(stage, len(masks_MP))
        request = self.tracker.request(masks_MP)
        while not request.complete:
            self.drain(POLL_S)
            self.show()
            self.check_signals()
        self.show()
        return request

    def drain(self, timeout_s: float) -> None:
        self.session.drain(timeout_s, self.accept)

    def accept(self, result: UnitResult | GivenUp) -> None:
        self.tracker.accept(result)
        if isinstance(result, GivenUp) and result.unit.overlap:
            self.folder.event("no overlap", reason=result.reason)
            self.progress.note(f"sets are searched without short lists: {result.reason}")
        elif isinstance(result, GivenUp):
            mask = key_text(keys(result.unit.masks_MP)[0], self.settings.num_players)
            self.folder.event("quarantined", mask=mask, reason=result.reason)
            self.progress.note(f"mask {mask} cannot be scored and is left out: {result.reason}")
        elif result.scores is not None:
            self.scores_new += result.scores.nll_MN.size
            self.progress.state.work += result.scores.work

    def check_signals(self) -> None:
        self.session.check_signals(self.accept, self._interrupted)

    def _interrupted(self) -> int:
        self.folder.event("interrupted", scored=self.tracker.scored)
        return self.tracker.scored

    # -- progress ------------------------------------------------------------------------------

    def show(self) -> None:
        state = self.progress.state
        state.done = self.tracker.scored
        state.reused = self.tracker.reused
        state.quarantined = len(self.tracker.quarantined)
        surrogate = self.planner.model.surrogate
        heldout = getattr(surrogate, "heldout_error", None)
        if surrogate is not None and heldout is not None:
            state.surrogate = surrogate.name
            state.heldout_r2, state.heldout_spearman = heldout.r2, heldout.spearman
        if self.progress.update():
            self.pool.publish(state)

    def _show_best(self, done: CompletedRound) -> None:
        total = self.calibration.num_tokens_I.sum()
        ppl_M = perplexity(done.nll_MI.astype(np.float64).sum(axis=1) / total)
        best = self.progress.state.best
        for target in self.settings.targets:
            name = f"without {target.sizes[0]}"
            if target.share is not None:
                name = f"at {100 * target.share:g}%"
            lowest = np.nanmin(ppl_M[target.holds(done.masks_MP)], initial=np.inf)
            best[name] = min(best.get(name, np.inf), float(lowest))

    def write_config(self, stored: dict[str, Any] | None) -> None:
        """config.json and windows.npz: everything needed to repeat the run."""
        self.described = described(
            self.config, self.pool.info, self.calibration, self.heldout, stored
        )
        path = self.folder.path / "windows.npz"
        if not holds_windows(path, self.calibration, self.heldout):
            write_windows_file(path, self.calibration, self.heldout)
        self.folder.write("config.json", json.dumps(self.described, indent=1) + "\n")
        self.folder.event("started", config=as_json(self.config), pid=os.getpid())
