"""Scores kept under the hash of samples: not read, told of, and taken over when asked."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lpserve
from lpserve.cli.entry import main
from lpserve.config import RunConfig, config_from
from lpserve.errors import InputError, StoreCorruptError
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.content_hash import checkpoint_hash, sampled_hash
from lpserve.store.rekey import rekey_store
from lpserve.store.store import Store
from lpserve.testing.runs import stored_scores
from lpserve.testing.stores import (
    drawn_windows,
    make_game,
    random_masks,
    random_nll,
)


def put(store: Store, model: str, windows, masks, nll, metric: str = "nll") -> None:
    game = store.game_id(make_game(model))
    for block in store.blocks_for(windows):
        store.put(game, block, masks, nll[:, block.rows], metric)


def test_all_scores_of_a_model_move_and_no_others(tmp_path, rng):
    windows, masks = drawn_windows(rng, 5), random_masks(rng, 9)
    nll, misses, other = (random_nll(rng, 9, 5) for _ in range(3))
    path = tmp_path / "scores.sqlite"
    with Store(path) as store:
        put(store, "old", windows, masks, nll)
        put(store, "old", windows, masks[:3], misses[:3], "misses")
        put(store, "another", windows, masks, other)
        (block, *_) = store.blocks_for(windows)
        store.quarantine(store.game_id(make_game("old")), block, masks[0], "poisoned")
        before = store.count()
    moved = rekey_store(path, "old", "new")
    assert moved == {make_game("old").content_hash: (make_game("new").content_hash, before - 9)}
    with Store(path) as store:  # reads the file through: checksums are right
        assert {game.model_hash for game in store.games().values()} == {"new", "another"}
        assert store.count() == before
        game = store.game_id(make_game("new"))
        np.testing.assert_array_equal(store.get(game, windows, masks)[0], nll)
        np.testing.assert_array_equal(store.get(game, windows, masks[:3], "misses")[0], misses[:3])
        assert list(store.quarantined(game).values()) == ["poisoned"]
        another = store.game_id(make_game("another"))
        np.testing.assert_array_equal(store.get(another, windows, masks)[0], other)
    assert rekey_store(path, "old", "new") == {}


def test_a_score_that_is_there_already_is_kept(tmp_path, rng):
    windows, masks = drawn_windows(rng, 4), random_masks(rng, 6)
    old, new = random_nll(rng, 6, 4), random_nll(rng, 2, 4)
    path = tmp_path / "scores.sqlite"
    with Store(path) as store:
        put(store, "old", windows, masks, old)
        put(store, "new", windows, masks[:2], new)
    rekey_store(path, "old", "new")
    with Store(path) as store:
        got, known = store.get(store.game_id(make_game("new")), windows, masks)
    assert known.all()
    np.testing.assert_array_equal(got, np.concatenate([new, old[2:]]))


def test_a_damaged_store_is_left_as_it_is(tmp_path, rng):
    path = tmp_path / "scores.sqlite"
    with Store(path) as store:
        put(store, "old", drawn_windows(rng, 2), random_masks(rng, 2), random_nll(rng, 2, 2))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE scores SET crc = crc + 1")
    db.close()
    data = path.read_bytes()
    with pytest.raises(StoreCorruptError):
        rekey_store(path, "old", "new")
    assert path.read_bytes() == data


@pytest.fixture
def config(tmp_path, model_dir, rng) -> RunConfig:
    """A short run of a tiny model."""
    texts = {}
    for side in ("calibration", "heldout"):
        texts[side] = str(tmp_path / f"{side}.npz")
        np.savez(texts[side], tokens=rng.integers(0, 97, (3, 20)))
    values = {"model": str(model_dir("llama")), "budget": 40, "max_removed": 2, "progress_s": 100.0}
    return config_from(values | texts | {"out": str(tmp_path / "run")}, "test")


def finished_before(config: RunConfig) -> Path:
    """The folder of a finished run as an earlier version had left it."""
    folder = lpserve.run(config).folder
    checkpoint = read_checkpoint(config.model)
    old = sampled_hash(checkpoint)
    moved = rekey_store(folder / "scores.sqlite", checkpoint_hash(checkpoint), old)
    ((game, (was, _)),) = moved.items()
    stored = json.loads((folder / "config.json").read_text())
    assert stored["game"] == game
    (folder / "config.json").write_text(json.dumps(stored | {"model_hash": old, "game": was}))
    return folder


def test_a_run_of_an_earlier_version_is_refused_adopted_and_read(config, capsys):
    folder = finished_before(config)
    scores = stored_scores(folder / "scores.sqlite")
    plan = (folder / "plan.json").read_text()
    with pytest.raises(InputError, match=r"knew a model by samples .* `lpserve scores .*--adopt"):
        lpserve.run(config)
    capsys.readouterr()
    assert main(["scores", str(folder), "--adopt", config.model]) == 0
    assert "are now kept under the hash of all its weights" in capsys.readouterr().out
    again = lpserve.run(config)
    assert stored_scores(folder / "scores.sqlite") == scores
    assert (folder / "plan.json").read_text() == plan
    assert again.scores_new == 0


def test_old_scores_in_a_store_are_told_and_not_read(config, tmp_path, capsys):
    store = finished_before(config) / "scores.sqlite"
    capsys.readouterr()
    second = lpserve.run(replace(config, out=str(tmp_path / "second"), store=str(store)))
    assert "they are not read (lpserve scores STORE --adopt MODEL" in capsys.readouterr().err
    assert second.scores_new > 0


def test_what_cannot_be_adopted_is_one_line(config, tmp_path, model_dir, capsys):
    folder = lpserve.run(config).folder
    for arguments, told in (
        ([str(tmp_path / "none"), "--adopt", config.model], "does not exist"),
        ([str(folder), "--adopt", config.model], "holds no scores of"),
        ([str(folder), "--adopt", str(model_dir("gpt2"))], "is of another model"),
    ):
        capsys.readouterr()
        assert main(["scores", *arguments]) == 2
        assert told in capsys.readouterr().err
