"""An exhaustive game read back, against the known game that was scored.

Scores are stored as float32: means agree within 1e-6 of values near 1.
"""

from __future__ import annotations

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.exhaustive.game import NEAR, optima, read_exhaustive
from lpserve.exhaustive.score import exhaustive
from lpserve.exhaustive.segments import segment_path
from lpserve.masks import all_masks, keys, removed_players
from lpserve.testing.runs import NUM_PLAYERS as P
from lpserve.testing.runs import exhaustive_config, known_game, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"), np.random.default_rng(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    out = tmp_path_factory.mktemp("game")
    return exhaustive(exhaustive_config(out, texts, max_removed=3)).folder


def test_utilities_are_the_known_games(folder, texts):
    game, known = read_exhaustive(folder), known_game(texts)
    mean_M = known.score(game.masks_MP).mean_nll_M()
    np.testing.assert_allclose(game.mean_nll_M, mean_M, rtol=1e-6)
    np.testing.assert_allclose(game.utilities_M(), -mean_M, rtol=1e-6)
    np.testing.assert_allclose(
        game.utilities_M("ppl_ratio"), np.exp(mean_M[-1] - mean_M), rtol=1e-5
    )
    assert game.reasons == {}
    with pytest.raises(InputError, match="needs kl, and the game holds nll"):
        game.utilities_M("neg_kl")
    with pytest.raises(InputError, match="utility must be"):
        game.utilities_M("colour")


def test_rows_are_where_the_masks_stand(folder, rng):
    game = read_exhaustive(folder)
    masks = rng.permutation(all_masks(P))
    place = {key: row for row, key in enumerate(keys(game.masks_MP))}
    assert game.rows(masks).tolist() == [place.get(key, -1) for key in keys(masks)]


def test_optima_are_the_best_of_all_sets(folder, texts):
    known = known_game(texts)
    found = optima(folder)
    assert [one.num_removed for one in found] == [1, 2, 3]
    for one in found:
        masks = all_masks(P, kept=P - one.num_removed)
        ppl = np.exp(known.score(masks).mean_nll_M())
        assert one.removed == removed_players(masks[ppl.argmin()])
        assert one.ppl == pytest.approx(ppl.min(), rel=1e-6)
        assert one.sets == len(masks)
        assert one.near == (ppl <= ppl.min() * (1 + NEAR)).sum()


def test_a_game_that_is_not_complete_or_of_other_windows_is_refused(tmp_path, texts):
    folder = exhaustive(exhaustive_config(tmp_path, texts, max_removed=2)).folder
    windows = (folder / "windows.npz").read_bytes()
    np.savez(folder / "windows.npz", tokens=np.ones((4, 40), dtype=np.int64))
    with pytest.raises(InputError, match="other windows"):
        read_exhaustive(folder)
    (folder / "windows.npz").write_bytes(windows)
    segment_path(folder, 0).unlink()
    for read in (read_exhaustive, optima):
        with pytest.raises(InputError, match="give the same `lpserve exhaustive` again"):
            read(folder)
