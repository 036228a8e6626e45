"""Runs by cost on tiny models: refused before a model loads, planned, planned again, exported."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import lpserve
from lpserve.analysis.analyse import analyse
from lpserve.analysis.build_plan import make_plan
from lpserve.analysis.record import read_record
from lpserve.cli.entry import main
from lpserve.config import config_from
from lpserve.errors import InputError
from lpserve.plan.plan import Settlement, load_plan
from lpserve.plan.set_files import read_sets
from lpserve.report.tracking import plan_metrics
from lpserve.runner.setup import check_model

LAYERS = 6


@pytest.fixture
def config_of(model_dir, tmp_path, rng):
    """A run of a tiny Llama on random tokens."""
    np.savez(tmp_path / "c.npz", tokens=rng.integers(0, 96, (6, 24)))
    np.savez(tmp_path / "h.npz", tokens=rng.integers(0, 96, (4, 24)))

    def make(**changes):
        values = {
            "model": str(model_dir("llama")),
            "calibration": str(tmp_path / "c.npz"),
            "heldout": str(tmp_path / "h.npz"),
            "budget": 120,
            "target": "params=0.8,0.6",
            "out": str(tmp_path / "run"),
            "progress_s": 100.0,
        }
        return config_from(values | changes, "test")

    return make


def test_the_best_sets_for_shares_of_a_cost_are_planned_and_exported(
    config_of, tmp_path, capsys, rng
):
    """The plan's sets are the best of those scored that keep so little, whatever their number."""
    config = config_of(players="half")
    result = lpserve.run(config)
    plan = load_plan(result.folder / "plan.json")
    assert plan.target_cost == "params"
    assert [entry.target for entry in plan.plans] == [0.8, 0.6]
    record = read_record(result.folder)
    analysis = analyse(record)
    assert plan.share_left("params", range(0, 2 * LAYERS, 2)) == pytest.approx(
        1 - sum(plan.costs["params"][::2]) / sum(plan.costs["params"])
    )
    for cost, target in (("params", None), ("params", "params=0.7"), ("kv", "kv=0.7,0.5")):
        found = make_plan(record, analysis, target=target)
        cost_P = np.array(found.costs[cost])
        left_M = record.masks_MP @ cost_P / cost_P.sum()
        nll_M = record.nll_MI.astype(np.float64).sum(axis=1)
        if target is None:  # the rest is of fits, whose last digits depend on threads
            assert [e.candidates[0].removed for e in found.plans] == [e.removed for e in plan.plans]
        for entry in found.plans:
            assert entry.target is not None
            best = np.where(left_M <= entry.target + 1e-12, nll_M, np.inf).argmin()
            assert entry.removed == np.flatnonzero(~record.masks_MP[best]).tolist()
            assert entry.num_removed == len(entry.removed)
    assert sum(source == "expansion" for source in record.sources) >= 16
    assert [metric.step for metric in plan_metrics(plan) if metric.name == "heldout_ppl"] == [
        0,
        20,
        40,
    ]
    assert [one.name for one in read_sets(result.folder, LAYERS)] == [
        "plan params=0.8",
        "plan params=0.6",
    ]
    page = (result.folder / "report.html").read_text()
    assert "keeps at most so much of the parameters of all layers" in page
    assert "% of params removed" in page
    assert lpserve.run(config).scores_new == 0

    # another cost, from the same scores
    capsys.readouterr()
    assert main(["plan", str(result.folder), "--target", "kv=0.5"]) == 0
    assert "50%" in capsys.readouterr().out
    # a race for a share of params says nothing of the same share of another cost
    raced = Settlement(
        removed=plan.plans[0].removed,
        outcome="wins",
        ties=[],
        contenders=2,
        windows=9,
        confidence=0.9,
        behind=0.0,
        half_width=None,
        target=0.8,
    )
    settled = replace(record, settlements=(raced,))
    assert make_plan(settled, analysis).plans[0].settlement == raced
    assert make_plan(settled, analysis, target="params=0.8").plans[0].settlement == raced
    assert make_plan(settled, analysis, target="flops=0.8").plans[0].settlement is None
    with pytest.raises(InputError, match="the run searched for shares of params: give target"):
        make_plan(record, analysis, max_removed=2)
    with pytest.raises(InputError, match=r"no scored set keeps at most 0\.08 of params"):
        make_plan(record, analysis, target="params=0.08")

    out = tmp_path / "pruned"
    wanted = ["export", str(result.folder), "--out", str(out)]
    assert main([*wanted, "--target", "params=0.60"]) == 0
    report = json.loads((out / "lpserve_export.json").read_text())
    assert report["verified"]
    for flags, words in (
        (("--remove", "3"), "the plan has sets for params=0.8, params=0.6: got 3"),
        (("--target", "params=0.7"), "the plan has sets for params=0.8, params=0.6: got params=0."),
        (("--target", "kv=0.6"), "the plan has sets for params=0.8, params=0.6: got kv=0.6"),
        (("--target", "0.6"), "a target is one of params, flops, kv, = and shares"),
    ):
        capsys.readouterr()
        assert main([*wanted, *flags]) == 2
        assert words in capsys.readouterr().err


