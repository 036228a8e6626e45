"""Attention and feed-forward of a decoder layer apart, found by structure and proved by numbers.

A layer's parts are its child modules that hold matrices. Those that let a token see other tokens
are its mixer (attention, a state-space model, a convolution); the others are its feed-forward part
(an MLP, experts). A part is absent when every module of it returns zero, so that whatever the layer
does with the result (a norm behind it, a multiplier, a router's extra output) still sees what an
absent part means. A module that adds the layer's residual to its result (Bloom's) returns the
residual. A half of a layer is a copy of the layer that shares all weights and holds
`Absent` modules in place of the other part.

Most layers are sequential: the mixer's half, then the feed-forward half, is the layer. In a
parallel layer both parts read the same input: its halves carry the mixer's result beside the state,
and a third step adds both up. What a layer is, is found by running it on real states; where neither
holds, the layer is refused.

Shapes: B rows, T tokens, d width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lpserve.engine.calls import Slot, hidden_of, like_output
from lpserve.engine.replay import same_tensor
from lpserve.errors import EngineError
from lpserve.model.players import ATTENTION, MLP

HALVES_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Of a state made by a layer's halves, as a share of what the layer changes of a typical token. A
layer that is of another form is off by the size of a part's effect."""
_ROUNDINGS = 8.0  # of a token's largest number, which sums in another order may differ by


@dataclass(frozen=True, slots=True)
class _Seen:
    """One call of a layer's child module."""

    output: Any
    residual: Slot | None
    """The argument that may be the layer's residual: the only one beside the first that has the
    shape of the output."""


class Absent(nn.Module):
    """Stands for a module that is left out: returns zeros in the form of its output.

    Args:
        output: one output of the module.
        residual: the argument that it adds to its result, which is returned in place of zeros.
    """

    def __init__(self, output: Any, residual: Slot | None = None) -> None:
        super().__init__()
        self._output = like_output(output, hidden_of(output)[:0])
        self._width = hidden_of(output).shape[-1]
        self._residual = residual

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._residual is not None:
            return like_output(self._output, self._residual.of(args, kwargs))
        given = next((tensor for _, tensor in _tensors(args, kwargs)), None)
        if given is None:
            raise EngineError("a part of the layer is given no state")
        template = hidden_of(self._output)
        zeros = template.new_zeros((*given.shape[:-1], self._width))
        return like_output(self._output, zeros)

    @property
    def form(self) -> dict[str, Any] | None:
        """What `lpserve.hf` needs to stand for the module where its weights are not at hand: the
        result's width, how many others come with it (None: it comes alone, not in a tuple), and the
        argument that is its residual. None: the output is of a class of the model's own."""
        alone = isinstance(self._output, torch.Tensor)
        if not alone and type(self._output) is not tuple:
            return None
        return {
            "width": self._width,
            "others": None if alone else len(self._output) - 1,
            "residual": None if self._residual is None else self._residual.key,
        }


class Given(nn.Module):
    """Stands for a module whose result is known: returns `value` in the form of its output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = like_output(output, hidden_of(output)[:0])
        self.value: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.value is not None
        return like_output(self._output, self.value)


class Kept(nn.Module):
    """Runs a module and keeps what it returned in `value`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.value: torch.Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        self.value = hidden_of(output)
        return output


Modules = Mapping[str, Sequence[str]]
"""Part of a layer -> the layer's child modules that are it."""
Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""Calls a module as the layer is called, on a state in the model's own layout; returns the state
after it."""


@dataclass(frozen=True, slots=True)
class SequentialHalves:
    """Halves that follow one another: each takes the state and returns it."""

    mixer: nn.Module
    feed_forward: nn.Module
    mixer_first: bool
    modules: Modules
    absent: Mapping[str, Absent]
    """What stands for each module that is left out."""
    alone: Mapping[str, nn.Module]
    """The layer with one part alone, by that part; it may be called in any way that the layer is
    called in."""


class ParallelHalves:
    """Halves that read the same input. The state carries the mixer's result, zero at first."""

    def __init__(
        self,
        keeping: nn.Module,
        kept: Kept,
        adding: nn.Module,
        ending: nn.Module,
        given: Given,
        modules: Modules,
        absent: Mapping[str, Absent],
        alone: Mapping[str, nn.Module],
    ) -> None:
        self.modules, self.absent = modules, absent
        self.alone = alone
        """As of `SequentialHalves`."""
        self._keeping, self._kept = keeping, kept
        self._adding, self._ending, self._given = adding, ending, given

    def mixed(self, run: Run, hidden: torch.Tensor) -> torch.Tensor:
        """The mixer's result on a state."""
        run(self._keeping, hidden)
        assert self._kept.value is not None
        return self._kept.value

    def added(
        self, run: Run, hidden: torch.Tensor, mixed: torch.Tensor, *, feed_forward: bool
    ) -> torch.Tensor:
        """The layer's state from the mixer's result, with the feed-forward part or without."""
        self._given.value = mixed
        try:
            return run(self._adding if feed_forward else self._ending, hidden)
        finally:
            self._given.value = None


