"""The cost planner: counts against slow enumeration, the bundled model, a real run, bad input.

Not covered here: whether a GPU keeps up the rate that a user assumes.
"""

from __future__ import annotations

import pytest

from lpserve.cli.entry import main
from lpserve.demo import FOLDER
from lpserve.errors import InputError
from lpserve.masks import keys
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.size import model_size
from lpserve.rounds.settings import RoundSettings
from lpserve.runner.cost import (
    CostSettings,
    cost,
    sample_rounds,
    split_units,
)
from lpserve.runner.run import run
from lpserve.scoring.progress import Progress
from lpserve.testing.checkpoints import llama_headers, write_headers
from lpserve.testing.runs import make_config

MODEL = str(FOLDER / "model")


def round_settings(players: int, removed: int, seed: int, size: int) -> RoundSettings:
    return RoundSettings(
        num_players=players,
        max_removed=removed,
        sizes=(players - removed, players - 1),
        seed=seed,
        surrogate="ridge",
        round_size=size,
    )


@pytest.mark.parametrize("case", range(6))
def test_counts_are_those_of_an_enumeration_of_prefixes(tmp_path, rng, case):
    players, engines = int(rng.integers(4, 14)), int(rng.integers(1, 5))
    removed, width, windows, length = int(rng.integers(1, players // 2 + 1)), 64, 3, 20
    model = llama_headers(tmp_path / "m", players, width, 96, 101, 4, 2)
    settings = CostSettings(
        model=str(model),
        budget=int(rng.integers(4 * players, 150)),
        max_removed=removed,
        num_windows=windows,
        length=length,
        engines=engines,
        seed=case,
    )
    found = cost(settings)
    rounds = sample_rounds(round_settings(players, removed, case, players), settings.budget)
    prefixes, masks, alone = 0, 0, 0
    for masks_MP in rounds:
        for unit in split_units(masks_MP, found.unit_masks, engines):
            pairs = {
                (tuple(bool(b) for b in mask[:i]), i)
                for mask in unit
                for i in range(players)
                if mask[i]
            }
            prefixes, masks, alone = prefixes + len(pairs), masks + len(unit), alone + unit.sum()
    assert found.scoring.layer_forwards == prefixes
    assert found.scoring.masks == masks == sum(found.rounds)
    assert found.scoring.alone == alone
    layer = 2 * width * width + 2 * 32 * width + 3 * 96 * width
    per_layer = 2 * layer + 4 * length * width
    expected = (prefixes * per_layer + masks * 2 * 101 * width) * windows * length
    assert found.scoring.flop == pytest.approx(expected, rel=1e-12)


def test_rounds_are_distinct_masks_up_to_the_budget_and_start_as_a_run_starts(rng):
    settings = round_settings(10, 4, int(rng.integers(1000)), 10)
    rounds = sample_rounds(settings, 120)
    every = [key for masks_MP in rounds for key in keys(masks_MP)]
    assert len(every) == len(set(every)) == 120
    assert rounds[0].sum(axis=1).tolist() == [10] + [9] * 10
    assert keys(rounds[1]) == keys(settings.random_pairs())
    assert rounds[2].sum(axis=1).tolist() == [8] * 3


@pytest.mark.thorough
@pytest.mark.parametrize("players", [8, 14])
def test_a_real_run_takes_about_the_layer_forwards_that_were_told(tmp_path, texts, players):
    budget = 16 * players
    options = {"num_players": players, "game_seed": 3}
    progress = Progress(interval_s=100.0)
    run(make_config(tmp_path, texts, budget=budget, engine_options=options), progress)
    model = llama_headers(tmp_path / "m", players, 64, 96, 101, 4, 2)
    told = cost(CostSettings(model=str(model), budget=budget, max_removed=4))
    assert told.scoring.masks == budget
    real, expected = progress.state.work, told.scoring.layer_forwards + told.heldout.layer_forwards
    # random masks stand for those that a run chooses for the values and for what they cost: they
    # share fewer prefixes (a run took 0.74 and 0.81 of what was told); its first units are small
    assert 0.65 * expected <= real.layer_forwards <= 1.15 * expected
    assert real.distinct_masks == pytest.approx(told.scoring.masks + told.heldout.masks, rel=0.1)


def test_experts_that_a_token_does_not_meet_are_not_counted(tmp_path):
    shapes = {"model.embed_tokens.weight": [50, 8]}
    for i in range(3):
        shapes[f"model.layers.{i}.attn.q.weight"] = [8, 8]
        shapes |= {f"model.layers.{i}.mlp.experts.{j}.up.weight": [16, 8] for j in range(4)}
    config = {
        "num_hidden_layers": 3,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "num_experts_per_tok": 2,
    }
    size = model_size(read_checkpoint(write_headers(tmp_path / "a", config, shapes)))
    assert size.layer_parameters_P.tolist() == [64 + 2 * 128] * 3
    assert size.parameters == 400 + 3 * (64 + 4 * 128)
    assert size.head_parameters == 400  # tied to the embedding
    stacked = {k: v for k, v in shapes.items() if "experts" not in k}
    stacked |= {f"model.layers.{i}.mlp.experts.up": [4, 8, 16] for i in range(3)}
    again = model_size(read_checkpoint(write_headers(tmp_path / "b", config, stacked)))
    assert again.layer_parameters_P.tolist() == size.layer_parameters_P.tolist()
    unknown = {k: v for k, v in config.items() if k != "num_experts_per_tok"}
    every = model_size(read_checkpoint(write_headers(tmp_path / "c", unknown, shapes)))
    assert every.layer_parameters_P.tolist() == [64 + 4 * 128] * 3
    assert "does not say" in every.experts


def test_a_time_is_told_for_a_named_rate_only(tmp_path, capsys):
    assert main(["cost", "--model", MODEL]) == 0
    plain = capsys.readouterr().out
    assert "unknown" in plain
    flags = ["--tflops-per-gpu", "2", "--engines", "3", "--gpus-per-engine", "2"]
    assert main(["cost", "--model", MODEL, *flags]) == 0
    text = capsys.readouterr().out
    found = cost(CostSettings(model=MODEL, tflops_per_gpu=2.0, engines=3, gpus_per_engine=2))
    assert found.seconds == pytest.approx(found.flop / 12e12)
    assert "engines 3 x GPUs 2 x 2 TFLOP/s" in text
    assert "Assumed:" in text


def test_a_unit_is_two_seconds_of_an_engine_and_never_starves_one(tmp_path):
    model = str(llama_headers(tmp_path / "m", 12, 64, 96, 101, 4, 2))
    slow = cost(CostSettings(model=model, tflops_per_gpu=1e-5))
    fast = cost(CostSettings(model=model, tflops_per_gpu=1e3))
    assert slow.unit_masks < fast.unit_masks == max(fast.rounds)
    assert slow.scoring.layer_forwards > fast.scoring.layer_forwards
    many = cost(CostSettings(model=model, tflops_per_gpu=1e3, engines=4))
    assert many.scoring.layer_forwards > fast.scoring.layer_forwards


def test_a_full_gpu_and_starving_engines_are_warned_about(capsys):
    assert main(["cost", "--model", MODEL, "--gpu-memory-gb", "0.001", "--engines", "9"]) == 0
    text = capsys.readouterr().out
    assert "WARNING: weights and one path of states take" in text
    assert "--round-size 72" in text
    assert main(["cost", "--model", MODEL, "--gpu-memory-gb", "8"]) == 0
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "nowhere"], "is not a folder"),
        (["--budget", "5"], "budget must be at least"),
        (["--max-removed", "12"], "max_removed must be at most 11"),
        (["--max-removed", "0"], "max_removed must be a whole number, at least 1"),
        (["--length", "1"], "length must be"),
        (["--engines", "0"], "engines must be"),
        (["--tflops-per-gpu", "-3"], "tflops_per_gpu must be"),
        (["--tflops-per-gpu", "nan"], "tflops_per_gpu must be"),
        (["--gpu-memory-gb", "0"], "gpu_memory_gb must be"),
        (["--dtype", "int3"], "dtype must be one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, flags, words):
    assert main(["cost", "--model", MODEL, *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({}, {}, "num_hidden_layers"),
        ({"num_hidden_layers": 7}, {}, "numbered lists"),
        ({"vocab_size": 51}, {}, "vocab_size"),
    ],
)
def test_a_model_that_cannot_be_understood_is_refused(tmp_path, config, tensors, words):
    base = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 50}
    shapes = {"embed.weight": [50, 8], "h.0.w.weight": [8, 8], "h.1.w.weight": [8, 8]}
    model = write_headers(tmp_path / "m", base | config if config else {}, shapes | tensors)
    with pytest.raises(InputError, match=words):
        model_size(read_checkpoint(model))


def test_weights_packed_in_integers_are_refused(tmp_path):
    base = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 50}
    shapes = {"embed.weight": [50, 8], "h.0.w.qweight": [8, 8], "h.1.w.qweight": [8, 8]}
    model = write_headers(tmp_path / "m", base, shapes)
    path = model / "model.safetensors"
    data = path.read_bytes().replace(b'"BF16", "shape": [8, 8]', b'"I16" , "shape": [8, 8]')
    path.write_bytes(data)
    with pytest.raises(InputError, match="packed in integers"):
        model_size(read_checkpoint(model))
