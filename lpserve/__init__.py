"""lpserve: which layers of this LLM can go?

Names are loaded when first used, so that importing lpserve imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpserve.engine import open_engine as open_engine
    from lpserve.types import EngineSpec as EngineSpec
    from lpserve.windows import TokenWindows as TokenWindows

__version__ = "0.1.0"

_HOMES = {
    "EngineSpec": "lpserve.types",
    "TokenWindows": "lpserve.windows",
    "open_engine": "lpserve.engine",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lpserve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
