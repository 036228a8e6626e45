"""lpserve: which layers of this LLM can go?

Names are loaded when first used, so that importing lpserve imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpserve.config import RunConfig as RunConfig
    from lpserve.data.windows import TokenWindows as TokenWindows
    from lpserve.engine import open_engine as open_engine
    from lpserve.exhaustive.game import ExhaustiveGame as ExhaustiveGame
    from lpserve.exhaustive.game import read_exhaustive as read_exhaustive
    from lpserve.export.export import export_checkpoint as export_checkpoint
    from lpserve.export.export import export_run as export_run
    from lpserve.plan.plan import Plan as Plan
    from lpserve.plan.plan import load_plan as load_plan
    from lpserve.report.plots import plot_interactions as plot_interactions
    from lpserve.report.plots import plot_plan as plot_plan
    from lpserve.report.plots import plot_values as plot_values
    from lpserve.runner.run import run as run
    from lpserve.store.store import Store as Store
    from lpserve.types import EngineSpec as EngineSpec
    from lpserve.types import Scores as Scores
    from lpserve.values.result import ShapleyValues as ShapleyValues
    from lpserve.values.shapley import shapley_values as shapley_values

__version__ = "0.1.0"

_HOMES = {
    "EngineSpec": "lpserve.types",
    "ExhaustiveGame": "lpserve.exhaustive.game",
    "Plan": "lpserve.plan.plan",
    "RunConfig": "lpserve.config",
    "Scores": "lpserve.types",
    "ShapleyValues": "lpserve.values.result",
    "Store": "lpserve.store.store",
    "TokenWindows": "lpserve.data.windows",
    "export_checkpoint": "lpserve.export.export",
    "export_run": "lpserve.export.export",
    "load_plan": "lpserve.plan.plan",
    "open_engine": "lpserve.engine",
    "plot_interactions": "lpserve.report.plots",
    "plot_plan": "lpserve.report.plots",
    "plot_values": "lpserve.report.plots",
    "read_exhaustive": "lpserve.exhaustive.game",
    "run": "lpserve.runner.run",
    "shapley_values": "lpserve.values.shapley",
}
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "__version__",
    *_HOMES,
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lpserve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
