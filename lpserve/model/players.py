"""The players of a model: the units that a mask keeps or removes, in execution order.

A player is a decoder layer (`layer`), its attention or feed-forward part (`half`), or a list of
these that go together (`groups:FILE`). Attention stands for whatever lets a token see others: a
state-space model or a convolution, too. Which players a model has is read from its config and the
headers of its tensors; engines prove on real windows that its layers can be taken apart so.

What a set of players means for a checkpoint, which consists of layers, is decided here, too
(`removed_parts`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lpserve.errors import InputError
from lpserve.inputs.shapes import converted
from lpserve.model.architecture import find_layer_prefix, read_architecture, required
from lpserve.model.checkpoint import Checkpoint, TensorEntry
from lpserve.types import Player

FULL_LAYER = "layer"
"""`Player.part` of a full decoder layer."""
ATTENTION, MLP = "attention", "mlp"
"""`Player.part` of a layer's mixer, and of its feed-forward part."""
NO_PLAYER = -1
"""What belongs to no player: every mask keeps it."""


def layer_players(num_layers: int) -> tuple[Player, ...]:
    """One player for each decoder layer."""
    return tuple(Player(index=i, layer=i, part=FULL_LAYER) for i in range(num_layers))


def half_players(whole: Sequence[bool]) -> tuple[Player, ...]:
    """Two players for each decoder layer, its attention first; one for a layer without halves.

    Args:
        whole: for each layer, whether it is one player.
    """
    parts = [
        (layer, part)
        for layer, one in enumerate(whole)
        for part in ((FULL_LAYER,) if one else (ATTENTION, MLP))
    ]
    return tuple(Player(index=i, layer=n, part=part) for i, (n, part) in enumerate(parts))


def checkpoint_players(checkpoint: Checkpoint, kind: str) -> tuple[Player, ...]:
    """The players of a checkpoint.

    A layer has halves where two or more of its modules hold matrices.

    Args:
        kind: `layer` or `half`.

    Raises:
        InputError: the headers do not show the layers; or no layer has halves.
    """
    num_layers = required(read_architecture(checkpoint).num_layers, "num_hidden_layers")
    if kind == FULL_LAYER:
        return layer_players(num_layers)
    prefix = find_layer_prefix(checkpoint, num_layers)
    modules: list[set[str]] = [set() for _ in range(num_layers)]
    for entry in checkpoint.tensors:
        number, _, rest = entry.name.removeprefix(prefix).partition(".")
        if not entry.name.startswith(prefix) or int(number) >= num_layers:
            continue
        module, inside, _ = rest.partition(".")
        if inside and len(entry.shape) > 1:
            modules[int(number)].add(module)
    whole = [len(found) < 2 for found in modules]
    if all(whole):
        named = ", ".join(sorted(set().union(*modules))) or "no module"
        raise InputError(
            f"model {checkpoint.path}: no layer has attention and a feed-forward part to be "
            f"dropped apart (its layers hold {named}): leave players at layer"
        )
    return half_players(whole)


def part_entries(
    checkpoint: Checkpoint, prefix: str, layer: int, modules: Mapping[str, Sequence[str]]
) -> dict[str, list[TensorEntry]]:
    """The tensors of each part of a layer.

    Args:
        prefix: what the names of layers' tensors begin with, such as `model.layers.`.
        modules: the layer's child modules that are each of its parts, as the model's class names
            them (`lpserve.engine.parts.Modules`).

    Raises:
        InputError: the tensors of a part cannot be told from its layer's others: the files name
            modules otherwise than the model's class does, and more than one.
    """
    tensors: dict[str, list[TensorEntry]] = {}
    start = f"{prefix}{layer}."
    for entry in checkpoint.tensors:
        if entry.name.startswith(start):
            tensors.setdefault(entry.name.removeprefix(start).split(".")[0], []).append(entry)
    matrices = [
        name
        for name, entries in tensors.items()
        if any(len(e.shape) > 1 and e.name != start + name for e in entries)
    ]
    named = {name: part for part, names in modules.items() for name in names}
    renamed = [name for name in matrices if name not in named]
    absent = [name for name in named if name not in tensors]
    if len(renamed) == len(absent) == 1:
        named[renamed[0]] = named.pop(absent[0])
    elif renamed or absent:
        raise InputError(
            f"model {checkpoint.path}: the parts of layer {layer} cannot be told apart in its "
            f"files, which name them {', '.join(sorted(matrices))}, while the model's class names "
            f"them {', '.join(sorted(named))}"
        )
    return {p: [e for n in named if named[n] == p for e in tensors[n]] for p in modules}


