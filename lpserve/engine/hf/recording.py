"""Forward passes of a transformers model that are watched at its layers.

A pass runs the model's own code up to its last layer and stops there. The layers run as they are,
or hand on the state that they are given; either way the arguments of every call are kept.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from lpserve.engine.calls import Slot, like_output
from lpserve.errors import EngineError, typed_first_line


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one layer's call. Containers are copies, so that what the model writes into
    them later is not seen; a KV cache, which would grow with every replay, is None."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        return cls(
            tuple(_kept(value) for value in args),
            {name: _kept(value) for name, value in kwargs.items()},
        )


@dataclass(slots=True)
class Recording:
    """What one forward pass did at the layers."""

    calls: list[Call] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)


class _Stop(Exception):
    """Ends a forward pass after the last layer."""


def record_layers(model: Any, layers: Sequence[nn.Module], tokens: torch.Tensor) -> Recording:
    """One forward pass with the layers as they are."""
    seen = Recording()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.calls.append(Call.of(args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen.outputs.append(output)
        if len(seen.outputs) == len(layers):
            raise _Stop

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        _run(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def record_around_layers(
    model: Any,
    layers: Sequence[nn.Module],
    tokens: torch.Tensor,
    slot: Slot,
    outputs: Sequence[Any],
) -> Recording:
    """One forward pass in which every layer hands on its state.

    Args:
        outputs: one output of each layer, whose form the ones here take.
    """
    seen = Recording()

    def body(index: int, args: Any, kwargs: Any) -> Any:
        seen.calls.append(Call.of(args, kwargs))
        if index == len(layers) - 1:
            raise _Stop
        return like_output(outputs[index], slot.of(args, kwargs))

    with layers_replaced(layers, body):
        _run(model, tokens)
    return seen


@contextmanager
def layers_replaced(
    layers: Sequence[nn.Module], body: Callable[[int, Any, Any], Any]
) -> Iterator[None]:
    """Run `body(i, args, kwargs)` in place of layer i."""

    def make(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: body(index, args, kwargs)

    for index, layer in enumerate(layers):
        layer.forward = make(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _run(model: Any, tokens: torch.Tensor) -> None:
    """A forward pass up to the last layer.

    Raises:
        EngineError: the model's own code fails.
    """
    with (
        suppress(_Stop),
        model_code(f"{type(model).__name__} fails on {list(tokens.shape)} tokens"),
    ):
        model(input_ids=tokens, use_cache=False)


@contextmanager
def model_code(failure: str) -> Iterator[None]:
    """Run a model's own code: whatever it raises, but for lack of memory, becomes an EngineError
    that begins with `failure`."""
    try:
        yield
    except (_Stop, EngineError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model's code may raise
        raise EngineError(f"{failure}: {typed_first_line(error)}") from error


def _kept(value: Any) -> Any:
    if isinstance(value, Cache):
        return None
    if type(value) in (tuple, list):
        return type(value)(_kept(item) for item in value)
    if is_dict(value):
        return type(value)({name: _kept(item) for name, item in value.items()})
    return value


def is_dict(value: Any) -> bool:
    """Whether an argument is a dictionary of arguments. transformers uses UserDict as well."""
    return type(value) in (dict, UserDict)
