"""Rivals in one table: what looks inside the model against transformers, what is found against real
scores, ours against a run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import lpserve
from lpserve.cli.entry import main
from lpserve.demo import FOLDER
from lpserve.errors import InputError
from lpserve.masks import removed_players
from lpserve.plan.layer_sets import LayerSet
from lpserve.rivals.accounting import Spent
from lpserve.rivals.compare import CompareConfig, compare
from lpserve.rivals.criteria import contiguous_layers, last_layers, taylor
from lpserve.rivals.ours import ours
from lpserve.rivals.proposer import Ask, drive
from lpserve.rivals.registry import RIVALS
from lpserve.rounds.settings import RoundSettings
from lpserve.runner.setup import windows_of
from lpserve.testing.games import best_by_size
from lpserve.testing.parity import NUM_LAYERS, some_windows
from lpserve.testing.reference import decoder_list, reference_model
from lpserve.testing.runs import known_game, make_config

MODEL = str(FOLDER / "model")
TOLERANCE = 1e-5
"""float32 means over some hundred tokens; a layer too many is worth 1e-2."""


@torch.inference_mode()
def states_by_hand(folder, windows) -> list[list[np.ndarray]]:
    """For every window the states entering each layer and the one after the last, [T, d]."""
    model = reference_model(folder)
    owner, name = decoder_list(model)
    found = []
    for tokens, length in zip(windows.tokens_NT, windows.lengths_N, strict=True):
        seen: list[np.ndarray] = []

        def note(module, args, kwargs, output, seen=seen):
            hidden = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if not seen:
                seen.append(hidden[0].double().numpy().copy())
            seen.append(after[0].double().numpy().copy())

        handles = [
            layer.register_forward_hook(note, with_kwargs=True) for layer in getattr(owner, name)
        ]
        model(input_ids=torch.from_numpy(tokens[None, :length].astype(np.int64)), use_cache=False)
        for handle in handles:
            handle.remove()
        found.append(seen)
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hidden_states_turn_as_in_transformers(family, model_dir, rng):
    folder, windows = model_dir(family), some_windows(rng, num=4)
    with lpserve.open_engine(folder, windows) as engine:
        got = cast("Any", engine).hidden_states()
    states = states_by_hand(folder, windows)
    influence = [
        1 - np.concatenate([cosine(s[i], s[i + 1]) for s in states]).mean()
        for i in range(NUM_LAYERS)
    ]
    assert np.abs(got.influence_P - influence).max() < TOLERANCE
    angle = np.array(
        [
            [
                np.mean(
                    [np.arccos(np.clip(cosine(s[i][-1], s[j][-1]), -1, 1)) / np.pi for s in states]
                )
                for j in range(NUM_LAYERS + 1)
            ]
            for i in range(NUM_LAYERS + 1)
        ]
    )
    off = ~np.eye(NUM_LAYERS + 1, dtype=bool)  # the arc cosine of one is steep
    assert np.abs(got.distance - angle)[off].max() < TOLERANCE
    assert (np.diag(got.distance) == 0).all()
    assert np.ptp(influence) > 100 * TOLERANCE


def test_taylor_importance_is_that_of_transformers_own_loss(model_dir, rng):
    folder = model_dir("llama")
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 97, (3, 40)))
    with lpserve.open_engine(folder, windows) as engine:
        before = engine.score(np.ones((1, NUM_LAYERS), dtype=bool)).nll_MN
        got = cast("Any", engine).taylor_importance()
        assert (engine.score(np.ones((1, NUM_LAYERS), dtype=bool)).nll_MN == before).all()
    model = reference_model(folder)
    ids = torch.from_numpy(windows.tokens_NT).long()
    model(input_ids=ids, labels=ids).loss.backward()
    wanted = [
        sum(float((p * p.grad).detach().abs().sum()) for p in layer.parameters() if p.ndim == 2)
        for layer in model.model.layers
    ]
    assert got == pytest.approx(wanted, rel=1e-4)  # gradients sum over tokens in another order


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_halves_are_measured_between_the_layers_own_states(family, model_dir, rng):
    """The states between layers are the same; a layer's gradients are those of its parts."""
    windows = some_windows(rng, num=4, ragged=False)
    found = []
    for players in ("layer", "half"):
        with lpserve.open_engine(model_dir(family), windows, players=players) as engine:
            measured = cast("Any", engine)
            found.append((measured.hidden_states(), measured.taylor_importance()))
    (layers, of_layers), (halves, of_halves) = found
    assert np.abs(halves.distance[::2, ::2] - layers.distance).max() < TOLERANCE
    assert halves.influence_P.shape == (2 * NUM_LAYERS,)
    assert (halves.influence_P > 0).all()
    assert of_halves.reshape(-1, 2).sum(1) == pytest.approx(of_layers, rel=1e-6)


