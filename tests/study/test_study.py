"""What a study file says: its points, which of them share masks, windows, refusals, costs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lpserve.config import as_json
from lpserve.demo import FOLDER, demo_study
from lpserve.errors import InputError
from lpserve.runner.setup import windows_of
from lpserve.study.cost import study_cost
from lpserve.study.parse import study_of
from lpserve.study.study import Study
from lpserve.study.sweep import all_windows
from lpserve.testing.runs import DEMO_TEXTS, study_values


def test_a_table_is_the_product_of_its_levels_and_tables_add_up(tmp_path):
    sweep = {
        "calibration": {"one": ["sherlock"], "all": ["sherlock", "dracula"]},
        "num-windows": [2, 4],
        "seed": [3, 4],
    }
    study = study_of(study_values(tmp_path, sweep=sweep), "test")
    told = [
        (p.levels["calibration"], p.levels["num_windows"], p.levels["seed"]) for p in study.points
    ]
    assert told == list(itertools.product(("one", "all"), ("2", "4"), ("3", "4")))
    assert study.varied == ("calibration", "num_windows", "seed")
    mixtures = {"one": ["sherlock"], "all": list(DEMO_TEXTS)}
    for point in study.points:
        named = point.levels
        assert list(point.config.calibration) == mixtures[named["calibration"]]
        assert point.config.num_windows == int(named["num_windows"])
        assert point.config.seed == int(named["seed"])
    more = study_of(study_values(tmp_path, sweep=[sweep, {"seed": [3, 9]}, {"seed": [9]}]), "test")
    assert len(more.points) == 8 + 2  # a point that comes twice is one point
    assert {p.id for p in study.points} < {p.id for p in more.points}


def test_a_point_is_known_by_what_it_is_and_not_by_where_it_runs(tmp_path):
    first = study_of(study_values(tmp_path), "test")
    other = study_of(study_values(tmp_path, out=str(tmp_path / "b"), progress_s=3.0), "test")
    assert [p.id for p in first.points] == [p.id for p in other.points]
    changed = study_of(study_values(tmp_path, budget=61), "test")
    assert not {p.id for p in first.points} & {p.id for p in changed.points}


def test_points_that_can_be_read_again_share_masks(tmp_path):
    sweep = {
        "calibration": {"one": ["sherlock"], "two": ["dracula"]},
        "num_windows": [2, 3],
        "utility": ["neg_nll", "ppl_ratio"],
        "surrogate": ["ridge", "gp"],
        "budget": [60, 70],
        "seed": [0, 1],
        "length": [16, 32],
    }
    study = study_of(study_values(tmp_path, sweep=sweep), "test")
    families = study.families()
    assert len(families) == 4  # seeds and lengths have masks of their own
    assert sorted(p.id for f in families for p in f.points) == sorted(p.id for p in study.points)
    for family in families:
        leader = family.leader.config
        assert family.leader not in family.points  # no point has both texts
        assert (list(leader.calibration), leader.num_windows, leader.budget) == (
            list(DEMO_TEXTS),
            3,
            70,
        )
        assert len({(p.config.seed, p.config.length) for p in family.points}) == 1
    own = study_of(study_values(tmp_path, sweep=sweep, masks="own"), "test")
    assert all(f.points == (f.leader,) for f in own.families())
    assert len(own.families()) == len(study.points)


def test_a_point_with_all_windows_chooses_the_masks_of_its_family():
    study = study_of(demo_study(), "demo")
    assert len(study.points) >= 24
    for family in study.families():
        leader = family.leader
        assert leader in family.points
        assert (leader.levels["calibration"], leader.levels["num_windows"]) == ("both", "10")


def windows_by_run(point) -> tuple[str, str]:
    calibration, heldout = windows_of(point.config)
    return calibration.content_hash, heldout.content_hash


def test_with_texts_held_out_a_points_windows_are_those_of_lpserve_run(tmp_path):
    """Held-out windows too, where lengths and seeds of windows do not vary."""
    held = str(tmp_path / "held.txt")
    (tmp_path / "held.txt").write_text((FOLDER / "heldout.txt").read_text()[:40_000])
    texts = {"sherlock": DEMO_TEXTS["sherlock"], "more": str(tmp_path / "more.txt")}
    (tmp_path / "more.txt").write_text((FOLDER / "heldout.txt").read_text()[60_000:120_000])
    sweep = {"calibration": [["sherlock"], ["sherlock", "more"]], "num_windows": [5, 2]}
    values = study_values(tmp_path, calibration=texts, heldout=held, sweep=sweep)
    study = study_of(values, "test")
    windows = all_windows(study)[study.base.model]
    for point in study.points:
        calibration, heldout = windows.of(point.config)
        assert (calibration.content_hash, heldout.content_hash) == windows_by_run(point)


@pytest.mark.thorough
def test_held_out_windows_are_one_yardstick(tmp_path):
    sweep = {"length": [16, 48], "window_seed": [0, 5], "calibration": [["sherlock"], ["dracula"]]}
    study = study_of(study_values(tmp_path, sweep=sweep), "test")
    windows = all_windows(study)[study.base.model]
    held = {windows.of(p.config)[1].content_hash for p in study.points}
    assert len(held) == 1
    assert windows.heldout.windows.length == 48
    assert [name for name, _ in windows.heldout.corpora] == list(DEMO_TEXTS)


def test_windows_come_in_parts_that_points_have_whole_or_not_at_all(tmp_path, rng):
    counts = sorted({int(n) for n in rng.integers(1, 12, 3)})
    sweep = {
        "calibration": [["sherlock"], ["dracula"], ["sherlock", "dracula"]],
        "num_windows": counts,
        "length": [16, 32],
    }
    study = study_of(study_values(tmp_path, sweep=sweep), "test")
    windows = all_windows(study)[study.base.model]
    configs = [p.config for p in study.points]
    atoms = [set(part.window_hashes) for part in windows.atoms(configs)]
    assert sum(map(len, atoms)) == len(set().union(*atoms))
    for config in configs:
        mine = set(windows.of(config)[0].windows.window_hashes)
        assert len(mine) == len(config.calibration) * config.num_windows
        assert set().union(*(a for a in atoms if a <= mine)) == mine
        assert all(a <= mine or not a & mine for a in atoms)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sweep": {"utilty": ["neg_nll"]}}, "unknown dimension 'utilty'.*did you mean 'utility'"),
        ({"sweep": {"utility": "neg_nll"}}, "sweep utility must be a list"),
        ({"sweep": {"utility": []}}, "sweep utility has no levels"),
        ({"sweep": {"seed": [0, 1, 0]}}, "sweep seed repeats a level: 0, 1, 0"),
        ({"sweep": None}, "sweep must be a table"),
        ({"sweep": {"utility": ["perplexity"]}}, "utility must be one of"),
        ({"sweep": {"calibration": {"x": ["holmes"]}}}, "mixture 'x' names 'holmes'; .* sherlock"),
        ({"sweep": {"calibration": {"x": []}}}, "mixture 'x' must be a list of corpora"),
        ({"sweep": {"calibration": {"x": "sherlock"}}}, "mixture 'x' must be a list of corpora"),
        ({"sweep": {"budget": [60, 5]}}, "point budget 5: budget must be at least"),
        ({"sweep": {"surrogate": ["ridge", "paper"]}}, "point surrogate paper: surrogate must be"),
        ({"sweep": {"sizes": [[10, 11], [3, 12]]}}, "point sizes 3-12: sizes must be"),
        ({"sweep": {"model": ["nowhere"]}}, "nowhere"),
        ({"masks": "mine"}, "masks must be one of shared, own"),
        ({"removed": [3]}, "removed asks for 3 layers, points plan 2"),
        ({"sweep": {"utility": [5, None]}}, "utility must be a text: got 5"),
        ({"sweep": {"calibration": {"x": [["sherlock"]]}}}, "mixture 'x' must be a list"),
        ({"removed": [0]}, "removed must be numbers of layers"),
        ({"removed": "2"}, "removed must be numbers of layers"),
        ({"store": "elsewhere.sqlite"}, "store is the study's own"),
        ({"screen_windows": 1}, "screen_windows is not for studies"),
        ({"budgett": 3}, "unknown key 'budgett'; did you mean 'budget'"),
        ({"calibration": {}}, "calibration is missing"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(tmp_path, changes, told):
    with pytest.raises(InputError, match=told) as error:
        study_of(study_values(tmp_path, **changes), "study s.yaml")
    assert str(error.value).startswith(("study s.yaml", "utility"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sweep": {"num_windows": [2, 100_000]}}, "too short"),
        ({"sweep": {"length": [16, 4000]}}, "positions|too short"),
        ({"calibration": {"sherlock": "gone.txt"}}, "gone.txt does not exist"),
        ({"heldout": DEMO_TEXTS["sherlock"], "heldout_windows": 100_000}, "too short"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(tmp_path, changes, told):
    study = study_of(study_values(tmp_path, **changes), "test")
    with pytest.raises(InputError, match=told):
        all_windows(study)


def test_sparsities_of_the_tables_change_nothing_that_is_run(tmp_path):
    plain = study_of(study_values(tmp_path), "test")
    told = study_of(study_values(tmp_path, removed=[2]), "test")
    assert told.removed == (2,)
    assert [p.id for p in told.points] == [p.id for p in plain.points]


def test_where_a_study_is_tracked_is_not_what_its_points_are(tmp_path):
    plain = study_of(study_values(tmp_path), "test")
    tracked = study_of(study_values(tmp_path, mlflow="http://u:secret@host:1", experiment="x"), "t")
    assert [p.id for p in tracked.points] == [p.id for p in plain.points]
    assert tracked.base.mlflow == "http://u:secret@host:1"
    assert as_json(tracked.base)["mlflow"] == "http://***@host:1"
    assert {p.config.mlflow for p in tracked.points} == {None}


def test_a_value_has_one_name_in_all_tables(tmp_path):
    mixtures = {"one": ["sherlock"], "all": ["dracula", "sherlock"]}
    tables = [{"calibration": mixtures, "seed": [0, 1]}, {"num_windows": [3, 2], "seed": [0, 1]}]
    study = study_of(study_values(tmp_path, sweep=tables), "test")
    assert len(study.points) == 6  # 3 windows of all texts come twice
    assert {p.levels["calibration"] for p in study.points} == {"one", "all"}
    matched = {(p.levels["calibration"], p.levels["num_windows"]) for p in study.points}
    assert {("all", "2"), ("all", "3")} <= matched
    tables[1] = {"calibration": {"one": ["dracula"]}}
    with pytest.raises(InputError, match="sweep calibration names two things 'one'"):
        study_of(study_values(tmp_path, sweep=tables), "test")


def test_corpora_are_cut_as_far_as_their_own_points_need(tmp_path):
    (tmp_path / "short.txt").write_text((FOLDER / "heldout.txt").read_text()[:3000])
    texts = {"long": DEMO_TEXTS["sherlock"], "short": str(tmp_path / "short.txt")}
    tables = [
        {"calibration": [["long"]], "num_windows": [200]},
        {"calibration": [["short"]], "num_windows": [4]},
    ]
    values = study_values(tmp_path, calibration=texts, sweep=tables, masks="own")
    study = study_of(values, "test")
    windows = all_windows(study)[study.base.model]
    assert [windows.of(p.config)[0].num_items for p in study.points] == [200, 4]
    with pytest.raises(InputError, match="too short"):  # one family, all texts as long
        all_windows(study_of(values | {"masks": "shared"}, "test"))


def test_windows_that_two_corpora_share_are_one_part(tmp_path, rng):
    tokens = rng.integers(2, 4000, (6, 32))
    for name, rows in (("big", tokens), ("small", tokens[:2])):
        np.savez(tmp_path / f"{name}.npz", tokens=rows)
    texts = {name: str(tmp_path / f"{name}.npz") for name in ("big", "small")}
    sweep = {"calibration": [["big"], ["small"]]}
    values = study_values(tmp_path, calibration=texts, heldout=DEMO_TEXTS["dracula"], sweep=sweep)
    study = study_of(values | {"masks": "own"}, "test")
    windows = all_windows(study)[study.base.model]
    parts = windows.atoms([p.config for p in study.points])
    assert sorted(part.num_windows for part in parts) == [2, 4]


def told_cost(study: Study):
    return study_cost(study, all_windows(study))


def test_the_cost_counts_masks_once_for_a_family(tmp_path):
    study = study_of(study_values(tmp_path), "test")
    shared = told_cost(study)
    assert (shared.points, shared.points_left, shared.families) == (4, 4, 2)
    assert shared.masks == 2 * 60
    own = told_cost(study_of(study_values(tmp_path, masks="own"), "test"))
    assert own.masks == 4 * 60
    assert own.pflop is not None
    assert shared.pflop is not None
    assert shared.pflop < own.pflop
    heldout = shared.scores - 2 * 60 * 6
    assert own.scores == 4 * 60 * 6 + heldout
    assert not shared.ask
    assert "4 points, 4 left to do" in shared.describe()


def test_work_of_unknown_size_is_asked_about(tmp_path):
    values = study_values(
        tmp_path, engine="synthetic", engine_options={"num_players": 8}, length=40
    )
    npz = tmp_path / "w.npz"
    np.savez(npz, tokens=np.random.default_rng(0).integers(0, 9, (8, 40)))
    held = tmp_path / "h.npz"
    np.savez(held, tokens=np.random.default_rng(1).integers(0, 9, (8, 40)))
    values |= {"calibration": str(npz), "heldout": str(held), "model": "synthetic"}
    told = told_cost(study_of(values, "test"))
    assert told.pflop is None
    assert told.ask
    assert "FLOP not known" in told.describe()


def test_configs_of_points_are_runs_of_their_own(tmp_path):
    for point in study_of(study_values(tmp_path), "test").points:
        config = as_json(point.config)
        assert config["out"].endswith(f"study/points/{point.id}")
        assert config["store"].endswith("study/scores.sqlite")
        assert config["sizes"] == [10, 11]