Halves = SequentialHalves | ParallelHalves


def find_halves(
    who: str,
    layer: nn.Module,
    run: Run,
    hidden: torch.Tensor,
    time_axis: int,
    *,
    lean: bool = True,
) -> Halves:
    """The halves of a layer.

    Args:
        who: the layer, for messages.
        run: calls the layer, or a copy of it, on a state.
        hidden: a real state that enters the layer, in the model's own layout.
        time_axis: the axis of its tokens; there are two at least.
        lean: whether halves leave out what works for the absent part alone.

    Raises:
        EngineError: the layer does not consist of a mixer and a feed-forward part, or cannot be
            taken apart.
    """
    expected = run(layer, hidden.clone())
    if not (hidden.isfinite().all() and expected.isfinite().all()):
        raise EngineError(f"{who} gives NaN or infinity: its parts cannot be told apart")
    seen = _children(who, layer, run, hidden)
    absent = _absent(who, layer, run, hidden, expected, seen)
    mixer, feed_forward = _parts(who, layer, run, hidden, absent, time_axis)
    modules = {ATTENTION: mixer, MLP: feed_forward}

    def without(*names: str) -> nn.Module:
        return with_children(layer, {name: absent[name] for name in names})

    halves = [without(*feed_forward), without(*mixer)]
    for first, second, mixer_first in ((*halves, True), (*reversed(halves), False)):
        if _close(run(second, run(first, hidden.clone())), expected, hidden):
            alone: dict[str, nn.Module] = {ATTENTION: halves[0], MLP: halves[1]}
            if lean:
                halves = [_without_idle(half, run, hidden) for half in halves]
            return SequentialHalves(halves[0], halves[1], mixer_first, modules, absent, alone)
    parallel = _parallel(layer, modules, seen, absent)
    if parallel is not None:
        mixed = parallel.mixed(run, hidden.clone())
        if mixed.shape == hidden.shape and _close(
            parallel.added(run, hidden.clone(), mixed, feed_forward=True), expected, hidden
        ):
            return parallel
    raise EngineError(
        f"{who}: its attention ({', '.join(mixer)}) and its feed-forward part "
        f"({', '.join(feed_forward)}) neither follow one another nor stand side by side, so they "
        "cannot be dropped apart"
    )


