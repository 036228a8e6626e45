"""The parts of a transformers model, found by structure: its decoder layers, and the modules
between the last layer and the head. Nothing here depends on a model's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from lpserve.engine.hf.recording import Recording, hidden_of
from lpserve.engine.replay import same_tensor
from lpserve.errors import EngineError


def find_layers(
    model: nn.Module, num_layers: int, tokens: torch.Tensor
) -> tuple[list[nn.Module], str]:
    """The decoder layers and the last word of their list's module path."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    order: list[int] = []
    members = {id(m): name for name, modules in lists.items() for m in modules}
    handles = [
        module.register_forward_pre_hook(lambda module, args: order.append(id(module)))
        for modules in lists.values()
        for module in modules
    ]
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    fitting = [
        name
        for name, modules in lists.items()
        if [i for i in order if members[i] == name] == [id(m) for m in modules]
    ]
    # of nested lists (one part of each layer, say) the outermost drives the rest
    fitting = [n for n in fitting if not any(n.startswith(f"{other}.") for other in fitting)]
    if len(fitting) != 1:
        raise EngineError(
            f"{type(model).__name__}: found {len(fitting)} lists of {num_layers} decoder layers "
            "that run once each in order; need exactly one"
        )
    return list(lists[fitting[0]]), fitting[0].rsplit(".", 1)[-1]


def check_chain(seen: Recording) -> None:
    """Raise EngineError unless every layer took the very tensor that the one before returned."""
    for index in range(1, len(seen.inputs)):
        if seen.inputs[index] is not seen.outputs[index - 1]:
            raise EngineError(
                f"something happens between layers {index - 1} and {index}: "
                "the model's layers cannot be skipped one by one"
            )


def find_tail(seen: Recording, name: str) -> tuple[nn.Module, ...]:
    """The modules between the last layer and the decoder's output, usually a norm.

    Raises:
        EngineError: what happens there is not a chain of modules. `name` is the model's.
    """
    tail: list[nn.Module] = []
    current = seen.outputs[-1]
    decoder_output = hidden_of(seen.base_output)
    for module, taken, returned in seen.after:
        if same_tensor(current, decoder_output):
            break
        if taken is current or (
            taken.numel() == current.numel() and taken.data_ptr() == current.data_ptr()
        ):
            tail.append(module)
            current = returned
    if not same_tensor(current, decoder_output):
        raise EngineError(
            f"{name}: what happens between the last layer and the head is not a chain of modules"
        )
    return tuple(tail)


def check_state_dtype(seen: Recording, name: str) -> torch.dtype:
    """The dtype of the state that every layer returns; raises EngineError where they differ."""
    dtypes = list(dict.fromkeys(output.dtype for output in seen.outputs))
    if len(dtypes) > 1:
        raise EngineError(
            f"the layers of {name} return states of several dtypes "
            f"({', '.join(map(str, dtypes))}): its layers cannot be skipped one by one"
        )
    return dtypes[0]


def output_factory(base_output: Any) -> Callable[[torch.Tensor], Any]:
    """Makes what the decoder returns from a hidden state, as it returned `base_output`."""
    if isinstance(base_output, ModelOutput):
        kind = type(base_output)
        return lambda hidden: kind(last_hidden_state=hidden)  # pyright: ignore[reportCallIssue]
    return lambda hidden: (hidden,)
