"""The recipe that makes the same pruned checkpoint with mergekit, for users of that tool."""

from __future__ import annotations

import json

from lpserve.export.pruned_config import PrunedConfig
from lpserve.model.checkpoint import Checkpoint

RECIPE_NAME = "mergekit.yaml"


def mergekit_yaml(checkpoint: Checkpoint, pruned: PrunedConfig) -> str:
    """The pruning as a mergekit passthrough recipe in YAML; layer ranges exclude their end."""
    ranges: list[list[int]] = []
    for layer in pruned.kept:
        if ranges and ranges[-1][1] == layer:
            ranges[-1][1] = layer + 1
        else:
            ranges.append([layer, layer + 1])
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16"
    lines = ["slices:"]
    for low, high in ranges:
        path = json.dumps(str(checkpoint.path.resolve()))
        lines += ["- sources:", f"  - model: {path}", f"    layer_range: [{low}, {high}]"]
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {dtype}"]) + "\n"