def test_layers_of_one_size_are_planned_by_cost_as_by_number(config_of, tmp_path):
    """All 42 sets of up to three layers are scored; in an untrained model more removed may be
    better, and then serves the larger share too."""
    by_cost = lpserve.run(config_of(target="flops=0.9,0.7,0.5", goal="plan", budget=62))
    by_number = lpserve.run(
        config_of(target=None, max_removed=3, goal="plan", budget=62, out=str(tmp_path / "n"))
    )
    cost, number = by_cost.outcome.plan, by_number.outcome.plan
    best = {e.calibration_ppl: e.removed for e in number.plans}
    for place, entry in enumerate(cost.plans):
        assert entry.removed == best[min(e.calibration_ppl for e in number.plans[place:])]
    assert not number.costs
    assert not number.target_cost
    with pytest.raises(InputError, match="the run has not recorded what its players cost"):
        make_plan(by_number.outcome.scored, by_number.outcome.analysis, target="params=0.5")
    with pytest.raises(InputError, match="belongs to another run: target was"):
        lpserve.run(config_of(target="flops=0.8", goal="plan", budget=62))


@pytest.mark.thorough
def test_alternatives_and_constraints_hold_for_shares_too(config_of):
    config = config_of(players="half", alternatives=2, protect=["0.mlp"], force=["4.attention"])
    plan = lpserve.run(config).outcome.plan
    for entry in plan.plans:
        assert entry.target is not None
        sets = [entry.removed, *(other.removed for other in entry.alternatives)]
        assert len(sets) == 3
        for removed in sets:
            assert 8 in removed
            assert 1 not in removed
            assert plan.share_left("params", removed) <= entry.target + 1e-9
        assert all(len(set(a) - set(b)) >= 2 for a in sets for b in sets if a != b)
    ppl = [entry.calibration_ppl for entry in plan.plans]
    assert all(one <= other for one, other in pairwise(ppl))


@pytest.mark.process
def test_groups_go_from_a_run_to_an_export(config_of, tmp_path):
    """The plan names groups, its sets and its export name what they hold."""
    file = tmp_path / "groups.toml"
    file.write_text(
        'ends = ["0.attention", "5.attention"]\nmiddle = [2, "3.mlp"]\n'
        'one = [1]\nlast = ["5.mlp"]\n'
    )
    config = config_of(
        players=f"groups:{file}", target=None, max_removed=3, budget=30, force=["ends"], goal="both"
    )
    result = lpserve.run(config)
    plan = load_plan(result.folder / "plan.json")
    assert (plan.unit, plan.constraint) == ("groups", "remove ends")
    labels = [plan.names([index]) for index in range(4)]
    assert labels == ["ends", "one", "middle", "last"]
    sets = {
        "ends": ["0.attention", "5.attention"],
        "one": [1],
        "middle": [2, "3.mlp"],
        "last": ["5.mlp"],
    }
    for entry, found in zip(plan.plans, read_sets(result.folder, LAYERS), strict=True):
        held = [part for index in entry.removed for part in sets[labels[index]]]
        together = {"5.attention", "5.mlp"} <= set(map(str, held))
        wanted = {*map(str, held)} - ({"5.attention", "5.mlp"} if together else set())
        assert set(map(str, found.removed)) == wanted | ({"5"} if together else set())
    assert plan.costs["params"][0] < plan.costs["params"][1]
    by_cost = make_plan(result.outcome.scored, result.outcome.analysis, target="kv=0.9,0.6")
    assert [entry.target for entry in by_cost.plans] == [0.9, 0.6]
    assert lpserve.export_run(result.folder, 1, tmp_path / "out", slim=True).verified
    assert lpserve.run(config).scores_new == 0
    file.write_text(file.read_text().replace("[1]", "[4]"))
    with pytest.raises(InputError, match="its players were others"):
        lpserve.run(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "params=0.05"}, "target params=0.05 cannot be reached: it leaves no player"),
        ({"target": "params=0.5", "protect": [0, 1, 2, 3]}, "what is protected keeps 0.667 of it"),
        ({"budget": 9}, "budget must be at least 10 for 6 players and target params=0.8,0.6"),
        ({"budget": 9, "players": "half"}, "budget must be at least 16 for 12 players and target"),
        ({"engine": "synthetic"}, "is no checkpoint"),
        ({"sizes": (5, 3)}, "sizes must be 0 <= k_min <= k_max <= 5"),
        ({"protect": [1], "force": [1]}, "player 1 cannot be both protected and forced"),
        ({"protect": [9]}, "protect: 9 is none of the 6 layers"),
        ({"protect": ["early"]}, "protect: early is none of the 6 layers"),
        ({"players": "groups:none.toml"}, "none.toml"),
    ],
)
def test_targets_that_no_run_can_meet_are_refused_before_a_model_loads(
    config_of, no_engine, changes, words
):
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        check_model(config_of(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "0.8"}, "target must be one of params, flops, kv, = and shares above 0"),
        ({"target": "params=1.0"}, "target must be one of params, flops, kv"),
        ({"max_removed": 3}, "max_removed counts players, target a cost: give one of the two"),
        ({"goal": "values"}, "target is about the plan, and goal values searches none"),
    ],
)
def test_targets_that_mean_nothing_are_refused(config_of, changes, words):
    with pytest.raises(InputError, match=words):
        config_of(**changes)


def test_parts_that_a_share_cannot_do_without_are_refused_at_start(config_of, tmp_path):
    """What parts cost is known once an engine has found them; the folder stays as it was."""
    with pytest.raises(InputError, match=r"target kv=0\.3 cannot be reached: .* keeps 0\.5 of it"):
        lpserve.run(
            replace(
                config_of(players="half", target="kv=0.3"),
                protect=["0.attention", "1.attention", "2.attention"],
            )
        )
    assert not list((tmp_path / "run").glob("*"))
