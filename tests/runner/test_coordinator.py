"""The whole job over the synthetic engine: a known game, real store, real files, real signals.

Not covered here: real models (test_cli, test_kills).
"""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lpserve
from lpserve.analysis.record import read_record
from lpserve.config import RunConfig
from lpserve.data.windows import TokenWindows
from lpserve.errors import EngineError, InputError, RunInterrupted
from lpserve.masks import all_masks, keys, without
from lpserve.plan.constraint import constraint_of
from lpserve.plan.plan import load_plan
from lpserve.plan.set_files import read_sets
from lpserve.runner.run import run
from lpserve.store.schema import checksum
from lpserve.testing.runs import NUM_PLAYERS as P
from lpserve.testing.runs import known_game, make_config, stored_count, stored_scores
from lpserve.values.exact import exact_values


def test_a_run_finds_the_best_sets_and_writes_everything(tmp_path, texts):
    result = run(make_config(tmp_path, texts))
    folder, plan = result.folder, result.outcome.plan
    for name in (
        "config.json",
        "scores.sqlite",
        "shapley.csv",
        "plan.json",
        "report.html",
        "events.jsonl",
        "windows.npz",
        "scores.npz",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert plan.masks_scored == 90
    game = known_game(texts)
    for entry in plan.plans:
        masks = all_masks(P, P - entry.num_removed)
        best = masks[game.mean_nll(masks).argmin()]
        assert entry.removed == [int(i) for i in np.flatnonzero(~best)]
        expected = game.score(best[None]).perplexity_M()[0]
        assert entry.calibration_ppl == pytest.approx(expected, rel=1e-6)  # float32 storage
        assert entry.heldout_ppl is not None
    stored = json.loads((folder / "plan.json").read_text())
    assert stored["format"] == 1
    assert [e["num_removed"] for e in stored["plans"]] == [1, 2, 3, 4]
    assert stored["players"][2] == {"index": 2, "layer": 2, "part": "layer"}
    assert lpserve.load_plan(folder / "plan.json") == plan
    report = (folder / "report.html").read_text()
    assert "<svg" in report
    assert plan.stopped == "the budget of 90 masks is spent"
    assert plan.stopped in report
    seen = set(keys(result.outcome.scored.masks_MP))
    for entry in plan.plans:
        if entry.unseen is not None:
            assert 0 <= entry.unseen.chance <= 1
            assert len(entry.unseen.removed) == entry.num_removed
            assert keys(without(P, entry.unseen.removed)[None])[0] not in seen
        # every window weighs all masks of this game alike: nothing depends on the windows
        assert entry.stability is not None
        assert entry.stability["stays_best"] == 1.0
        assert entry.stability["halves_regret"] == pytest.approx(0, abs=1e-6)
    with (folder / "interactions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == P * (P - 1) // 2
    strength = [abs(float(row["interaction"])) for row in rows]
    assert strength == sorted(strength, reverse=True)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("protect", "force", "goal"),
    [([2, 0], None, "both"), (None, [5], "plan"), ([1], [6, 3], "plan")],
)
def test_a_run_within_a_constraint_plans_the_best_sets_within(
    tmp_path, texts, protect, force, goal
):
    config = make_config(tmp_path, texts, protect=protect, force=force, goal=goal)
    result = run(config)
    game, within = known_game(texts), constraint_of(P, protect, force)
    plan = load_plan(result.folder / "plan.json")
    assert (plan.protected, plan.forced) == (sorted(protect or []), sorted(force or []))
    assert [entry.num_removed for entry in plan.plans] == list(range(len(force or "-"), 5))
    for entry in plan.plans:
        masks = within.all_sets(entry.num_removed)
        best = masks[game.mean_nll(masks).argmin()]
        assert entry.removed == [int(i) for i in np.flatnonzero(~best)]
        assert entry.heldout_ppl is not None
        for candidate in entry.candidates:
            assert within.holds(without(P, candidate.removed)[None]).all()
    assert plan.constraint in (result.folder / "report.html").read_text()
    record = read_record(result.folder)
    assert record.within == within
    again = run(config)
    assert again.scores_new == 0
    assert again.outcome.plan == result.outcome.plan
    with pytest.raises(InputError, match=r"belongs to another run: \w+ was"):
        run(replace(config, protect=[6] if protect != [6] else [5], force=None))


@pytest.mark.thorough
def test_alternatives_are_scored_held_out_and_read_again(tmp_path, texts):
    config = make_config(tmp_path, texts, alternatives=2)
    result = run(config)
    plan = load_plan(result.folder / "plan.json")
    assert (plan.alternatives, plan.min_distance) == (2, 2)
    assert not plan.plans[0].alternatives
    assert "the scored sets of 1 removed hold fewer than 2 alternatives" in " ".join(plan.notes)
    record = read_record(result.folder)
    ppl = dict(zip(keys(record.masks_MP), record.nll_MI.sum(axis=1), strict=True))
    for entry in plan.plans[1:]:
        sets = [entry.removed, *(other.removed for other in entry.alternatives)]
        assert len(sets) == 3
        assert all(len(set(a) - set(b)) >= 2 for a in sets for b in sets if a != b)
        scored = [ppl[keys(without(P, removed)[None])[0]] for removed in sets]
        assert scored == sorted(scored)
        for other in entry.alternatives:
            assert other.heldout_ppl is not None
            assert other.heldout_delta is not None
    named = [one.name for one in read_sets(result.folder, P)]
    assert named[:5] == ["plan -1", "plan -2", "plan -2 #1", "plan -2 #2", "plan -3"]
    assert plan.removed_by(3, 2) == plan.entry(3).alternatives[1].removed
    with pytest.raises(InputError, match="2 alternatives for 3 removed: got 3"):
        plan.removed_by(3, 3)
    page = (result.folder / "report.html").read_text()
    assert page.count("<tr>", page.index('<table id="alternatives">')) >= 1 + 3 * 2
    # other alternatives, without a score anew
    again = run(replace(config, alternatives=1, min_distance=3))
    assert again.outcome.plan.plans[3].removed == plan.plans[3].removed
    assert [len(entry.alternatives) for entry in again.outcome.plan.plans[:2]] == [0, 0]


def test_a_run_over_halves_names_them_everywhere(tmp_path, texts):
    """Of 4 layers as 8 halves; protected: a layer and a part of another."""
    config = make_config(tmp_path, texts, players="half", protect=[1], force=["3.mlp"])
    result = run(config)
    plan = load_plan(result.folder / "plan.json")
    assert [(p["layer"], p["part"]) for p in plan.players[:3]] == [
        (0, "attention"),
        (0, "mlp"),
        (1, "attention"),
    ]
    assert (plan.protected, plan.forced) == ([2, 3], [7])
    assert plan.constraint == "keep 1.attention, 1.mlp and remove 3.mlp"
    assert plan.unit == "parts of layers"
    assert plan.names(plan.entry(1).removed) == "3.mlp"
    page = (result.folder / "report.html").read_text()
    assert "Which parts of layers can go?" in page
    assert plan.names(plan.entry(4).removed) in page
    with (result.folder / "shapley.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["attention", "mlp"] * (P // 2)
    assert read_sets(result.folder, P // 2)[0].removed == ("3.mlp",)
    assert run(config).scores_new == 0
    with pytest.raises(InputError, match="belongs to another run"):
        run(replace(config, players="layer", protect=None, force=None))
    for changes, words in (
        ({"protect": ["9.mlp"]}, "protect: 9.mlp is none of the 8 parts of layers"),
        ({"players": "heads"}, "players must be one of layer, half, groups:FILE: got 'heads'"),
        ({"engine_options": {"num_players": 7}}, "num_players must be even for halves"),
    ):
        with pytest.raises(InputError, match=words):
            run(make_config(tmp_path / "other", texts, **{"players": "half", **changes}))


def test_constraints_that_cannot_be_are_refused_before_anything_is_scored(tmp_path, texts):
    for changes, words in (
        ({"protect": [P]}, f"protect: {P} is none of the {P} layers"),
        ({"protect": [1], "force": [1]}, "player 1 cannot be both"),
        ({"force": list(range(5))}, "force removes 5 players, max_removed is 4"),
        ({"protect": [0], "goal": "values"}, "goal values searches none"),
        ({"protect": "0"}, "protect must be a list of layers"),
        ({"force": [-1]}, "force must be a list of layers"),
        ({"alternatives": 2, "goal": "values"}, "alternatives is about the plan"),
        ({"alternatives": -1}, "alternatives must be"),
        ({"min_distance": 2}, "min_distance is about alternatives"),
        ({"alternatives": 2, "min_distance": 5}, "min_distance must be at most max_removed, 4"),
    ):
        with pytest.raises(InputError, match=words):
            run(make_config(tmp_path, texts, **changes))
    assert not (tmp_path / "run").exists()


def test_values_are_those_of_the_known_game(tmp_path, texts):
    result = run(make_config(tmp_path, texts, budget=256, sizes=[0, P - 1]))
    masks = all_masks(P)
    scores = known_game(texts).score(masks)
    exact = exact_values(masks, -scores.mean_nll_M()[:, None], (0, P - 1))[:, 0]
    with (result.folder / "shapley.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = np.array([float(row["value"]) for row in rows])
    errors = np.array([float(row["total_stderr"]) for row in rows])
    # scores are stored as float32: 1e-7 of NLLs near 1, over small differences
    assert np.abs(values - exact).max() < max(1e-6, 4 * float(errors.max()))
    assert {row["k_min"] for row in rows} == {"0"}


@pytest.mark.thorough
def test_a_finished_run_again_scores_nothing_and_gives_the_same_plan(tmp_path, texts):
    config = make_config(tmp_path, texts)
    first = run(config)
    before = stored_scores(first.folder / "scores.sqlite")
    text = (first.folder / "plan.json").read_text()
    poisoned = dict(config.engine_options)  # an engine that would fail if it were asked
    again = run(config)
    assert stored_scores(again.folder / "scores.sqlite") == before
    assert (again.folder / "plan.json").read_text() == text
    assert poisoned == config.engine_options


@pytest.mark.thorough
def test_a_larger_budget_extends_the_same_sequence(tmp_path, texts):
    small = read_record(run(make_config(tmp_path, texts, budget=60)).folder)
    large = read_record(run(make_config(tmp_path, texts, budget=90)).folder)
    alone = read_record(run(make_config(tmp_path, texts, out=str(tmp_path / "alone"))).folder)
    assert (large.masks_MP[:60] == small.masks_MP).all()
    assert (large.masks_MP == alone.masks_MP).all()


@pytest.mark.thorough
def test_a_shared_store_saves_the_scoring_and_changes_no_proposal(tmp_path, texts):
    store = str(tmp_path / "shared.sqlite")
    first = run(make_config(tmp_path, texts, store=store, out=str(tmp_path / "a")))
    before = stored_scores(Path(store))
    second = run(make_config(tmp_path, texts, store=store, out=str(tmp_path / "b")))
    assert stored_scores(Path(store)) == before
    assert first.outcome.plan == second.outcome.plan
    events = [
        json.loads(line)
        for line in (tmp_path / "b" / "events.jsonl").read_text().split("\n")
        if line
    ]
    assert events[-1]["event"] == "finished"


@pytest.mark.thorough
def test_a_poisoned_mask_is_left_out_and_the_rest_is_scored(tmp_path, texts):
    poison = "".join("01"[int(b)] for b in without(P, [2]))
    options = {"num_players": P, "game_seed": 3, "poison": [poison]}
    result = run(make_config(tmp_path, texts, engine_options=options))
    assert set(result.outcome.quarantined) == {poison}
    assert "poisoned" in result.outcome.quarantined[poison]
    assert result.outcome.plan.masks_scored == 89
    assert all(entry.removed != [2] for entry in result.outcome.plan.plans)
    assert poison in (result.folder / "report.html").read_text()
    again = run(make_config(tmp_path, texts, engine_options=options))
    assert again.outcome.plan == result.outcome.plan


def test_non_finite_scores_are_stored_and_never_chosen(tmp_path, texts):
    bad = ["".join("01"[int(b)] for b in without(P, [i])) for i in (1, 4)]
    options = {"num_players": P, "game_seed": 3, "nan": bad}
    result = run(make_config(tmp_path, texts, engine_options=options))
    stored = stored_scores(result.folder / "scores.sqlite")
    nan_masks = {mask for (mask, _), nll in stored.items() if np.isnan(nll)}
    assert nan_masks == set(keys(np.array([without(P, [1]), without(P, [4])])))
    assert all(e.removed not in ([1], [4]) for e in result.outcome.plan.plans)
    assert np.isfinite(result.outcome.analysis.values.values_P).all()


def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(tmp_path, texts):
    with pytest.raises(InputError, match="has no option 'colour'"):
        run(make_config(tmp_path, texts, engine_options={"num_players": P, "colour": 1}))
    assert not (tmp_path / "run").exists()


def test_a_model_whose_own_score_is_not_finite_stops_the_run(tmp_path, texts):
    options = {"num_players": P, "nan": ["1" * P]}
    with pytest.raises(Exception, match="full model's own score is not finite"):
        run(make_config(tmp_path, texts, engine_options=options))


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_the_same_command_resumes_it(tmp_path, texts, number):
    options = {"num_players": P, "game_seed": 3, "delay_s": 0.02}
    config = make_config(tmp_path, texts, engine_options=options)
    store = tmp_path / "run" / "scores.sqlite"
    handler = signal.getsignal(signal.SIGINT)  # ignored in a background job

    def interrupt() -> None:
        while not store.exists() or not stored_count(store):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(RunInterrupted, match="same command again to resume"):
        run(config)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler
    kept = stored_scores(store)
    assert 0 < len(kept) < 90 * 4
    resumed = run(config)
    alone = run(make_config(tmp_path, texts, out=str(tmp_path / "alone"), engine_options=options))
    after = stored_scores(store)
    assert kept.items() <= after.items()
    assert after == stored_scores(alone.folder / "scores.sqlite")
    assert resumed.outcome.plan == alone.outcome.plan


def test_other_windows_or_settings_are_refused_in_a_used_folder(tmp_path, texts):
    run(make_config(tmp_path, texts))
    before = (tmp_path / "run" / "plan.json").read_bytes()
    with pytest.raises(InputError, match="max_removed was 4, is 3"):
        run(make_config(tmp_path, texts, max_removed=3))
    np.savez(texts["calibration"], tokens=np.arange(160).reshape(4, 40))
    with pytest.raises(InputError, match="calibration text has changed"):
        run(make_config(tmp_path, texts))
    assert (tmp_path / "run" / "plan.json").read_bytes() == before


@pytest.mark.thorough
def test_a_torn_event_line_is_cut_off(tmp_path, texts):
    config = make_config(tmp_path, texts)
    run(config)
    events = tmp_path / "run" / "events.jsonl"
    with events.open("ab") as file:
        file.write(b'{"time": 1, "eve')
    run(config)
    assert all(json.loads(line) for line in events.read_text().splitlines())


@pytest.mark.slow  # half a minute of fits
def test_the_paper_surrogate_serves_a_whole_run(tmp_path, texts):
    result = run(make_config(tmp_path, texts, surrogate="paper", utility="ppl_ratio", budget=60))
    assert result.outcome.analysis.surrogate_name == "paper"
    assert "Monte Carlo" in result.outcome.analysis.values.estimator
    assert result.outcome.plan.utility == "ppl_ratio"


def test_a_stop_rule_ends_before_the_budget_and_is_named(tmp_path, texts):
    result = run(make_config(tmp_path, texts, budget=250, stop_chance=0.05, stop_gain=0.01))
    assert result.outcome.plan.masks_scored < 163  # all masks of the strata that a run may ask for
    assert "beating the plan by more than 1%" in result.outcome.scored.stopped


def test_engine_errors_are_runtime_errors_too():
    assert issubclass(EngineError, RuntimeError)


# -- a screen ----------------------------------------------------------------------------------


def screened_windows(folder: Path, texts) -> dict[bytes, set[int]]:
    """Mask -> calibration windows that it is stored on."""
    windows = lpserve.TokenWindows.from_npz(texts["calibration"])
    row_of = {name: row for row, name in enumerate(windows.window_hashes)}
    found: dict[bytes, set[int]] = {}
    for mask, window in stored_scores(folder / "scores.sqlite"):
        if window in row_of:
            found.setdefault(mask, set()).add(row_of[window])
    return found


@pytest.mark.thorough
def test_a_screen_scores_sets_on_few_windows_first(tmp_path, texts):
    plain = run(make_config(tmp_path, texts, out=str(tmp_path / "plain")))
    result = run(make_config(tmp_path, texts, screen_windows=1))
    plan, scored = result.outcome.plan, result.outcome.scored
    assert plan.masks_scored == 90
    where = screened_windows(result.folder, texts)
    alone = [mask for mask, rows in where.items() if rows == {0}]
    assert all(rows in ({0}, {0, 1, 2, 3}) for rows in where.values())
    assert len(where) == 90
    assert plan.masks_screened == len(alone) > 0
    assert (
        f"{len(alone)} of them on 1 of 4 windows alone"
        in (result.folder / "report.html").read_text()
    )
    # the windows of this game weigh masks alike: the screen misses nothing
    assert [e.removed for e in plan.plans] == [e.removed for e in plain.outcome.plan.plans]
    for entry in plan.plans:
        assert where[keys(without(P, entry.removed)[None])[0]] == {0, 1, 2, 3}
    again = read_record(result.folder)
    assert again.screen == (0,)
    np.testing.assert_array_equal(again.screened_M(), scored.screened_M())
    assert int(scored.screened_M().sum()) == len(alone)


@pytest.mark.thorough
def test_a_screen_asks_for_the_same_whatever_a_store_holds(tmp_path, texts):
    """Scores on more windows than are asked for save time and change nothing."""
    store = str(tmp_path / "shared.sqlite")
    fresh = run(make_config(tmp_path, texts, screen_windows=2, out=str(tmp_path / "fresh")))
    run(make_config(tmp_path, texts, budget=256, store=store, out=str(tmp_path / "all")))
    known = run(make_config(tmp_path, texts, screen_windows=2, store=store))
    np.testing.assert_array_equal(known.outcome.scored.nll_MI, fresh.outcome.scored.nll_MI)
    np.testing.assert_array_equal(known.outcome.scored.masks_MP, fresh.outcome.scored.masks_MP)
    assert known.outcome.plan == fresh.outcome.plan


@pytest.mark.thorough
def test_a_larger_budget_goes_on_from_a_screened_run(tmp_path, texts):
    run(make_config(tmp_path, texts, screen_windows=1, budget=60))
    extended = run(make_config(tmp_path, texts, screen_windows=1, budget=90))
    fresh = run(make_config(tmp_path, texts, screen_windows=1, out=str(tmp_path / "fresh")))
    np.testing.assert_array_equal(extended.outcome.scored.nll_MI, fresh.outcome.scored.nll_MI)
    assert extended.outcome.plan == fresh.outcome.plan


def test_a_screen_of_all_windows_is_refused_before_anything_starts(tmp_path, texts):
    with pytest.raises(InputError, match="screen_windows must be below the number of windows"):
        run(make_config(tmp_path, texts, screen_windows=4))
    assert not (tmp_path / "run").exists()


# -- windows that grow, engines that change ----------------------------------------------------


def test_more_windows_extend_a_run_in_its_folder(tmp_path):
    """The larger number of windows holds the smaller; what is scored already is read."""
    from lpserve.demo import FOLDER

    def config(num_windows: int, out: str, **changes: object) -> RunConfig:
        texts = {"calibration": str(FOLDER / "calibration.txt")}
        return make_config(
            tmp_path,
            texts | {"heldout": str(FOLDER / "heldout.txt")},
            **changes,
            model=str(FOLDER / "model"),
            num_windows=num_windows,
            heldout_windows=num_windows,
            length=16,
            budget=40,
            max_removed=2,
            out=str(tmp_path / out),
        )

    small = run(config(2, "run"))
    grown = run(config(3, "run"))
    fresh = run(config(3, "fresh"))
    assert grown.outcome.plan.to_json() == fresh.outcome.plan.to_json()
    assert grown.scores_new < fresh.scores_new
    assert small.scores_new > 0
    windows = (tmp_path / "run" / "windows.npz").read_bytes()
    fewer = (tmp_path / "fresh" / "windows.npz").read_bytes()[:-9]  # as a kill may leave it
    (tmp_path / "run" / "windows.npz").write_bytes(fewer)
    run(config(3, "run"))
    assert (tmp_path / "run" / "windows.npz").read_bytes()[:2] == windows[:2]
    assert TokenWindows.from_npz(tmp_path / "run" / "windows.npz").num_windows == 3
    with pytest.raises(InputError, match="windows = 3, which can only grow: got 2"):
        run(config(2, "run"))
    with pytest.raises(InputError, match="length was 16, is 17"):
        run(replace(config(3, "run"), length=17))
    other = tmp_path / "other.txt"
    other.write_text((FOLDER / "heldout.txt").read_text(encoding="utf-8")[1000:], encoding="utf-8")
    moved = config(4, "moved", heldout=str(other))
    run(replace(moved, num_windows=2, heldout_windows=2))
    other.write_text("A text of other words. " * 200)
    with pytest.raises(InputError, match="the heldout text has changed since"):
        run(moved)


def test_an_engine_that_scores_the_whole_model_otherwise_is_refused(tmp_path, texts):
    """Scores of another engine are in the store; this one gives others."""
    config = make_config(tmp_path, texts)
    run(config)
    shared = replace(config, store=str(tmp_path / "run" / "scores.sqlite"), out=str(tmp_path / "b"))
    run(shared)  # the same game scores the same
    with sqlite3.connect(tmp_path / "run" / "scores.sqlite") as db:
        rows = db.execute("SELECT game, block, metric, mask, value FROM scores").fetchall()
        for game, block, metric, mask, value in rows:
            other = (np.frombuffer(value, np.float32) * np.float32(1.0002)).tobytes()
            crc = checksum(game, block, metric, mask, other)
            db.execute(
                "UPDATE scores SET value = ?, crc = ? WHERE game = ? AND block = ? AND metric = ?"
                " AND mask = ?",
                (other, crc, game, block, metric, mask),
            )
    with pytest.raises(InputError, match=r"they do not mix; use the engine that made them"):
        run(replace(shared, out=str(tmp_path / "c")))
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    kept["engine"]["path"] = "another"
    (tmp_path / "run" / "config.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"they do not mix"):
        run(config)
