"""A study at work, on the bundled model: every score once, answers as a run's, kills, failures."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

import lpserve
from lpserve.analysis.record import read_record
from lpserve.cli.entry import main
from lpserve.demo import FOLDER
from lpserve.runner.run import run
from lpserve.store.store import Store
from lpserve.study.parse import study_of
from lpserve.study.sweep import SweepResult, all_windows, sweep
from lpserve.testing.runs import (
    DEMO_TEXTS,
    SMALL_SWEEP,
    small_study_values,
    stored_count,
    stored_scores,
)

pytestmark = pytest.mark.thorough

TOLERANCE = 1e-6
"""Relative; float32 NLLs stored as float32, the same arithmetic whatever the batch (CPU)."""


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory) -> SweepResult:
    return sweep(study_of(small_study_values(tmp_path_factory.mktemp("sweep")), "test"))


def answers_of(out: Path) -> dict[str, str]:
    """point -> plan and values, as files."""
    return {
        folder.name: (folder / "plan.json").read_text() + (folder / "shapley.csv").read_text()
        for folder in (out / "points").iterdir()
        if (folder / "plan.json").exists()
    }


def test_every_score_is_made_once_and_read_again(finished_study):
    result = finished_study
    assert len(result.points) == 16
    assert not result.failed
    stored = stored_scores(result.study.out / "scores.sqlite")
    assert result.scores_held == len(stored)  # distinct (mask, window)
    assert result.scores_new == len(stored)  # what engines gave, over all points
    assert result.scores_twice == 0
    assert result.scores_read > 5 * result.scores_new
    # a point with the windows of another asks for held-out checks at most
    for finished in result.points:
        if finished.masks_of != finished.point.id:
            heldout = 2 * len(DEMO_TEXTS) * (1 + 4 * 2)
            assert finished.scores_new <= heldout


def test_points_tell_what_their_windows_score(finished_study, rng):
    """Scores of a point that read masks again, against an engine of its own."""
    study = finished_study.study
    windows = all_windows(study)[study.base.model]
    point = study.points[int(rng.integers(len(study.points)))]
    scored = read_record(point.config.out)
    calibration, heldout = (sample.windows for sample in windows.of(point.config))
    with lpserve.open_engine(study.base.model, calibration) as engine:
        again = engine.score(scored.masks_MP).nll_MN
        held = engine.score(scored.heldout_masks_MP, engine.register(heldout)).nll_MN
    assert np.abs(scored.nll_MI / again - 1).max() < TOLERANCE
    assert np.abs(scored.heldout_nll_MI / held - 1).max() < TOLERANCE
    assert (scored.utility, scored.seed) == (point.config.utility, point.config.seed)
    assert scored.corpora == calibration.corpora


def test_a_point_that_chose_masks_is_the_run_that_lpserve_run_gives(tmp_path, finished_study):
    """The masks of the widest point, and with `own` those of every point."""
    held = tmp_path / "held.txt"
    held.write_text((FOLDER / "heldout.txt").read_text()[:30_000])
    table = {"num_windows": [1, 2], "utility": SMALL_SWEEP["utility"]}
    texts = {"sherlock": DEMO_TEXTS["sherlock"]}
    values = small_study_values(
        tmp_path, calibration=texts, heldout=str(held), masks="own", sweep=table
    )
    result = sweep(study_of(values, "test"))
    assert result.scores_twice == 0
    assert result.scores_new == result.scores_held
    for finished in result.points:
        config = finished.point.config
        alone = run(
            lpserve.RunConfig(
                **{
                    **config.__dict__,
                    "out": str(tmp_path / f"alone-{finished.point.id}"),
                    "store": None,
                }
            )
        )
        got = read_record(finished.folder)
        assert (got.masks_MP == alone.outcome.scored.masks_MP).all()
        assert np.abs(got.nll_MI / alone.outcome.scored.nll_MI - 1).max() < TOLERANCE
        plan = lpserve.load_plan(finished.folder / "plan.json")
        assert [e.removed for e in plan.plans] == [e.removed for e in alone.outcome.plan.plans]


def test_the_same_study_again_does_nothing(finished_study):
    told: list[str] = []
    before = answers_of(finished_study.study.out)
    again = sweep(finished_study.study, log=told.append)
    assert told == []
    assert again.scores_held == finished_study.scores_held
    assert [r.point.id for r in again.points] == [r.point.id for r in finished_study.points]
    assert answers_of(finished_study.study.out) == before


@pytest.mark.slow
def test_a_study_may_grow(tmp_path):
    few = SMALL_SWEEP | {"seed": [0], "num_windows": [1]}
    first = sweep(study_of(small_study_values(tmp_path, sweep=few), "test"))
    told: list[str] = []
    more = SMALL_SWEEP | {"seed": [0, 2], "num_windows": [1]}
    second = sweep(study_of(small_study_values(tmp_path, sweep=more), "test"), log=told.append)
    assert {r.point.id for r in first.points} < {r.point.id for r in second.points}
    assert len(told) == 4  # the other seed's points
    assert second.scores_twice == 0
    # another metric: the masks are scored for it, and held-out windows stay
    metrics = more | {"utility": [*SMALL_SWEEP["utility"], "accuracy"]}
    scored = sweep(study_of(small_study_values(tmp_path, sweep=metrics), "test"))
    assert not scored.failed
    assert scored.scores_held >= second.scores_held
    # wider windows choose other masks: every point reads those
    wide = SMALL_SWEEP | {"seed": [0], "num_windows": [1, 2]}
    third = sweep(study_of(small_study_values(tmp_path, sweep=wide), "test"))
    assert {r.masks_of for r in third.points} != {r.masks_of for r in first.points}
    fresh = sweep(study_of(small_study_values(tmp_path / "fresh", sweep=wide), "test"))
    assert answers_of(fresh.study.out).items() <= answers_of(third.study.out).items()


def test_points_of_a_study_that_grew_are_held_against_the_same_windows(tmp_path):
    """Longer windows lengthen the yardstick: what was finished is checked again."""
    table = {"utility": ["neg_nll"], "length": [24]}
    sweep(study_of(small_study_values(tmp_path, sweep=table), "test"))
    result = sweep(
        study_of(small_study_values(tmp_path, sweep=table | {"length": [24, 40]}), "test")
    )
    assert not result.failed
    held = [read_record(r.folder).heldout_num_tokens_I.tolist() for r in result.points]
    assert held[0] == held[1]
    assert set(held[0]) == {39}
    for finished in result.points:
        with np.load(finished.folder / "windows.npz") as stored:
            assert stored["heldout_tokens"].shape[1] == 40


def test_a_study_goes_on_under_another_name_of_its_folder(tmp_path, monkeypatch):
    """As after a kill: a point has its config, and no result yet."""
    table = {"utility": SMALL_SWEEP["utility"]}
    first = sweep(study_of(small_study_values(tmp_path, sweep=table), "test"))
    for finished in first.points:
        (finished.folder / "point.json").unlink()
    monkeypatch.chdir(tmp_path)
    again = sweep(
        study_of(small_study_values(tmp_path, sweep=table, out="study", device="cpu"), "test")
    )
    assert not again.failed
    assert again.scores_held == first.scores_held


def test_a_text_that_changed_is_told(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((FOLDER / "calibration.txt").read_text()[:60_000])
    table = {"utility": ["neg_nll"], "seed": [0]}
    values = small_study_values(
        tmp_path, sweep=table, calibration={"x": str(text)}, heldout=DEMO_TEXTS["dracula"]
    )
    sweep(study_of(values, "test"))
    text.write_text((FOLDER / "calibration.txt").read_text()[60_000:120_000])
    result = sweep(study_of(values, "test"))
    assert "the calibration text has changed since" in result.points[0].failed


def test_a_point_that_fails_is_told_and_the_others_finish(tmp_path):
    study = study_of(small_study_values(tmp_path), "test")
    follower = next(p for f in study.families() for p in f.points if p is not f.leader)
    leader = study.families()[1].leader
    (study.out / "points").mkdir(parents=True)
    for point in (follower, leader):
        Path(point.config.out).write_text("in the way")
    told: list[str] = []
    result = sweep(study, log=told.append)
    lost = {r.point.id: r.failed for r in result.failed}
    assert set(lost) == {follower.id, *(p.id for p in study.families()[1].points)}
    assert "cannot be made" in lost[follower.id]
    assert "cannot be made" in lost[leader.id]
    others = {reason for name, reason in lost.items() if name not in (follower.id, leader.id)}
    assert others == {f"its masks are those of point {leader.id}, which failed"}
    assert sum("failed:" in line for line in told) == 2
    for point in (follower, leader):
        Path(point.config.out).unlink()
    again = sweep(study)
    assert not again.failed
    assert again.scores_twice == 0


def study_file(tmp_path, **changes) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(small_study_values(tmp_path, **changes)))
    return path


def test_the_command_leaves_tables_and_a_page(tmp_path, capsys):
    sweep_table = {"utility": SMALL_SWEEP["utility"], "seed": [0, 1]}
    path = study_file(tmp_path, sweep=sweep_table, removed=[2])
    assert main(["sweep", str(path)]) == 0
    said = capsys.readouterr()
    assert "4 points, 4 left to do; times that masks are chosen: 2" in said.err
    assert re.search(r"4 of 4 points done; [\d,]+ scores .*, each made once", said.out)
    out = tmp_path / "study"
    for name, rows in (("sets", 4), ("values", 4 * 12)):
        table = pq.read_table(out / f"{name}.parquet").to_pylist()
        with (out / f"{name}.csv").open(newline="") as file:
            plain = list(csv.DictReader(file))
        assert len(table) == len(plain) == rows
        for one, other in zip(table, plain, strict=True):
            assert {
                k: "" if v is None else str(v)
                for k, v in one.items()
                if k != "seconds" and not isinstance(v, float)
            }.items() <= other.items()
    for row in pq.read_table(out / "sets.parquet").to_pylist():
        plan = lpserve.load_plan(out / "points" / row["point"] / "plan.json")
        entry = plan.plans[1]
        assert row["num_removed"] == 2
        assert [int(layer) for layer in row["removed"].split()] == entry.removed
        assert row["heldout_ppl"] == entry.heldout_ppl
        assert (row["utility"], row["status"]) == (plan.utility, "done")
    page = (out / "sweep.html").read_text()
    for point in (out / "points").iterdir():
        assert f'href="points/{point.name}/report.html"' in page
    assert "Kendall" in page
    assert "<script" not in page
    record = json.loads((out / "sweep.json").read_text())
    assert record["scores_new"] == record["scores_held"]
    assert main(["sweep", str(path), "--dry-run"]) == 0
    assert "0 left to do" in capsys.readouterr().err


def test_a_failed_point_is_in_tables_and_page_and_the_command_says_so(tmp_path, capsys):
    path = study_file(tmp_path, sweep={"utility": SMALL_SWEEP["utility"]})
    study = study_of(yaml.safe_load(path.read_text()), "test")
    follower = next(p for f in study.families() for p in f.points if p is not f.leader)
    Path(follower.config.out).parent.mkdir(parents=True)
    Path(follower.config.out).write_text("in the way")
    assert main(["sweep", str(path)]) == 1
    told = capsys.readouterr()
    assert f"failed: {follower.id}: " in told.out
    assert told.err.splitlines()[-1].startswith("lpserve: 1 of 2 points failed")
    rows = pq.read_table(study.out / "sets.parquet").to_pylist()
    failed = [row for row in rows if row["status"] == "failed"]
    assert [row["point"] for row in failed] == [follower.id]
    assert "cannot be made" in failed[0]["reason"]
    assert f"Failed: {follower.id}" in (study.out / "sweep.html").read_text()


def test_bad_studies_are_refused_in_one_line_before_a_folder_is_made(tmp_path, capsys):
    broken = study_file(tmp_path, sweep={"utlity": ["neg_nll"]})
    synthetic = {
        "engine": "synthetic",
        "engine_options": {"num_players": 8},
        "length": 24,
        "calibration": str(tmp_path / "a.npz"),
        "heldout": str(tmp_path / "b.npz"),
        "sweep": {"seed": [0, 1]},
    }
    for name in "ab":
        tokens = np.random.default_rng(ord(name)).integers(0, 99, (3, 24))
        np.savez(tmp_path / f"{name}.npz", tokens=tokens)
    for arguments, told in (
        (["sweep"], "name a study file, or --demo"),
        (["sweep", "x.yaml", "--demo"], "name a study file, or --demo"),
        (["sweep", str(tmp_path / "gone.yaml")], "does not exist"),
        (["sweep", str(broken)], "did you mean 'utility'"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.strip().count("\n") == 0
    large = tmp_path / "large.yaml"
    large.write_text(
        yaml.safe_dump(small_study_values(tmp_path) | synthetic | {"model": "synthetic"})
    )
    assert main(["sweep", str(large)]) == 2
    assert "say --yes to begin" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.process
@pytest.mark.slow  # four processes
def test_a_killed_sweep_goes_on_without_scoring_again(tmp_path, rng, capsys):
    """SIGKILL and SIGINT at random moments; then the same answers as undisturbed."""
    table = SMALL_SWEEP | {"calibration": [["sherlock"]]}
    path = study_file(tmp_path, sweep=table)
    command = [sys.executable, "-m", "lpserve", "sweep", str(path)]
    store = tmp_path / "study" / "scores.sqlite"
    counts = [0]
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if stored_count(store) > counts[-1]:
                    break
                time.sleep(0.01)
            time.sleep(float(rng.uniform(0, 0.5)))
            process.send_signal(number)
            _, error = process.communicate(timeout=120)
            if process.returncode == 0:  # it was done before the signal came
                break
            assert process.returncode == code, error
        counts.append(stored_count(store))
    assert counts == sorted(counts)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "each made once" in done.stdout
    undisturbed = sweep(study_of(small_study_values(tmp_path / "undisturbed", sweep=table), "test"))
    got, expected = stored_scores(store), stored_scores(undisturbed.study.out / "scores.sqlite")
    assert got.keys() == expected.keys()
    assert max(abs(got[k] / expected[k] - 1) for k in expected) < TOLERANCE
    assert answers_of(tmp_path / "study") == answers_of(undisturbed.study.out)


def test_two_models_are_one_study(tmp_path):
    """Each with engines, windows and tables of its own; they are never compared."""
    other = tmp_path / "copy-of-demo"
    shutil.copytree(FOLDER / "model", other)
    models = {"bundled": str(FOLDER / "model"), "copy": str(other)}
    table = {"model": models, "seed": [0, 1]}
    values = small_study_values(
        tmp_path, sweep=table, calibration={"sherlock": DEMO_TEXTS["sherlock"]}
    )
    del values["model"]
    result = sweep(study_of(values, "test"))
    assert not result.failed
    by_model = {m: [r for r in result.points if r.point.levels["model"] == m] for m in models}
    for mine, copies in zip(*by_model.values(), strict=True):
        # the same content is the same game: the copy's points find every score in the store
        assert mine.scores_new > 0
        assert copies.scores_new == 0
    with Store(result.study.out / "scores.sqlite") as store:
        assert len(store.games()) == 1


@pytest.mark.ray
@pytest.mark.slow  # a Ray cluster of its own
def test_ray_engines_give_the_same_study(tmp_path, finished_study):
    values = small_study_values(tmp_path, pool="ray", engines=2)
    result = sweep(study_of(values, "test"))
    assert not result.failed
    assert result.scores_held == finished_study.scores_held
    got = stored_scores(result.study.out / "scores.sqlite")
    expected = stored_scores(finished_study.study.out / "scores.sqlite")
    assert got.keys() == expected.keys()
    assert max(abs(got[k] / expected[k] - 1) for k in expected) < 1e-5
