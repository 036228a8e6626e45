"""The config of a pruned checkpoint: what must change when layers go, and whether it can.

Every field known to describe single layers is cut to the kept layers; another list with one entry
a layer is cut if the kept layers cannot be described with it as it is. The result is held against
the original on models without weights (`structure`): a config that can no longer describe the kept
layers is refused.

Imports torch and transformers late.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from lpserve.errors import InputError, LpserveError, first_line
from lpserve.export.quantization import SECTIONS, Renumbering, check_scales, renumbered
from lpserve.export.structure import (
    CannotExpress,
    Skeleton,
    build_skeleton,
    check_kept_layers,
    shared_sources,
)
from lpserve.model.architecture import (
    ABSENT_KEY,
    LAYER_COUNT_KEYS,
    LAYERS_AHEAD,
    find_layer_prefix,
    read_architecture,
    text_section,
)
from lpserve.model.checkpoint import Checkpoint
from lpserve.model.loading import transformers_library
from lpserve.model.local import FROM_FOLDER
from lpserve.model.own_code import check_own_code

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
)
"""Config lists with one entry a layer: they are cut always."""
LAYER_INDEX_LISTS = (
    "mlp_only_layers",
    "attn_layer_indices",
    "moe_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "cross_attention_layers",
)
"""Config lists of layer indices."""
LEADING_LAYERS = (
    "max_window_layers",
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
)
"""Config counts of the first layers that differ from the rest."""
LAST_LAYERS = ("moe_layer_end_index",)
"""Config indices of the last layer of a kind."""
DEPTH_POWERS = {"scale_depth": 0.5}
"""Config numbers that a model divides by this power of its depth (MiniCPM's residual scale)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrunedConfig:
    """The config of the pruned model and where its layers come from."""

    config: dict[str, Any]
    """Content of the pruned config.json."""
    kept: list[int]
    """0-based layers of the original model, sorted."""
    num_layers: int
    """Layers of the original model."""
    vocab_size: int
    """Tokens of the vocabulary."""
    prefix: str
    """What names of layers' tensors begin with in the original, such as `model.layers.`."""
    path: str
    """Of the layers' list in the pruned model: `model.layers`."""
    numbers: Renumbering
    """How names of the original become names of the pruned model."""
    moved: dict[str, str] = field(default_factory=dict)
    """Tensors that kept layers share with a removed one, which alone stores them: old name by new
    name."""


@dataclass(frozen=True, slots=True)
class Original:
    """What exports of one checkpoint share: built once, for any number of sets."""

    checkpoint: Checkpoint
    defaults: dict[str, Any]
    """The language model's config as transformers completes it; without fields that it derives
    from others."""
    skeleton: Skeleton


def read_original(checkpoint: Checkpoint) -> Original:
    """Build the original model without weights.

    Raises:
        InputError: transformers cannot.
    """
    check_own_code(checkpoint)
    try:
        whole = transformers_library().AutoConfig.from_pretrained(
            str(checkpoint.path), **FROM_FOLDER
        )
    except LpserveError:  # a signal
        raise
    except Exception as error:  # whatever a config's code may raise
        raise InputError(
            f"transformers cannot read the config of {checkpoint.path}: {first_line(error)}"
        ) from error
    text: Any = whole.get_text_config()
    num_layers = read_architecture(checkpoint).num_layers or int(text.num_hidden_layers)
    try:
        skeleton = build_skeleton(checkpoint.config, str(checkpoint.path), num_layers)
    except CannotExpress as reason:
        raise InputError(f"model {checkpoint.path}: {reason}") from None
    return Original(checkpoint, text.to_dict(), skeleton)


def prune_config(checkpoint: Checkpoint, removed: Sequence[int]) -> PrunedConfig:
    """The config without the removed layers, its structure checked without loading a weight.

    Args:
        removed: 0-based layers of the original model; none, where parts of layers alone go.

    Raises:
        InputError: layers out of range or repeated, kept layers that the config can no longer
            describe at their new positions, or quantization settings that contradict the tensors.
    """
    return prune(read_original(checkpoint), removed)


def prune(original: Original, removed: Sequence[int]) -> PrunedConfig:
    """`prune_config` of an original that has been read."""
    checkpoint, old = original.checkpoint, original.skeleton
    num_layers, who = old.num_layers, f"model {checkpoint.path}"
    kept = _kept(removed, num_layers)
    if text_section(checkpoint.config).get("scale_attn_by_inverse_layer_idx"):
        raise InputError(
            f"{who} scales attention by the layer's position "
            "(scale_attn_by_inverse_layer_idx): removing layers would change the others"
        )
    reasons: list[str] = []
    for config in _candidates(original, kept):
        try:
            new = build_skeleton(config, str(checkpoint.path), len(kept))
            path = check_kept_layers(old, new, kept)
        except CannotExpress as reason:
            reasons.append(str(reason))
            continue
        names = [entry.name for entry in checkpoint.tensors]
        start = f"{path}.0."
        first_layer = {n[len(start) :]: s for n, s in old.shapes().items() if n.startswith(start)}
        word = path.rpartition(".")[2]
        prefix = find_layer_prefix(checkpoint, num_layers, word, first_layer)
        numbers = Renumbering(names, prefix, kept)
        _renumber_quantization(checkpoint, config, numbers)
        return PrunedConfig(
            config=config,
            kept=kept,
            num_layers=num_layers,
            vocab_size=int(original.defaults["vocab_size"]),
            prefix=prefix,
            path=path,
            numbers=numbers,
            moved=shared_sources(old, new, path, kept, set(names), prefix),
        )
    raise InputError(f"{who} cannot be exported without layers {sorted(removed)}: {reasons[-1]}")


def _kept(removed: Sequence[int], num_layers: int) -> list[int]:
    unique = sorted(set(removed))
    if len(unique) != len(removed) or not set(unique) <= set(range(num_layers)):
        raise InputError(
            f"removed layers must be different numbers in 0..{num_layers - 1}: got {list(removed)}"
        )
    if len(unique) == num_layers:
        raise InputError("at least one layer must stay")
    return [layer for layer in range(num_layers) if layer not in unique]


def _candidates(original: Original, kept: list[int]) -> Iterator[dict[str, Any]]:
    """Configs that may describe the kept layers: lists that nothing is known about are left as they
    are, then each of them is cut, then all."""
    num_layers = original.skeleton.num_layers

    def made(cut: Sequence[str]) -> dict[str, Any]:
        config = copy.deepcopy(original.checkpoint.config)
        if ABSENT_KEY in config:
            config[ABSENT_KEY] = _of_kept(config[ABSENT_KEY], kept)
        text = text_section(config)
        _cut_fields(text, original.defaults, kept, num_layers)
        if text.get(LAYERS_AHEAD):
            text[LAYERS_AHEAD] = 0  # their tensors stay behind (`writer.write_checkpoint`)
        for key in cut:
            values = text.get(key, original.defaults.get(key)) or ()
            text[key] = [values[layer] for layer in kept]
        return config

    unknown = _unknown_lists(original, num_layers)
    yield made(())
    for key in unknown:
        yield made((key,))
    if len(unknown) > 1:
        yield made(unknown)


def _of_kept(absent: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """Absent modules of the kept layers, under their new numbers."""
    found = {}
    for name, form in absent.items():
        layers, number, module = re.split(r"\.(\d+)\.", name, maxsplit=1)
        if int(number) in kept:
            found[f"{layers}.{kept.index(int(number))}.{module}"] = form
    return found


def _unknown_lists(original: Original, num_layers: int) -> list[str]:
    """Config lists with as many entries as layers that are not known to be of layers. Ids of tokens
    are known not to be."""
    text = text_section(original.checkpoint.config)
    known = {*PER_LAYER_LISTS, *LAYER_INDEX_LISTS}
    return [
        key
        for key in dict.fromkeys([*text, *original.defaults])
        if key not in known
        and "token" not in key
        and key != "architectures"
        and isinstance(values := text.get(key, original.defaults.get(key)), list | tuple)
        and len(values) == num_layers
    ]


def _cut_fields(
    text: dict[str, Any], defaults: dict[str, Any], kept: list[int], num_layers: int
) -> None:
    """Change, in place, every field that describes single layers.

    Args:
        defaults: as transformers completes them: what config.json leaves out.
    """
    counts = [key for key in LAYER_COUNT_KEYS if key in text] or ["num_hidden_layers"]
    for key in counts:
        multiple, rest = divmod(int(text.get(key, num_layers)), num_layers)
        if not rest:  # some models count the halves of a layer
            text[key] = multiple * len(kept)
    _write_out_sparse_step(text, num_layers)
    _cut_pattern(text, defaults, kept, num_layers)
    for key in PER_LAYER_LISTS:
        values = text.get(key, defaults.get(key))
        if isinstance(values, list | tuple) and len(values) == num_layers:
            text[key] = [values[layer] for layer in kept]
    for key in LAYER_INDEX_LISTS:
        values = text.get(key, defaults.get(key))
        if isinstance(values, list):
            text[key] = [kept.index(layer) for layer in values if layer in kept]
    for key in LEADING_LAYERS:
        if type(text.get(key)) is int:
            text[key] = sum(layer < text[key] for layer in kept)
    for key in LAST_LAYERS:
        if type(text.get(key)) is int and text[key] >= 0:
            text[key] = sum(layer <= text[key] for layer in kept) - 1
    for key, power in DEPTH_POWERS.items():
        if isinstance(text.get(key), int | float):
            text[key] *= (len(kept) / num_layers) ** power
    single = text.get("per_layer_config")
    if isinstance(single, dict):
        text["per_layer_config"] = {
            str(kept.index(int(layer))): values
            for layer, values in single.items()
            if str(layer).isdigit() and int(layer) in kept
        }
    _cut_periods(text, defaults, kept)


def _write_out_sparse_step(text: dict[str, Any], num_layers: int) -> None:
    """Experts in every so many layers (Qwen's MoE) become a list of the layers without experts."""
    step = text.get("decoder_sparse_step")
    if type(step) is int and step > 1:
        dense = {layer for layer in range(num_layers) if (layer + 1) % step}
        text["mlp_only_layers"] = sorted(dense.union(text.get("mlp_only_layers") or ()))
        text["decoder_sparse_step"] = 1


def _cut_pattern(
    text: dict[str, Any], defaults: dict[str, Any], kept: list[int], num_layers: int
) -> None:
    """A pattern that is repeated over the layers is written out (RecurrentGemma's)."""
    pattern = text.get("block_types", defaults.get("block_types"))
    if isinstance(pattern, list | tuple) and 0 < len(pattern) < num_layers:
        text["block_types"] = [pattern[layer % len(pattern)] for layer in kept]


def _cut_periods(text: dict[str, Any], defaults: dict[str, Any], kept: list[int]) -> None:
    """Kinds of layers that come every so many layers (Jamba's attention and experts): the period
    and offset that give the kept layers, if there are some."""
    for key in [k for k in defaults if k.endswith("_layer_period")]:
        offset_key = key.removesuffix("period") + "offset"
        period = text.get(key, defaults.get(key))
        offset = text.get(offset_key, defaults.get(offset_key))
        if type(period) is not int or type(offset) is not int or period < 1:
            continue
        wanted = [layer % period == offset for layer in kept]
        for new, start in product(range(1, len(kept) + 2), range(len(kept) + 1)):
            if start < new and [at % new == start for at in range(len(kept))] == wanted:
                text[key], text[offset_key] = new, start
                break


def _renumber_quantization(
    checkpoint: Checkpoint, config: dict[str, Any], numbers: Renumbering
) -> None:
    """Change, in place, the layer numbers in a config's quantization settings, and check them."""
    pruned_names = [n for name in numbers.tensors if (n := numbers.new_name(name)) is not None]
    sections = [config] if text_section(config) is config else [config, text_section(config)]
    for section in sections:
        for key in SECTIONS:
            if key not in section:
                continue
            where = f"{checkpoint.path / 'config.json'} ({key})"
            check_scales(section[key], numbers.tensors, numbers.prefix, where)
            section[key] = renumbered(section[key], numbers, where)
            check_scales(section[key], pruned_names, numbers.prefix, f"the pruned {where}")
