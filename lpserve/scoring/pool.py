"""The contract of a pool of engines, and the units of work that go through it.

`lpserve.scoring.local` and `lpserve.scoring.ray.pool` implement it. A pool hands units to the
engines named by its caller and reports what became of them; the dispatcher decides which unit goes
to which engine, and what follows when one fails.

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import Engine, HasOverlap
from lpserve.scoring.progress import RunState
from lpserve.store.blocks import WindowBlock
from lpserve.types import BoolArray, EngineInfo, Scores


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WorkUnit:
    """Masks to score on the windows of a block, or one mask on some of its windows.

    Two units are the same only if they are the same object.
    """

    masks_MP: BoolArray
    """bool [M, P]; True: the player is kept."""
    block: WindowBlock
    windows: str
    """Hash under which the engines know the windows."""
    extra_metrics: tuple[str, ...] = ()
    """Metrics beside the NLL."""
    overlap: bool = False
    """Whether the overlap of the masks' effects is measured (`types.Scores.overlap_MM`): such a
    unit stays whole, and its masks in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitResult:
    """What became of a unit: scores, or the error that it ended with."""

    unit: WorkUnit
    scores: Scores | None
    """None where it ended with an error."""
    engine: str
    error: str | None = None
    """One line."""
    blamed: bool = True
    """Whether the unit may have caused the error. False where the engine had not begun with it, or
    a node left."""
    lost: bool = False
    """Whether the engine was lost while it worked on the unit."""


def score_on(
    engine: Engine,
    masks_MP: BoolArray,
    windows: str,
    extra_metrics: tuple[str, ...],
    overlap: bool,
) -> Scores:
    """What an engine gives for a unit of these masks; see `WorkUnit`."""
    if not overlap:
        return engine.score(masks_MP, windows, extra_metrics)
    assert isinstance(engine, HasOverlap)
    return engine.score_overlap(masks_MP, windows, extra_metrics)


def still_works(engine: Engine, windows: str) -> bool:
    """Whether an engine that just raised can score the full model.

    After some errors (of a device, of a lost worker) an engine scores nothing any more, and no mask
    is to blame.
    """
    try:
        engine.score(np.ones((1, engine.info.num_players), dtype=bool), windows)
    except Exception:
        return False
    return True


class EnginePool(Protocol):
    """Several engines of one game behind one queue of results.

    Called from one thread only. `submit` never blocks; results come in any order.
    """

    info: EngineInfo
    """What the engines have in common."""

    @property
    def engines(self) -> Mapping[str, str]:
        """Engines that take part: name -> the hardware it runs on. A new mapping whenever one has
        come or gone."""
        ...

    def register(self, windows: TokenWindows) -> str:
        """Make windows known to every engine; returns their hash."""
        ...

    def submit(self, unit: WorkUnit, engine: str, expected_s: float | None) -> None:
        """Hand a unit to an engine; it comes back from `next` exactly once.

        An engine scores its units in the order in which they were submitted.

        Args:
            expected_s: seconds that it should take; None: not known.
        """
        ...

    def cancel(self, unit: WorkUnit, engine: str) -> None:
        """Have a unit come back without scores if its engine has not begun with it."""
        ...

    def next(self, timeout_s: float) -> UnitResult | None:
        """The next finished unit, in any order; None after the timeout."""
        ...

    def publish(self, state: RunState) -> None:
        """Publish a run's figures, where the pool has a place for them."""
        ...

    def close(self) -> None:
        """Stop the engines; units in flight are dropped."""
        ...
