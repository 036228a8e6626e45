"""Scores every mask of a family into a folder of segments: streamed, resumed, on any engines.

Results are first committed to the folder's SQLite store, as every score of lpserve is. A segment
whose masks are all there is written, synced, and its rows are then removed from the store, which so
holds a few segments at most and is deleted at the end. A process that is killed at any place loses
nothing: what it leaves is segments, and rows that the next one reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import lpserve
from lpserve.config import WindowConfig
from lpserve.data.windows import TokenWindows
from lpserve.engine.base import check_extra_metrics
from lpserve.errors import InputError, LpserveError
from lpserve.exhaustive.family import SmallRemovals
from lpserve.exhaustive.segments import (
    Manifest,
    Segment,
    describe_difference,
    num_segments,
    read_manifest,
    segment_path,
    segment_range,
    write_manifest,
    write_segment,
)
from lpserve.inputs.files import is_there
from lpserve.inputs.rules import Count, Text
from lpserve.masks import full_mask, key_text, keys
from lpserve.runner.setup import num_players_of, windows_of
from lpserve.scoring.pace import LONG_QUEUE
from lpserve.scoring.pool import UnitResult
from lpserve.scoring.progress import Progress
from lpserve.scoring.session import POLL_S, ScoringSession
from lpserve.scoring.tracker import ScoreRequest, ScoreTracker
from lpserve.scoring.units import GivenUp
from lpserve.store.files import make_folder, write_npz
from lpserve.store.lock import PathLock
from lpserve.types import EngineInfo, Work, perplexity
from lpserve.utility import utility_named

_AHEAD = 1 << 14
"""Masks that engines have before them, at least, while there are any: a segment that is nearly done
keeps none of them waiting."""


@dataclass(frozen=True, kw_only=True)
class ExhaustiveConfig(WindowConfig):
    """Which sets to score, on which windows, with which engines. Windows are those of `lpserve run`
    with the same keys; held-out ones are not scored."""

    max_removed: Count
    """Every set of up to so many players."""
    utility: Text = "neg_nll"
    """What a coalition is worth, of texts: its metric is scored beside the NLL."""
    out: Text = "exhaustive"
    """Folder of the game."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if utility_named(self.utility).item == "question":
            raise InputError(
                f"utility {self.utility} is about tasks, and every set is scored on texts: use "
                "neg_nll, ppl_ratio or neg_kl"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExhaustiveResult:
    """What was done for a game."""

    folder: Path
    family: SmallRemovals
    masks_new: int
    """Masks that engines scored; all others had been."""
    work: Work


def exhaustive(config: ExhaustiveConfig, progress: Progress | None = None) -> ExhaustiveResult:
    """Score every set of up to `max_removed` players into the folder `config.out`.

    The same config goes on where it was stopped.

    Raises:
        InputError: something cannot be used, raised before a model loads; or the folder holds
            another game.
        LpserveError: the full model's own score is not finite.
        RunInterrupted: a signal came; what was scored is kept.
    """
    family = SmallRemovals(num_players_of(config), config.max_removed)
    windows, _ = windows_of(config)
    folder = Path(config.out)
    earlier = read_manifest(folder) if is_there(folder / "game.json") else None
    holder = f"lpserve exhaustive in {folder}"
    with _locked(folder, holder):
        store = folder / "scores.sqlite"
        with ScoringSession(
            config, windows, store=store, holder=holder, progress=progress
        ) as session:
            metric = utility_named(config.utility).metric
            extra = () if metric == "nll" else (metric,)
            check_extra_metrics(session.info, extra)
            manifest = _manifest(config, session.info, windows, extra)
            _begin(folder, manifest, earlier, windows)
            scoring = _Scoring(folder, family, session, windows, extra)
            scoring.run()
            work, apart = session.work, session.masks_scored
        store.unlink(missing_ok=True)
    new = scoring.tracker.scored - scoring.tracker.reused + apart
    return ExhaustiveResult(folder=folder, family=family, masks_new=new, work=work)


@contextmanager
def _locked(folder: Path, holder: str) -> Iterator[None]:
    """The folder, made and locked; one that was made here is removed if nothing began in it."""
    made = not folder.exists()
    make_folder(folder / "segments", "folder of an exhaustive game")
    lock = PathLock(folder / "game", holder=holder)
    try:
        yield
    finally:
        lock.release()
        if made and not (folder / "game.json").exists():
            for name in ("game.lock", "scores.sqlite", "scores.sqlite.lock"):
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # something else lies in it
                (folder / "segments").rmdir()
                folder.rmdir()


def _manifest(
    config: ExhaustiveConfig, info: EngineInfo, windows: TokenWindows, extra: tuple[str, ...]
) -> Manifest:
    return Manifest(
        model=info.model,
        model_hash=info.model_hash,
        game=info.game.content_hash,
        players=[(player.layer, player.part) for player in info.players],
        max_removed=config.max_removed,
        metrics=["nll", *extra],
        utility=config.utility,
        windows=windows.content_hash,
        corpora=list(windows.corpora),
        engine={"kind": info.kind, "path": info.path, "dtype": info.dtype, "device": info.device},
        versions={"lpserve": lpserve.__version__, **info.versions},
    )


def _begin(
    folder: Path, manifest: Manifest, earlier: Manifest | None, windows: TokenWindows
) -> None:
    """Write what the game is of, or find the same in the folder."""
    if earlier is None:
        arrays = {"tokens": windows.tokens_NT, "scored": windows.scored_NT}
        write_npz(folder / "windows.npz", arrays)
        write_manifest(folder, manifest)
        return
    if what := describe_difference(manifest, earlier):
        raise InputError(f"{folder} holds another game: {what} changed since; choose another --out")
    if manifest.engine["path"] != earlier.engine.get("path"):
        raise InputError(
            f"{folder} was scored by {earlier.engine.get('path')}, and this is "
            f"{manifest.engine['path']}: give the same engine, or choose another --out"
        )


class _Scoring:
    """The segments of one game at work."""

    def __init__(
        self,
        folder: Path,
        family: SmallRemovals,
        session: ScoringSession,
        windows: TokenWindows,
        extra: tuple[str, ...],
    ) -> None:
        self._folder, self._family, self._session, self._windows = folder, family, session, windows
        session.dispatcher.paces.together = LONG_QUEUE
        self.tracker = ScoreTracker(
            session.store, session.game, windows, session.dispatcher, extra_metrics=extra
        )
        missing = [
            number
            for number in range(num_segments(family))
            if not is_there(segment_path(folder, number))
        ]
        self._left = deque(missing)
        ranges = [segment_range(family, number) for number in missing]
        self._written = family.count - sum(stop - start for start, stop in ranges)
        """Masks of segments that an earlier session wrote."""
        self._pending: deque[tuple[int, ScoreRequest]] = deque()

    def run(self) -> None:
        if self._left:
            self._check_full_model()
        self._session.progress.begin("scoring", self._family.count)
        self._show()
        while self._left or self._pending:
            waiting = sum(request.missing for _, request in self._pending)
            if self._left and waiting < _AHEAD:
                number = self._left.popleft()
                masks_MP = self._family.masks(*segment_range(self._family, number))
                self._pending.append((number, self.tracker.request(masks_MP)))
            else:
                self._session.drain(POLL_S, self._accept)
            while self._pending and self._pending[0][1].complete:
                self._write(*self._pending.popleft())
            self._show()
            self._session.check_signals(self._accept, lambda: self._written + self.tracker.scored)

    def _check_full_model(self) -> None:
        """Refuse a model whose own score is not finite before weeks are spent on its subsets."""
        full_1P = full_mask(self._family.num_players)[None]
        nll_1N = self._session.score(full_1P, self._windows, stage="full model")["nll"]
        if not np.isfinite(nll_1N).all():
            raise LpserveError(
                "the full model's own score is not finite: check the model and the dtype"
            )

    def _accept(self, result: UnitResult | GivenUp) -> None:
        self.tracker.accept(result)
        if isinstance(result, GivenUp):
            mask = key_text(keys(result.unit.masks_MP)[0], self._family.num_players)
            self._session.progress.note(f"mask {mask} cannot be scored: {result.reason}")
        elif result.scores is not None:
            self._session.progress.state.work += result.scores.work

    def _write(self, number: int, request: ScoreRequest) -> None:
        """Write a complete segment, then forget its rows in the store."""
        bad = self.tracker.quarantined
        mask_keys = keys(request.masks_MP)
        reasons = {row: bad[key] for row, key in enumerate(mask_keys) if key in bad}
        write_segment(
            self._folder, number, request.masks_MP, Segment(values=request.values, reasons=reasons)
        )
        self._session.store.forget(self._session.game, mask_keys[0], mask_keys[-1])
        best = self._session.progress.state.best
        mean_M = request.nll_MN.astype(np.float64).sum(axis=1) / self._windows.num_tokens_N.sum()
        removed_M = (~request.masks_MP).sum(axis=1)
        for removed in range(1, self._family.max_removed + 1):
            here_M = mean_M[(removed_M == removed) & np.isfinite(mean_M)]
            if len(here_M):
                ppl = float(perplexity(here_M.min()))
                name = f"without {removed}"
                best[name] = min(ppl, best.get(name, np.inf))

    def _show(self) -> None:
        state, tracker = self._session.progress.state, self.tracker
        state.done = self._written + tracker.scored
        state.reused = self._written + tracker.reused
        state.quarantined = len(tracker.quarantined)
        state.windows = (0, 0)
        if self._session.progress.update():
            self._session.pool.publish(state)
