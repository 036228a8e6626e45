"""The game object under the real shapiq: exact values, approximators, memory, refusals.

Random tables stand for games where only arithmetic matters, the synthetic engine where scores are
counted or broken; a tiny random Llama is scored for real. Not covered here: vLLM engines, and how
good shapiq's approximators are below their full budget.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapiq

import lpserve
from lpserve.analysis.record import read_record
from lpserve.config import config_from
from lpserve.engine.synthetic import SyntheticEngine
from lpserve.errors import InputError
from lpserve.exhaustive.score import exhaustive
from lpserve.masks import all_masks, drop_one, full_mask, keys
from lpserve.runner.run import run
from lpserve.shapiq_game import LayerGame
from lpserve.surrogate import make_surrogate
from lpserve.testing.runs import NUM_PLAYERS, exhaustive_config, write_texts
from lpserve.types import EngineSpec
from lpserve.values.exact import exact_values

UTILITIES = ("neg_nll", "ppl_ratio")
"""Those that every engine can score; the others have a test of their own."""
ROUNDING = 1e-12
"""float64 sums of at most 2^8 terms, relative to the spread of the utilities."""
KERNEL_SHAP = 1e-6
"""KernelSHAP holds its two end constraints by weights of 1e8 in a least squares fit: relative to
the spread of the utilities it was at most 6e-8 off on 300 such tables, 3e-7 on a 12-layer model."""


@pytest.fixture
def table(rng):
    """Masks and utilities of a whole game of 4 to 8 players, in random order."""
    num_players = int(rng.integers(4, 9))
    masks = rng.permutation(all_masks(num_players))
    return masks, rng.normal(rng.normal(), rng.uniform(0.1, 10), size=len(masks))


@pytest.fixture
def windows(rng):
    return lpserve.TokenWindows.from_tokens(rng.integers(0, 97, (3, 12)))


def synthetic(windows, rng, **options) -> SyntheticEngine:
    options = {"num_players": 6, "game_seed": int(rng.integers(1 << 30))} | options
    return SyntheticEngine(EngineSpec(kind="synthetic", model="", options=options), windows)


def shapley_of(masks, utilities) -> np.ndarray:
    """What lpserve gives when every mask is scored."""
    return exact_values(masks, np.asarray(utilities)[:, None], (0, masks.shape[1] - 1))[:, 0]


def of_shapiq(game) -> np.ndarray:
    return shapiq.ExactComputer(game)("SV", 1).get_n_order_values(1)


def utility_by_hand(name: str, scores, full_nll_N) -> np.ndarray:
    mean_M = scores.nll_MN.sum(axis=1) / scores.num_tokens_N.sum()
    full = full_nll_N.sum() / scores.num_tokens_N.sum()
    return -mean_M if name == "neg_nll" else np.exp(full) / np.exp(mean_M)


# -- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_shapiqs_exact_values_are_lpserves_on_any_table(table, normalize):
    masks, utilities = table
    game = LayerGame.from_table(masks, utilities, normalize=normalize)
    tolerance = ROUNDING * np.ptp(utilities)
    np.testing.assert_allclose(of_shapiq(game), shapley_of(masks, utilities), atol=tolerance)
    assert game.masks_scored == len(masks)
    assert game.masks_predicted == 0


@pytest.mark.parametrize("utility", UTILITIES)
def test_a_real_models_exact_values_agree_whoever_adds_them_up(model_dir, windows, utility):
    with lpserve.open_engine(str(model_dir("llama")), windows) as engine:
        masks = all_masks(engine.info.num_players)
        scores = engine.score(masks)
        game = LayerGame.from_engine(engine, utility)
        values = of_shapiq(game)
    utilities = utility_by_hand(utility, scores, scores.nll_MN[-1])
    assert masks[-1].all()
    # float32 products may round differently in another batch
    np.testing.assert_allclose(values, shapley_of(masks, utilities), atol=1e-5 * np.ptp(utilities))
    assert np.ptp(values) > 1e-3 * np.ptp(utilities)
    assert game.masks_scored == len(masks)


@pytest.mark.parametrize(("name", "tolerance"), [("KernelSHAP", KERNEL_SHAP), ("SVARM", ROUNDING)])
def test_an_approximator_that_asks_for_every_mask_is_exact(table, name, tolerance):
    masks, utilities = table
    game = LayerGame.from_table(masks, utilities)
    approximator = getattr(shapiq, name)(game.n_players, random_state=0)
    values = approximator.approximate(len(masks), game).get_n_order_values(1)
    expected = shapley_of(masks, utilities)
    np.testing.assert_allclose(values, expected, atol=tolerance * np.ptp(utilities))


@pytest.mark.parametrize("name", ["KernelSHAP", "SVARM", "PermutationSamplingSV"])
def test_an_approximator_spends_no_more_scores_than_its_budget(windows, rng, name):
    engine = synthetic(windows, rng, num_players=9)
    game = LayerGame.from_engine(engine)
    budget = int(rng.integers(60, 400))
    approximator = getattr(shapiq, name)(9, random_state=int(rng.integers(1 << 30)))
    values = approximator.approximate(budget, game).get_n_order_values(1)
    assert np.isfinite(values).all()
    assert game.masks_scored == engine.masks_scored <= budget
    masks, utilities = game.scored()
    assert len(np.unique(masks, axis=0)) == len(masks) == game.masks_scored
    scores = engine.score(masks)
    full = engine.score(full_mask(9)[None])
    expected = utility_by_hand("neg_nll", scores, full.nll_MN[0])
    np.testing.assert_allclose(utilities, expected, rtol=ROUNDING)


def test_interactions_do_not_depend_on_normalize_but_for_the_baseline(table):
    masks, utilities = table
    found = [
        shapiq.ExactComputer(LayerGame.from_table(masks, utilities, normalize=flag))("k-SII", 2)
        for flag in (True, False)
    ]
    spread = np.ptp(utilities)
    for order in (1, 2):
        centred, plain = (values.get_n_order_values(order) for values in found)
        np.testing.assert_allclose(centred, plain, atol=ROUNDING * spread)
    empty = utilities[~masks.any(axis=1)][0]
    assert found[0].baseline_value == 0
    assert found[1].baseline_value == empty


# -- coalitions and their memory -------------------------------------------------------------------


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_coalition_is_worth_its_utility_less_that_of_no_layer(windows, rng, utility, normalize):
    engine = synthetic(windows, rng)
    masks = rng.permutation(all_masks(6))[:20]
    full, empty = full_mask(6), ~full_mask(6)
    scores = engine.score(np.concatenate([masks, [full, empty]]))
    by_hand = utility_by_hand(utility, scores, scores.nll_MN[-2])
    game = LayerGame.from_engine(engine, utility, normalize=normalize)
    offset = by_hand[-1] if normalize else 0.0
    np.testing.assert_allclose(game(masks), by_hand[:-2] - offset, rtol=1e-9, atol=ROUNDING)
    assert game.normalization_value == pytest.approx(offset)
    assert game.is_normalized == normalize


def test_coalitions_are_understood_in_every_form_that_shapiq_has(table):
    masks, utilities = table
    game = LayerGame.from_table(masks, utilities, normalize=False)
    kept = [tuple(np.flatnonzero(mask).tolist()) for mask in masks]
    for form in (masks, masks.astype(np.int64), masks.astype(np.float64), kept):
        np.testing.assert_array_equal(game(form), utilities)
    np.testing.assert_array_equal(game(masks[3]), utilities[3:4])
    assert game[kept[5]] == utilities[5]


def test_new_coalitions_are_asked_for_together_and_once(table):
    masks, utilities = table
    row_of = {mask.tobytes(): row for row, mask in enumerate(masks)}
    asked = []

    def utility(masks_MP):
        asked.append(masks_MP)
        return np.array([utilities[row_of[mask.tobytes()]] for mask in masks_MP])

    num_players = masks.shape[1]
    game = LayerGame(num_players, utility, normalize=False)
    np.testing.assert_array_equal(asked[0], [full_mask(num_players), ~full_mask(num_players)])
    inner = masks[masks.any(axis=1) & ~masks.all(axis=1)]
    first, second = inner[:5], np.concatenate([inner[3:7], inner[3:7], asked[0]])
    game(first)
    np.testing.assert_array_equal(game(second)[:4], game(second)[4:8])
    assert len(asked) == 3
    np.testing.assert_array_equal(asked[1], first)
    assert {mask.tobytes() for mask in asked[2]} == {mask.tobytes() for mask in inner[5:7]}
    assert len(asked[2]) == 2
    assert game.masks_scored == game.n_values_stored == 9


def test_a_saved_game_goes_on_where_it_stopped(windows, rng, tmp_path):
    engine = synthetic(windows, rng)
    game = LayerGame.from_engine(engine)
    masks = rng.permutation(all_masks(6))[:30]
    values = game(masks)
    game.save(tmp_path / "game.json")
    again = LayerGame.from_engine(engine)
    again.load_values(tmp_path / "game.json")
    before = engine.masks_scored
    np.testing.assert_array_equal(again(masks), values)
    assert engine.masks_scored == before
    again(all_masks(6))
    assert engine.masks_scored == before + 64 - game.masks_scored


def test_precompute_of_some_coalitions_keeps_to_shapiqs_meaning(windows, rng):
    engine = synthetic(windows, rng)
    game = LayerGame.from_engine(engine)
    masks = rng.permutation(all_masks(6))[:10]
    values = game(masks)
    game.precompute(masks)
    np.testing.assert_array_equal(game(masks), values)
    with pytest.raises(KeyError, match="not stored"):
        game(all_masks(6))


# -- masks without a score -------------------------------------------------------------------------


def test_a_mask_that_was_never_scored_is_refused_with_their_number(table):
    masks, utilities = table
    ends = masks.all(axis=1) | ~masks.any(axis=1)
    kept = ends | (np.arange(len(masks)) % 2 == 0)
    game = LayerGame.from_table(masks[kept], utilities[kept])
    missing = len(masks) - int(kept.sum())
    inner = int((kept & ~ends).sum())
    line = rf"{missing} of {missing + inner} new coalitions were never scored.*surrogate"
    with pytest.raises(InputError, match=line):
        of_shapiq(game)
    assert game.masks_scored == 2


def test_a_surrogate_answers_when_asked_to_and_for_nothing_else(table):
    masks, utilities = table
    kept = masks.all(axis=1) | ~masks.any(axis=1) | (np.arange(len(masks)) % 3 > 0)
    game = LayerGame.from_table(masks[kept], utilities[kept], surrogate="gp", normalize=False)
    found = game(masks)
    np.testing.assert_array_equal(found[kept], utilities[kept])
    surrogate = make_surrogate("gp")
    surrogate.fit(masks[kept], utilities[kept])
    np.testing.assert_allclose(found[~kept], surrogate.mean(masks[~kept]), rtol=1e-9)
    assert (game.masks_scored, game.masks_predicted) == (kept.sum(), (~kept).sum())
    scored_masks, scored_utilities = game.scored()
    np.testing.assert_array_equal(game(scored_masks), scored_utilities)
    assert set(keys(scored_masks)) == set(keys(masks[kept]))
    np.testing.assert_array_equal(game(masks), found)
    game.precompute()  # shapiq's memory then holds predictions too
    np.testing.assert_array_equal(game(masks), found)
    assert set(keys(game.scored()[0])) == set(keys(masks[kept]))


@pytest.mark.parametrize("end", [0, 1])
def test_the_whole_model_and_no_layer_are_never_predicted(table, end):
    masks, utilities = table
    kept = masks.any(axis=1) if end == 0 else ~masks.all(axis=1)
    with pytest.raises(InputError, match=rf"--sizes 0,{masks.shape[1] - 1}"):
        LayerGame.from_table(masks[kept], utilities[kept], surrogate="auto")


def test_a_game_of_a_table_can_be_pickled(table):
    masks, utilities = table
    kept = masks.all(axis=1) | ~masks.any(axis=1) | (np.arange(len(masks)) % 3 > 0)
    game = LayerGame.from_table(masks[kept], utilities[kept], surrogate="ridge")
    game(masks[:7])
    again = pickle.loads(pickle.dumps(game))
    assert (again.masks_scored, again.masks_predicted) == (game.masks_scored, game.masks_predicted)
    np.testing.assert_array_equal(again(masks), game(masks))


def test_a_game_on_an_engine_says_how_to_keep_it_instead_of_pickling(windows, rng):
    game = LayerGame.from_engine(synthetic(windows, rng))
    with pytest.raises(InputError, match=r"cannot be pickled.*game\.save"):
        pickle.dumps(game)


# -- scores that are not finite --------------------------------------------------------------------


def test_neg_nll_without_a_finite_score_is_the_lowest_finite_utility_so_far(windows, rng):
    engine = synthetic(windows, rng, nan=["011111"])
    game = LayerGame.from_engine(engine, normalize=False)
    pair = drop_one(full_mask(6))[:2]  # 011111 and a finite one
    with pytest.warns(RuntimeWarning, match="1 masks have no finite score"):
        found = game(pair)
    assert found[0] == min(found[1], *game(np.array([full_mask(6), ~full_mask(6)])))


def test_a_mask_without_a_finite_score_keeps_the_value_that_it_first_had():
    nll = {0b111: 1.0, 0b000: 5.0, 0b011: np.nan, 0b101: 9.0, 0b110: np.nan}

    class Engine(SyntheticEngine):
        """Scores from the table above: later ones are lower than any before."""

        def mean_nll(self, masks_MP):
            return np.array([nll[code] for code in masks_MP @ (1 << np.arange(3))])

    windows = lpserve.TokenWindows.from_tokens(np.arange(8).reshape(2, 4))
    spec = EngineSpec(kind="synthetic", model="", options={"num_players": 3})
    game = LayerGame.from_engine(Engine(spec, windows))
    with pytest.warns(RuntimeWarning):
        first = game([(0, 1)])
    assert first == 0  # worth no layer, the lowest so far
    lower = game([(0, 2)])
    assert lower < 0
    with pytest.warns(RuntimeWarning):
        assert game([(1, 2)]) == lower
    assert game([(0, 1)]) == first


def test_ppl_ratio_without_a_finite_score_is_zero(windows, rng):
    engine = synthetic(windows, rng, nan=["011111", "000000"])
    game = LayerGame.from_engine(engine, "ppl_ratio")
    found = game(np.array([[0, 1, 1, 1, 1, 1], [0] * 6, [1] * 6], dtype=bool))
    np.testing.assert_array_equal(found, [0.0, 0.0, 1.0])


def test_a_whole_model_without_a_finite_score_is_refused(windows, rng):
    with pytest.raises(InputError, match="full model has no finite score"):
        LayerGame.from_engine(synthetic(windows, rng, nan=["111111"]))


def test_utilities_that_shapiq_cannot_take_are_refused(windows, rng):
    def infinite(masks_MP):
        return np.where(masks_MP.sum(axis=1) == 1, -np.inf, 1.0)

    game = LayerGame(3, infinite)
    with pytest.raises(InputError, match=r"keeps \[1\] is infinite"):
        game(np.array([[1, 1, 0], [0, 1, 0]], dtype=bool))
    with pytest.raises(InputError, match=r"must be float \[2\]: got \[2, 1\]"):
        LayerGame(3, lambda masks_MP: np.ones((len(masks_MP), 1)))
    with pytest.raises(InputError, match=r"utility must be one of .*: got 'ppl'"):
        LayerGame.from_engine(synthetic(windows, rng), "ppl")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m, u: (np.concatenate([m, m[:1]]), np.append(u, u[0])), "masks repeat"),
        (lambda m, u: (m, np.where(np.arange(len(u)) == 4, np.nan, u)), "that of mask 4 is not"),
        (lambda m, u: (m.astype(int), u), "masks must be bool"),
    ],
)
def test_a_table_that_is_no_game_is_refused(table, change, line):
    with pytest.raises(InputError, match=line):
        LayerGame.from_table(*change(*table))


def test_a_surrogate_that_cannot_be_is_refused(table):
    masks, utilities = table
    with pytest.raises(InputError, match="unknown surrogate 'forest': one of auto"):
        LayerGame.from_table(masks, utilities, surrogate="forest")
    ends = masks.all(axis=1) | ~masks.any(axis=1)
    with pytest.raises(InputError, match="2 masks with finite scores are too few"):
        LayerGame.from_table(masks[ends], utilities[ends], surrogate="auto")


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture
def make_run(tmp_path, rng):
    """A finished run on the synthetic engine with 5 players: its folder and outcome."""

    def make(**changes):
        path = str(tmp_path / "calibration.npz")
        np.savez(path, tokens=rng.integers(0, 50_000, (4, 20)))
        np.savez(tmp_path / "heldout.npz", tokens=rng.integers(0, 50_000, (4, 20)))
        values = {
            "model": "synthetic",
            "engine": "synthetic",
            "engine_options": {"num_players": 5, "game_seed": int(rng.integers(1 << 30))},
            "calibration": path,
            "heldout": str(tmp_path / "heldout.npz"),
            "budget": 32,
            "max_removed": 4,
            "sizes": [0, 4],
            "out": str(tmp_path / "run"),
            "progress_s": 100.0,
        }
        return run(config_from(values | changes, "test"))

    return make


@pytest.mark.parametrize("utility", UTILITIES)
def test_a_finished_runs_values_are_found_again_from_its_folder(make_run, utility):
    result = make_run(utility=utility)
    values = result.outcome.analysis.values
    assert values.estimator == "exact"
    game = LayerGame.from_run(result.folder)
    tolerance = ROUNDING * np.ptp(result.outcome.analysis.utilities_M)
    np.testing.assert_allclose(of_shapiq(game), values.values_P, atol=tolerance)
    assert game.masks_scored == 32


def test_a_run_of_truncated_values_is_refused_in_one_line(make_run):
    result = make_run(sizes=None, max_removed=2, budget=16)
    with pytest.raises(InputError, match=r"empty coalition must have been scored.*--sizes 0,4"):
        LayerGame.from_run(result.folder, surrogate="auto")
    with pytest.raises(InputError, match="holds no finished run"):
        LayerGame.from_run(result.folder.parent)


@pytest.mark.parametrize("utility", UTILITIES)
def test_masks_of_a_run_without_a_finite_score_follow_the_utilitys_rule(make_run, utility):
    scored = read_record(make_run(utility=utility).folder)
    inner = np.flatnonzero(scored.masks_MP.any(axis=1) & ~scored.masks_MP.all(axis=1))
    given_up, broken = inner[0], inner[-1]
    nll = scored.nll_MI.copy()
    nll[given_up] = np.nan
    nll[broken, 1] = np.inf
    scored = replace(scored, nll_MI=nll, loss_MI=nll)
    warned = pytest.warns(RuntimeWarning, match="1 masks have no finite score")
    with warned if utility == "neg_nll" else contextlib.nullcontext():
        game = LayerGame.from_run(scored, normalize=False)
    utilities = scored.view.of(scored.loss_MI)
    lowest = np.nanmin(utilities) if utility == "neg_nll" else 0.0
    assert game(scored.masks_MP[broken])[0] == lowest
    with pytest.raises(InputError, match="1 of 1 new coalitions"):
        game(scored.masks_MP[given_up])
    warned = pytest.warns(RuntimeWarning, match="1 masks have no finite score")
    with warned if utility == "neg_nll" else contextlib.nullcontext():
        game = LayerGame.from_run(scored, surrogate=scored.surrogate, normalize=False)
    finite = np.isfinite(utilities)
    surrogate = make_surrogate(scored.surrogate, scored.seed)
    surrogate.fit(scored.masks_MP[finite], utilities[finite])
    expected = surrogate.mean(scored.masks_MP[given_up][None])
    np.testing.assert_allclose(game(scored.masks_MP[given_up]), expected, rtol=1e-9)
    assert (game.masks_scored, game.masks_predicted) == (2, 1)


def test_a_mask_of_a_run_that_was_scored_on_a_screen_alone_has_no_score(make_run):
    scored = read_record(make_run(utility="ppl_ratio").folder)
    screened = np.flatnonzero(scored.masks_MP.any(axis=1) & ~scored.masks_MP.all(axis=1))[2]
    nll = scored.nll_MI.copy()
    nll[screened, 1:] = np.nan
    scored = replace(scored, nll_MI=nll, screen=(0,))
    game = LayerGame.from_run(scored, normalize=False)
    with pytest.raises(InputError, match="1 of 1 new coalitions"):
        game(scored.masks_MP[screened])
    assert game(scored.masks_MP[0])[0] == 1.0


# -- every set of a few removed layers -------------------------------------------------------------


def test_a_game_of_all_sets_is_exact_and_one_of_a_few_refuses_the_rest(tmp_path, rng):
    texts = write_texts(tmp_path, rng)
    everything = exhaustive(exhaustive_config(tmp_path / "all", texts, max_removed=NUM_PLAYERS))
    found = lpserve.read_exhaustive(everything.folder)
    for utility in UTILITIES:
        game = LayerGame.from_exhaustive(found, utility)
        shapley = shapley_of(found.masks_MP, found.utilities_M(utility))
        tolerance = ROUNDING * np.ptp(found.utilities_M(utility))
        np.testing.assert_allclose(of_shapiq(game), shapley, atol=tolerance)
        assert game.masks_predicted == 0
    few = exhaustive(exhaustive_config(tmp_path / "few", texts, max_removed=2)).folder
    game = LayerGame.from_exhaustive(few, normalize=False)
    masks = all_masks(NUM_PLAYERS)
    near = (~masks).sum(axis=1) <= 2
    held = found.utilities_M()[found.rows(masks[near])]
    np.testing.assert_array_equal(game(masks[near]), held)
    with pytest.raises(InputError, match=r"coalitions were never scored"):
        game(masks)
    game = LayerGame.from_exhaustive(few, surrogate="gp", normalize=False)
    np.testing.assert_array_equal(game(masks)[near], held)
    assert game.masks_predicted == len(masks) - near.sum() - 1  # the empty one was scored
    with pytest.raises(InputError, match=r"game\.json"):
        LayerGame.from_exhaustive(tmp_path)


# -- the package and its page ----------------------------------------------------------------------


def test_without_shapiq_the_import_says_what_to_install():
    code = "import sys; sys.modules['shapiq'] = None; import lpserve.shapiq_game"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("lpserve.errors.InputError: lpserve.shapiq_game needs shapiq")
    assert 'pip install "lpserve[shapiq]"' in last


@pytest.mark.filterwarnings("ignore:Not all budget is required")  # 64 masks, a budget of 400
def test_the_documented_cross_check_runs_as_written(model_dir, windows, tmp_path, capsys):
    page = (Path(__file__).parent.parent / "docs" / "method.md").read_text()
    (code,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "lpserve.shapiq_game" in block
    ]
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(model_dir("llama"))
    names = {"lpserve": lpserve, "windows": windows}  # as code before it has left them
    with contextlib.chdir(tmp_path):
        exec(compile(code, "method.md", "exec"), names)
    game, ours, theirs = names["game"], names["ours"], names["theirs"]
    masks, utilities = game.scored()
    assert game.masks_scored == len(masks) == 64  # all there are, fewer than the budget
    expected = shapley_of(masks, utilities)
    tolerance = ROUNDING * np.ptp(utilities)
    np.testing.assert_allclose(ours.values_P, expected, atol=tolerance)
    np.testing.assert_allclose(theirs.get_n_order_values(1), expected, atol=tolerance)
    assert capsys.readouterr().out.startswith("64 ")


def test_utilities_of_other_metrics_are_scored_for_them(model_dir, tmp_path, rng):
    """Divergence from the full model, on an open engine and from a run's folder."""
    windows = lpserve.TokenWindows.from_tokens(rng.integers(2, 97, (3, 12)))
    for name, num in (("calibration", 3), ("heldout", 2)):
        np.savez(tmp_path / f"{name}.npz", tokens=rng.integers(2, 97, (num, 12)))
    folder = str(model_dir("llama"))
    with lpserve.open_engine(folder, windows) as engine:
        masks = all_masks(engine.info.num_players)
        divergence = engine.score(masks, extra_metrics=("kl",)).of("kl").sum(axis=1)
        expected = -divergence / windows.num_tokens_N.sum()
        game = LayerGame.from_engine(engine, "neg_kl", normalize=False)
        assert np.abs(game(masks) - expected).max() < 1e-6
    config = config_from(
        {
            "model": folder,
            "calibration": str(tmp_path / "calibration.npz"),
            "heldout": str(tmp_path / "heldout.npz"),
            "budget": 64,
            "max_removed": 3,
            "sizes": [0, len(masks[0]) - 1],
            "utility": "neg_kl",
            "surrogate": "gp",
            "out": str(tmp_path / "run"),
            "progress_s": 100.0,
        },
        "test",
    )
    scored = run(config).outcome.scored
    game = LayerGame.from_run(tmp_path / "run", normalize=False)
    expected = -scored.loss_MI.astype(np.float64).sum(axis=1) / scored.num_tokens_I.sum()
    np.testing.assert_allclose(game(scored.masks_MP), expected, atol=1e-9)
