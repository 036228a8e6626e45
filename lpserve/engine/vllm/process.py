"""Starting and ending vLLM in this process, and what it leaves behind put back."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import torch

from lpserve.engine.vllm.options import quiet_environment
from lpserve.engine.vllm.worker.extension import shut_down
from lpserve.errors import EngineError, InputError, typed_first_line

_in_use = threading.Lock()


class GlobalState:
    """What vLLM changes in the process that holds its worker, so that it can be put back.

    Its CPU worker disables `torch.set_num_threads`; its Transformers backend decorates the classes
    of transformers' own model, which then load only inside vLLM; some environment variables stay.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._set_num_threads = torch.set_num_threads
        self._environment = dict(os.environ)
        self._classes = [
            (cls, cls.__bases__, {n: cls.__dict__[n] for n in _DECORATED if n in cls.__dict__})
            for cls in _model_classes(str(config.get("model_type")))
        ]
        self._changed: dict[str, str] = {}

    def started(self) -> None:
        """Note which environment variables starting has set."""
        now = dict(os.environ)
        self._changed = {k: v for k, v in now.items() if self._environment.get(k) != v}

    def put_back(self) -> None:
        torch.set_num_threads = self._set_num_threads
        for name, value in self._changed.items():
            if os.environ.get(name) == value:
                before = self._environment.get(name)
                os.environ.pop(name) if before is None else os.environ.update({name: before})
        for cls, bases, attributes in self._classes:
            if cls.__bases__ == bases:
                continue
            cls.__bases__ = bases
            for name in _DECORATED:
                if name in attributes:
                    setattr(cls, name, attributes[name])
                elif name in cls.__dict__:
                    delattr(cls, name)


_DECORATED = ("__init__", "__call__", "forward")


def _model_classes(model_type: str) -> list[Any]:
    """transformers' classes of this model type."""
    from transformers import CONFIG_MAPPING, AutoModel

    try:
        model_class: Any = AutoModel._model_mapping[CONFIG_MAPPING[model_type]]
    except KeyError:
        return []
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    module = sys.modules[model_class.__module__]
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]


def start(arguments: Mapping[str, Any], left: GlobalState) -> Any:
    """A `vllm.LLM`; after a failed start everything is as before."""
    if not _in_use.acquire(blocking=False):
        raise EngineError(
            "a vLLM engine is open in this process already: vLLM keeps one distributed state a "
            "process; close it first, or use engines in processes of their own"
        )
    try:
        with quiet_environment():
            from vllm import LLM

            llm = LLM(**arguments)
        left.started()
        return llm
    except BaseException as error:
        shut_down(None)
        left.started()
        left.put_back()
        _in_use.release()
        if isinstance(error, Exception) and not isinstance(error, EngineError | InputError):
            raise EngineError(f"vLLM cannot start: {_reason(error)}") from error
        raise


def _reason(error: BaseException) -> str:
    """The line of an exception chain that says most: the innermost message, first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "validation error" in lines[0] and len(lines) > 1:
        return lines[1]
    return typed_first_line(error)


def stop(llm: Any, left: GlobalState) -> None:
    """End an engine; everything is as before it started."""
    try:
        shut_down(llm)
    finally:
        left.put_back()
        _in_use.release()
