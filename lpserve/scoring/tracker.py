"""The scores of one set of windows: those read from the store, and those that are still missing.

A score counts here once the store holds it, and as the store holds it: in float32. Masks are
tracked one by one only while a score of theirs is missing. A request keeps the scores of its masks
in one array for each metric, which is freed with the request.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpserve.data.windows import TokenWindows
from lpserve.masks import keys
from lpserve.scoring.dispatcher import Dispatcher
from lpserve.scoring.pool import UnitResult
from lpserve.scoring.units import GivenUp
from lpserve.store.blocks import WindowBlock
from lpserve.store.store import Store
from lpserve.types import BoolArray, FloatArray, IntArray


@dataclass(slots=True, eq=False)
class ScoreRequest:
    """Masks that were asked for together, and the scores that have come of them."""

    masks_MP: BoolArray
    values: dict[str, NDArray[np.float32]]
    """Metric -> stored sums over a window, `float32[M, N]`; NaN where a mask was given up or is
    not scored yet."""
    known: dict[str, BoolArray]
    """Metric -> which of these the store held before, `bool[M, N]`."""
    missing: int = 0
    """Masks that lack a score that was asked for, and are not given up."""
    overlap_PP: FloatArray | None = None
    """How the effects of single players overlap, nats per token (`types.Scores.overlap_MM`); None
    where it was not asked for or could not be had."""

    @property
    def nll_MN(self) -> NDArray[np.float32]:
        """Stored NLLs in nats, `float32[M, N]`."""
        return self.values["nll"]

    @property
    def complete(self) -> bool:
        """Whether every mask is scored or given up."""
        return not self.missing


@dataclass(slots=True, eq=False)
class _OpenMask:
    """A mask of which a score is missing."""

    request: ScoreRequest
    row: int
    blocks: int
    """Blocks still to score."""
    promoted: bool
    """Already counted when scored on the screen; do not count twice."""


class ScoreTracker:
    """Scores of one game on one set of windows.

    Args:
        game: the store's number of the game.
        screen: rows of the windows that a screened mask is scored on; None: no mask is screened.
        extra_metrics: metrics that are scored and stored beside the NLL.
    """

    def __init__(
        self,
        store: Store,
        game: int,
        windows: TokenWindows,
        dispatcher: Dispatcher,
        *,
        screen: IntArray | None = None,
        extra_metrics: tuple[str, ...] = (),
    ) -> None:
        self._extra_metrics = extra_metrics
        self._store = store
        self._game = game
        self._windows = windows
        self._dispatcher = dispatcher
        rows = np.arange(windows.num_windows)
        self._beyond = np.empty(0, dtype=np.int64) if screen is None else np.setdiff1d(rows, screen)
        """Rows of the windows that a screened mask is not scored on."""
        self._blocks: list[WindowBlock] = []
        self._columns: dict[tuple[int, int], tuple[IntArray, IntArray]] = {}
        """Of a block, by its number and first row: positions in it, and the rows of the windows
        that they give the scores of; more rows than positions where windows repeat."""
        for part in [rows] if screen is None else [screen, self._beyond]:
            for block in store.blocks_for(windows.select(part)):
                self._add_block(WindowBlock(id=block.id, rows=part[block.rows]), part)
        self._screened_blocks = {
            b.id for b in self._blocks if not np.isin(b.rows, self._beyond).any()
        }
        self._block_windows = {
            block.id: dispatcher.register(windows.select(block.rows)) for block in self._blocks
        }
        self._open: dict[bytes, _OpenMask] = {}
        self._singles: ScoreRequest | None = None
        """The request that waits for an overlap."""
        blocks = {block.id for block in self._blocks}
        self._bad = {
            held: reason for held, reason in store.quarantined(game).items() if held[0] in blocks
        }
        self.quarantined: dict[bytes, str] = {}
        """Masks that were given up: key -> reason. Their scores are NaN."""
        self.scored = 0
        """Masks that have every score that was first asked of them."""
        self.reused = 0
        """Masks of `scored` whose scores the store already held."""
        self.windows = (0, 0)
        """Windows of masks that engines have scored or given up, and those that they were asked
        for."""

    @property
    def in_parts(self) -> bool:
        """Whether a mask is scored on its windows in several parts."""
        return len(self._blocks) > 1

    def _add_block(self, block: WindowBlock, part: IntArray) -> None:
        """Add a block of windows, and note all rows of this part that have their content."""
        hashes = self._windows.window_hashes
        position_of = {hashes[row]: position for position, row in enumerate(block.rows)}
        rows = np.array([row for row in part if hashes[row] in position_of], dtype=np.int64)
        positions = np.array([position_of[hashes[row]] for row in rows], dtype=np.int64)
        self._blocks.append(block)
        self._columns[_block_key(block)] = positions, rows

    def request(
        self,
        masks_MP: BoolArray,
        full_M: BoolArray | None = None,
        *,
        promoted: bool = False,
        overlap: bool = False,
    ) -> ScoreRequest:
        """Read what the store holds of these masks and queue the rest for the engines.

        A screened mask's scores on windows beyond the screen stay NaN, also where the store holds
        them: what a run decides does not depend on what others have scored.

        Args:
            masks_MP: bool [M, P], distinct, and none of an earlier request that is not complete.
            full_M: bool [M], which masks are wanted on all windows, the others on the screen;
                None: all of them.
            promoted: they are already counted, when scored on the screen; do not count them twice.
            overlap: the full mask and all that drop one player come first, in the players' order,
                and the overlap of their effects is wanted too. It is measured with their scores, or
                again where the store holds these alone.
        """
        full_M = np.ones(len(masks_MP), dtype=bool) if full_M is None else full_M
        request = self._read(masks_MP, full_M)
        known_MN = np.all(list(request.known.values()), axis=0)
        mask_keys = keys(masks_MP)
        left_M = np.zeros(len(masks_MP), dtype=np.int64)
        wanted: list[tuple[int, list[int]]] = []
        together = self._without_overlap() if overlap else set()
        for index, block in enumerate(self._blocks):
            rows = []
            wanted_M = full_M | (block.id in self._screened_blocks)
            unknown_M: BoolArray = np.asarray(~known_MN[:, block.rows].all(axis=1))
            unknown_M[: 1 + masks_MP.shape[1]] |= block.id in together
            for row in np.flatnonzero(wanted_M & unknown_M).tolist():
                reason = self._bad.get((block.id, mask_keys[row]))
                if reason is None:
                    rows.append(row)
                else:
                    self.quarantined[mask_keys[row]] = reason
            left_M[rows] += 1
            wanted.append((index, rows))
        for row in np.flatnonzero(left_M).tolist():
            self._open[mask_keys[row]] = _OpenMask(request, row, int(left_M[row]), promoted)
        request.missing = int((left_M > 0).sum())
        if not promoted:
            known = np.flatnonzero(left_M == 0).tolist()
            complete = sum(mask_keys[row] not in self.quarantined for row in known)
            self.reused += complete
            self.scored += complete
        if overlap:
            self._singles = request
        for index, rows in wanted:
            if rows:
                self._submit(self._blocks[index], masks_MP, rows, together)
        self._note_overlap()
        return request

    def _read(self, masks_MP: BoolArray, full_M: BoolArray) -> ScoreRequest:
        """What the store holds of some masks."""
        request = ScoreRequest(masks_MP=masks_MP, values={}, known={})
        for metric in ("nll", *self._extra_metrics):
            values_MN, held_MN = self._store.get(self._game, self._windows, masks_MP, metric)
            values_MN[np.ix_(~full_M, self._beyond)] = np.nan
            request.values[metric], request.known[metric] = values_MN, held_MN
        return request

    def _submit(
        self, block: WindowBlock, masks_MP: BoolArray, rows: list[int], together: set[int]
    ) -> None:
        """Queue masks on a block; on those of `together` the single players' as one unit."""
        self._count_windows(0, len(rows) * len(block.rows))
        where = block, self._block_windows[block.id], self._extra_metrics
        singles = 1 + masks_MP.shape[1]
        if block.id in together and rows[:singles] == list(range(singles)):
            self._dispatcher.add_overlap(masks_MP[:singles], *where)
            rows = rows[singles:]
        if rows:
            self._dispatcher.add(masks_MP[rows], *where)

    def _without_overlap(self) -> set[int]:
        """Blocks of which the store holds no overlap."""
        held = ((b.id, self._store.get_overlap(self._game, b.id)) for b in self._blocks)
        return {block for block, overlap_PP in held if overlap_PP is None}

    def _note_overlap(self) -> None:
        """Give the overlap to the request that asked for it, once every block has its part."""
        if self._singles is None:
            return
        parts = [self._store.get_overlap(self._game, block.id) for block in self._blocks]
        found = [part for part in parts if part is not None]
        if len(found) == len(parts):
            rows = np.concatenate([block.rows for block in self._blocks])
            self._singles.overlap_PP = sum(found, np.zeros(())) / (
                self._windows.num_tokens_N[rows].sum()
            )
            self._singles = None

    def accept(self, result: UnitResult | GivenUp) -> None:
        """Commit a result of the dispatcher to the store, then count it."""
        unit = result.unit
        if isinstance(result, GivenUp) and unit.overlap:
            where = unit.block, unit.windows, unit.extra_metrics
            self._dispatcher.add(unit.masks_MP, *where)
            return
        self._count_windows(len(unit.masks_MP) * len(unit.block.rows), 0)
        if isinstance(result, GivenUp):
            self._store.quarantine(self._game, unit.block, unit.masks_MP[0], result.reason)
            key = keys(unit.masks_MP)[0]
            self.quarantined[key] = result.reason
            self._one_block_less(key)
            return
        assert result.scores is not None
        mask_keys = keys(unit.masks_MP)
        for metric in ("nll", *self._extra_metrics):
            values_MN = result.scores.of(metric)
            self._store.put(self._game, unit.block, unit.masks_MP, values_MN, metric)
            with np.errstate(over="ignore"):  # beyond float32 is inf, as in the store
                stored_MN = values_MN.astype(np.float32)
            positions, rows = self._columns[_block_key(unit.block)]
            for key, value_N in zip(mask_keys, stored_MN, strict=True):
                request, row = self._open[key].request, self._open[key].row
                new = ~request.known[metric][row, rows]  # the older score counts
                request.values[metric][row, rows[new]] = value_N[positions[new]]
        if result.scores.overlap_MM is not None:
            overlap_PP = result.scores.overlap_MM[1:, 1:]
            self._store.put_overlap(self._game, unit.block.id, overlap_PP)
            self._note_overlap()
        for key in mask_keys:
            self._one_block_less(key)

    def _count_windows(self, done: int, wanted: int) -> None:
        self.windows = self.windows[0] + done, self.windows[1] + wanted

    def _one_block_less(self, key: bytes) -> None:
        mask = self._open[key]
        mask.blocks -= 1
        if not mask.blocks:
            del self._open[key]
            mask.request.missing -= 1
            self.scored += key not in self.quarantined and not mask.promoted


def _block_key(block: WindowBlock) -> tuple[int, int]:
    return block.id, int(block.rows[0])
