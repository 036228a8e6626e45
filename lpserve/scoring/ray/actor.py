"""The Ray actor that runs one engine in a process of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray

from lpserve.data.windows import TokenWindows
from lpserve.engine import build_engine
from lpserve.engine.base import Engine
from lpserve.errors import LpserveError, typed_first_line
from lpserve.scoring.pool import score_on, still_works
from lpserve.types import BoolArray, EngineInfo, EngineSpec, Scores


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """The node, address, process number and GPUs of an engine's process."""

    node: str
    address: str
    pid: int
    gpus: tuple[str, ...]

    @property
    def place(self) -> str:
        """The hardware, as text: node and GPUs."""
        return f"{self.node}/{','.join(self.gpus)}"


@dataclass(frozen=True, slots=True)
class Failure:
    """An engine's error as a value.

    An exception would reach the driver as the traceback of another process.
    """

    kind: str
    line: str
    broken: bool = False
    """Whether the engine can no longer score the full model either."""
    refused: bool = False
    """Whether the windows cannot be used at all."""


class EngineActor:
    """One engine. Ray runs the calls one after another, in the order in which they were made."""

    _engine: Engine

    def where(self) -> Whereabouts:
        """Where this process runs; also the sign that it is alive."""
        context = ray.get_runtime_context()
        gpus = tuple(context.get_accelerator_ids().get("GPU", []))
        address = ray.util.get_node_ip_address()
        return Whereabouts(context.get_node_id(), address, os.getpid(), gpus)

    def open(self, spec: EngineSpec, windows: TokenWindows) -> EngineInfo | Failure:
        """Start the engine."""
        self._refused: dict[str, Failure] = {}
        try:
            self._engine = build_engine(spec, windows)
        except LpserveError as error:
            return Failure(type(error).__name__, str(error))
        except Exception as error:  # of a library, out of memory, ...
            return Failure(type(error).__name__, typed_first_line(error))
        return self._engine.info

    def register(self, windows: TokenWindows) -> None:
        """Make windows known to the engine; a refusal is kept for `score` to return."""
        try:
            self._engine.register(windows)
        except Exception as error:  # nobody waits for this call: reported when they are scored
            failure = Failure(type(error).__name__, typed_first_line(error), refused=True)
            self._refused[windows.content_hash] = failure

    def score(
        self,
        masks_MP: BoolArray,
        windows: str,
        extra_metrics: tuple[str, ...],
        overlap: bool = False,
    ) -> Scores | Failure:
        """Score masks bool [M, P] on registered windows; see `lpserve.scoring.pool.WorkUnit`."""
        if windows in self._refused:
            return self._refused[windows]
        try:
            return score_on(self._engine, masks_MP, windows, extra_metrics, overlap)
        except Exception as error:
            broken = not still_works(self._engine, windows)
            return Failure(type(error).__name__, typed_first_line(error), broken)