def sets_of(proposer) -> list[tuple[int, ...]]:
    record = drive(proposer, lambda ask: np.zeros(len(ask.masks_MP)), 100)
    return [removed_players(mask) for scored in record for mask in scored.ask.masks_MP]


def test_rankings_and_blocks():
    assert sets_of(last_layers(5, 3)) == [(4,), (3, 4), (2, 3, 4)]
    distance = np.zeros((6, 6))
    for i in range(6):
        for j in range(i + 1, 6):
            distance[i, j] = abs(i - 1) + 0.1 * j
    assert sets_of(contiguous_layers(distance, 2)) == [(1,), (1, 2)]
    values = np.array([0.0, 5, 1, 2, 3, 9, 8, 7, 0, 0.5])
    assert sets_of(taylor(values, 5)) == [
        (4,),
        (4, 7),
        (4, 6, 7),
        (4, 5, 6, 7),
        (0, 4, 5, 6, 7),
    ]


def test_a_mask_on_few_windows_counts_for_its_share(rng):
    masks = np.unique(rng.random((40, 8)) < 0.5, axis=0)

    def proposer():
        yield Ask(masks[:10], range(1))
        yield Ask(masks[:10], range(1, 3))
        yield Ask(masks[:10])
        yield Ask(masks[10:20])

    record = drive(proposer(), lambda ask: np.zeros(len(ask.masks_MP)), 12, num_windows=4)
    # 10 masks on all 4 windows, however they came, and 2 more
    assert [len(s.ask.masks_MP) for s in record] == [10, 10, 10, 2]
    spent = Spent(4)
    for scored in record:
        spent.add(scored.ask)
    assert spent.masks == 12
    assert spent.tokens(np.array([5, 6, 7, 8])) == 12 * 26


