"""A LayerStack over any decoder-only transformers model, found by structure.

The layer list is the module list whose members run once each, in order, every one taking the very
tensor that the one before it returned. The other arguments that the model hands its layers (rotary
tables, attention masks, positions) are recorded from real forward passes at batch 1 for each
padded length and replayed. Nothing here depends on a model's name.

A model is refused, with the reason, when a layer's arguments depend on the text or on an earlier
layer, when something happens between two layers, when attention looks ahead, or when replaying
does not give what the model gives.

Shapes: N windows, T tokens, B rows, d width, n scored targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from lpserve.data.windows import TokenWindows
from lpserve.engine.head import Head, WholeVocabulary, on_device, plain_nll
from lpserve.engine.replay import same_value
from lpserve.errors import EngineError

PARITY_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 1e-2}
"""Relative, summed NLL of a window, replayed against the model's own forward at start. Half
precision only has to show that the structure is right: rounding differs with the batch shape."""


class RecordedStack:
    """The model as embedding, layers and head. Use under `torch.inference_mode`."""

    def __init__(self, model: Any, *, head_chunk_bytes: int, compile_layers: bool = False) -> None:
        self.model = model
        self.base = model.base_model
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        config = model.config.get_text_config()
        self.num_players = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self.layers, self.list_name = _find_layers(model, self.num_players, self._probe_ids(8))
        self._run: list[Any] = list(self.layers)
        self._compiled = compile_layers
        if compile_layers:
            self._run = [torch.compile(layer) for layer in self.layers]
        self._calls: dict[int, list[_LayerCall]] = {}
        self._tail: tuple[nn.Module, ...] = ()
        self._reducer = Head(
            WholeVocabulary(self._logits, compiled=compile_layers),
            vocab_size=self.vocab_size,
            chunk_bytes=head_chunk_bytes,
            dtype=self.dtype,
            device=self.device,
        )
        self._inputs_survive = True
        self._returns_tuple = False

    def state_bytes(self, length: int) -> int:
        return length * self.width * self.dtype.itemsize

    def prepare(self, windows: TokenWindows) -> None:
        """Record and check this padded length on real windows; a no-op when it is known.

        Raises:
            EngineError: the model cannot be driven layer by layer.
        """
        if windows.length in self._calls:
            return
        tokens_NT = on_device(windows.tokens_NT[:2], self.device)
        self._record(tokens_NT[:1])
        with _compiling(type(self.model).__name__) if self._compiled else nullcontext():
            self._check_replay(windows.select(np.arange(min(2, windows.num_windows))))

    def embed(self, block: TokenWindows) -> torch.Tensor:
        captured: list[torch.Tensor] = []

        def first(hidden: torch.Tensor) -> torch.Tensor:
            captured.append(hidden)
            return hidden

        with self._layers_replaced([first] + [_same] * (self.num_players - 1)):
            self.base(input_ids=on_device(block.tokens_NT, self.device), use_cache=False)
        return captured[0]

    def run_player(self, player: int, state_BTd: torch.Tensor) -> torch.Tensor:
        call = self._calls[state_BTd.shape[1]][player]
        hidden = state_BTd if self._inputs_survive else state_BTd.clone()
        return _hidden(call.replay(self._run[player], hidden))

    def reduce(
        self,
        state_BTd: torch.Tensor,
        block: TokenWindows,
        extra_metrics: Sequence[str] = (),
        whole_NTd: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._reducer.reduce(state_BTd, block, extra_metrics, whole_NTd)

    def _logits(self, rows_nd: torch.Tensor) -> torch.Tensor:
        """`[n, V]`."""
        rows_1nd = rows_nd[None]
        for module in self._tail:
            rows_1nd = module(rows_1nd)
        return self._head(rows_1nd).squeeze(0)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Whatever the model does to its decoder's output: projection, scale, soft cap."""
        output = self._output_like(hidden)
        dummy = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        with _forward_replaced(self.base, lambda *args, **kwargs: output):
            return self.model(input_ids=dummy, use_cache=False).logits

    # -- recording ---------------------------------------------------------------------------

    def _record(self, tokens_1T: torch.Tensor) -> None:
        real = _run_recorded(self.model, self.base, self.layers, tokens_1T)
        _check_chain(real)
        self._returns_tuple = real.returns_tuple
        self._tail = self._find_tail(real)
        self._output_like = _output_factory(real.base_output)
        # other tokens, and no layer run at all: the arguments must not notice
        other = (tokens_1T + 1) % self.vocab_size
        with self._layers_replaced([_same] * self.num_players):
            blank = _run_recorded(self.model, self.base, self.layers, other)
        calls = []
        for index, (call, twin) in enumerate(zip(real.calls, blank.calls, strict=True)):
            name = call.first_difference(twin)
            if name is not None:
                raise EngineError(
                    f"layer {index} of {type(self.model).__name__} takes {name!r}, which depends "
                    "on the text or on earlier layers: its layers cannot be skipped one by one"
                )
            calls.append(call)
        self._calls[tokens_1T.shape[1]] = calls

    def _find_tail(self, real: _Recording) -> tuple[nn.Module, ...]:
        """The modules between the last layer and the decoder's output, usually a norm."""
        tail: list[nn.Module] = []
        current = real.outputs[-1]
        decoder_output = _hidden(real.base_output)
        for module, taken, returned in real.after:
            if torch.equal(current, decoder_output):
                break
            if taken is current or (
                taken.numel() == current.numel() and taken.data_ptr() == current.data_ptr()
            ):
                tail.append(module)
                current = returned
        if current.shape != decoder_output.shape or not torch.equal(current, decoder_output):
            raise EngineError(
                f"{type(self.model).__name__}: what happens between the last layer and the head "
                "is not a chain of modules"
            )
        return tuple(tail)

    @contextmanager
    def _layers_replaced(
        self, bodies: list[Callable[[torch.Tensor], torch.Tensor]]
    ) -> Iterator[None]:
        """Run `bodies[i](hidden)` in place of layer i."""

        def make(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                output = bodies[index](hidden)
                return (output,) if self._returns_tuple else output

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = make(index)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    # -- checks at start -----------------------------------------------------------------------

    def _check_replay(self, pair: TokenWindows) -> None:
        """All layers replayed at batch 2 must give the model's own NLL, and never look ahead."""
        tokens_NT = on_device(pair.tokens_NT, self.device)
        logits = self.model(input_ids=tokens_NT, use_cache=False).logits
        expected_N = plain_nll(logits, pair, self.device)
        state = self.embed(pair)
        for player in range(self.num_players):
            before = state.clone()
            after = self.run_player(player, state)
            if not torch.equal(before, state):  # a layer that writes into its input
                self._inputs_survive = False
                after = self.run_player(player, before)
            if after.shape != state.shape:
                raise EngineError(
                    f"layer {player} of {type(self.model).__name__} changes the state's shape "
                    f"from {list(state.shape)} to {list(after.shape)}"
                )
            state = after
        got_N = self.reduce(state, pair)[:, 0]
        tolerance = PARITY_TOLERANCE[str(self.dtype).removeprefix("torch.")]
        worst = float(((got_N - expected_N).abs() / expected_N.abs().clamp(min=1e-6)).max())
        if torch.isfinite(expected_N).all() and not worst <= tolerance:
            raise EngineError(
                f"{type(self.model).__name__}: layers replayed one by one score {worst:.1e} "
                f"(relative) off the model's own forward pass; tolerance {tolerance:.0e}"
            )
        changed = tokens_NT.clone()
        changed[:, -1] = (changed[:, -1] + 1) % self.vocab_size
        ahead = self.model(input_ids=changed, use_cache=False).logits[:, :-1]
        if torch.isfinite(logits).all() and not torch.allclose(
            ahead, logits[:, :-1], rtol=1e-2, atol=1e-2 * float(logits.abs().max())
        ):
            raise EngineError(f"{type(self.model).__name__} is not a decoder: it looks ahead")

    def _probe_ids(self, length: int) -> torch.Tensor:
        return (torch.arange(length, device=self.device)[None] + 2) % self.vocab_size


class _LayerCall:
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

    def first_difference(self, other: _LayerCall) -> str | None:
        """The name of the first argument in which two calls differ."""
        for position, (a, b) in enumerate(zip(self._args, other._args, strict=True), start=1):
            if not same_value(a, b):
                return f"argument {position}"
        for name, value in self._kwargs.items():
            if name not in other._kwargs or not same_value(value, other._kwargs[name]):
                return name
        return None


class _Recording:
    """What one forward pass did at the layers and after them."""

    def __init__(self) -> None:
        self.calls: list[_LayerCall] = []
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.after: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        self.base_output: Any = None
        self.returns_tuple = False


def _run_recorded(
    model: Any, base: nn.Module, layers: list[nn.Module], tokens: torch.Tensor
) -> _Recording:
    """One forward pass under hooks."""
    seen = _Recording()
    inside = {id(m) for layer in layers for m in layer.modules()}

    def before_layer(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            raise EngineError(f"{type(module).__name__} takes no hidden_states tensor")
        seen.inputs.append(hidden)
        seen.calls.append(_LayerCall(args, kwargs, hidden))

    def after_layer(module: nn.Module, args: Any, output: Any) -> None:
        seen.outputs.append(_hidden(output))
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


def _check_chain(seen: _Recording) -> None:
    for index in range(1, len(seen.inputs)):
        if seen.inputs[index] is not seen.outputs[index - 1]:
            raise EngineError(
                f"something happens between layers {index - 1} and {index}: "
                "the model's layers cannot be skipped one by one"
            )


def _find_layers(
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


def _output_factory(base_output: Any) -> Callable[[torch.Tensor], Any]:
    if isinstance(base_output, ModelOutput):
        kind = type(base_output)
        return lambda hidden: kind(last_hidden_state=hidden)  # pyright: ignore[reportCallIssue]
    return lambda hidden: (hidden,)


def _hidden(output: Any) -> torch.Tensor:
    """The hidden state of a layer's or decoder's output."""
    hidden = output[0] if isinstance(output, tuple | ModelOutput) else output
    if not isinstance(hidden, torch.Tensor):
        raise EngineError(f"a layer returned {type(hidden).__name__}, not a tensor")
    return hidden


def _same(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _without_caches(value: Any) -> Any:
    """A recorded KV cache would grow with every replay; layers take None instead."""
    return None if isinstance(value, Cache) else value


@contextmanager
def _compiling(name: str) -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    try:
        yield
    except TorchDynamoException as error:
        line = str(error).strip().splitlines()[0]
        raise EngineError(
            f"torch.compile cannot compile the layers of {name} ({line}): set compile_layers to "
            "false"
        ) from error


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
