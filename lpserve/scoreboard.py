"""What a run knows of one set of windows: scores read from the store, and what is still missing.

Every score passes through the store before it counts here, as float32.
Notation: M masks, N windows, P players.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lpserve.masks import keys
from lpserve.pool import Dispatcher, EnginePool, GivenUp, UnitResult
from lpserve.store import Store
from lpserve.types import BoolArray
from lpserve.windows import TokenWindows


class Scoreboard:
    """Scores of one game on one set of windows."""

    def __init__(
        self,
        store: Store,
        game: int,
        windows: TokenWindows,
        pool: EnginePool,
        dispatcher: Dispatcher,
    ) -> None:
        self._store = store
        self._game = game
        self._windows = windows
        self._dispatcher = dispatcher
        self._blocks = store.blocks_for(windows)
        self._block_windows = {
            block.id: pool.register(windows.select(block.rows)) for block in self._blocks
        }
        self._nll: dict[bytes, NDArray[np.float32]] = {}
        self._missing: dict[bytes, set[int]] = {}
        known = store.quarantined(game)
        self._bad = {
            (block.id, key): reason
            for (held, key), reason in known.items()
            for block in self._blocks
            if held == block.id
        }
        self.quarantined: dict[bytes, str] = {}
        """Masks given up: key -> reason. Their scores are NaN."""
        self.reused = 0
        """Masks whose scores the store already held."""

    def request(self, masks_MP: BoolArray) -> None:
        """Read what the store holds of these masks and have the rest scored."""
        nll_MN, known_MN = self._store.get(self._game, self._windows, masks_MP)
        mask_keys = keys(masks_MP)
        for row, key in enumerate(mask_keys):
            self._nll[key] = nll_MN[row]
            self._missing[key] = set()
            self.reused += bool(known_MN[row].all())
        for block in self._blocks:
            wanted = []
            for row, key in enumerate(mask_keys):
                if known_MN[row, block.rows].all():
                    continue
                if (block.id, key) in self._bad:
                    self.quarantined[key] = self._bad[block.id, key]
                    continue
                self._missing[key].add(block.id)
                wanted.append(row)
            if wanted:
                self._dispatcher.add(masks_MP[wanted], block, self._block_windows[block.id])

    def holds(self, result: UnitResult | GivenUp) -> bool:
        """Whether a result is about one of this scoreboard's blocks."""
        return result.unit.windows in self._block_windows.values()

    def accept(self, result: UnitResult | GivenUp) -> None:
        """Commit a result, then count it."""
        unit = result.unit
        if isinstance(result, GivenUp):
            self._store.quarantine(self._game, unit.block, unit.masks_MP[0], result.reason)
            key = keys(unit.masks_MP)[0]
            self.quarantined[key] = result.reason
            self._missing[key].discard(unit.block.id)
            return
        assert result.scores is not None
        self._store.put(self._game, unit.block, unit.masks_MP, result.scores.nll_MN)
        stored_MN = result.scores.nll_MN.astype(np.float32)
        for key, nll_N in zip(keys(unit.masks_MP), stored_MN, strict=True):
            self._nll[key][unit.block.rows] = nll_N
            self._missing[key].discard(unit.block.id)

    def complete(self, masks_MP: BoolArray) -> bool:
        """Whether every one of these requested masks is scored or given up."""
        return not any(self._missing[key] for key in keys(masks_MP))

    def nll(self, masks_MP: BoolArray) -> NDArray[np.float32]:
        """Stored NLLs in nats, `float32[M, N]`; NaN where a mask was given up."""
        return np.array([self._nll[key] for key in keys(masks_MP)]).reshape(
            len(masks_MP), self._windows.num_windows
        )

    def num_scored(self) -> int:
        """Requested masks that are scored whole."""
        return sum(
            not missing and key not in self.quarantined for key, missing in self._missing.items()
        )