@pytest.mark.thorough
def test_ours_asks_for_what_a_run_scores(texts, tmp_path):
    """The same masks until a surrogate chooses, as good sets after it: means are rounded in another
    order than a run's sums, and a fit may turn on a last bit."""
    config = make_config(tmp_path, texts, budget=60, goal="plan")
    lpserve.run(config)
    with np.load(tmp_path / "run" / "scores.npz") as data:
        masks, nll, tokens = data["masks"], data["nll"], data["num_tokens"]
    players = masks.shape[1]
    config = config.resolved(players)
    assert config.max_removed
    assert config.sizes
    assert config.round_size
    engine = known_game(texts)
    settings = RoundSettings(
        num_players=players,
        max_removed=config.max_removed,
        sizes=config.sizes,
        seed=config.seed,
        surrogate=config.surrogate,
        round_size=config.round_size,
        goal="plan",
    )
    record = drive(ours(settings), lambda ask: engine.score(ask.masks_MP).mean_nll_M(), 60)
    asked = np.concatenate([scored.ask.masks_MP for scored in record])
    assert len(asked) == len(masks) == 60
    first = 1 + players  # all kept, and every player alone dropped
    assert (asked[:first] == masks[:first]).all()
    mean_M = nll.sum(axis=1, dtype=float) / tokens.sum()
    for r, (_, found) in best_by_size(record).items():
        of_run = mean_M[(~masks).sum(axis=1) == r].min()
        assert found == pytest.approx(of_run, rel=0.02)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A small comparison of everybody on the bundled model, and its config."""
    out = tmp_path_factory.mktemp("compare") / "out"
    config = CompareConfig(
        model=MODEL,
        calibration={"a": str(FOLDER / "calibration.txt")},
        heldout={"b": str(FOLDER / "heldout.txt")},
        num_windows=2,
        heldout_windows=2,
        length=48,
        max_removed=2,
        budget=60,
        sets=(LayerSet("theirs", (1, 8)),),
        out=str(out),
    )
    return config, compare(config)


@pytest.mark.thorough
def test_every_rival_is_in_the_table_with_its_cost(table):
    config, comparison = table
    assert {c.rival for c in comparison.costs} == set(RIVALS)
    assert {f.rival for f in comparison.found} == {*RIVALS, "theirs"}
    for cost in comparison.costs:
        assert cost.masks > 0
        assert cost.tokens <= config.budget * 2 * 48
        assert cost.layer_forwards > 0
    text = (Path(config.out) / "results.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == len(comparison.found) == 2 * len(RIVALS) + 1
    costs = csv.DictReader((Path(config.out) / "costs.csv").read_text().splitlines())
    told = {row["rival"]: float(row["layer_forwards"]) for row in costs}
    assert told == {c.rival: c.layer_forwards for c in comparison.costs}
    best = {
        r: min(f.calibration_ppl for f in comparison.found if f.num_removed == r) for r in (1, 2)
    }
    for f in comparison.found:
        if f.rival in ("greedy", "lpserve", "oneshot"):
            assert f.num_removed > 1 or f.calibration_ppl == best[1]  # all scored every single


@pytest.mark.thorough
def test_what_is_found_scores_what_the_table_says(table):
    config, comparison = table
    with np.load(cut_again(config)) as data:
        windows = [lpserve.TokenWindows.from_tokens(data[n]) for n in ("calibration", "heldout")]
    masks = np.array([[i not in f.removed for i in range(12)] for f in comparison.found])
    for text, attribute in zip(windows, ("calibration_ppl", "heldout_ppl"), strict=True):
        with lpserve.open_engine(MODEL, text) as engine:
            scored = engine.score(masks).perplexity_M()
        told = [getattr(f, attribute) for f in comparison.found]
        assert told == pytest.approx(scored, rel=1e-5)  # stored as float32


def cut_again(config: CompareConfig) -> str:
    calibration, heldout = windows_of(config)
    path = f"{config.out}/check.npz"
    np.savez(path, calibration=calibration.tokens_NT, heldout=heldout.tokens_NT)
    return path


@pytest.mark.thorough
def test_again_everything_is_read_back(table):
    config, comparison = table
    again = compare(config)
    assert again.masks_scored == 0
    assert (again.found, again.costs) == (comparison.found, comparison.costs)
    about = json.loads((Path(config.out) / "results.json").read_text())
    assert about["full_calibration_ppl"] == comparison.full_calibration_ppl


def test_what_looks_inside_the_model_says_so_where_it_cannot(texts, tmp_path):
    config = CompareConfig(
        model="synthetic",
        engine="synthetic",
        engine_options={"num_players": 6},
        calibration={"a": texts["calibration"]},
        heldout={"b": texts["heldout"]},
        rivals=("shortgpt", "angular", "taylor", "greedy"),
        budget=40,
        out=str(tmp_path / "out"),
    )
    comparison = compare(config)
    assert {f.rival for f in comparison.found} == {"greedy"}
    for cost in comparison.costs[:3]:
        assert cost.masks == 0
        assert cost.note.startswith("not run: ")
        assert "engine transformers in this process" in cost.note


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--rivals", "greedy,sleb"], "rivals must be of lpserve, random"),
        (["--budget", "20"], "budget must be at least"),
        (["--rivals", "paper", "--budget", "9"], "the paper's pipeline removing up to 6"),
        (["--max-removed", "12"], "max_removed must be at most 11"),
        (["--sets", "/no/such.txt"], "/no/such.txt does not exist"),
        (["--length", "600"], "longer than the model's 512 positions"),
        (["--calibration", "/no/text.txt"], "/no/text.txt does not exist"),
    ],
)
def test_bad_input_is_one_line_before_any_engine(flags, reason, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("an engine was started")

    monkeypatch.setattr("lpserve.scoring.session.open_pool", refuse)
    code = main(["baselines", "--demo", *flags, "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2, lines
    assert len(lines) == 1
    assert reason in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_missing_model_or_text_is_named(capsys):
    assert main(["baselines"]) == 2
    assert "model is missing (--model)" in capsys.readouterr().err
    assert main(["baselines", "--model", MODEL]) == 2
    assert "calibration is missing (--calibration)" in capsys.readouterr().err
    with pytest.raises(InputError, match="got 'me'"):
        CompareConfig(model=MODEL, calibration={"a": "b"}, rivals=("me",))
