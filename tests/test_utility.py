"""Utilities made of other metrics than the NLL: what a run says of them, against every mask scored.

A small model of 6 layers, so that all 64 masks are known and nothing is estimated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lpserve
from lpserve.analysis.record import read_record
from lpserve.cli.entry import main
from lpserve.config import config_from
from lpserve.errors import InputError
from lpserve.masks import all_masks, key_text, keys
from lpserve.runner.run import run
from lpserve.study.parse import study_of
from lpserve.study.sweep import sweep
from lpserve.testing.games import shapley_by_hand
from lpserve.testing.parity import NUM_LAYERS, some_windows
from lpserve.testing.runs import make_config, stored_scores
from lpserve.utility import METRICS, utility_named

pytestmark = pytest.mark.thorough

METRIC_OF = {"neg_kl": "kl", "neg_kl_top8": "kl_top8", "accuracy": "misses"}
TOLERANCE = 1e-5
"""Of means over some hundred tokens, in nats or misses a token: float32 sums, stored as float32."""


@pytest.fixture
def game(tmp_path, model_dir, rng):
    """A model, its windows as files, and a config's values."""
    folder = model_dir("llama")
    calibration = some_windows(rng, num=4)
    heldout = some_windows(rng, num=3)
    paths = {}
    for name, windows in (("calibration", calibration), ("heldout", heldout)):
        paths[name] = str(tmp_path / f"{name}.npz")
        np.savez(paths[name], tokens=windows.tokens_NT, scored=windows.scored_NT)
    values = {
        "model": str(folder),
        **paths,
        "budget": 64,
        "max_removed": 3,
        "sizes": [0, NUM_LAYERS - 1],
        "out": str(tmp_path / "run"),
        "progress_s": 100.0,
        "surrogate": "gp",
    }
    return values, calibration


def mean_losses(values, windows, metric: str) -> dict[bytes, float]:
    """Mask -> mean loss a token, from an engine of its own."""
    masks_MP = all_masks(NUM_LAYERS)
    with lpserve.open_engine(values["model"], windows) as engine:
        sums_MN = engine.score(masks_MP, extra_metrics=(metric,)).of(metric)
    means_M = sums_MN.sum(axis=1) / windows.num_tokens_N.sum()
    return dict(zip(keys(masks_MP), means_M.tolist(), strict=True))


@pytest.mark.parametrize(
    "utility",
    [pytest.param(u, marks=[pytest.mark.slow] if u != "neg_kl" else []) for u in METRIC_OF],
)
def test_values_and_plan_are_about_the_utility(utility, game, capsys):
    values, windows = game
    loss = mean_losses(values, windows, METRIC_OF[utility])
    result = run(config_from(values | {"utility": utility}, "test"))
    outcome = result.outcome
    assert len(outcome.scored.masks_MP) == 2**NUM_LAYERS
    expected = shapley_by_hand(loss, NUM_LAYERS)
    assert np.abs(outcome.analysis.values.values_P - expected).max() < TOLERANCE
    with lpserve.open_engine(values["model"], windows) as engine:
        for entry in outcome.plan.plans:
            sizes = [k for k in loss if key_text(k, NUM_LAYERS).count("0") == entry.num_removed]
            chosen = np.ones(NUM_LAYERS, dtype=bool)
            chosen[entry.removed] = False
            best = min(loss[k] for k in sizes)
            assert loss[keys(chosen[None])[0]] <= best + TOLERANCE
            # perplexities are told beside it, from NLLs
            ppl = engine.score(chosen[None]).perplexity_M()[0]
            assert entry.calibration_ppl == pytest.approx(ppl, rel=TOLERANCE)
            assert entry.heldout_ppl is not None
            assert entry.predicted_ppl is None
    again = read_record(result.folder)
    assert (again.loss_MI == outcome.scored.loss_MI).all()
    assert again.utility == utility
    if utility == "accuracy":
        warnings = " ".join(w for e in outcome.plan.plans for w in e.warnings)
        assert "nats per token behind" not in warnings
    assert run(config_from(values | {"utility": utility}, "test")).scores_new == 0


