"""Decoder layers patched once, so that a mask can skip them or a handler can run them one by one.

Names nothing of vLLM: what a layer is comes from `worker/`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lpserve.errors import EngineError
from lpserve.model.players import FULL_LAYER

Handler = Callable[[int, dict[str, Any]], Any]
"""(index of a layer on this rank, its arguments by name) -> what the layer returns."""


class LayerTap:
    """The layers of one rank, patched once: skipped by mask, or handed to a handler."""

    def __init__(
        self, layers: list[nn.Module], first: int, before_layer: Callable[[], None]
    ) -> None:
        self.layers = layers
        self.first = first
        """Index of the first of them in the model."""
        self.kept: list[list[str]] = [[FULL_LAYER]] * len(layers)
        """The parts of each layer that run in requests; empty: it is skipped."""
        self.halves: dict[int, Mapping[str, nn.Module]] = {}
        """Of layers that are run in halves, the layer with one part alone, by that part."""
        self.calls = [0] * len(layers)
        """Times that each layer's own forward ran."""
        self._before_layer = before_layer
        self._handler: Handler | None = None
        self._originals = [layer.forward for layer in layers]
        self._signatures = [inspect.signature(original) for original in self._originals]
        self.takes_residual = ["residual" in s.parameters for s in self._signatures]
        self._num_beside: list[int | None] = [None] * len(layers)
        """How many values each layer returns beside its state; None until it ran once."""
        for index, layer in enumerate(layers):
            if hasattr(layer, "_lpserve_index"):
                raise EngineError(f"layer {first + index} is patched already")
            layer.forward = self._make(index)
            layer._lpserve_index = index  # pyright: ignore[reportArgumentType]

    @property
    def returns_beside(self) -> bool:
        """Whether a layer is known to return more than its state, other than a residual."""
        return any(self._num_beside)

    def read_mask(self) -> list[list[str]]:
        """What runs, as the patches see it; refuses when a patch is not in place any more."""
        for index, layer in enumerate(self.layers):
            if getattr(layer.forward, "_lpserve_tap", None) is not self:
                raise EngineError(f"layer {self.first + index} lost its patch")
        return list(self.kept)

    def skips(self, index: int) -> bool:
        """Whether the mask leaves this layer out (requests)."""
        return not self.kept[index]

    def run(self, index: int, arguments: dict[str, Any], module: nn.Module | None = None) -> Any:
        """The layer's own forward, or that of a half of it."""
        self.calls[index] += 1
        if module is None or module is self.layers[index]:
            return self._originals[index](**arguments)
        return module.forward(**arguments)

    def _own_forward(self, index: int) -> Callable[..., Any]:
        """What runs of a layer in requests."""
        kept = self.kept[index]
        alone = self.halves.get(index)
        if alone is None or len(kept) == len(alone):
            return self._originals[index]
        return alone[kept[0]].forward

    @contextmanager
    def handled(self, handler: Handler) -> Iterator[None]:
        """Call `handler(index, arguments by name)` in place of the layers."""
        self._handler = handler
        try:
            yield
        finally:
            self._handler = None

    def _make(self, index: int) -> Callable[..., Any]:
        signature = self._signatures[index]
        last = index == len(self.layers) - 1

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._before_layer()
            if self._handler is not None:
                return self._handler(index, _by_name(signature, args, kwargs))
            if not self.skips(index):
                self.calls[index] += 1
                output = self._own_forward(index)(*args, **kwargs)
                if not self.takes_residual[index]:
                    self._num_beside[index] = _count_beside(output)
                return output
            arguments = _by_name(signature, args, kwargs)
            return self.identity_output(index, arguments["hidden_states"], arguments, ends=last)

        forward._lpserve_tap = self  # pyright: ignore[reportFunctionMemberAccess]
        return forward

    def identity_output(
        self, index: int, hidden: torch.Tensor, arguments: dict[str, Any], *, ends: bool
    ) -> Any:
        """What a layer that does nothing returns. The last one owes the norm a residual."""
        if not self.takes_residual[index]:
            return self.with_beside(index, hidden, arguments)
        residual = arguments["residual"]
        return hidden, torch.zeros_like(hidden) if ends and residual is None else residual

    def with_beside(self, index: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> Any:
        """A state in the form that a layer without a residual returns it.

        What such layers return beside their state is not read by the models known (StableLM's).
        It is NaN here: no score could hide that a model reads it.
        """
        count = self._num_beside[index]
        if count is None:  # it has not run yet, and what it returns is only known then
            copy = {"hidden_states": hidden.clone()}
            count = _count_beside(self._originals[index](**(arguments | copy)))
            self._num_beside[index] = count
        return (hidden, *[torch.full_like(hidden, torch.nan)] * count) if count else hidden


def _count_beside(output: Any) -> int:
    return len(output) - 1 if isinstance(output, tuple) else 0


def _by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name, `**kwargs` of the layer spread out."""
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise EngineError(f"a layer takes its arguments as *{name}")
        else:
            named[name] = value
    if not isinstance(named.get("hidden_states"), torch.Tensor):
        raise EngineError("a layer takes no tensor named hidden_states")
    named.setdefault("residual", None)
    if "residual" not in signature.parameters:
        named.pop("residual")
    return named
