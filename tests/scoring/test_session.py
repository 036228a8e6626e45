"""Scores that a session hands out, against an engine that is asked itself."""

from __future__ import annotations

import numpy as np
import pytest

import lpserve
from lpserve.config import EngineConfig
from lpserve.scoring.session import ScoringSession


@pytest.mark.parametrize("num_distinct", [1, 3])
def test_windows_that_repeat_all_get_their_score(num_distinct, model_dir, rng, tmp_path):
    """Text of which parts repeat gives equal windows; a store holds the score of one."""
    path = str(model_dir("llama"))
    distinct = rng.integers(2, 97, (num_distinct, 24))
    windows = lpserve.TokenWindows.from_tokens(distinct[rng.integers(0, num_distinct, 7)])
    masks_MP = np.array([[True] * 6, [True] * 5 + [False]])
    with lpserve.open_engine(path, windows) as engine:
        expected_MN = engine.score(masks_MP).nll_MN
    for scored in (2, 0):  # by engines, then from the store
        with ScoringSession(
            EngineConfig(model=path), windows, store=tmp_path / "s.sqlite", holder="a test"
        ) as session:
            got_MN = session.score(masks_MP, windows)["nll"]
            assert session.masks_scored == scored
        # float32, as stored
        np.testing.assert_allclose(got_MN, expected_MN, rtol=1e-6)
