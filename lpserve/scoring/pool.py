"""Pools: many engines behind one queue. `EnginePool` is the contract; `LocalPool` runs one engine
in this process on a thread of its own, so that the coordinator goes on meanwhile.

Which unit goes to whom, and what follows when one fails, is the dispatcher's.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import Engine
from lpserve.scoring.progress import RunState
from lpserve.store.blocks import WindowBlock
from lpserve.types import BoolArray, EngineInfo, Scores


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WorkUnit:
    """Masks to score on the windows of a block, or one mask on some of them. Known by identity."""

    masks_MP: BoolArray
    block: WindowBlock
    windows: str
    """Hash under which the engines know the windows."""
    extra_metrics: tuple[str, ...] = ()
    """Metrics beside the NLL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitResult:
    """What became of a unit: scores, or the error that it ended with."""

    unit: WorkUnit
    scores: Scores | None
    engine: str
    error: str | None = None
    blamed: bool = True
    """Whether the unit may be the cause of the error: not when its turn had not come, or when a
    node left."""
    lost: bool = False
    """Whether the engine was lost while it worked on the unit."""


def still_works(engine: Engine, windows: str) -> bool:
    """Whether an engine that just raised can score the whole model: after some errors (a device's,
    a lost worker's) nothing works any more, and no mask is to blame."""
    try:
        engine.score(np.ones((1, engine.info.num_players), dtype=bool), windows)
    except Exception:
        return False
    return True


class EnginePool(Protocol):
    """Engines behind one queue."""

    info: EngineInfo

    @property
    def engines(self) -> Mapping[str, str]:
        """Engines that take part: name -> the hardware it runs on. A new mapping whenever one has
        come or gone."""
        ...

    def register(self, windows: TokenWindows) -> str:
        """Make windows known to every engine; returns their hash."""
        ...

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        """Hand a unit to an engine; it comes back from `next` once. Units of an engine are scored
        in the order of their coming.

        Args:
            expected_s: how long it should take; None: not known.
        """
        ...

    def cancel(self, unit: WorkUnit, engine: str) -> None:
        """Have a unit come back without being scored, if it waits behind another."""
        ...

    def next(self, timeout_s: float) -> UnitResult | None:
        """The next finished unit, in any order; None after the timeout."""
        ...

    def publish(self, state: RunState) -> None:
        """Show a run's figures to whoever watches the pool."""
        ...

    def close(self) -> None: ...
