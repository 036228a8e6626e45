"""Players: layers and their parts, how they are named, and what sets of them stand for."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from lpserve.errors import InputError
from lpserve.export.export import export_checkpoint
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.players import (
    ATTENTION,
    FULL_LAYER,
    MLP,
    NO_PLAYER,
    checkpoint_players,
    half_players,
    has_parts,
    kept_parts,
    kinds_of,
    layer_parts,
    layer_players,
    members,
    named_players,
    player_label,
    players_from,
    removed_parts,
)
from lpserve.plan.plan import Plan, PlanEntry
from lpserve.plan.set_files import read_sets
from lpserve.types import Player

NUM_LAYERS = 6
HALVES = tuple(
    Player(index=2 * layer + half, layer=layer, part=part)
    for layer in range(NUM_LAYERS)
    for half, part in enumerate((ATTENTION, MLP))
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


def test_sets_of_parts_become_whole_layers_and_parts():
    assert removed_parts(HALVES, [0, 1, 3, 8]) == ([0], [HALVES[3], HALVES[8]])
    assert removed_parts(MLPS, [2]) == ([], [MLPS[2]])
    assert removed_parts(layer_players(4), [3, 1]) == ([3, 1], [])
    with pytest.raises(InputError, match="player 12 is not one of the plan's 12"):
        removed_parts(HALVES, [12])
    with pytest.raises(InputError, match="player 0 is part 'head 3' of layer 1: parts are"):
        removed_parts([Player(index=0, layer=1, part="head 3")], [0])


def test_layers_are_run_whole_or_in_parts():
    assert layer_parts(layer_players(2), 3) == [{"layer": 0}, {"layer": 1}, {"layer": NO_PLAYER}]
    some = [Player(index=0, layer=1, part=MLP)]
    assert layer_parts(some, 2) == [{"layer": NO_PLAYER}, {MLP: 0, ATTENTION: NO_PLAYER}]
    players = half_players([False, True])
    assert [player_label(p) for p in players] == ["0.attention", "0.mlp", "1"]
    assert layer_parts(players, 2) == [{ATTENTION: 0, MLP: 1}, {"layer": 2}]


def test_players_are_named_by_layer_and_part():
    assert named_players(HALVES, [1, "3.mlp", "1.mlp"], "protect") == (2, 3, 7)
    assert named_players(layer_players(3), [2, 0], "force") == (0, 2)
    for names, players, words in (
        ([6], HALVES, "force: 6 is none of the 12 parts of layers, numbered from 0"),
        (["0.mlp"], layer_players(2), "force: 0.mlp is none of the 2 layers"),
    ):
        with pytest.raises(InputError, match=words):
            named_players(players, names, "force")


@pytest.mark.parametrize("players", [HALVES, MLPS], ids=["halves", "mlps"])
def test_the_sets_of_a_plan_of_half_layers_are_parts(players, tmp_path):
    path = write_plan(tmp_path, players, [1, 3])
    (found,) = read_sets(path, NUM_LAYERS)
    assert found.removed == tuple(player_label(players[i]) for i in (1, 3))


def test_players_of_a_checkpoint_are_read_from_its_headers(model_dir):
    checkpoint = read_checkpoint(model_dir("llama"))
    assert checkpoint_players(checkpoint, "layer") == layer_players(NUM_LAYERS)
    assert checkpoint_players(checkpoint, "half") == HALVES
    # two modules of OPT's layers are its feed-forward part
    assert checkpoint_players(read_checkpoint(model_dir("opt")), "half") == HALVES


def test_players_that_are_full_layers_are_exported_as_those_layers(model_dir, tmp_path):
    players = [Player(index=i, layer=NUM_LAYERS - 1 - i) for i in range(NUM_LAYERS)]
    report = export_checkpoint(
        model_dir("llama"), [0, 2], tmp_path / "out", players=players, verify=False
    )
    assert report.removed == [3, 5]


# -- groups ------------------------------------------------------------------------------------


def groups_file(tmp_path, text):
    path = tmp_path / "groups.toml"
    path.write_text(text)
    return f"groups:{path}"


def test_groups_are_players_in_the_order_of_their_first_members(model_dir, tmp_path):
    kind = groups_file(
        tmp_path, 'late = [5]\nmixed = ["3.mlp", 1]\nheads = ["0.attention", "2.attention"]\n'
    )
    players = checkpoint_players(read_checkpoint(model_dir("llama")), kind)
    assert [player_label(player) for player in players] == ["heads", "mixed", "late"]
    assert [members(player) for player in players] == [
        ((0, ATTENTION), (2, ATTENTION)),
        ((1, FULL_LAYER), (3, MLP)),
        ((5, FULL_LAYER),),
    ]
    assert players_from([asdict(player) for player in players]) == players
    assert (kinds_of(players), has_parts(players)) == ("groups", True)
    assert not has_parts(players[2:])
    parts = layer_parts(players, 6)
    assert parts[0] == {ATTENTION: 0, MLP: NO_PLAYER}
    assert parts[1] == {FULL_LAYER: 1}
    assert parts[4] == {FULL_LAYER: NO_PLAYER}
    assert kept_parts(parts, [False, True, False]) == [
        [MLP],
        [FULL_LAYER],
        [MLP],
        [ATTENTION, MLP],
        [FULL_LAYER],
        [],
    ]
    assert named_players(players, ["heads", 5], "protect") == (0, 2)
    assert named_players(players, ["late"], "protect") == (2,)
    whole, rest = removed_parts(players, [0, 1])
    assert whole == [1]
    assert [player_label(part) for part in rest] == ["0.attention", "2.attention", "3.mlp"]
    with pytest.raises(InputError, match="protect: 3 is none of the 3 groups"):
        named_players(players, [3], "protect")


def test_groups_may_take_a_layer_away_together(model_dir, tmp_path):
    kind = groups_file(tmp_path, 'a = ["4.attention"]\nb = ["4.mlp", 2]\n')
    players = checkpoint_players(read_checkpoint(model_dir("llama")), kind)
    assert removed_parts(players, [0, 1]) == ([2, 4], [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = [1]\n", "must hold two groups at least"),
        ("a = [1]\nb = []\n", "'b' must be a name of letters"),
        ('a = [1]\nb = ["x"]\n', "'b' must be a name of letters"),
        ("a = [1]\nb = [true]\n", "'b' must be a name of letters"),
        ("a = [1]\nb = 3\n", "'b' must be a name of letters"),
        ('a = [1]\n"b c" = [3]\n', "'b c' must be a name of letters"),
        ("a = [1]\nb = [6]\n", "b names 6, which the model of 6 layers does not have"),
        ('a = [1]\nb = ["7.mlp"]\n', "b names 7.mlp, which the model of 6 layers"),
        ("a = [1]\nb = [1]\n", "1 of b is in a already"),
        ('a = [1]\nb = ["1.mlp"]\n', "1.mlp of b is in a already"),
        ('a = ["1.mlp"]\nb = [1]\n', "1 of b is in a already"),
        ("a = [1, 1]\nb = [2]\n", "1 of a is in a already"),
        ("a = ", "groups.toml"),
    ],
)
def test_groups_that_cannot_be_are_refused(text, words, model_dir, tmp_path):
    with pytest.raises(InputError, match=words):
        checkpoint_players(read_checkpoint(model_dir("llama")), groups_file(tmp_path, text))


def test_a_file_of_groups_must_be_there(model_dir):
    with pytest.raises(InputError, match=r"none\.toml"):
        checkpoint_players(read_checkpoint(model_dir("llama")), "groups:none.toml")
