"""Races at the end of a run: which windows they read, what they cost, and what the plan says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import lpserve
from lpserve.cli.entry import main
from lpserve.config import config_from
from lpserve.data.prepare import cut_run_items
from lpserve.demo import FOLDER
from lpserve.errors import InputError
from lpserve.masks import without
from lpserve.plan.plan import load_plan
from lpserve.plan.race import Standing
from lpserve.runner.settling import _Race, _settlements, race_windows
from lpserve.store.store import Store
from lpserve.testing.runs import DEMO_TEXTS, NUM_PLAYERS


def config_of(tmp_path, **changes):
    values = {
        "model": str(FOLDER / "model"),
        "engine": "synthetic",
        "engine_options": {"num_players": NUM_PLAYERS, "game_seed": 3},
        "calibration": DEMO_TEXTS["sherlock"],
        "heldout": DEMO_TEXTS["dracula"],
        "num_windows": 6,
        "heldout_windows": 4,
        "length": 64,
        "budget": 90,
        "max_removed": 4,
        "settle": 0.9,
        "max_windows": 40,
        "out": str(tmp_path / "run"),
        "progress_s": 100.0,
    }
    return config_from({k: v for k, v in (values | changes).items() if v is not None}, "test")


def test_a_race_reads_the_windows_that_a_larger_run_would_add(tmp_path):
    config = config_of(tmp_path, calibration=DEMO_TEXTS, heldout=None)
    calibration, heldout = cut_run_items(config)
    windows = race_windows(config, calibration, heldout)
    assert windows is not None
    larger, _ = cut_run_items(replace(config, num_windows=40, settle=None, max_windows=None))
    hashes = larger.windows.window_hashes
    # a window of each text in turn, those that chose the sets left out
    expected = [hashes[start + row] for row in range(6, 40) for start in (0, 40)]
    assert list(windows.window_hashes) == expected
    assert not set(expected) & set(calibration.windows.window_hashes)
    unsettled = replace(config, settle=None, max_windows=None)
    assert race_windows(unsettled, calibration, heldout) is None


def test_a_run_settles_its_plan_and_goes_on_from_its_scores(tmp_path, capsys):
    """The synthetic game orders sets alike on all windows: every race has a winner, soon, unless a
    difference counts as a tie."""
    config = config_of(tmp_path, tie=1e-6)
    first = lpserve.run(config)
    plan = load_plan(tmp_path / "run" / "plan.json")
    for entry in plan.plans:
        assert entry.settlement is not None
        assert entry.settlement.removed == entry.removed
        assert entry.settlement.outcome == "wins"
        assert entry.settlement.contenders == 8
        assert entry.settlement.windows < 34
        assert entry.removed == first.outcome.plan.entry(entry.num_removed).removed
        assert not any("draw of windows" in warning for warning in entry.warnings)
    again = lpserve.run(config)
    assert again.scores_new == 0
    assert load_plan(tmp_path / "run" / "plan.json") == plan
    assert main(["plan", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "for 4 of 4 sizes the set shown is the best of its contenders (90% each)" in told
    assert "~" not in told
    assert main(["plan", str(tmp_path / "run"), "--protect", str(plan.plans[0].removed[0])]) == 0
    assert "raced on" not in capsys.readouterr().out
    # other rules on the same folder: all differences are ties, and more windows are more windows
    tied = lpserve.run(replace(config, tie=0.9, max_windows=50))
    kinds = [entry.settlement and entry.settlement.outcome for entry in tied.outcome.plan.plans]
    assert kinds == ["tie"] * 4
    assert main(["plan", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "~ ties with other sets (`ties` in plan.json)" in told
    unsettled = lpserve.run(replace(config, settle=None, max_windows=None))
    assert unsettled.scores_new == 0
    assert all(entry.settlement is None for entry in unsettled.outcome.plan.plans)


def test_scores_of_a_race_are_kept_and_read_by_a_larger_run(tmp_path):
    config = config_of(tmp_path, tie=1e-6)
    result = lpserve.run(config)
    larger, _ = cut_run_items(replace(config, num_windows=40, settle=None, max_windows=None))
    fresh = larger.windows.select(np.arange(6, 40))
    chosen = result.outcome.plan.entry(2).removed
    mask_P = without(NUM_PLAYERS, chosen)
    with Store(tmp_path / "run" / "scores.sqlite") as store:
        (game,) = [store.game_id(game) for game in store.games().values()]
        _, known_MN = store.get(game, fresh, mask_P[None])
    settlement = result.outcome.plan.entry(2).settlement
    assert settlement is not None
    assert known_MN[0].sum() == settlement.windows


def test_of_sets_that_tie_the_one_that_holds_the_smaller_plans_set_is_the_first_choice():
    def race(sets, behind, alive):
        alive_M = np.array(alive)
        last = Standing(
            alive_M=alive_M,
            leader=int(np.argmin(behind)),
            behind_M=np.array(behind),
            half_width_M=np.array([0.0, 0.004, 0.003])[: len(sets)],
            decided=True,
        )
        masks_MP = np.array([without(6, one) for one in sets])
        return _Race(None, masks_MP, alive_M, last=last, windows=20)

    one, two, three = _settlements(
        [
            race([[2], [3]], [0.0, 0.1], [True, False]),
            race([[0, 1], [2, 5], [1, 2]], [0.0, 0.002, 0.001], [True, True, True]),
            race([[0, 1, 4], [3, 4, 5]], [0.0, 0.001], [True, True]),
        ],
        0.9,
    )
    assert (one.removed, one.outcome, one.ties) == ([2], "wins", [])
    # both others hold layer 2: the better of them
    assert (two.removed, two.outcome, two.behind) == ([1, 2], "tie", 0.001)
    assert two.ties == [[0, 1], [2, 5]]
    assert three.removed == [0, 1, 4]  # none holds 1 and 2
    assert three.half_width == 0.004


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_windows": None}, "settle needs max_windows of at least 11"),
        ({"max_windows": 8}, "settle needs max_windows of at least 11, 5 more than num_windows"),
        ({"settle": None}, "max_windows is for races: give settle too"),
        ({"settle": 1.5}, "settle must be a number above 0 and below 1"),
        ({"goal": "values"}, "settle is about the plan, and goal values searches none"),
        ({"utility": "accuracy"}, "settle compares losses in nats per token"),
        ({"max_windows": 10**6}, "max_windows"),
    ],
)
def test_what_cannot_race_is_refused_before_an_engine_starts(tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        lpserve.run(config_of(tmp_path, **changes))
    assert not (tmp_path / "run" / "scores.sqlite").exists()


def test_windows_from_an_npz_cannot_grow(tmp_path, rng):
    np.savez(tmp_path / "w.npz", tokens=rng.integers(0, 500, (6, 40)))
    with pytest.raises(InputError, match=r"'w' is an \.npz, whose windows are all used"):
        lpserve.run(config_of(tmp_path, calibration=str(tmp_path / "w.npz")))


def test_plans_of_earlier_versions_are_read(tmp_path):
    lpserve.run(config_of(tmp_path, settle=None, max_windows=None))
    path = tmp_path / "run" / "plan.json"
    content = json.loads(path.read_text())
    for entry in content["plans"]:
        del entry["settlement"]
    path.write_text(json.dumps(content))
    assert load_plan(path).plans[0].settlement is None
