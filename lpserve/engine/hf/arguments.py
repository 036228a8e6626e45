"""What a model hands its layers beside the hidden state, and how to hand it to a layer again.

Three forward passes tell what an argument depends on: the real one on a text, and two in which
every layer hands on its state, on another text and on both texts together. A tensor that is the
same in all of them (rotary tables) is kept. One that only grows with the number of windows (a
mask, ALiBi's bias) is repeated for each. One that depends on the text but on no layer (the
embedding, in Zamba-2) is taken anew for every block of windows. What earlier layers computed is
left out where the layer gives the same without it (the last routing, where a layer ignores it), and
refused where it does not.

Shapes: B rows (k stacked masks times N windows).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch

from lpserve.engine.calls import hidden_of
from lpserve.engine.hf.recording import Call, Recording, is_dict
from lpserve.engine.hf.structure import Form
from lpserve.engine.replay import same_tensor, same_value
from lpserve.errors import EngineError

TEXT_TOLERANCE = 1e-3
"""Of a tensor computed from the text alone, relative to its largest value: products over batches of
other sizes round differently. What a layer adds is of another order; the replay is checked too."""

Path = tuple[int | str, ...]
"""Where a tensor lies in a call: position or name of the argument, then keys inside containers."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """A tensor for one window, equal for all windows: repeated along its first axis."""

    one: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Text:
    """A tensor that is taken from the block of windows at hand."""

    path: Path


class RowRepeater:
    """Tensors repeated for a micro-batch. Layers share most arguments: what they share is repeated
    once, and kept until another number is asked for."""

    def __init__(self) -> None:
        self._times = 0
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def repeated(self, tensor: torch.Tensor, times: int) -> torch.Tensor:
        if times == 1:
            return tensor
        if times != self._times:
            self._kept.clear()
            self._times = times
        found = self._kept.get(id(tensor))
        if found is None:
            if tensor.shape[0] == 1:
                many = tensor.expand(times, *tensor.shape[1:])
            else:
                many = tensor.repeat(times, *[1] * (tensor.ndim - 1))
            # the tensor is kept beside its copies, so that its id stays its own
            found = self._kept[id(tensor)] = (tensor, many)
        return found[1]

    def forget(self) -> None:
        self._kept.clear()


@dataclass(frozen=True, slots=True)
class LayerArguments:
    """The arguments of one layer, the hidden state left out, as templates."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    plain: bool
    """Nothing in them depends on the micro-batch."""

    def call(
        self,
        layer: Any,
        form: Form,
        hidden: torch.Tensor,
        num_rows: int,
        text: Call | None,
        repeater: RowRepeater,
    ) -> Any:
        """Run a layer.

        Args:
            hidden: in the model's own layout.
            num_rows: B.
            text: the layer's call in the block at hand, of N windows; B is a multiple of N.
        """
        if self.plain:
            args, kwargs = list(self.args), dict(self.kwargs)
        else:
            filled = _Filler(num_rows, text, form, repeater)
            args = [filled(value) for value in self.args]
            kwargs = {name: filled(value) for name, value in self.kwargs.items()}
        key = form.slot.key
        if isinstance(key, int):
            args.insert(key, hidden)
        else:
            kwargs[key] = hidden
        return layer(*args, **kwargs)


