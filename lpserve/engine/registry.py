"""The kinds of engine, by name. To add one, describe it in a module of its own and list it here."""

from __future__ import annotations

from lpserve.engine.hf.kind import TRANSFORMERS
from lpserve.engine.kind import EngineKind
from lpserve.engine.synthetic import SYNTHETIC
from lpserve.engine.vllm.kind import VLLM
from lpserve.errors import InputError

ENGINE_KINDS: dict[str, EngineKind] = {
    kind.name: kind
    for kind in (
        TRANSFORMERS,
        VLLM,
        SYNTHETIC,
    )
}
"""All kinds, the default first."""


def check_engine_kind(name: str) -> None:
    """Raise InputError unless this is the name of a kind."""
    if not isinstance(name, str) or name not in ENGINE_KINDS:
        raise InputError(f"engine must be one of {', '.join(ENGINE_KINDS)}: got {name!r}")


def engine_kind(name: str) -> EngineKind:
    """The kind of this name; raises InputError where there is none."""
    check_engine_kind(name)
    return ENGINE_KINDS[name]


def shown_kinds() -> list[EngineKind]:
    """The kinds that score models, for the command line's help."""
    return [kind for kind in ENGINE_KINDS.values() if not kind.is_game]
