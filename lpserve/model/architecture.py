"""What a checkpoint's config.json says of the architecture, under one name for each quantity.

Model families name the same quantity differently (`num_hidden_layers`, `n_layer`, ...), and models
of several modalities keep the language model's fields under `text_config`, as transformers does.
All of that is known here and nowhere else: the rest of the package reads `Architecture`. Quantities
that a config leaves out are None; `required` turns that into an error where one is needed.

Imports no torch and no transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lpserve.errors import InputError
from lpserve.inputs.shapes import converted
from lpserve.model.checkpoint import Checkpoint
from lpserve.model.own_code import check_own_code

LAYER_COUNT_KEYS = (
    "num_decoder_layers",
    "decoder_layers",
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "num_blocks",
)
"""Config keys that hold the number of decoder layers."""
MOST_LAYERS = 10_000
"""A config that counts more is damaged: models have some hundred."""
LAYERS_AHEAD = "num_nextn_predict_layers"
"""The config key that counts layers which predict several tokens ahead, and that come last."""
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_WIDTH = ("hidden_size", "n_embd", "d_model")
_POSITIONS = ("max_position_embeddings", "n_positions")
_ACTIVE_EXPERTS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_top_k",
    "moe_topk",
    "top_k_experts",
)
MODEL_TYPE = "lpserve"
BASE_KEY, ABSENT_KEY = "lpserve_base", "lpserve_absent"
"""Of checkpoints without the weights of absent parts (`lpserve.hf`): their `model_type`, and keys
of config.json: the original's `model_type`, and module -> the form of what stands for it
(`lpserve.engine.parts.Absent.form`)."""
SLIM_PREFIX = "Slim"
"""Begins the name of their architecture, which the original's follows: vLLM tells them by it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The sizes of a language model, as its config.json gives them."""

    num_layers: int | None
    """Decoder layers."""
    num_heads: int | None
    """Attention heads of a layer."""
    num_kv_heads: int | None
    """Heads whose keys and values are stored; the attention heads where none are named."""
    head_size: int | None
    """Width of one head: as named, or else width / heads."""
    width: int | None
    """Size of a hidden state."""
    vocab_size: int | None
    """Tokens of the vocabulary."""
    max_positions: int | None
    """The most tokens that the model reads at once; the lowest, if several keys bound it."""
    positions_key: str
    """The config key of that bound, "" where there is none."""
    latent_size: int
    """Values cached for a token and layer by latent attention (DeepSeek); 0: not of this kind."""
    active_experts: int | None
    """Experts of a layer that compute one token, in a mixture of experts."""
    attention: str | None
    """The attention implementation of transformers that the model needs; None: any.

    Soft-capped attention scores (Gemma-2) exist in transformers' `eager` attention only: its SDPA
    accepts the argument and silently ignores it (seen in 5.19 and 5.23).
    """

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Architecture:
        """Read the content of a config.json."""
        text = text_section(dict(config))

        def first(*keys: str) -> int | None:
            for section in (text, config):
                for key in keys:
                    value = section.get(key)
                    if type(value) is int and value > 0:
                        return value
            return None

        heads, width = first(*_HEADS), first(*_WIDTH)
        bounds = [(bound, key) for key in _POSITIONS if (bound := first(key)) is not None]
        max_positions, positions_key = min(bounds, default=(None, ""))
        softcapped = any(section.get("attn_logit_softcapping") for section in (text, config))
        return cls(
            num_layers=first(*LAYER_COUNT_KEYS) or _listed_layers(text),
            num_heads=heads,
            num_kv_heads=first("num_key_value_heads") or heads,
            head_size=first("head_dim") or (width // heads if width and heads else None),
            width=width,
            vocab_size=first("vocab_size"),
            max_positions=max_positions,
            positions_key=positions_key,
            latent_size=(first("kv_lora_rank") or 0) + (first("qk_rope_head_dim") or 0),
            active_experts=first(*_ACTIVE_EXPERTS),
            attention="eager" if softcapped else None,
        )


def _listed_layers(text: Mapping[str, Any]) -> int | None:
    """The number of layers where a config lists their kinds and has no count (Nemotron-H)."""
    for key in ("layers_block_type", "hybrid_override_pattern", "layer_types"):
        kinds = text.get(key)
        if isinstance(kinds, list | str) and kinds:
            return len(kinds)
    return None


def read_architecture(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a checkpoint."""
    return Architecture.from_config(checkpoint.config)


def text_section(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model: `text_config`, or all of it."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def required(value: int | None, name: str) -> int:
    """A quantity that the caller cannot do without; raises InputError where the config lacks it."""
    if value is None:
        raise InputError(f"the model's config.json names no {name} that is a whole number above 0")
    return value


def check_decoder(checkpoint: Checkpoint) -> None:
    """Raise InputError unless the config says decoder-only language model, by itself or inside a
    model of several modalities, with as many layers as the files hold."""
    where = f"{checkpoint.path / 'config.json'}: architectures"
    names = converted(checkpoint.config.get("architectures") or [], list[str], where)
    decoder = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    decoder = decoder or multimodal_class(checkpoint.config) is not None
    if not decoder or checkpoint.config.get("is_encoder_decoder"):
        raise InputError(
            f"model {checkpoint.path} is not a decoder-only language model: architectures is "
            f"{names}; a name ending in ForCausalLM is needed, or ForConditionalGeneration with a "
            "text_config"
        )
    _check_layer_count(checkpoint)
    check_own_code(checkpoint)


def multimodal_class(config: Mapping[str, Any]) -> str | None:
    """The transformers class of a model that reads more than text around a decoder; None for a
    model of text alone, which `AutoModelForCausalLM` loads."""
    names = config.get("architectures")
    if not isinstance(names, list) or not isinstance(config.get("text_config"), dict):
        return None
    return next((str(n) for n in names if str(n).endswith("ForConditionalGeneration")), None)


def _check_layer_count(checkpoint: Checkpoint) -> None:
    """Raise InputError where the files hold decoder layers that the config does not count.

    transformers and vLLM leave them out. Layers that predict several tokens ahead, as DeepSeek-V3
    keeps them behind its decoder layers, are counted by the config in a key of their own.
    """
    num_layers = read_architecture(checkpoint).num_layers
    if num_layers is None:
        return
    if num_layers > MOST_LAYERS:
        raise InputError(
            f"model {checkpoint.path}: config.json counts {num_layers:,} layers, more than "
            f"{MOST_LAYERS:,}"
        )
    lists = _numbered_lists(checkpoint)
    counted = set(range(num_layers))
    if any(indices == counted for indices in lists.values()):
        return
    allowed = num_layers + _layers_ahead(checkpoint)
    for prefix, indices in lists.items():
        more = sorted(index for index in indices if index >= allowed)
        if counted <= indices and more:
            raise InputError(
                f"model {checkpoint.path}: config.json counts {num_layers} layers, and the files "
                f"hold {prefix}{more[0]} too: correct num_hidden_layers, or copy the checkpoint "
                "again"
            )


def find_layer_prefix(
    checkpoint: Checkpoint,
    num_layers: int,
    list_name: str | None = None,
    first_layer: Mapping[str, tuple[int, ...]] | None = None,
) -> str:
    """The tensor-name prefix of the decoder layers, such as `model.layers.`.

    Found by structure: the names `<prefix><i>.<rest>` must exist for exactly i = 0..L-1, beside
    layers that predict several tokens ahead.

    Args:
        list_name: the last word of the layer list's module path, in which the prefix must end;
            None: any word.
        first_layer: shapes of layer 0's tensors by name, which decide between several lists (of a
            model that reads images, say).

    Raises:
        InputError: no prefix, or several, fit.
    """
    counted = set(range(num_layers))
    allowed = set(range(num_layers + _layers_ahead(checkpoint)))
    fitting = [
        prefix
        for prefix, indices in _numbered_lists(checkpoint).items()
        if counted <= indices <= allowed and list_name in (None, prefix.split(".")[-2])
    ]
    if len(fitting) > 1 and first_layer:
        shapes = {entry.name: entry.shape for entry in checkpoint.tensors}

        def num_alike(prefix: str) -> int:
            return sum(shapes.get(f"{prefix}0.{n}") == shape for n, shape in first_layer.items())

        most = max(map(num_alike, fitting))
        fitting = [prefix for prefix in fitting if num_alike(prefix) == most]
    if len(fitting) == 1:
        return fitting[0]
    if list_name is None:
        raise InputError(
            f"model {checkpoint.path}: {len(fitting)} numbered lists of tensors have {num_layers} "
            "entries (num_hidden_layers); need exactly one"
        )
    raise InputError(
        f"model {checkpoint.path}: {len(fitting)} tensor-name prefixes fit a list of "
        f"{num_layers} decoder layers named {list_name!r}; need exactly one"
    )


def _layers_ahead(checkpoint: Checkpoint) -> int:
    """Layers that predict several tokens ahead, which files hold behind the decoder's."""
    ahead = text_section(checkpoint.config).get(LAYERS_AHEAD)
    return ahead if type(ahead) is int and ahead > 0 else 0


def _numbered_lists(checkpoint: Checkpoint) -> dict[str, set[int]]:
    """The numbers in tensor names by what stands before them, such as `model.layers.`."""
    pattern = re.compile(r"^(?P<prefix>(?:[^0-9.][^.]*\.)+)(?P<index>\d+)\.")
    found: dict[str, set[int]] = {}
    for entry in checkpoint.tensors:
        if match := pattern.match(entry.name):
            found.setdefault(match["prefix"], set()).add(int(match["index"]))
    return found
