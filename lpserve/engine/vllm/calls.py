"""How a vLLM model's layers are called: their arguments, recorded, and calls of one or all.

Names nothing of vLLM. Shapes: B rows, T tokens, n = B * T flat tokens, d width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from lpserve.engine.head import Vocabulary
from lpserve.engine.replay import same_value
from lpserve.engine.vllm.tap import LayerTap
from lpserve.errors import EngineError

_MAX_CALLS = 16
"""Batch shapes whose recorded arguments are kept."""


class Link(Protocol):
    """To the neighbours in a pipeline of ranks; a rank that holds all layers is first and last."""

    is_first: bool
    is_last: bool

    def send(self, tensor: torch.Tensor) -> None: ...

    def receive(self, shape: torch.Size) -> torch.Tensor: ...


class DrivenModel(Protocol):
    """What a stack needs of a model; `worker/` makes one of vLLM's."""

    tap: LayerTap
    name: str
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    tensor_parallel_size: int
    length: int
    """Tokens of each window in the calls that follow."""

    @property
    def link(self) -> Link: ...

    def session(self) -> AbstractContextManager[None]: ...

    def run(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor: ...

    def vocabulary(self) -> Vocabulary: ...


class Recorded:
    """Arguments of every layer for one batch shape, hidden state and residual left out."""

    def __init__(self, ids: torch.Tensor, positions: torch.Tensor, length: int) -> None:
        self.ids = ids
        self.positions = positions
        self.length = length
        self.hidden = torch.empty(0)
        self.residual: torch.Tensor | None = None
        self.arguments: list[dict[str, Any]] = []


class LayerCalls:
    """The layers of one rank, called one by one as their model calls them."""

    def __init__(self, model: DrivenModel) -> None:
        self._model, self._tap = model, model.tap
        self.num_layers = len(model.tap.layers)
        self._kept: dict[tuple[int, int], Recorded] = {}

    def layer(
        self,
        record: Recorded,
        layer: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        module: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer, or a half of it, returns: hidden state and residual."""
        self._model.length = record.length
        arguments = record.arguments[layer] | {"hidden_states": hidden}
        if self._tap.takes_residual[layer]:
            arguments["residual"] = residual
        output: Any = self._tap.run(layer, arguments, module)
        if not isinstance(output, tuple):
            return output, output
        left = output[-1] if self._tap.takes_residual[layer] else output[0]
        # some take a residual by habit, do not read it and leave none (Gemma-4's)
        return output[0], torch.zeros_like(output[0]) if left is None else left

    def tail(
        self, record: Recorded, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """What the model does after its last layer, up to the head: usually a norm."""

        def pass_on(index: int, arguments: dict[str, Any]) -> Any:
            ends = index == self.num_layers - 1
            taken = hidden if ends else arguments["hidden_states"]
            if ends and residual is not None:
                arguments = arguments | {"residual": residual}
            return self._tap.identity_output(index, taken, arguments, ends=ends)

        with self._tap.handled(pass_on):
            return self._model.run(record.ids, record.positions)

    def recorded(self, length: int, rows: int) -> Recorded:
        if (length, rows) not in self._kept:
            ids = torch.zeros(length * rows, dtype=torch.long, device=self._model.device)
            self.record(ids, length, rows)
        return self._kept[length, rows]

    def record(self, ids: torch.Tensor, length: int, rows: int) -> Recorded:
        """One forward in which no layer does anything: embedding, and every layer's arguments."""
        device = self._model.device
        positions = torch.arange(length, device=device).repeat(rows)
        record = Recorded(ids, positions, length)
        self._model.length = length
        handed: list[torch.Tensor] = []  # what the layer before returned

        def pass_on(index: int, arguments: dict[str, Any]) -> Any:
            hidden = arguments.pop("hidden_states")
            residual = arguments.pop("residual", None)
            if not index:
                record.hidden, record.residual = hidden, residual
            elif (
                not handed
                or hidden is not handed[0]
                or (self._tap.takes_residual[index] and residual is not handed[-1])
            ):
                raise EngineError(
                    f"something happens between layers {index - 1} and {index} of "
                    f"{self._model.name}: its layers cannot be skipped one by one"
                )
            record.arguments.append(arguments)
            hidden = hidden.view_as(hidden)  # a new object, so that the next layer shows it
            if not self._tap.takes_residual[index]:
                handed[:] = [hidden]
                return self._tap.with_beside(index, hidden, arguments)
            residual = torch.zeros_like(hidden) if residual is None else residual.view_as(residual)
            handed[:] = [hidden, residual]
            return hidden, residual

        with self._tap.handled(pass_on):
            final = self._model.run(ids, positions)
        if self._tap.returns_beside:
            _check_unread(self._model.name, record, final)
        if len(record.arguments) != self.num_layers:
            raise EngineError(
                f"{self._model.name} ran {len(record.arguments)} of its {self.num_layers} layers"
            )
        if len(self._kept) >= _MAX_CALLS:
            self._kept.clear()
        self._kept[length, rows] = record
        return record

    def next(
        self, record: Recorded, player: int, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next layer, or what follows the last one, on copies."""
        copy = None if residual is None else residual.clone()
        if player < self.num_layers:
            return self.layer(record, player, hidden.clone(), copy)
        final = self.tail(record, hidden.clone(), copy)
        return final, torch.zeros_like(final)


def check_text_alone_differs(model: str, record: Recorded, other: Recorded) -> None:
    """Raise EngineError when an argument notices other tokens."""
    for index, (a, b) in enumerate(zip(record.arguments, other.arguments, strict=True)):
        for name, value in a.items():
            if not same_value(value, b.get(name)):
                raise EngineError(
                    f"layer {index} of {model} takes {name!r}, which depends on the text: its "
                    "layers cannot be skipped one by one"
                )


def _check_unread(model: str, record: Recorded, final: Any) -> None:
    """Raise EngineError where what layers returned beside their state (NaN) was read."""
    for value in (final, *(a for each in record.arguments for a in each.values())):
        if isinstance(value, torch.Tensor) and value.isnan().any():
            raise EngineError(
                f"{model} reads what its layers return beside their state: its layers cannot be "
                "skipped one by one"
            )
