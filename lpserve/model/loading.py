"""Which class of transformers stands for a checkpoint: the same for scoring, export and speed.

Imports transformers late.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from lpserve.errors import InputError
from lpserve.model.architecture import multimodal_class
from lpserve.model.local import FROM_FOLDER


def load_pretrained(config: Mapping[str, Any], path: str, **arguments: Any) -> Any:
    """`from_pretrained` of the checkpoint's class: `AutoModelForCausalLM`, or the class that the
    config names where the decoder is a part of a model of several modalities.

    Args:
        config: content of its config.json.
        arguments: of `from_pretrained`, beside `FROM_FOLDER`.
    """
    return _model_class(config, path).from_pretrained(path, **FROM_FOLDER, **arguments)


def build_untrained(config: Mapping[str, Any], path: str, loaded: Any) -> Any:
    """A model of a loaded config of that class, with untrained weights."""
    cls = _model_class(config, path)
    return cls(loaded) if multimodal_class(config) else cls.from_config(loaded)


def transformers_library() -> Any:
    """transformers, with the models that `lpserve.hf` adds to it."""
    import transformers

    importlib.import_module("lpserve.hf")
    return transformers


def _model_class(config: Mapping[str, Any], path: str) -> Any:
    transformers = transformers_library()
    name = multimodal_class(config) or "AutoModelForCausalLM"
    found = getattr(transformers, name, None)
    if found is None:
        raise InputError(
            f"model {path} names the class {name}, which transformers "
            f"{transformers.__version__} does not have"
        )
    return found
