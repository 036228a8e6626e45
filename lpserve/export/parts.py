"""Checkpoints without parts of layers: their weights are zeros, or left out.

A part whose weights are all zero returns zero, which is what its absence means
(`lpserve.engine.parts`). Such a checkpoint loads anywhere, and saves no time and no memory. Where
the weights are left out, the config names the absent modules, and `lpserve.hf` loads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lpserve.errors import InputError
from lpserve.export.pruned_config import PrunedConfig
from lpserve.model.architecture import (
    ABSENT_KEY,
    BASE_KEY,
    MODEL_TYPE,
    SLIM_PREFIX,
    multimodal_class,
)
from lpserve.model.checkpoint import Checkpoint
from lpserve.model.players import part_entries
from lpserve.types import Player


def part_tensors(
    checkpoint: Checkpoint,
    prefix: str,
    parts: Sequence[Player],
    modules: Mapping[int, Mapping[str, Sequence[str]]],
) -> set[str]:
    """Names of the tensors that hold the weights of parts of layers.

    Args:
        prefix: what the names of layers' tensors begin with, such as `model.layers.`.
        modules: as of `part_entries`.

    Raises:
        InputError: as `part_entries`.
    """
    layers = sorted({part.layer for part in parts})
    found = {layer: part_entries(checkpoint, prefix, layer, modules[layer]) for layer in layers}
    return {entry.name for part in parts for entry in found[part.layer][part.part]}


def slim_config(
    checkpoint: Checkpoint,
    pruned: PrunedConfig,
    parts: Sequence[Player],
    modules: Mapping[int, Mapping[str, Sequence[str]]],
    absent: Mapping[int, Mapping[str, Mapping[str, Any] | None]],
) -> dict[str, Any]:
    """The config of a checkpoint without the weights of parts: `lpserve.hf` says what it holds.

    Args:
        absent: of each layer, module -> the form of what stands for it (`EngineInfo.settings`).

    Raises:
        InputError: the model is one of several modalities or of code of its own, or what its
            modules return is of a class of its own.
    """
    config = pruned.config
    forms: dict[str, Any] = dict(config.get(ABSENT_KEY, {}))  # an original may lack some itself
    named = {"model_type", "architectures"} <= config.keys()
    if multimodal_class(config) or config.get("auto_map") or not named:
        raise InputError(
            "weights of parts can be left out of text models of transformers' own classes alone: "
            "export without slim"
        )
    for part in parts:
        start = f"{pruned.prefix}{part.layer}."
        tensors = part_tensors(checkpoint, pruned.prefix, [part], modules)
        stored = dict.fromkeys(name.removeprefix(start).split(".")[0] for name in sorted(tensors))
        for name in modules[part.layer][part.part]:
            form = absent[part.layer][name]
            if form is None:
                raise InputError(
                    f"{name} of layer {part.layer} returns an output of a class of its own, which "
                    "nothing can stand for: export without slim"
                )
            place = f"{pruned.path}.{pruned.kept.index(part.layer)}"
            renamed = [other for other in stored if other not in modules[part.layer][part.part]]
            in_files = name if name in stored or not renamed else renamed[0]
            forms[f"{place}.{name}"] = {**form, "in_files": in_files}
    names = [str(name).removeprefix(SLIM_PREFIX) for name in config["architectures"]]
    return {
        **config,
        "model_type": MODEL_TYPE,
        "architectures": [f"{SLIM_PREFIX}{name}" for name in names],
        BASE_KEY: config.get(BASE_KEY, config["model_type"]),
        ABSENT_KEY: forms,
    }
