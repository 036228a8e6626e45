"""One forward pass of a transformers model under hooks: the arguments of every layer's call, the
hidden states between layers, and what follows the last one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from lpserve.engine.replay import same_value
from lpserve.errors import EngineError


class LayerCall:
    """The arguments of one layer's call, the hidden state left out."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor) -> None:
        self._by_position = bool(args) and args[0] is hidden
        self._args = tuple(_without_caches(a) for a in args[1:]) if self._by_position else ()
        self._kwargs = {
            name: _without_caches(value)
            for name, value in kwargs.items()
            if self._by_position or name != "hidden_states"
        }

    def replay(self, layer: Any, hidden: torch.Tensor) -> Any:
        if self._by_position:
            return layer(hidden, *self._args, **self._kwargs)
        return layer(hidden_states=hidden, **self._kwargs)

    def first_difference(self, other: LayerCall) -> str | None:
        """The name of the first argument in which two calls differ."""
        for position, (a, b) in enumerate(zip(self._args, other._args, strict=True), start=1):
            if not same_value(a, b):
                return f"argument {position}"
        for name, value in self._kwargs.items():
            if name not in other._kwargs or not same_value(value, other._kwargs[name]):
                return name
        return None


class Recording:
    """What one forward pass did at the layers and after them."""

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.after: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        self.base_output: Any = None
        self.returns_tuple = False


def record_forward(
    model: Any, base: nn.Module, layers: list[nn.Module], tokens: torch.Tensor
) -> Recording:
    """One forward pass under hooks."""
    seen = Recording()
    inside = {id(m) for layer in layers for m in layer.modules()}

    def before_layer(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            raise EngineError(f"{type(module).__name__} takes no hidden_states tensor")
        seen.inputs.append(hidden)
        seen.calls.append(LayerCall(args, kwargs, hidden))

    def after_layer(module: nn.Module, args: Any, output: Any) -> None:
        seen.outputs.append(hidden_of(output))
        seen.returns_tuple = isinstance(output, tuple)

    def after_other(module: nn.Module, args: Any, output: Any) -> None:
        if len(seen.outputs) == len(layers) and args and isinstance(output, torch.Tensor):
            seen.after.append((module, args[0], output))

    def after_base(module: nn.Module, args: Any, output: Any) -> None:
        seen.base_output = output

    handles = [base.register_forward_hook(after_base)]
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(before_layer, with_kwargs=True))
        handles.append(layer.register_forward_hook(after_layer))
    for module in base.modules():
        if id(module) not in inside and not list(module.children()):
            handles.append(module.register_forward_hook(after_other))
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state of a layer's or decoder's output."""
    hidden = output[0] if isinstance(output, tuple | ModelOutput) else output
    if not isinstance(hidden, torch.Tensor):
        raise EngineError(f"a layer returned {type(hidden).__name__}, not a tensor")
    return hidden


def _without_caches(value: Any) -> Any:
    """A recorded KV cache would grow with every replay; layers take None instead."""
    return None if isinstance(value, Cache) else value
