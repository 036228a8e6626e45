"""Players and layers: a set of half-layers is refused wherever full layers would be removed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from lpserve.errors import InputError
from lpserve.export.export import export_checkpoint, export_run
from lpserve.model.players import layer_players, players_from, removed_layers
from lpserve.plan.plan import Plan, PlanEntry
from lpserve.plan.set_files import read_sets
from lpserve.types import Player

NUM_LAYERS = 6
HALVES = tuple(
    Player(index=2 * layer + half, layer=layer, part=part)
    for layer in range(NUM_LAYERS)
    for half, part in enumerate(("attn", "mlp"))
)
MLPS = tuple(Player(index=i, layer=i, part="mlp") for i in range(NUM_LAYERS))


def write_plan(folder: Path, players: tuple[Player, ...], removed: list[int]) -> Path:
    """A plan.json that removes these players."""
    entry = PlanEntry(
        num_removed=len(removed),
        removed=removed,
        source="greedy",
        calibration_ppl=2.0,
        predicted_ppl=None,
        heldout_ppl=None,
        candidates=[],
    )
    plan = Plan(
        model="model",
        model_hash="0" * 64,
        num_players=len(players),
        players=[asdict(player) for player in players],
        utility="neg_nll",
        masks_scored=1,
        heldout_masks=0,
        full_calibration_ppl=1.0,
        full_heldout_ppl=None,
        plans=[entry],
    )
    path = folder / "plan.json"
    path.write_text(plan.to_json())
    return path


def test_players_are_the_layers_in_order_and_survive_json():
    players = layer_players(NUM_LAYERS)
    assert [(p.index, p.layer, p.part) for p in players] == [(i, i, "layer") for i in range(6)]
    assert players_from(json.loads(json.dumps([asdict(p) for p in HALVES]))) == HALVES
    with pytest.raises(InputError, match="players cannot be read"):
        players_from([{"index": 0}])


def test_removed_players_are_mapped_to_their_layers(rng):
    order = rng.permutation(NUM_LAYERS).tolist()
    players = [Player(index=i, layer=layer) for i, layer in enumerate(order)]
    assert removed_layers(players, [4, 1]) == [order[4], order[1]]
    with pytest.raises(InputError, match="player 6 is not one of"):
        removed_layers(players, [6])


@pytest.mark.parametrize("players", [HALVES, MLPS], ids=["halves", "mlps"])
def test_a_plan_of_half_layers_is_refused_before_anything_is_written(players, model_dir, tmp_path):
    model, out = model_dir("llama"), tmp_path / "out"
    run = tmp_path / "run"
    run.mkdir()
    path = write_plan(run, players, [1, 3])
    words = "only full layers can be removed"
    with pytest.raises(InputError, match=words) as error:
        export_run(run, 2, out, model=model)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=words):
        export_checkpoint(model, [1, 3], out, players=players)
    with pytest.raises(InputError, match=words):
        read_sets(path, NUM_LAYERS)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_players_that_are_full_layers_are_exported_as_those_layers(model_dir, tmp_path):
    players = [Player(index=i, layer=NUM_LAYERS - 1 - i) for i in range(NUM_LAYERS)]
    report = export_checkpoint(
        model_dir("llama"), [0, 2], tmp_path / "out", players=players, verify=False
    )
    assert report.removed == [3, 5]