def layer_parts(players: Sequence[Player], num_layers: int) -> list[dict[str, int]]:
    """For each layer, its parts that are run apart and the index of each one's player.

    A layer that no player takes apart is `FULL_LAYER` alone; any other has `ATTENTION` and `MLP`.
    What belongs to no player has `NO_PLAYER`.
    """
    parts: list[dict[str, int]] = [{} for _ in range(num_layers)]
    for player in players:
        parts[player.layer][player.part] = player.index
    for found in parts:
        for part in (ATTENTION, MLP) if found and FULL_LAYER not in found else (FULL_LAYER,):
            found.setdefault(part, NO_PLAYER)
    return parts


def kept_parts(parts: Sequence[Mapping[str, int]], kept_P: Sequence[bool]) -> list[list[str]]:
    """For each layer, those of its parts (`layer_parts`) that a mask keeps."""
    return [[p for p, i in found.items() if i == NO_PLAYER or kept_P[i]] for found in parts]


def named_players(
    players: Sequence[Player], names: Iterable[int | str], key: str
) -> tuple[int, ...]:
    """Indices of the players that are named, each once and in order.

    Args:
        names: a layer's number names every player in it, `7.attention` one part.
        key: what they are given as, for messages.

    Raises:
        InputError: a name fits no player.
    """
    found: set[int] = set()
    for name in names:
        fitting = {p.index for p in players if name in (p.layer, f"{p.layer}.{p.part}")}
        if not fitting:
            kinds = kinds_of(players)
            raise InputError(
                f"{key}: {name} is none of the {len(players)} {kinds}, numbered from 0"
            )
        found |= fitting
    return tuple(sorted(found))


def player_label(player: Player) -> str:
    """How a player is called in tables and figures: `7`, `7.attention`."""
    return str(player.layer) + ("" if player.part == FULL_LAYER else f".{player.part}")


def num_layers_of(players: Sequence[Player]) -> int:
    """How many layers have players."""
    return len({player.layer for player in players})


def has_parts(players: Sequence[Player]) -> bool:
    """Whether some player is a part of a layer."""
    return any(player.part != FULL_LAYER for player in players)


def kinds_of(players: Sequence[Player]) -> str:
    """What players are called together: `layers`, `parts of layers`."""
    return "parts of layers" if has_parts(players) else "layers"


def players_from(rows: Sequence[Mapping[str, Any]]) -> tuple[Player, ...]:
    """Players from the JSON form that plans hold: `index`, `layer` and `part` of each.

    Raises:
        InputError: a player is not of that form.
    """
    return converted(rows, tuple[Player, ...], "the plan's players cannot be read")


def removed_parts(
    players: Sequence[Player], removed: Sequence[int]
) -> tuple[list[int], list[Player]]:
    """What a set of removed players stands for: whole layers, and parts of the layers that stay.

    A layer all of whose parts are removed is removed as a whole.

    Raises:
        InputError: no such player, or one that is an unknown part.
    """
    gone: dict[int, dict[str, Player]] = {}
    for player in _players_at(players, removed):
        if player.part not in (FULL_LAYER, ATTENTION, MLP):
            raise InputError(
                f"player {player.index} is part {player.part!r} of layer {player.layer}: parts are "
                f"{ATTENTION} and {MLP}"
            )
        gone.setdefault(player.layer, {})[player.part] = player
    whole = [
        n for n, parts in gone.items() if FULL_LAYER in parts or {ATTENTION, MLP} <= set(parts)
    ]
    return whole, [p for n, parts in gone.items() if n not in whole for p in parts.values()]


def _players_at(players: Sequence[Player], removed: Sequence[int]) -> list[Player]:
    by_index = {player.index: player for player in players}
    for index in removed:
        if index not in by_index:
            raise InputError(f"player {index} is not one of the plan's {len(players)} players")
    return [by_index[index] for index in removed]
