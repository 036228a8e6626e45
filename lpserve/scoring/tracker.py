"""What a run knows of one set of windows: scores read from the store, and what is still missing.

Every score passes through the store before it counts here, as float32. Only masks that are not
whole yet are kept track of one by one; a request's scores are one array, dropped with the request.
Notation: M masks, P players, N windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lpserve.data.windows import TokenWindows
from lpserve.masks import keys
from lpserve.scoring.dispatcher import Dispatcher, GivenUp
from lpserve.scoring.pool import UnitResult
from lpserve.store.store import Store, WindowBlock
from lpserve.types import BoolArray, IntArray


@dataclass(slots=True, eq=False)
class Request:
    """Masks that were asked for together."""

    masks_MP: BoolArray
    values: dict[str, NDArray[np.float32]]
    """Metric -> stored sums `[M, N]`; NaN where a mask was given up, or is not scored yet."""
    known: dict[str, BoolArray]
    """Which of them the store held before."""
    missing: int = 0
    """Masks that lack a score that was asked for, and are not given up."""

    @property
    def nll_MN(self) -> NDArray[np.float32]:
        """Stored NLLs in nats."""
        return self.values["nll"]

    @property
    def complete(self) -> bool:
        return not self.missing


@dataclass(slots=True, eq=False)
class _Open:
    """A mask of which a score is missing."""

    request: Request
    row: int
    blocks: int
    """Blocks still to score."""
    again: bool
    """Whether it counted as scored before."""


class ScoreTracker:
    """Scores of one game on one set of windows."""

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
        """
        Args:
            screen: rows of windows; masks may be scored on those alone.
            extra_metrics: metrics that are scored and stored beside the NLL.
        """
        self._extra_metrics = extra_metrics
        self._store = store
        self._game = game
        self._windows = windows
        self._dispatcher = dispatcher
        rows = np.arange(windows.num_windows)
        self._beyond = np.empty(0, dtype=np.int64) if screen is None else np.setdiff1d(rows, screen)
        """Rows of the windows that a screened mask is not scored on."""
        parts = [rows] if screen is None else [screen, self._beyond]
        self._blocks = [
            WindowBlock(id=block.id, rows=part[block.rows])
            for part in parts
            for block in store.blocks_for(windows.select(part))
        ]
        self._screened_blocks = {
            b.id for b in self._blocks if not np.isin(b.rows, self._beyond).any()
        }
        self._block_windows = {
            block.id: dispatcher.register(windows.select(block.rows)) for block in self._blocks
        }
        self._open: dict[bytes, _Open] = {}
        blocks = {block.id for block in self._blocks}
        self._bad = {
            held: reason for held, reason in store.quarantined(game).items() if held[0] in blocks
        }
        self.quarantined: dict[bytes, str] = {}
        """Masks given up: key -> reason. Their scores are NaN."""
        self.scored = 0
        """Masks that have every score that they were first asked for."""
        self.reused = 0
        """Those of them whose scores the store already held."""

    def request(
        self, masks_MP: BoolArray, whole_M: BoolArray | None = None, *, again: bool = False
    ) -> Request:
        """Read what the store holds of these masks and have the rest scored.

        The masks are distinct, and none of them is still open. Nothing is said of windows that were
        not asked for, whatever the store holds.

        Args:
            whole_M: which masks are wanted on all windows, the others on the screen; None: all.
            again: they were asked for before, on the screen: they do not count as scored again.
        """
        whole_M = np.ones(len(masks_MP), dtype=bool) if whole_M is None else whole_M
        request = Request(masks_MP=masks_MP, values={}, known={})
        known_MN = np.ones((len(masks_MP), self._windows.num_windows), dtype=bool)
        for metric in ("nll", *self._extra_metrics):
            values_MN, held_MN = self._store.get(self._game, self._windows, masks_MP, metric)
            values_MN[np.ix_(~whole_M, self._beyond)] = np.nan
            request.values[metric], request.known[metric] = values_MN, held_MN
            known_MN &= held_MN
        mask_keys = keys(masks_MP)
        left_M = np.zeros(len(masks_MP), dtype=np.int64)
        wanted: list[tuple[int, list[int]]] = []
        for index, block in enumerate(self._blocks):
            rows = []
            wanted_M = whole_M | (block.id in self._screened_blocks)
            unknown_M = ~known_MN[:, block.rows].all(axis=1)
            for row in np.flatnonzero(wanted_M & unknown_M).tolist():
                reason = self._bad.get((block.id, mask_keys[row]))
                if reason is None:
                    rows.append(row)
                else:
                    self.quarantined[mask_keys[row]] = reason
            left_M[rows] += 1
            wanted.append((index, rows))
        for row in np.flatnonzero(left_M).tolist():
            self._open[mask_keys[row]] = _Open(request, row, int(left_M[row]), again)
        request.missing = int((left_M > 0).sum())
        if not again:
            known = np.flatnonzero(left_M == 0).tolist()
            whole = sum(mask_keys[row] not in self.quarantined for row in known)
            self.reused += whole
            self.scored += whole
        for index, rows in wanted:
            if rows:
                block = self._blocks[index]
                windows = self._block_windows[block.id]
                self._dispatcher.add(masks_MP[rows], block, windows, self._extra_metrics)
        return request

    def accept(self, result: UnitResult | GivenUp) -> None:
        """Commit a result, then count it."""
        unit = result.unit
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
            for key, value_N in zip(mask_keys, stored_MN, strict=True):
                request, row = self._open[key].request, self._open[key].row
                new_N = ~request.known[metric][row, unit.block.rows]  # the older score counts
                request.values[metric][row, unit.block.rows[new_N]] = value_N[new_N]
        for key in mask_keys:
            self._one_block_less(key)

    def _one_block_less(self, key: bytes) -> None:
        mask = self._open[key]
        mask.blocks -= 1
        if not mask.blocks:
            del self._open[key]
            mask.request.missing -= 1
            self.scored += key not in self.quarantined and not mask.again
