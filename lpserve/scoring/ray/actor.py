"""What runs in an engine's own process."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray

from lpserve.data.windows import TokenWindows
from lpserve.engine import build_engine
from lpserve.engine.base import Engine
from lpserve.errors import LpserveError, typed_first_line
from lpserve.scoring.pool import still_works
from lpserve.types import BoolArray, EngineInfo, EngineSpec, Scores


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where an engine's process is."""

    node: str
    address: str
    pid: int
    gpus: tuple[str, ...]

    @property
    def place(self) -> str:
        """The hardware: node and GPUs."""
        return f"{self.node}/{','.join(self.gpus)}"


@dataclass(frozen=True, slots=True)
class Failure:
    """An engine's error, as a value: an exception would reach the driver as the traceback of
    another process."""

    kind: str
    line: str
    broken: bool = False
    """Whether the engine can no longer score the whole model either."""
    refused: bool = False
    """Whether the windows cannot be used at all."""


class EngineActor:
    """One engine. Calls run one after another, in the order in which they were made."""

    _engine: Engine

    def where(self) -> Whereabouts:
        context = ray.get_runtime_context()
        gpus = tuple(context.get_accelerator_ids().get("GPU", []))
        address = ray.util.get_node_ip_address()
        return Whereabouts(context.get_node_id(), address, os.getpid(), gpus)

    def open(self, spec: EngineSpec, windows: TokenWindows) -> EngineInfo | Failure:
        self._refused: dict[str, Failure] = {}
        try:
            self._engine = build_engine(spec, windows)
        except LpserveError as error:
            return Failure(type(error).__name__, str(error))
        except Exception as error:  # of a library, out of memory, ...
            return Failure(type(error).__name__, typed_first_line(error))
        return self._engine.info

    def register(self, windows: TokenWindows) -> None:
        try:
            self._engine.register(windows)
        except Exception as error:  # nobody waits for this call: told when they are scored
            failure = Failure(type(error).__name__, typed_first_line(error), refused=True)
            self._refused[windows.content_hash] = failure

    def score(
        self, masks_MP: BoolArray, windows: str, extra_metrics: tuple[str, ...]
    ) -> Scores | Failure:
        if windows in self._refused:
            return self._refused[windows]
        try:
            return self._engine.score(masks_MP, windows, extra_metrics)
        except Exception as error:
            broken = not still_works(self._engine, windows)
            return Failure(type(error).__name__, typed_first_line(error), broken)
