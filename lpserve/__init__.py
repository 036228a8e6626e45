"""lpserve: which layers of this LLM can go?

Names are loaded when first used, so that importing lpserve imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpserve.config import RunConfig as RunConfig
    from lpserve.coordinator import run as run
    from lpserve.engine import open_engine as open_engine
    from lpserve.export import export_checkpoint as export_checkpoint
    from lpserve.export import export_run as export_run
    from lpserve.plan import Plan as Plan
    from lpserve.plan import load_plan as load_plan
    from lpserve.plots import plot_interactions as plot_interactions
    from lpserve.plots import plot_plan as plot_plan
    from lpserve.plots import plot_values as plot_values
    from lpserve.shapley import ShapleyValues as ShapleyValues
    from lpserve.shapley import shapley_values as shapley_values
    from lpserve.store import Store as Store
    from lpserve.types import EngineSpec as EngineSpec
    from lpserve.types import Scores as Scores
    from lpserve.windows import TokenWindows as TokenWindows

__version__ = "0.1.0"

_HOMES = {
    "EngineSpec": "lpserve.types",
    "Plan": "lpserve.plan",
    "RunConfig": "lpserve.config",
    "Scores": "lpserve.types",
    "ShapleyValues": "lpserve.shapley",
    "Store": "lpserve.store",
    "TokenWindows": "lpserve.windows",
    "export_checkpoint": "lpserve.export",
    "export_run": "lpserve.export",
    "load_plan": "lpserve.plan",
    "open_engine": "lpserve.engine",
    "plot_interactions": "lpserve.plots",
    "plot_plan": "lpserve.plots",
    "plot_values": "lpserve.plots",
    "run": "lpserve.coordinator",
    "shapley_values": "lpserve.shapley",
}
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "__version__",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lpserve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
