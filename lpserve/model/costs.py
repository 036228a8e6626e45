"""What each player costs in use: parameters, arithmetic and cached keys and values of a token.

Counted from the checkpoint's headers and config alone; no tensor is loaded. Whole layers count all
that they hold, parts of layers what their modules hold.

Notation: P players, T tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lpserve.inputs.rules import COSTS
from lpserve.model.architecture import (
    find_layer_prefix,
    read_architecture,
    required,
    text_section,
)
from lpserve.model.checkpoint import Checkpoint, TensorEntry
from lpserve.model.players import ATTENTION, FULL_LAYER, members, part_entries
from lpserve.model.size import parameters_met
from lpserve.types import FloatArray, IntArray, Player

_CACHED = re.compile(r"(?i)attention")
_NOT_CACHED = re.compile(r"(?i)linear")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlayerCosts:
    """Costs of a model's players."""

    params_P: IntArray
    """Parameters: what is stored."""
    flops_P: FloatArray
    """FLOP of a token at a context of so many tokens: of experts, those that it meets."""
    kv_P: IntArray
    """Numbers that a token leaves in the cache of keys and values."""

    def by_name(self) -> dict[str, list[float]]:
        """Costs as plain numbers, by their names in `COSTS`."""
        costs = (self.params_P, self.flops_P, self.kv_P)
        return {
            name: np.asarray(cost_P, dtype=np.float64).tolist()
            for name, cost_P in zip(COSTS, costs, strict=True)
        }


def player_costs(
    checkpoint: Checkpoint,
    players: Sequence[Player],
    length: int,
    modules: Mapping[int, Mapping[str, Sequence[str]]] | None = None,
) -> PlayerCosts:
    """Costs of players at a context of `length` tokens.

    A token costs 2 FLOP for each matrix entry that it meets, and attention over T tokens 4 T d
    more, where d is the width of all heads.

    Args:
        modules: of each layer, the child modules that are each of its parts
            (`EngineInfo.settings`); needed where players are parts.

    Raises:
        InputError: config or headers do not say enough, or parts cannot be told apart in them.
    """
    architecture = read_architecture(checkpoint)
    num_layers = required(architecture.num_layers, "num_hidden_layers")
    prefix = find_layer_prefix(checkpoint, num_layers)
    attends = _attending(checkpoint, num_layers)
    heads = required(architecture.num_heads, "num_attention_heads")
    head_size = required(architecture.head_size, "head_dim")
    cached = architecture.latent_size or 2 * (architecture.num_kv_heads or heads) * head_size
    held: dict[int, dict[str, list[TensorEntry]]] = {}
    params, flops, kv = [], [], []
    for player in players:
        mine: list[TensorEntry] = []
        mixers = 0
        for layer, part in members(player):
            if part == FULL_LAYER:
                start = f"{prefix}{layer}."
                mine += [entry for entry in checkpoint.tensors if entry.name.startswith(start)]
            else:
                if layer not in held:
                    held[layer] = part_entries(checkpoint, prefix, layer, (modules or {})[layer])
                mine += held[layer][part]
            mixers += part in (FULL_LAYER, ATTENTION) and attends[layer]
        params.append(sum(math.prod(entry.shape) for entry in mine))
        met, _ = parameters_met(mine, architecture.active_experts)
        flops.append(2.0 * met + 4.0 * length * heads * head_size * mixers)
        kv.append(cached * mixers)
    return PlayerCosts(
        params_P=np.array(params, dtype=np.int64),
        flops_P=np.array(flops, dtype=np.float64),
        kv_P=np.array(kv, dtype=np.int64),
    )


def _attending(checkpoint: Checkpoint, num_layers: int) -> list[bool]:
    """Which layers attend to keys and values of earlier tokens: all, where the config lists no
    kinds of layers; else those whose kind is an attention that is not linear."""
    text = text_section(checkpoint.config)
    for key in ("layer_types", "layers_block_type"):
        kinds = text.get(key)
        if isinstance(kinds, list) and len(kinds) == num_layers:
            return [
                bool(_CACHED.search(str(kind)) and not _NOT_CACHED.search(str(kind)))
                for kind in kinds
            ]
    return [True] * num_layers
