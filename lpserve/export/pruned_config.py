"""The config of a pruned checkpoint: what must change when layers go, and whether it can.

Every field known to describe single layers is cut to the kept layers. The result is then built on
torch's meta device, without any weight, and each kept layer is compared with the layer that stands
at its new position: a config that can no longer describe the kept layers is refused.

Imports torch and transformers late.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpserve.errors import InputError
from lpserve.model.architecture import (
    LAYER_COUNT_KEYS,
    find_layer_prefix,
    read_architecture,
    text_section,
)
from lpserve.model.checkpoint import Checkpoint
from lpserve.model.own_code import FROM_FOLDER, check_own_code

PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "no_rope_layers",
    "attention_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "per_layer_config",
)
"""Config lists with one entry a layer. Any other list of that length is left alone."""
LAYER_INDEX_LISTS = ("mlp_only_layers", "attn_layer_indices")
"""Config lists of layer indices."""
LEADING_LAYERS = ("max_window_layers", "first_k_dense_replace")
"""Config counts of the first layers that differ from the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrunedConfig:
    """The config of the pruned model and where its layers come from."""

    config: dict[str, Any]
    """Content of the pruned config.json."""
    kept: list[int]
    """0-based layers of the original model, sorted."""
    num_layers: int
    """Layers of the original model."""
    prefix: str
    """Tensor-name prefix of the layers, such as `model.layers.`."""
    vocab_size: int
    """Tokens of the vocabulary."""


def prune_config(checkpoint: Checkpoint, removed: Sequence[int]) -> PrunedConfig:
    """The config without the removed layers, its structure checked without loading a weight.

    Args:
        removed: 0-based layers of the original model.

    Raises:
        InputError: layers out of range or repeated, or kept layers that the config can no longer
            describe at their new positions.
    """
    from transformers import AutoConfig

    check_own_code(checkpoint)
    original = AutoConfig.from_pretrained(str(checkpoint.path), **FROM_FOLDER)
    defaults = original.get_text_config()
    num_layers = read_architecture(checkpoint).num_layers or int(defaults.num_hidden_layers)
    unique = sorted(set(removed))
    if len(unique) != len(removed) or not unique or not 0 <= unique[0] <= unique[-1] < num_layers:
        raise InputError(
            f"removed layers must be different numbers in 0..{num_layers - 1}: got {list(removed)}"
        )
    if len(unique) == num_layers:
        raise InputError("at least one layer must stay")
    kept = [layer for layer in range(num_layers) if layer not in unique]
    config = copy.deepcopy(checkpoint.config)
    _cut_fields(text_section(config), defaults, kept, num_layers)
    if text_section(config).get("scale_attn_by_inverse_layer_idx"):
        raise InputError(
            f"model {checkpoint.path} scales attention by the layer's position "
            "(scale_attn_by_inverse_layer_idx): removing layers would change the others"
        )
    list_names = _check_structure(checkpoint, config, kept)
    prefixes = {find_layer_prefix(checkpoint, num_layers, name) for name in list_names}
    if len(prefixes) != 1:
        raise InputError(f"model {checkpoint.path}: several lists of layers: {sorted(prefixes)}")
    return PrunedConfig(
        config=config,
        kept=kept,
        num_layers=num_layers,
        prefix=prefixes.pop(),
        vocab_size=int(defaults.vocab_size),
    )


def _cut_fields(text: dict[str, Any], defaults: Any, kept: list[int], num_layers: int) -> None:
    """Change, in place, every field that describes single layers.

    Args:
        defaults: transformers' config, which fills in lists that config.json leaves out.
    """
    for key in [key for key in LAYER_COUNT_KEYS if key in text] or LAYER_COUNT_KEYS[:1]:
        text[key] = len(kept)
    for key in PER_LAYER_LISTS:
        values = text.get(key, getattr(defaults, key, None))
        if isinstance(values, list | tuple) and len(values) == num_layers:
            text[key] = [values[layer] for layer in kept]
    for key in LAYER_INDEX_LISTS:
        if isinstance(text.get(key), list):
            text[key] = [kept.index(layer) for layer in text[key] if layer in kept]
    for key in LEADING_LAYERS:
        if isinstance(text.get(key), int):
            text[key] = sum(layer < text[key] for layer in kept)


def _check_structure(checkpoint: Checkpoint, config: dict[str, Any], kept: list[int]) -> set[str]:
    """Compare every kept layer with the layer at its new position; names of the layer lists."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    def layers(values: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "config.json").write_text(json.dumps(values))
            loaded = AutoConfig.from_pretrained(scratch, **FROM_FOLDER)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded)
        count = int(loaded.get_text_config().num_hidden_layers)
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        }

    old, new = layers(checkpoint.config), layers(config)
    common = {name for name in old if name in new}
    outer = {n for n in common if not any(n.startswith(f"{other}.") for other in common)}
    for name in outer:
        for position, layer in enumerate(kept):
            difference = _difference(old[name][layer], new[name][position])
            if difference:
                raise InputError(
                    f"model {checkpoint.path}: layer {layer} cannot stand at position {position}: "
                    f"{difference} differs there, and the config cannot say otherwise"
                )
    return {name.rsplit(".", 1)[-1] for name in outer}


def _difference(old: Any, new: Any) -> str | None:
    """The first way in which two layers' structures differ, their position left out."""
    for (name, a), (other, b) in zip(old.named_modules(), new.named_modules(), strict=False):
        if name != other or type(a) is not type(b):
            return name or "the layer's class"
        for key, value in vars(a).items():
            simple = isinstance(value, bool | int | float | str | None)
            if simple and key not in ("layer_idx", "layer_id") and vars(b).get(key) != value:
                return f"{name}.{key}".lstrip(".")
    shapes = [{n: tuple(p.shape) for n, p in layer.named_parameters()} for layer in (old, new)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            return name
    return None
