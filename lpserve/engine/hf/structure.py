"""The decoder layers of a transformers model and the form of their states, found by structure.
Nothing here depends on a model's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lpserve.engine.calls import Slot, hidden_of
from lpserve.engine.hf.recording import (
    Call,
    Recording,
    model_code,
    record_around_layers,
    record_layers,
)
from lpserve.errors import EngineError


def find_layers(
    model: nn.Module, num_layers: int, tokens: torch.Tensor
) -> tuple[list[nn.Module], str]:
    """The decoder layers and the last word of their list's module path.

    They are the module list whose members run once each, in order. A list of `num_layers`, as the
    config counts them, comes first; failing that, the only list of another length.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    order: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: order.append(id(module)))
        for module in {id(m): m for modules in lists.values() for m in modules}.values()
    ]
    try:
        with model_code(f"{type(model).__name__} cannot read a text by itself"):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    in_order = []
    for name, modules in lists.items():
        members = [id(m) for m in modules]
        own = set(members)
        if [i for i in order if i in own] == members:
            in_order.append(name)
    # of nested lists (one part of each layer, say) the outermost drives the rest
    outermost = [n for n in in_order if not any(n.startswith(f"{o}.") for o in in_order)]
    fitting = [n for n in outermost if len(lists[n]) == num_layers]
    if not fitting:
        for name, modules in lists.items():
            if len(modules) == num_layers and any(id(m) in order for m in modules):
                _check_runs(
                    f"{type(model).__name__}: {name}", [order.count(id(m)) for m in modules]
                )
        fitting = outermost
    if len(fitting) != 1:
        raise EngineError(
            f"{type(model).__name__}: found {len(fitting)} lists of {num_layers} decoder layers "
            "that run once each in order; need exactly one"
        )
    return list(lists[fitting[0]]), fitting[0].rsplit(".", 1)[-1]


def _check_runs(name: str, times: list[int]) -> None:
    """Raise EngineError where layers of a list run not at all, or several times."""
    for layer, count in enumerate(times):
        if count != 1:
            often = f"{count} times" if count else "not at all"
            raise EngineError(
                f"{name}[{layer}] runs {often} on a text: its layers cannot be skipped one by one"
            )


def find_slot(seen: Recording) -> Slot:
    """The argument that is the hidden state: in every call, the very tensor that the layer before
    returned.

    Raises:
        EngineError: there is none, because something happens between two layers.
    """
    candidates = [Slot(key) for key in _tensors(seen.calls[0])]
    for index in range(1, len(seen.calls)):
        call, before = seen.calls[index], hidden_of(seen.outputs[index - 1])
        keys = set(_tensors(call))
        candidates = [
            slot
            for slot in candidates
            if slot.key in keys and slot.of(call.args, call.kwargs) is before
        ]
        if not candidates:
            raise EngineError(
                f"something happens between layers {index - 1} and {index}: "
                "the model's layers cannot be skipped one by one"
            )
    if not candidates:
        raise EngineError("the first layer takes no tensor")
    return candidates[0]


def _tensors(call: Call) -> Iterable[int | str]:
    for position, value in enumerate(call.args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield position
    for name, value in call.kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield name


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Where a model's states keep windows and tokens; ours keep them first, `[B, T, ...]`."""

    batch_axis: int
    time_axis: int

    def ours(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.movedim((self.batch_axis, self.time_axis), (0, 1)).contiguous()

    def theirs(self, state: torch.Tensor) -> torch.Tensor:
        return state.movedim((0, 1), (self.batch_axis, self.time_axis))


@dataclass(frozen=True, slots=True)
class Form:
    """How a model calls its layers."""

    slot: Slot
    outputs: tuple[Any, ...]
    """One output of each layer."""
    layout: StateLayout
    state_elements: int
    """Of one token."""


def find_form(model: Any, layers: list[nn.Module], vocab_size: int) -> Form:
    """Read the form of layer calls off two short texts of other lengths and numbers.

    Raises:
        EngineError: something happens between two layers; or no axis of the states counts tokens,
            or windows.
    """
    device = model.device
    rows, length = 1, 8

    def ids(rows: int, length: int) -> torch.Tensor:
        flat = torch.arange(rows * length, device=device) + 2
        return (flat % vocab_size).view(rows, length)

    seen = record_layers(model, layers, ids(rows, length))
    slot = find_slot(seen)
    more = record_around_layers(model, layers, ids(rows + 1, length + 1), slot, seen.outputs)
    one = slot.of(seen.calls[0].args, seen.calls[0].kwargs)
    two = slot.of(more.calls[0].args, more.calls[0].kwargs)
    axes = range(one.ndim)
    batch = [a for a in axes if (one.shape[a], two.shape[a]) == (rows, rows + 1)]
    time = [a for a in axes if (one.shape[a], two.shape[a]) == (length, length + 1)]
    if one.ndim != two.ndim or len(batch) != 1 or len(time) != 1:
        raise EngineError(
            f"the layers of {type(model).__name__} take states of shape {list(one.shape)} for "
            f"{rows} text of {length} tokens, {list(two.shape)} for {rows + 1} of {length + 1}: "
            "no state for each token that could be skipped one by one"
        )
    return Form(
        slot=slot,
        outputs=tuple(seen.outputs),
        layout=StateLayout(batch[0], time[0]),
        state_elements=one.numel() // length,
    )
