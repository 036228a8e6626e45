"""The players of a model: the units that a mask keeps or removes, in execution order.

Every engine plays full decoder layers today. A player may also be a part of a layer
(`lpserve.types.Player.part`); what a set of players means for a checkpoint, which consists of full
layers, is decided here: `removed_layers` refuses what cannot be exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lpserve.errors import InputError
from lpserve.inputs.shapes import converted
from lpserve.types import Player

FULL_LAYER = "layer"
"""`Player.part` of a full decoder layer."""


def layer_players(num_layers: int) -> tuple[Player, ...]:
    """One player for each decoder layer."""
    return tuple(Player(index=i, layer=i, part=FULL_LAYER) for i in range(num_layers))


def players_from(rows: Sequence[Mapping[str, Any]]) -> tuple[Player, ...]:
    """Players from the JSON form that plans hold: `index`, `layer` and `part` of each.

    Raises:
        InputError: a player is not of that form.
    """
    return converted(rows, tuple[Player, ...], "the plan's players cannot be read")


def removed_layers(players: Sequence[Player], removed: Sequence[int]) -> list[int]:
    """The decoder layers that a set of removed players stands for, in the order of `removed`.

    Args:
        players: all players of the model.
        removed: indices of players.

    Raises:
        InputError: no such player, or one that is only a part of its layer: checkpoints are
            written, and sets of layers evaluated, with full layers removed only.
    """
    by_index = {player.index: player for player in players}
    layers = []
    for index in removed:
        player = by_index.get(index)
        if player is None:
            raise InputError(f"player {index} is not one of the plan's {len(players)} players")
        if player.part != FULL_LAYER:
            raise InputError(
                f"player {index} is part {player.part!r} of layer {player.layer}: only full layers "
                "can be removed"
            )
        layers.append(player.layer)
    return layers
