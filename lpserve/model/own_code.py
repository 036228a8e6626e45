"""Code that comes with a checkpoint is never run: transformers would ask on the terminal."""

from __future__ import annotations

import importlib.metadata

from lpserve.errors import InputError
from lpserve.model.checkpoint import Checkpoint


def check_own_code(checkpoint: Checkpoint) -> None:
    """Raise InputError for a model that only code in its own folder can build."""
    if not checkpoint.config.get("auto_map"):
        return
    from transformers import CONFIG_MAPPING

    kind = checkpoint.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        version = importlib.metadata.version("transformers")
        raise InputError(
            f"model {checkpoint.path} needs Python code of its own (auto_map in config.json), "
            f"which is never run: transformers {version} itself knows no model_type {kind!r}"
        )
