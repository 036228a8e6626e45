"""Arguments and outputs of a module's call, whatever form a model gives them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lpserve.errors import EngineError


@dataclass(frozen=True, slots=True)
class Slot:
    """Which argument of a module's call is the hidden state: a position, or a name."""

    key: int | str

    def of(self, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
        return args[self.key] if isinstance(self.key, int) else kwargs[self.key]


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state of a module's output: the output, or the first of several."""
    hidden: Any = output
    if isinstance(output, OrderedDict) and output:  # transformers' ModelOutput
        hidden = next(iter(output.values()))
    elif isinstance(output, tuple | list) and len(output) > 0:
        hidden = output[0]  # pyright: ignore[reportGeneralTypeIssues]
    if not isinstance(hidden, torch.Tensor):
        raise EngineError(f"a layer returned {type(hidden).__name__}, not a tensor")
    return hidden


def like_output(output: Any, hidden: torch.Tensor) -> Any:
    """What a module returns when its state is `hidden`: of the form of `output`, with None for
    whatever else that holds."""
    if isinstance(output, torch.Tensor):
        return hidden
    if isinstance(output, OrderedDict):
        first, *others = output.keys()
        return type(output)(**{first: hidden}, **dict.fromkeys(others))
    return type(output)([hidden, *[None] * (len(output) - 1)])