class _Filler:
    def __init__(self, num_rows: int, text: Call | None, form: Form, repeater: RowRepeater) -> None:
        self._num_rows, self._text, self._form = num_rows, text, form
        self._repeater = repeater

    def __call__(self, template: Any) -> Any:
        if isinstance(template, _Rows):
            return self._repeater.repeated(template.one, self._num_rows)
        if isinstance(template, _Text):
            assert self._text is not None
            state = self._form.slot.of(self._text.args, self._text.kwargs)
            windows = state.shape[self._form.layout.batch_axis]
            tensor = _at(self._text, template.path)
            return self._repeater.repeated(tensor, self._num_rows // windows)
        if type(template) in (tuple, list):
            return type(template)(self(item) for item in template)
        if is_dict(template):  # a new one: layers may write into it
            return type(template)({name: self(item) for name, item in template.items()})
        return template


def learn_arguments(
    name: str,
    form: Form,
    layers: Sequence[Any],
    real: Recording,
    other: Recording,
    both: Recording,
) -> list[LayerArguments]:
    """The arguments of every layer.

    Args:
        name: the model's, for messages.
        layers: the modules.
        real: of the real forward pass on a text x, one window.
        other: of a pass around the layers on a text y, one window.
        both: of a pass around the layers on x and y, two windows.

    Raises:
        EngineError: a layer needs what earlier layers computed, or what cannot be taken apart by
            windows.
    """
    return [
        _learn(f"layer {index} of {name}", form, layers[index], real, other, both, index)
        for index in range(len(layers))
    ]


def _learn(
    who: str,
    form: Form,
    layer: Any,
    real: Recording,
    other: Recording,
    both: Recording,
    index: int,
) -> LayerArguments:
    calls = real.calls[index], other.calls[index], both.calls[index]
    if len({len(call.args) for call in calls}) != 1 or len({*map(_names, calls)}) != 1:
        raise EngineError(f"{who} is called in other ways from text to text")
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    carried: list[int | str] = []
    for key in [*range(len(calls[0].args)), *calls[0].kwargs]:
        if key == form.slot.key:
            continue
        values = [_at(call, (key,)) for call in calls]
        try:
            template = _template(values[0], values[1], values[2], (key,))
        except _Carried:
            carried.append(key)
            template = values[1]  # what the model hands on when no layer has run
        if isinstance(key, int):
            args.append(template)
        else:
            kwargs[key] = template
    for key in carried:
        if not _ignored(layer, form, real, index, key, other.calls[index]):
            called = f"argument {key}" if isinstance(key, int) else repr(key)
            raise EngineError(
                f"{who} takes {called}, which earlier layers compute: its layers cannot be "
                "skipped one by one"
            )
    return LayerArguments(tuple(args), kwargs, plain=_is_plain([*args, *kwargs.values()]))


class _Carried(Exception):
    """An argument depends on earlier layers."""


def _template(real: Any, other: Any, both: Any, path: Path) -> Any:
    """How to make an argument, from its values in the three passes; raises _Carried."""
    if all(isinstance(value, torch.Tensor) for value in (real, other, both)):
        return _tensor_template(real, other, both, path)
    kinds = {type(value) for value in (real, other, both)}
    if kinds in ({tuple}, {list}) and len({len(value) for value in (real, other, both)}) == 1:
        items = zip(real, other, both, strict=True)
        return kinds.pop()(_template(*item, (*path, i)) for i, item in enumerate(items))
    if len(kinds) == 1 and is_dict(real) and set(real) == set(other) == set(both):
        kind = kinds.pop()
        return kind({k: _template(real[k], other[k], both[k], (*path, k)) for k in real})
    if same_value(real, other) and same_value(other, both):
        return other
    raise _Carried


def _tensor_template(
    real: torch.Tensor, other: torch.Tensor, both: torch.Tensor, path: Path
) -> Any:
    if same_tensor(other, both) and same_tensor(real, other):
        return other
    if other.ndim == 0 or both.shape != (2 * other.shape[0], *other.shape[1:]):
        raise _Carried
    first, second = both.split(other.shape[0])
    if same_tensor(real, other) and same_tensor(first, other) and same_tensor(second, other):
        return _Rows(other)
    if real.shape == other.shape and _close(first, real) and _close(second, other):
        return _Text(path)
    raise _Carried


def _ignored(
    layer: Any, form: Form, real: Recording, index: int, key: int | str, blank: Call
) -> bool:
    """Whether a layer returns the same state with the argument as it is when no layer has run."""
    call = real.calls[index]
    args, kwargs = list(call.args), dict(call.kwargs)
    if isinstance(key, int):
        args[key] = blank.args[key]
    else:
        kwargs[key] = blank.kwargs[key]
    args = [copy(value) if is_dict(value) else value for value in args]
    kwargs = {k: copy(value) if is_dict(value) else value for k, value in kwargs.items()}
    state = form.slot.of(call.args, call.kwargs).clone()
    if isinstance(form.slot.key, int):
        args[form.slot.key] = state
    else:
        kwargs[form.slot.key] = state
    try:
        got = hidden_of(layer(*args, **kwargs))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever a layer may raise that cannot do without it
        return False
    return same_tensor(got, hidden_of(real.outputs[index]))


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = max(TEXT_TOLERANCE, 4 * torch.finfo(a.dtype).eps)
    largest = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * largest)


def _is_plain(values: list[Any]) -> bool:
    """Whether templates can be handed to a layer as they are: no tensor to fill in, and no
    container that a layer might write into."""
    return not any(
        isinstance(value, _Rows | _Text | list)
        or is_dict(value)
        or (isinstance(value, tuple) and not _is_plain(list(value)))
        for value in values
    )


def _names(call: Call) -> tuple[str, ...]:
    return tuple(sorted(call.kwargs))


def _at(call: Call, path: Path) -> Any:
    first, *rest = path
    value: Any = call.args[first] if isinstance(first, int) else call.kwargs[first]
    for key in rest:
        value = value[key]
    return value
