"""The progress line: kept up to date in a terminal, else one plain line per interval."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from lpserve.types import Work


@dataclass(slots=True)
class RunState:
    """The figures of a progress line."""

    stage: str = "scoring"
    done: int = 0
    """Masks scored or read back from the store."""
    total: int = 0
    reused: int = 0
    """Masks of `done` that the store already held."""
    windows: tuple[int, int] = (0, 0)
    """Where masks are scored on their windows in several parts: windows of masks that engines have
    scored, and those that they have to."""
    work: Work = field(default_factory=Work)
    best: dict[str, float] = field(default_factory=dict)
    """What sets are searched for (`without 3`, `at 80%`), in order -> the best calibration
    perplexity so far; infinite: none is scored."""
    surrogate: str = ""
    heldout_r2: float | None = None
    heldout_spearman: float | None = None
    quarantined: int = 0


class Progress:
    """Shows a RunState; use as a context manager.

    Args:
        interval_s: seconds between two lines where the stream is no terminal.
        stream: where to write; None: standard error.
    """

    def __init__(self, *, interval_s: float, stream: TextIO | None = None) -> None:
        self.state = RunState()
        self._stream = stream or sys.stderr
        self._interval_s = interval_s
        self._started = time.monotonic()
        self._last = -math.inf  # the first update is shown at once
        console = Console(file=self._stream)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.update(force=True)
        if self._live:
            self._live.stop()

    def begin(self, stage: str, total: int) -> None:
        """Start a stage of `total` masks; its speed and time left are its own."""
        self.state.stage, self.state.total = stage, total
        self.state.done = self.state.reused = 0
        self.state.windows = (0, 0)
        self._started = time.monotonic()

    def update(self, *, force: bool = False) -> bool:
        """Show the state if the interval has passed (in a terminal, half a second); returns whether
        it was shown."""
        now = time.monotonic()
        if not force and now - self._last < (0.5 if self._live else self._interval_s):
            return False
        self._last = now
        text = self.line(now - self._started)
        if self._live:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()
        return True

    def note(self, text: str) -> None:
        """Show a message on a line of its own."""
        if self._live:
            self._live.console.print(Text(text))
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def line(self, elapsed_s: float) -> str:
        """The progress line as text, `elapsed_s` after the stage began."""
        state = self.state
        scored: float = state.done - state.reused
        parts = [f"{state.stage}: {state.done}/{state.total} masks"]
        if state.reused:
            parts[0] += f" ({state.reused} from the store)"
        if state.windows[1]:
            parts.append(f"{state.windows[0]}/{state.windows[1]} windows")
            scored = state.windows[0] / state.windows[1] * (state.total - state.reused)
        speed = scored / elapsed_s if elapsed_s > 0 else 0.0
        parts.append(f"{speed:.1f} masks/s")
        work = state.work
        if work.skip_layer_forwards:
            saved = work.skip_layer_forwards - work.layer_forwards
            share = saved / work.skip_layer_forwards
            parts.append(f"{saved} layer-forwards saved ({share:.0%})")
        if shown := [name for name, ppl in state.best.items() if math.isfinite(ppl)]:
            shown = [shown[0], shown[len(shown) // 2], shown[-1]] if len(shown) > 3 else shown
            best = ", ".join(f"{state.best[name]:.4g} {name}" for name in shown)
            parts.append(f"best ppl {best}")
        if state.heldout_r2 is not None and state.heldout_spearman is not None:
            parts.append(
                f"{state.surrogate} predicts unseen masks: R2 {state.heldout_r2:.3f}, "
                f"rho {state.heldout_spearman:.3f}"
            )
        if state.quarantined:
            parts.append(f"{state.quarantined} quarantined")
        left = state.total - state.reused - scored
        if left > 0:
            parts.append(f"{left / speed:.0f} s left" if speed > 0 else "time left unknown")
        else:
            parts.append(f"{elapsed_s:.0f} s")
        return " | ".join(parts)
