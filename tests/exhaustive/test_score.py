"""Every set scored: what lies in the folder, stops at any place, engines of any number.

The known game says what scores must be; they are stored as float32 and compared as such.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from lpserve.cli.entry import main
from lpserve.demo import FOLDER
from lpserve.errors import InputError, LpserveError, RunInterrupted
from lpserve.exhaustive import score, segments
from lpserve.exhaustive.family import SmallRemovals
from lpserve.exhaustive.game import read_exhaustive
from lpserve.exhaustive.score import exhaustive
from lpserve.masks import key_text, keys
from lpserve.store.store import Store
from lpserve.testing.reference import reference_model, window_nll, with_layers_deleted
from lpserve.testing.runs import NUM_PLAYERS as P
from lpserve.testing.runs import exhaustive_config, known_game, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"), np.random.default_rng(4))


@pytest.fixture
def small_segments(monkeypatch):
    """Segments of 10 masks, so that a small game has several."""
    monkeypatch.setattr(segments, "SEGMENT_MASKS", 10)
    monkeypatch.setattr(score, "_AHEAD", 15)


def tallied(path: Path) -> int:
    return sum(map(int, path.read_text().split())) if path.exists() else 0


def assert_is_known(folder: Path, texts: dict[str, str]) -> None:
    game = read_exhaustive(folder)
    wanted = known_game(texts).score(game.masks_MP).nll_MN.astype(np.float32)
    np.testing.assert_array_equal(game.values["nll"], wanted)


def test_every_set_is_scored_once(tmp_path, texts, small_segments):
    tally = tmp_path / "tally"
    config = exhaustive_config(tmp_path, texts, max_removed=4, tally=str(tally))
    result = exhaustive(config)
    assert_is_known(result.folder, texts)
    assert result.masks_new == tallied(tally) == SmallRemovals(P, 4).count
    assert len(list((result.folder / "segments").iterdir())) == -(-result.masks_new // 10)
    assert not (result.folder / "scores.sqlite").exists()
    # again: nothing is scored
    assert exhaustive(config).masks_new == 0
    assert tallied(tally) == result.masks_new


@pytest.mark.process
@pytest.mark.thorough
def test_killed_at_random_moments_it_loses_nothing(tmp_path, texts, rng, small_segments):
    """What was in flight at a kill may be scored again, nothing that had been committed."""
    tally = tmp_path / "tally"
    config = exhaustive_config(tmp_path, texts, max_removed=P, tally=str(tally), delay_s=0.01)
    code = (
        "import json, sys; from lpserve.exhaustive import score, segments; "
        "segments.SEGMENT_MASKS = 10; score._AHEAD = 15; "
        "score.exhaustive(score.ExhaustiveConfig(**json.loads(sys.argv[1])))"
    )
    argv = [sys.executable, "-c", code, json.dumps(asdict(config))]
    kills, most, code_of_last = 0, 0, -1
    for _ in range(40):
        worker = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = len(list(Path(config.out).glob("segments/*.parquet")))
        while worker.poll() is None:
            held = len(list(Path(config.out).glob("segments/*.parquet")))
            if held > seen and kills < 4:
                time.sleep(float(rng.uniform(0, 0.1)))
                worker.send_signal(signal.SIGKILL)
                kills += worker.wait() == -signal.SIGKILL
                break
            time.sleep(0.005)
        most, code_of_last = max(most, seen), worker.returncode
        if code_of_last == 0:
            break
    assert code_of_last == 0
    assert kills >= 2
    assert most > 0
    assert_is_known(Path(config.out), texts)
    # a unit in flight at each kill, at most 64 masks in all
    assert 256 <= tallied(tally) <= 256 + kills * 64


def test_a_signal_stops_it_and_the_same_command_goes_on(tmp_path, texts, small_segments):
    tally = tmp_path / "tally"
    config = exhaustive_config(tmp_path, texts, max_removed=4, tally=str(tally), delay_s=0.02)
    written = segments.write_segment

    def then_stop(folder, number, *rest):
        written(folder, number, *rest)
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "write_segment", then_stop)
        with pytest.raises(RunInterrupted, match="give the same command again"):
            exhaustive(config)
    before = tallied(tally)
    assert 30 <= before < SmallRemovals(P, 4).count
    with pytest.raises(InputError, match="`lpserve exhaustive` again"):
        read_exhaustive(config.out)
    result = exhaustive(config)
    assert tallied(tally) == before + result.masks_new == SmallRemovals(P, 4).count
    assert_is_known(result.folder, texts)


def test_masks_that_cannot_be_scored_are_named_and_left_out(tmp_path, texts, small_segments):
    family = SmallRemovals(P, 2)
    poison = key_text(keys(family.masks(4, 5))[0], P)
    nan = key_text(keys(family.masks(20, 21))[0], P)
    config = exhaustive_config(tmp_path, texts, max_removed=2, poison=[poison], nan=[nan])
    for _ in range(2):  # the second time from the segments alone
        game = read_exhaustive(exhaustive(config).folder)
        assert list(game.reasons) == [4]
        bad = np.flatnonzero(np.isnan(game.values["nll"]).any(axis=1))
        assert bad.tolist() == [4, 20]
        others = np.delete(np.arange(family.count), [4, 20])
        wanted = known_game(texts).score(game.masks_MP[others]).nll_MN.astype(np.float32)
        np.testing.assert_array_equal(game.values["nll"][others], wanted)


def test_rows_that_a_segment_holds_leave_the_store(tmp_path, texts, small_segments):
    held = []
    forget = Store.forget

    def counted(store, *arguments):
        forget(store, *arguments)
        held.append(store.count())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "forget", counted)
        exhaustive(exhaustive_config(tmp_path, texts, max_removed=4))
    assert held[-1] == 0
    # what is asked for at once: two segments and the full model, in its one block of windows
    assert max(held) <= 2 * 10 + 15


def test_another_game_in_the_folder_is_refused(tmp_path, texts):
    config = exhaustive_config(tmp_path, texts, max_removed=2)
    exhaustive(config)
    for change, what in (
        ({"max_removed": 3}, "max_removed changed"),
        ({"engine_options": {"num_players": P, "game_seed": 4}}, "the model"),
        (
            {"calibration": {"a": texts["heldout"]}, "heldout": {"b": texts["calibration"]}},
            "the calibration windows",
        ),
    ):
        with pytest.raises(InputError, match=what):
            exhaustive(replace(config, **change))


def test_a_model_whose_own_score_is_not_finite_is_refused(tmp_path, texts):
    config = exhaustive_config(tmp_path, texts, max_removed=2, nan=["1" * P])
    with pytest.raises(LpserveError, match="full model's own score is not finite"):
        exhaustive(config)


@pytest.mark.ray
@pytest.mark.thorough
def test_many_engines_give_the_same_game(tmp_path, texts, small_segments):
    import ray

    config = exhaustive_config(tmp_path, texts, max_removed=4, delay_s=0.001)
    # a Ray of its own: another test's, which would be found, may lose its nodes
    ray.init("local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        result = exhaustive(replace(config, pool="ray", engines=3))
    finally:
        ray.shutdown()
    assert_is_known(result.folder, texts)


def test_the_command_line_scores_the_bundled_model(tmp_path, capsys):
    """Scores are those of transformers' model with layers deleted, within float32's rounding."""
    out = tmp_path / "game"
    argv = ["exhaustive", "--demo", "--max-removed", "1", "--num-windows", "2", "--length", "32"]
    assert main([*argv, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "14 masks, 78 layer-forwards in one trie" in printed
    game = read_exhaustive(out)
    model = reference_model(FOLDER / "model").float()
    where = game.windows.tokens_NT, game.windows.scored_NT
    for mask_P, nll_N in zip(game.masks_MP[1:], game.values["nll"][1:], strict=True):
        wanted = window_nll(with_layers_deleted(model, mask_P), *where)
        np.testing.assert_allclose(nll_N, wanted, rtol=1e-5)
    best = game.masks_MP[1:-1][game.mean_nll_M[1:-1].argmin()]
    assert f"  {np.flatnonzero(~best)[0]}\n" in printed
    assert sorted(p.name for p in out.iterdir() if "lock" not in p.name) == [
        "game.json",
        "segments",
        "windows.npz",
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-removed", "0"], "max_removed must be"),
        (["--max-removed", "13"], "max_removed must be 1..12"),
        (["--max-removed", "2", "--utility", "task_margin"], "is about tasks"),
        (["--max-removed", "2", "--utility", "colour"], "utility must be"),
        (["--max-removed", "2", "--calibration", "/no/such.txt"], "/no/such.txt"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, flags, words):
    out = tmp_path / "game"
    text = ["--calibration", str(FOLDER / "calibration.txt")] * ("--calibration" not in flags)
    argv = ["exhaustive", "--model", str(FOLDER / "model"), *text, *flags, "--out", str(out)]
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not out.exists()
