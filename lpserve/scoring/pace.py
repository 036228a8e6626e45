"""How long work takes at each engine, and how large its next unit should be.

An engine's pace is measured: seconds for a token of a mask, a moving average over its units. Units
then aim at `TARGET_UNIT_S`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lpserve.data.windows import TokenWindows
from lpserve.scoring.pool import UnitResult, WorkUnit

TARGET_UNIT_S = 2.0
"""Seconds that a unit should take."""
ANSWER_S = 0.004
"""Units last at least this long for each engine: an answer costs the driver about half of it
(`scripts/bench/results/coordinator.md`), so it keeps pace with any number of engines."""
MIN_UNIT_S = 0.2
"""Masks are not spread over more engines, nor split over windows, below this time a unit."""
_FIRST_UNIT_MASKS = 2
_PACE_MEMORY = 0.5
"""Weight of an engine's earlier pace against its latest unit's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Together:
    """Masks that are scored at a time though it takes longer than `TARGET_UNIT_S`: alone they share
    no prefixes.

    Sixteen neighbours share nearly all that a whole round does (a greedy step on 30 layers runs
    0.56 of the layers in units of 16, 0.54 as one unit, all of them one by one).
    """

    masks: int = 16
    seconds: float = 30.0
    """Fewer, where they would take longer than this."""


ROUND = Together()
"""Of the rounds of a run, after which others wait."""
LONG_QUEUE = Together(masks=256, seconds=120.0)
"""Where thousands of neighbours wait and nothing waits for them: a unit of 16 masks runs the 26
layers of its first one to share the 4 to 8 of each further one, say."""


class EnginePaces:
    """The measured pace of every engine.

    Args:
        windows_of: the registered windows of a hash.
    """

    def __init__(self, windows_of: Callable[[str], TokenWindows]) -> None:
        self._windows_of = windows_of
        self.seconds_per_token: dict[str, float] = {}
        """Engine -> seconds for a token of a mask."""
        self.together = ROUND
        """How many slow masks go to an engine at a time."""

    def learn(self, result: UnitResult) -> None:
        """Take a scored unit's time into its engine's pace."""
        assert result.scores is not None
        measured = max(result.scores.work.seconds, 1e-6) / self._tokens(result.unit)
        before = self.seconds_per_token.get(result.engine, measured)
        self.seconds_per_token[result.engine] = (
            _PACE_MEMORY * before + (1 - _PACE_MEMORY) * measured
        )

    def expected_s(self, unit: WorkUnit, engine: str) -> float | None:
        """Seconds that a unit should take at an engine; None while no engine has scored any.

        From the engine's own pace; from the mean of the others' as long as it has none.
        """
        pace = self.seconds_per_token.get(engine)
        if pace is None:
            if not self.seconds_per_token:
                return None
            pace = sum(self.seconds_per_token.values()) / len(self.seconds_per_token)
        return pace * self._tokens(unit)

    def _tokens(self, unit: WorkUnit) -> int:
        return len(unit.masks_MP) * self._windows_of(unit.windows).tokens_NT.size


def target_unit_s(num_engines: int) -> float:
    """Seconds that a unit should take so that the driver keeps pace with all engines."""
    return max(TARGET_UNIT_S, ANSWER_S * num_engines)


def unit_masks(mask_s: float, together: Together = ROUND) -> int:
    """Masks of a unit where there are many more: `TARGET_UNIT_S` of work, or as many as share most
    of their prefixes."""
    shared = min(together.masks, int(together.seconds / mask_s))
    return max(1, int(TARGET_UNIT_S / mask_s), shared)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitSize:
    """How much of the queue goes to an engine next."""

    masks: int
    window_parts: int
    """Parts that a unit of one mask may be split into, over its windows; 1 where engines do not
    outnumber masks or the mask is quick."""


def unit_size(
    *,
    mask_s: float | None,
    masks_waiting: int,
    num_engines: int,
    target_s: float,
    together: Together = ROUND,
) -> UnitSize:
    """The size of the next unit.

    About `target_s` of work; more where masks are so slow that too few would share prefixes; less
    where few masks are left so that all engines end together, but not less than `MIN_UNIT_S` unless
    the queue is shorter.

    Args:
        mask_s: seconds that one mask should take at the engine; None: not known.
        masks_waiting: masks in the queue, those of this unit included.
    """
    share = -(-masks_waiting // num_engines)
    if mask_s is None:
        return UnitSize(masks=min(_FIRST_UNIT_MASKS, share), window_parts=1)
    share = max(share, int(MIN_UNIT_S / mask_s))
    alone = int(target_s / mask_s)
    most = max(alone, min(unit_masks(mask_s, together), share if num_engines == 1 else share // 2))
    masks = max(1, min(most, share))
    parts = min(num_engines // masks_waiting, int(mask_s / MIN_UNIT_S))
    return UnitSize(masks=masks, window_parts=max(1, parts))
