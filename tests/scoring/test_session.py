"""Scores that a session hands out, against an engine that is asked itself."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

import lpserve
from lpserve.config import EngineConfig
from lpserve.engine.scorer import StackScorer
from lpserve.errors import StoreCorruptError
from lpserve.masks import drop_one
from lpserve.scoring.session import ScoringSession, single_overlap
from lpserve.store.store import Store
from lpserve.testing.parity import some_windows


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


def test_a_session_that_cannot_begin_gives_its_store_back(tmp_path, rng, monkeypatch):
    windows = some_windows(rng, num=2)
    config = EngineConfig(model="synthetic", engine="synthetic")

    def damaged(_store):
        raise StoreCorruptError("a page that cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "games", damaged)
        with pytest.raises(StoreCorruptError):
            ScoringSession(config, windows, store=tmp_path / "s.sqlite")
    with ScoringSession(config, windows, store=tmp_path / "s.sqlite") as session:
        assert session.store.count() == 0


def singles_of(num_players):
    full_P = np.ones(num_players, dtype=bool)
    return np.concatenate([full_P[None], drop_one(full_P)])


def test_the_overlap_of_single_layers_is_measured_once_and_kept(model_dir, rng, tmp_path):
    """Blocks of 64 windows each; then from the store, without an engine's work; and where the store
    holds single layers' scores alone, with these scored again but the older ones kept."""
    path, windows = str(model_dir("llama")), some_windows(rng, num=70, length=16, ragged=False)
    masks_MP = singles_of(6)
    with lpserve.open_engine(path, windows) as engine:
        scores = cast("Any", engine).score_overlap(masks_MP)
    expected_PP = scores.overlap_MM[1:, 1:] / windows.num_tokens_N.sum()
    for store, first in (("a", None), ("a", None), ("b", masks_MP[:4])):
        with ScoringSession(
            EngineConfig(model=path), windows, store=tmp_path / store, holder="a test"
        ) as session:
            if first is not None:
                session.score(first, windows)
            rows = session.store.count()
            found_PP = single_overlap(session, windows)
            assert found_PP is not None
            assert session.store.count() == 14
            nll_MN = session.score(masks_MP, windows)["nll"]
            made = session.work.distinct_masks
            # heads: for the scores and for the overlap, of two blocks
            assert made == (0 if rows == 14 else 2 * 2 * 7 + 2 * (0 if first is None else 4))
        # sums over two blocks are rounded otherwise than over all windows
        np.testing.assert_allclose(found_PP, expected_PP, atol=1e-5 * np.abs(expected_PP).max())
        np.testing.assert_allclose(nll_MN, scores.nll_MN, rtol=1e-6)


def test_without_an_overlap_single_layers_are_scored_all_the_same(
    model_dir, rng, tmp_path, monkeypatch, capsys
):
    path, windows = str(model_dir("llama")), some_windows(rng, num=3)

    def fails(*_arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(StackScorer, "score_overlap", fails)
    config = EngineConfig(model=path)
    with ScoringSession(config, windows, store=tmp_path / "s", holder="a test") as session:
        assert single_overlap(session, windows) is None
        assert session.store.count() == 7
    assert "the overlap of single layers is not known: RuntimeError: out of memory" in (
        capsys.readouterr().err
    )


def test_an_engine_that_shows_no_logits_has_no_overlap(rng, tmp_path):
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 97, (2, 9)))
    config = EngineConfig(model="synthetic", engine="synthetic", engine_options={"num_players": 5})
    with ScoringSession(config, windows, store=tmp_path / "s", holder="a test") as session:
        assert single_overlap(session, windows) is None
        assert session.store.count() == 0
