"""The progress line: what it says, and how often."""

from __future__ import annotations

import io

import pytest

from lpserve.scoring.progress import Progress
from lpserve.types import Work


def test_the_line_holds_every_figure():
    progress = Progress(interval_s=1.0, stream=io.StringIO())
    progress.begin("scoring", 100)
    state = progress.state
    state.done, state.reused, state.quarantined = 60, 20, 1
    state.work = Work(layer_forwards=300, skip_layer_forwards=400)
    state.best = {f"without {r}": 9.0 + r for r in (1, 2, 3, 4)}
    state.surrogate, state.heldout_r2, state.heldout_spearman = "gp", 0.98765, 0.9
    assert progress.line(10.0) == (
        "scoring: 60/100 masks (20 from the store) | 4.0 masks/s | 100 layer-forwards saved (25%)"
        " | best ppl 10 without 1, 12 without 3, 13 without 4"
        " | gp predicts unseen masks: R2 0.988, rho 0.900 | 1 quarantined"
        " | 10 s left"
    )


def test_nothing_scored_yet_says_so():
    progress = Progress(interval_s=1.0, stream=io.StringIO())
    progress.begin("scoring", 100)
    assert progress.line(0.5) == "scoring: 0/100 masks | 0.0 masks/s | time left unknown"


def test_masks_in_parts_count_their_windows():
    progress = Progress(interval_s=1.0, stream=io.StringIO())
    progress.begin("wikitext2", 3)
    progress.state.windows = (128, 512)
    assert progress.line(30.0) == (
        "wikitext2: 0/3 masks | 128/512 windows | 0.0 masks/s | 90 s left"
    )


@pytest.mark.parametrize(("interval_s", "lines"), [(1000.0, 1), (1e-9, 5)])
def test_outside_a_terminal_one_plain_line_comes_per_interval(interval_s, lines):
    stream = io.StringIO()
    progress = Progress(interval_s=interval_s, stream=stream)
    for _ in range(5):
        progress.update()
    assert len(stream.getvalue().splitlines()) == lines
    assert "\x1b" not in stream.getvalue()