def test_the_choice_of_utility_changes_the_answer(game):
    """Or the tests above would hold for a run that ignores it."""
    values, windows = game
    kl, nll = (mean_losses(values, windows, m) for m in ("kl", "misses"))
    assert (
        np.abs(shapley_by_hand(kl, NUM_LAYERS) - shapley_by_hand(nll, NUM_LAYERS)).max()
        > 100 * TOLERANCE
    )


def test_one_store_serves_all_utilities(game, tmp_path):
    values, _ = game
    values = values | {"store": str(tmp_path / "scores.sqlite")}
    first = run(config_from(values | {"out": str(tmp_path / "a")}, "test"))
    other = values | {"utility": "neg_kl", "out": str(tmp_path / "b")}
    second = run(config_from(other, "test"))
    assert second.scores_new > 0  # divergences were not scored
    for name in ("a", "b"):
        third = run(
            config_from((values if name == "a" else other) | {"out": str(tmp_path / name)}, "test")
        )
        assert third.scores_new == 0
    scored = first.outcome.scored
    rows = dict(zip(keys(scored.masks_MP), scored.nll_MI, strict=True))
    for key, nll_N in zip(
        keys(second.outcome.scored.masks_MP), second.outcome.scored.nll_MI, strict=True
    ):
        assert (rows[key] == nll_N).all()  # the older score counts


def test_a_study_scores_all_metrics_of_its_utilities_at_once(game, tmp_path):
    values, windows = game
    names = ["neg_nll", "neg_kl", "accuracy"]
    table = {"utility": names, "seed": [0]}
    study = study_of(values | {"sweep": table, "out": str(tmp_path / "study")}, "test")
    assert study.metrics == ("nll", "kl", "misses")
    result = sweep(study)
    assert not result.failed
    assert result.scores_twice == 0
    nll = stored_scores(tmp_path / "study" / "scores.sqlite")
    assert len(nll) <= result.scores_new
    # held-out checks alone: 3 windows, at most the full model and 4 candidates a size
    assert all(r.scores_new <= 3 * 13 for r in result.points[1:])
    for finished in result.points:
        utility = finished.point.config.utility
        if utility == "neg_nll":
            continue
        loss = mean_losses(values, windows, METRIC_OF[utility])
        scored = read_record(finished.folder)
        means_M = scored.loss_MI.astype(np.float64).sum(axis=1) / windows.num_tokens_N.sum()
        for key, mean in zip(keys(scored.masks_MP), means_M.tolist(), strict=True):
            assert mean == pytest.approx(loss[key], abs=TOLERANCE)


def test_utilities_by_definition(rng):
    loss_MN = rng.random((5, 4)) * 9
    tokens_N = rng.integers(1, 20, 4)
    mean_M = loss_MN.sum(axis=1) / tokens_N.sum()
    for name in ("neg_nll", "neg_kl", "neg_kl_top3"):
        np.testing.assert_allclose(utility_named(name).of(loss_MN, tokens_N, loss_MN[0]), -mean_M)
    np.testing.assert_allclose(
        utility_named("accuracy").of(loss_MN, tokens_N, loss_MN[0]), 1 - mean_M
    )
    ratio_M = np.exp(mean_M[0] - mean_M)
    np.testing.assert_allclose(
        utility_named("ppl_ratio").of(loss_MN, tokens_N, loss_MN[0]), ratio_M
    )
    assert [utility_named(u).metric for u in ("neg_nll", "ppl_ratio", "neg_kl", "accuracy")] == [
        "nll",
        "nll",
        "kl",
        "misses",
    ]
    assert set(METRICS) == {"nll", "misses", "kl"}


@pytest.mark.parametrize("name", ["kl", "neg_", "neg_kl_top", "neg_kl_top0", "neg_misses", "ppl"])
def test_unknown_utilities_are_refused(name, tmp_path, capsys):
    with pytest.raises(InputError, match="utility must be one of neg_nll, ppl_ratio, neg_kl"):
        utility_named(name)
    assert main(["run", "--demo", "--utility", name, "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_an_engine_without_the_metric_refuses_the_run(tmp_path, texts):
    config = make_config(tmp_path, texts, utility="neg_kl")
    with pytest.raises(InputError, match="metric 'kl' cannot be had from engine synthetic"):
        run(config)
    assert not (Path(tmp_path) / "run").exists()
