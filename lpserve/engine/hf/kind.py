"""The engine kind `transformers`, described without loading torch or transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import Engine, HasHiddenStates, HasTaylorImportance
from lpserve.engine.kind import (
    MEMORY_OPTIONS,
    EngineKind,
    InUse,
    check_known_options,
    checkpoint_resources,
    folder_players,
)
from lpserve.inputs.rules import Switch, Text
from lpserve.types import EngineSpec

OPTIONS = {
    **MEMORY_OPTIONS,
    "attn_implementation": Text,
    "compile_layers": Switch,
    "keep_freed_memory": Switch,
}
"""Engine options and their types; `TransformersEngine` says what each does."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for an option that the transformers engine does not have."""
    check_known_options("transformers", options, OPTIONS)


def _build(spec: EngineSpec, windows: TokenWindows) -> Engine:
    from lpserve.engine.hf.engine import TransformersEngine

    return TransformersEngine(spec, windows)


def _runs_everywhere(device: str) -> None:
    """transformers runs on any device that torch has."""


TRANSFORMERS = EngineKind(
    name="transformers",
    build=_build,
    check_options=check_options,
    players=folder_players,
    resources=checkpoint_resources,
    capabilities=(HasHiddenStates, HasTaylorImportance),
    in_use=InUse(script=Path(__file__).with_name("in_use.py"), check=_runs_everywhere),
)
