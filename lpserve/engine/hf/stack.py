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

from lpserve.data.windows import TokenWindows
from lpserve.engine.head import Head, LocalVocabulary, on_device, plain_nll
from lpserve.engine.hf.recording import LayerCall, hidden_of, record_forward
from lpserve.engine.hf.structure import (
    check_chain,
    check_state_dtype,
    find_layers,
    find_tail,
    output_factory,
)
from lpserve.errors import EngineError, first_line

PARITY_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 1e-2}
"""Relative, summed NLL of a window, replayed against the model's own forward at start. Half
precision only has to show that the structure is right: rounding differs with the batch shape."""


class RecordedStack:
    """The model as embedding, layers and head. Use under `torch.inference_mode`."""

    def __init__(self, model: Any, *, head_chunk_bytes: int, compile_layers: bool = False) -> None:
        self.model = model
        self.base = model.base_model
        self.dtype: torch.dtype = model.dtype
        self.state_dtype: torch.dtype = model.dtype
        """Measured by `prepare`."""
        self.device: torch.device = model.device
        config = model.config.get_text_config()
        self.num_players = int(config.num_hidden_layers)
        self.width = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self.layers, self.list_name = find_layers(model, self.num_players, self._probe_ids(8))
        self._run: list[Any] = list(self.layers)
        self._compiled = compile_layers
        if compile_layers:
            self._run = [torch.compile(layer) for layer in self.layers]
        self._calls: dict[int, list[LayerCall]] = {}
        self._tail: tuple[nn.Module, ...] = ()
        self._reducer = Head(
            LocalVocabulary(self._logits, compiled=compile_layers),
            vocab_size=self.vocab_size,
            chunk_bytes=head_chunk_bytes,
            dtype=self.dtype,
            device=self.device,
        )
        self._inputs_survive = True
        self._returns_tuple = False

    def state_bytes(self, length: int) -> int:
        return length * self.width * self.state_dtype.itemsize

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

        with self._layers_replaced([first] + [_same_state] * (self.num_players - 1)):
            self.base(input_ids=on_device(block.tokens_NT, self.device), use_cache=False)
        return captured[0]

    def run_player(self, player: int, batch: torch.Tensor) -> torch.Tensor:
        call = self._calls[batch.shape[1]][player]
        hidden = batch if self._inputs_survive else batch.clone()
        return hidden_of(call.replay(self._run[player], hidden))

    def reduce(
        self,
        batch: torch.Tensor,
        block: TokenWindows,
        extra_metrics: Sequence[str] = (),
        full_NTd: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._reducer.reduce(batch, block, extra_metrics, full_NTd)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, V]`."""
        rows_1nd = rows[None]
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
        real = record_forward(self.model, self.base, self.layers, tokens_1T)
        check_chain(real)
        self.state_dtype = check_state_dtype(real, type(self.model).__name__)
        self._returns_tuple = real.returns_tuple
        self._tail = find_tail(real, type(self.model).__name__)
        self._output_like = output_factory(real.base_output)
        # other tokens, and no layer run at all: the arguments must not notice
        other = (tokens_1T + 1) % self.vocab_size
        with self._layers_replaced([_same_state] * self.num_players):
            blank = record_forward(self.model, self.base, self.layers, other)
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
        self._check_first_states(state)
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
            self._check_dtype(player, after)
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

    def _check_first_states(self, embedded: torch.Tensor) -> None:
        """Every layer may be the first that runs: given the embedding, whose dtype may be another,
        it must return a state as all others do."""
        if embedded.dtype != self.state_dtype:
            for player in range(self.num_players):
                self._check_dtype(player, self.run_player(player, embedded.clone()))

    def _check_dtype(self, player: int, state: torch.Tensor) -> None:
        if state.dtype != self.state_dtype:
            raise EngineError(
                f"layer {player} of {type(self.model).__name__} returns {state.dtype} or "
                f"{self.state_dtype}, depending on the layers before it: its layers cannot be "
                "skipped one by one"
            )

    def _probe_ids(self, length: int) -> torch.Tensor:
        return (torch.arange(length, device=self.device)[None] + 2) % self.vocab_size


def _same_state(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@contextmanager
def _compiling(name: str) -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    try:
        yield
    except TorchDynamoException as error:
        line = first_line(error)
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
