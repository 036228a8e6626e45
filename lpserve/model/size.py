"""How large a model is, from its config and safetensors headers: parameters, bytes, FLOP.

No tensor is loaded. Layers are counted by structure, so that nothing here depends on the names that
a model family gives its matrices.

Notation: P players (layers), T tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lpserve.errors import InputError
from lpserve.model.architecture import find_layer_prefix, read_architecture, required
from lpserve.model.checkpoint import Checkpoint, TensorEntry
from lpserve.types import FloatArray, IntArray

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number of each dtype that models are run in."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ModelSize:
    """What config and headers say of a model's size."""

    parameters: int
    """All of them, embeddings included."""
    layer_parameters_P: IntArray
    """Matrix entries that compute one token in each layer: of experts, the active ones only."""
    head_parameters: int
    """Entries of the output projection, whether or not it is tied to the embedding."""
    attention_width: int
    """Heads x head size."""
    hidden_size: int
    experts: str
    """How experts were counted, "" where there are none."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layer_parameters_P)

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all parameters in a dtype of `ITEM_BYTES`."""
        return self.parameters * ITEM_BYTES[dtype]

    def layer_flop_P(self, length: int) -> FloatArray:
        """FLOP of one token in each layer, `float64[P]`: 2 for every parameter, and 4 T d for
        attention over T = `length` tokens, where d is the attention width."""
        parameters_P = self.layer_parameters_P.astype(np.float64)
        return 2.0 * parameters_P + 4.0 * length * self.attention_width

    def head_flop(self) -> float:
        """FLOP of one token in the output projection."""
        return 2.0 * self.head_parameters


def model_size(checkpoint: Checkpoint) -> ModelSize:
    """Count parameters by structure: the layers are a numbered list of tensors, and the output
    projection has one row for each token of the vocabulary.

    Raises:
        InputError: the config or the tensors do not say enough, or weights are packed in integers.
    """
    architecture = read_architecture(checkpoint)
    num_layers = required(architecture.num_layers, "num_hidden_layers")
    vocab = required(architecture.vocab_size, "vocab_size")
    hidden = required(architecture.width, "hidden_size")
    heads = required(architecture.num_heads, "num_attention_heads")
    prefix = find_layer_prefix(checkpoint, num_layers)
    layers: list[list[TensorEntry]] = [[] for _ in range(num_layers)]
    others: list[TensorEntry] = []
    for entry in checkpoint.tensors:
        if entry.name.startswith(prefix):
            layers[int(entry.name[len(prefix) :].split(".")[0])].append(entry)
        else:
            others.append(entry)
    _check_unpacked(checkpoint)
    outputs = [entry for entry in others if len(entry.shape) == 2 and vocab in entry.shape]
    if not outputs:
        raise InputError(
            f"model {checkpoint.path}: no tensor outside the layers has {vocab} rows (vocab_size), "
            "so the output projection cannot be found"
        )
    active = architecture.active_experts
    counted = [parameters_met(entries, active) for entries in layers]
    has_experts = any(experts for _, experts in counted)
    return ModelSize(
        parameters=checkpoint.num_parameters,
        layer_parameters_P=np.array([parameters for parameters, _ in counted], dtype=np.int64),
        head_parameters=max(math.prod(entry.shape) for entry in outputs),
        attention_width=heads * required(architecture.head_size, "head_dim"),
        hidden_size=hidden,
        experts="" if not has_experts else _expert_note(active),
    )


def parameters_met(entries: Sequence[TensorEntry], active: int | None) -> tuple[int, int]:
    """Matrix entries that compute one token in a layer, and how many experts the layer has."""
    plain, experts, indices, stacked = 0, 0, set[str](), 0
    for entry in entries:
        if len(entry.shape) < 2:
            continue
        parameters = math.prod(entry.shape)
        found = re.search(r"\.experts\.(?:(\d+)\.)?", entry.name)
        if not found:
            plain += parameters
            continue
        experts += parameters
        if found[1] is not None:
            indices.add(found[1])
        elif len(entry.shape) == 3:
            stacked = entry.shape[0]
    number = len(indices) or stacked
    if number and active is not None:
        experts = experts * min(active, number) // number
    return plain + experts, number


def _expert_note(active: int | None) -> str:
    if active is None:
        return "experts: the config does not say how many a token meets; ALL are counted"
    return f"experts: {active} of a layer's are met by a token (config), the others not counted"


def _check_unpacked(checkpoint: Checkpoint) -> None:
    packed = [e for e in checkpoint.tensors if e.dtype[0] in "IU" and len(e.shape) >= 2]
    if packed:
        raise InputError(
            f"model {checkpoint.path}: {packed[0].name} is packed in integers ({packed[0].dtype}), "
            "so parameters cannot be read from its headers; give the checkpoint that was quantized"
        )