def with_children(layer: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a module with other children; it shares all else, weights too."""
    changed = copy.copy(layer)
    changed.__dict__.pop("forward", None)  # one that was patched would run the original
    changed._modules = {**layer._modules, **children}  # a copy shares the dictionary itself
    return changed


def _children(who: str, layer: nn.Module, run: Run, hidden: torch.Tensor) -> dict[str, _Seen]:
    """The children that hold matrices, in the order in which they run."""
    seen: dict[str, _Seen] = {}
    names = [
        name
        for name, child in layer.named_children()
        # vLLM packs matrices away on a CPU, and leaves an empty parameter
        if any(weight.ndim > 1 or not weight.numel() for weight in child.parameters())
    ]

    def keep(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            shape = hidden_of(output).shape
            _, *more = _tensors(args, kwargs)
            fitting = [Slot(key) for key, value in more if value.shape == shape]
            seen[name] = _Seen(output, fitting[0] if len(fitting) == 1 else None)

        return hook

    handles = [
        layer.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
        for name in names
    ]
    try:
        run(layer, hidden.clone())
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) < 2:
        found = f"{', '.join(seen)} alone" if seen else "no module with matrices"
        raise EngineError(
            f"{who} consists of {found}, not of attention (or another mixer) and a feed-forward "
            "part"
        )
    return seen


def _absent(
    who: str,
    layer: nn.Module,
    run: Run,
    hidden: torch.Tensor,
    expected: torch.Tensor,
    seen: dict[str, _Seen],
) -> dict[str, Absent]:
    """Stand-ins with which the layer hands on its state: modules that return zeros, or else those
    that return their residual."""
    for with_residual in (False, True):
        absent = {
            name: Absent(one.output, one.residual if with_residual else None)
            for name, one in seen.items()
        }
        # the same difference as if the layer had not changed the state
        nothing = run(with_children(layer, absent), hidden.clone())
        if _close(nothing, hidden, expected):
            return absent
    raise EngineError(
        f"{who} changes its state even when {', '.join(seen)} give zero: its attention and "
        "feed-forward part cannot be dropped apart"
    )


def _parts(
    who: str,
    layer: nn.Module,
    run: Run,
    hidden: torch.Tensor,
    absent: dict[str, Absent],
    time_axis: int,
) -> tuple[list[str], list[str]]:
    """Names of the children that let a token see others, and of the rest.

    A state that is not a number at the first token spreads through a mixer to other tokens, and
    through nothing else.
    """
    mixer: list[str] = []
    rest: list[str] = []
    for name in absent:
        alone = with_children(layer, {n: one for n, one in absent.items() if n != name})
        spoilt = hidden.clone()
        spoilt.select(time_axis, 0).fill_(torch.nan)
        others = run(alone, spoilt).narrow(time_axis, 1, hidden.shape[time_axis] - 1)
        (rest if others.isfinite().all() else mixer).append(name)
    if not mixer or not rest:
        missing = "feed-forward part" if mixer else "part that by itself lets a token see others"
        raise EngineError(f"{who} ({', '.join(absent)}) has no {missing}")
    return mixer, rest


def _without_idle(half: nn.Module, run: Run, hidden: torch.Tensor) -> nn.Module:
    """A half without modules that work for the absent part alone, a norm before it say: what
    handing their input on instead does not change, bit for bit."""
    expected = run(half, hidden.clone())
    for name, child in list(half.named_children()):
        if isinstance(child, Absent | nn.Identity) or not any(True for _ in child.parameters()):
            continue
        tried = with_children(half, {name: nn.Identity()})
        try:
            got = run(tried, hidden.clone())
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # whatever a layer may raise that cannot do without it
            continue
        if same_tensor(got, expected):
            half = tried
    return half


def _parallel(
    layer: nn.Module,
    modules: Modules,
    seen: dict[str, _Seen],
    absent: dict[str, Absent],
) -> ParallelHalves | None:
    """The halves of a parallel layer, if its mixer is one module."""
    mixer, feed_forward = modules[ATTENTION], modules[MLP]
    if len(mixer) != 1:
        return None
    kept, given = Kept(layer.get_submodule(mixer[0])), Given(seen[mixer[0]].output)
    idle = {name: absent[name] for name in feed_forward}
    return ParallelHalves(
        with_children(layer, {mixer[0]: kept, **idle}),
        kept,
        with_children(layer, {mixer[0]: given}),
        with_children(layer, {mixer[0]: given, **idle}),
        given,
        modules,
        absent,
        {
            ATTENTION: with_children(layer, idle),
            MLP: with_children(layer, {name: absent[name] for name in mixer}),
        },
    )


def _close(got: torch.Tensor, wanted: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a state is the one that is wanted, and not merely near it.

    Some tokens have numbers a thousand times those of others: rounding is measured against each
    token's own, and all else against what lies between the state that is wanted and another one.
    """
    if got.shape != wanted.shape:
        return False
    dtype = got.dtype
    got, wanted, other = (state.flatten(0, -2).double() for state in (got, wanted, other))
    typical = (wanted - other).square().mean(-1).sqrt().median()
    rounding = _ROUNDINGS * torch.finfo(dtype).eps * wanted.abs().amax(-1, keepdim=True)
    return bool(((got - wanted).abs() <= rounding + HALVES_TOLERANCE[dtype] * typical).all())


def _tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[int | str, Any]]:
    """The arguments that are tensors of numbers with a fraction, by position or name."""
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield key, value
