"""The players of a model: the units that a mask keeps or removes, in execution order.

A player is a decoder layer (`layer`), its attention or feed-forward part (`half`), or a list of
these that go together (`groups:FILE`): its `Player.part` is then the group's name, `=` and its
members, such as `early=3,4.attention`. Attention stands for whatever lets a token see others: a
state-space model or a convolution, too. Which players a model has is read from its config and the
headers of its tensors; engines prove on real windows that its layers can be taken apart so.

What a set of players means for a checkpoint, which consists of layers, is decided here, too
(`removed_parts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lpserve.errors import InputError
from lpserve.inputs.config_file import load_config_file
from lpserve.inputs.rules import GROUP_NAME, PART_NAME
from lpserve.inputs.shapes import converted
from lpserve.model.architecture import find_layer_prefix, read_architecture, required
from lpserve.model.checkpoint import Checkpoint, TensorEntry
from lpserve.types import Player

FULL_LAYER = "layer"
"""`Player.part` of a full decoder layer."""
ATTENTION, MLP = "attention", "mlp"
"""`Player.part` of a layer's mixer, and of its feed-forward part."""
GROUPS = "groups:"
"""Begins the configuration key `players` where a file holds groups."""
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
        kind: `layer`, `half`, or `groups:` and a TOML or YAML file of group names and their
            members: numbers of layers, or parts such as `4.attention`.

    Raises:
        InputError: the headers do not show the layers; no layer has halves; or the file cannot be
            used.
    """
    num_layers = required(read_architecture(checkpoint).num_layers, "num_hidden_layers")
    if kind == FULL_LAYER:
        return layer_players(num_layers)
    if kind.startswith(GROUPS):
        groups = _read_groups(kind.removeprefix(GROUPS))
        named = [name for some in groups.values() for name in some]
        halves = _halves(checkpoint, num_layers) if any(type(n) is str for n in named) else ()
        return _group_players(groups, num_layers, halves, kind)
    return _halves(checkpoint, num_layers)


def _halves(checkpoint: Checkpoint, num_layers: int) -> tuple[Player, ...]:
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


def _read_groups(path: str) -> dict[str, list[int | str]]:
    groups = load_config_file(path)
    for name, members in groups.items():
        named = isinstance(members, list) and members
        if not re.match(GROUP_NAME, name) or not named or not all(map(_is_member, members)):
            raise InputError(
                f"groups {path}: {name!r} must be a name of letters, digits and _, and a list of "
                f"layers' numbers or of parts such as 7.attention: got {members!r}"
            )
    if len(groups) < 2:
        raise InputError(f"groups {path} must hold two groups at least")
    return groups


def _is_member(value: Any) -> bool:
    return (type(value) is int and value >= 0) or (
        isinstance(value, str) and re.match(PART_NAME, value) is not None
    )


def _group_players(
    groups: Mapping[str, Sequence[int | str]],
    num_layers: int,
    halves: Sequence[Player],
    source: str,
) -> tuple[Player, ...]:
    """A player for each group, in the order of their first members in the model."""
    known = {(p.layer, p.part) for p in halves} | {(n, FULL_LAYER) for n in range(num_layers)}
    seen: dict[tuple[int, str], str] = {}
    found = []
    for name, members in groups.items():
        parts = sorted(_named_part(member) for member in members)
        for layer, part in parts:
            if (layer, part) not in known:
                raise InputError(
                    f"{source}: {name} names {_part_name(layer, part)}, which the model of "
                    f"{num_layers} layers does not have"
                )
            clashing = (part, FULL_LAYER) if part != FULL_LAYER else (ATTENTION, MLP, FULL_LAYER)
            for other in clashing:
                if (layer, other) in seen:
                    raise InputError(
                        f"{source}: {_part_name(layer, part)} of {name} is in "
                        f"{seen[layer, other]} already"
                    )
            seen[layer, part] = name
        text = ",".join(_part_name(layer, part) for layer, part in parts)
        found.append((parts[0], f"{name}={text}"))
    return tuple(
        Player(index=i, layer=first[0], part=part) for i, (first, part) in enumerate(sorted(found))
    )


def _named_part(name: int | str) -> tuple[int, str]:
    layer, _, part = str(name).partition(".")
    return int(layer), part or FULL_LAYER


def _part_name(layer: int, part: str) -> str:
    return str(layer) if part == FULL_LAYER else f"{layer}.{part}"


def members(player: Player) -> tuple[tuple[int, str], ...]:
    """What a player consists of: (layer, part) each; of a group several."""
    _, is_group, text = player.part.partition("=")
    if not is_group:
        return ((player.layer, player.part),)
    return tuple(_named_part(name) for name in text.split(","))


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
        for layer, part in members(player):
            parts[layer][part] = player.index
    ordered = []
    for found in parts:
        names = (ATTENTION, MLP) if found and FULL_LAYER not in found else (FULL_LAYER,)
        ordered.append({part: found.get(part, NO_PLAYER) for part in names})
    return ordered


def kept_parts(parts: Sequence[Mapping[str, int]], kept_P: Sequence[bool]) -> list[list[str]]:
    """For each layer, those of its parts (`layer_parts`) that a mask keeps."""
    return [[p for p, i in found.items() if i == NO_PLAYER or kept_P[i]] for found in parts]


def named_players(
    players: Sequence[Player], names: Iterable[int | str], key: str
) -> tuple[int, ...]:
    """Indices of the players that are named, each once and in order.

    Args:
        names: a layer's number names every player in it, `7.attention` one part; a group's name,
            the group.
        key: what they are given as, for messages.

    Raises:
        InputError: a name fits no player.
    """
    found: set[int] = set()
    for name in names:
        fitting = {p.index for p in players if _is_named(p, name)}
        if not fitting:
            kinds = kinds_of(players)
            raise InputError(
                f"{key}: {name} is none of the {len(players)} {kinds}, numbered from 0"
            )
        found |= fitting
    return tuple(sorted(found))


def _is_named(player: Player, name: int | str) -> bool:
    """Whether a player is a group of that name, or lies within a layer or part of that name."""
    if type(name) is str and re.match(GROUP_NAME, name):
        return player.part.startswith(f"{name}=")
    layer, part = _named_part(name)
    return all(n == layer and part in (FULL_LAYER, held) for n, held in members(player))


def player_label(player: Player) -> str:
    """How a player is called in tables and figures: `7`, `7.attention`, or its group's name."""
    name, is_group, _ = player.part.partition("=")
    return name if is_group else _part_name(player.layer, player.part)


def num_layers_of(players: Sequence[Player]) -> int:
    """How many layers have players."""
    return len({layer for player in players for layer, _ in members(player)})


def has_parts(players: Sequence[Player]) -> bool:
    """Whether some player is a part of a layer, or holds one."""
    return any(part != FULL_LAYER for player in players for _, part in members(player))


def has_groups(players: Sequence[Player]) -> bool:
    """Whether some player is a group."""
    return any("=" in player.part for player in players)


def kinds_of(players: Sequence[Player]) -> str:
    """What players are called together: `layers`, `parts of layers`, `groups`."""
    if has_groups(players):
        return "groups"
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
        for layer, part in members(player):
            if part not in (FULL_LAYER, ATTENTION, MLP):
                raise InputError(
                    f"player {player.index} is part {part!r} of layer {layer}: parts are "
                    f"{ATTENTION} and {MLP}"
                )
            gone.setdefault(layer, {})[part] = Player(index=player.index, layer=layer, part=part)
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
