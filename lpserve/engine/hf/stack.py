"""A LayerStack over any decoder-only transformers model, found by structure.

The layers are the module list whose members run once each, in order, every one taking the very
tensor that the one before it returned. What else the model hands its layers (rotary tables,
attention masks, positions) is learnt from real forward passes for each padded length, and handed to
them again (`arguments`). Embedding and head are the model's own forward pass around its layers.
Nothing here depends on a model's name.

A model is refused, with the reason, when a layer needs what an earlier layer computed beside the
state, when something happens between two layers, when attention looks ahead, or when replaying
does not give what the model gives.

Shapes: N windows, T tokens, B rows, d width, n scored targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import PaddingMattersError
from lpserve.engine.calls import hidden_of, like_output
from lpserve.engine.head import Head, LocalVocabulary, on_device, plain_nll
from lpserve.engine.hf.arguments import LayerArguments, RowRepeater, learn_arguments
from lpserve.engine.hf.recording import (
    Call,
    Recording,
    layers_replaced,
    model_code,
    record_around_layers,
    record_layers,
)
from lpserve.engine.hf.structure import find_form, find_layers
from lpserve.engine.parts import Halves, Modules, ParallelHalves, find_halves
from lpserve.engine.replay import same_tensor
from lpserve.engine.steps import Step, layer_steps, paired_state
from lpserve.errors import EngineError, first_line
from lpserve.model.players import FULL_LAYER, layer_parts, layer_players
from lpserve.types import Player

PARITY_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 1e-2}
"""Relative, summed NLL of a window, replayed against the model's own forward at start. Half
precision only has to show that the structure is right: rounding differs with the batch shape."""


class RecordedStack:
    """The model as embedding, steps and head. Use under `torch.inference_mode`.

    Args:
        num_layers: as the checkpoint's config counts them; None: as the model's does.
        players: what masks keep or drop; None: the layers.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: torch.dtype,
        num_layers: int | None,
        players: Sequence[Player] | None = None,
        head_chunk_bytes: int,
        compile_layers: bool = False,
    ) -> None:
        self.model = model
        self.name = type(model).__name__
        self.dtype = dtype
        self.state_dtype = dtype
        """Measured by `prepare`."""
        self.device: torch.device = model.device
        config = model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        num_layers = num_layers or int(config.num_hidden_layers)
        self.layers, _ = find_layers(model, num_layers, self._probe_ids(8))
        self.players = tuple(players or layer_players(len(self.layers)))
        self._form = find_form(model, self.layers, self.vocab_size)
        self._compiled = compile_layers
        self._steps: list[Step] = []
        self._paired = False
        self.modules: dict[int, Modules] = {}
        """Of each layer that is run in halves, the modules of its parts."""
        self._arguments: dict[int, list[LayerArguments]] = {}
        self._repeater = RowRepeater()
        self._block_calls: list[Call] = []
        self._reducer = Head(
            LocalVocabulary(self._logits, compiled=compile_layers),
            vocab_size=self.vocab_size,
            chunk_bytes=head_chunk_bytes,
            dtype=dtype,
            device=self.device,
        )
        self._inputs_survive = True
        self.first_not_finite: int | None = None
        """The first layer that makes NaN or infinity of finite states, as seen at start."""

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    @property
    def step_players(self) -> list[int]:
        return [step.player for step in self._steps]

    def state_bytes(self, length: int) -> int:
        tensors = 2 if self._paired else 1
        return length * self._form.state_elements * tensors * self.state_dtype.itemsize

    def prepare(self, windows: TokenWindows) -> None:
        """Record and check this padded length on real windows; a no-op when it is known.

        Raises:
            EngineError: the model cannot be driven layer by layer.
            PaddingMattersError: a window that is shorter than the padded length scores otherwise
                than by itself.
        """
        if windows.length in self._arguments:
            return
        self._record(on_device(windows.tokens_NT[:1], self.device))
        try:
            with _compiling(self.name) if self._compiled else nullcontext():
                self._check_replay(_shortest_and_longest(windows))
        except EngineError:
            del self._arguments[windows.length]
            raise

    def embed(self, block: TokenWindows) -> torch.Tensor:
        seen = self._around(on_device(block.tokens_NT, self.device))
        self._block_calls = seen.calls
        self._repeater.forget()
        hidden = self._form.layout.ours(
            self._form.slot.of(seen.calls[0].args, seen.calls[0].kwargs)
        )
        return paired_state(hidden) if self._paired else hidden

    def run_step(self, step: int, batch: torch.Tensor) -> torch.Tensor:
        state = batch if self._inputs_survive else batch.clone()
        one = self._steps[step]

        def call(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            arguments = self._arguments[batch.shape[1]][one.layer]
            text = self._block_calls[one.layer]
            output = arguments.call(module, self._form, hidden, len(batch), text, self._repeater)
            return hidden_of(output)

        return one.run(call, state, self._form.layout)

    def hidden(self, batch: torch.Tensor) -> torch.Tensor:
        """The hidden states in a state, `[B, T, ...]`."""
        return batch.sum(dim=2) if self._paired else batch

    def reduce(
        self,
        batch: torch.Tensor,
        block: TokenWindows,
        extra_metrics: Sequence[str] = (),
        full_NTd: torch.Tensor | None = None,
    ) -> torch.Tensor:
        full = None if full_NTd is None else self.hidden(full_NTd)
        return self._reducer.reduce(self.hidden(batch), block, extra_metrics, full)

    def before_head(self, batch: torch.Tensor, block: TokenWindows) -> torch.Tensor:
        return self._reducer.before(self.hidden(batch), block)

    def overlap(self, rows: torch.Tensor, reference: int) -> torch.Tensor:
        return self._reducer.overlap(rows, reference)

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, V]`: the model's own forward pass on n texts of one token each, whose last layer
        returns the given states."""
        slot, outputs = self._form.slot, self._form.outputs
        state = self._form.layout.theirs(rows[:, None])

        def body(index: int, args: Any, kwargs: Any) -> Any:
            last = index == len(self.layers) - 1
            return like_output(outputs[index], state if last else slot.of(args, kwargs))

        dummy = torch.zeros((len(rows), 1), dtype=torch.long, device=self.device)
        with layers_replaced(self.layers, body):
            return self.model(input_ids=dummy, use_cache=False).logits[:, 0]

    # -- recording ---------------------------------------------------------------------------

    def _around(self, tokens: torch.Tensor) -> Recording:
        form = self._form
        return record_around_layers(self.model, self.layers, tokens, form.slot, form.outputs)

    def _record(self, tokens_1T: torch.Tensor) -> None:
        real = record_layers(self.model, self.layers, tokens_1T)
        dtypes = list(dict.fromkeys(hidden_of(output).dtype for output in real.outputs))
        if len(dtypes) > 1:
            raise EngineError(
                f"the layers of {self.name} return states of several dtypes "
                f"({', '.join(map(str, dtypes))}): its layers cannot be skipped one by one"
            )
        self.state_dtype = dtypes[0]
        other = (tokens_1T + 1) % self.vocab_size
        both = torch.cat([tokens_1T, other])
        length = tokens_1T.shape[1]
        self._arguments[length] = learn_arguments(
            self.name, self._form, self.layers, real, self._around(other), self._around(both)
        )
        if not self._steps:
            self._make_steps(real, length)

    def _make_steps(self, real: Recording, length: int) -> None:
        """Find what the players are run by, on the states of a real text."""
        slot = self._form.slot
        states = [slot.of(real.calls[0].args, real.calls[0].kwargs)]
        states += [hidden_of(output) for output in real.outputs]

        def halves_of(layer: int) -> Halves:
            who, text = f"layer {layer} of {self.name}", real.calls[layer]
            arguments = self._arguments[length][layer]

            def call(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
                output = arguments.call(module, self._form, hidden, 1, text, self._repeater)
                return hidden_of(output)

            with model_code(f"{who} cannot be run in parts"):
                state, axis = states[layer].clone(), self._form.layout.time_axis
                return find_halves(who, self.layers[layer], call, state, axis)

        def ready(module: nn.Module) -> Any:
            return torch.compile(module) if self._compiled else module

        parts = layer_parts(self.players, len(self.layers))
        halves = {n: halves_of(n) for n, found in enumerate(parts) if FULL_LAYER not in found}
        self.modules = {layer: found.modules for layer, found in halves.items()}
        self._paired = any(isinstance(found, ParallelHalves) for found in halves.values())
        self._steps = layer_steps(self.layers, parts, halves, paired=self._paired, prepared=ready)

    # -- checks at start -----------------------------------------------------------------------

    def _check_replay(self, pair: TokenWindows) -> None:
        """All layers replayed at batch 2 must give the NLL that the model gives for each window by
        itself, and never look ahead."""
        own = [self._own_logits(pair, row) for row in range(pair.num_windows)]
        expected_N = torch.cat(
            [
                plain_nll(logits, pair.select(np.array([row]), logits.shape[1]), self.device)
                for row, logits in enumerate(own)
            ]
        )
        got_N = self.reduce(self._replayed(pair), pair)[:, 0]
        tolerance = PARITY_TOLERANCE[str(self.dtype).removeprefix("torch.")]
        worst = _worst_difference(got_N, expected_N)
        if torch.isfinite(expected_N).all() and not worst <= tolerance:
            tokens_NT = on_device(pair.tokens_NT, self.device)
            padded = self.model(input_ids=tokens_NT, use_cache=False).logits
            padded_N = plain_nll(padded, pair, self.device)
            if _worst_difference(got_N, padded_N) <= tolerance:
                raise PaddingMattersError(
                    f"{self.name} scores a window otherwise when it is padded, by {worst:.1e}"
                )
            raise EngineError(
                f"{self.name}: layers replayed one by one score {worst:.1e} "
                f"(relative) off the model's own forward pass; tolerance {tolerance:.0e}"
            )
        logits = own[-1]
        changed = on_device(pair.tokens_NT[-1:, : logits.shape[1]], self.device)
        changed[:, -1] = (changed[:, -1] + 1) % self.vocab_size
        ahead = self.model(input_ids=changed, use_cache=False).logits[:, :-1]
        if torch.isfinite(logits).all() and not torch.allclose(
            ahead, logits[:, :-1], rtol=1e-2, atol=1e-2 * float(logits.abs().max())
        ):
            raise EngineError(f"{self.name} is not a decoder: it looks ahead")

    def _own_logits(self, pair: TokenWindows, row: int) -> torch.Tensor:
        """`[1, T', V]` of one window without padding."""
        tokens_NT = pair.tokens_NT[row : row + 1, : pair.lengths_N[row]]
        return self.model(input_ids=on_device(tokens_NT, self.device), use_cache=False).logits

    def _replayed(self, pair: TokenWindows) -> torch.Tensor:
        """The state after all steps, each of which is checked on the way."""
        state = self.embed(pair)
        if state.shape[:2] != pair.tokens_NT.shape:
            raise EngineError(
                f"the layers of {self.name} take {state.shape[1]} states for {pair.length} tokens"
            )
        self._check_first_states(state)
        for step in range(self.num_steps):
            before = state.clone()
            after = self._tried(step, state)
            if not same_tensor(before, state):  # a layer that writes into its input
                self._inputs_survive = False
                after = self._tried(step, before)
            if after.shape != state.shape:
                raise EngineError(
                    f"{self._steps[step]} of {self.name} changes the state's shape "
                    f"from {list(state.shape)} to {list(after.shape)}"
                )
            self._check_dtype(step, after)
            if self.first_not_finite is None and not after.isfinite().all():
                self.first_not_finite = self._steps[step].layer
            state = after
        return state

    def _tried(self, step: int, state: torch.Tensor) -> torch.Tensor:
        """One step; raises EngineError, with its name, for whatever the layer raises."""
        if self._compiled:  # `_compiling` tells what the compiler raises
            return self.run_step(step, state)
        with model_code(f"{self._steps[step]} of {self.name} cannot be run by itself"):
            return self.run_step(step, state)

    def _check_first_states(self, embedded: torch.Tensor) -> None:
        """Every layer may be the first that runs: given the embedding, whose dtype may be another,
        it must return a state as all others do."""
        if embedded.dtype != self.state_dtype:
            for step in range(self.num_steps):
                self._check_dtype(step, self.run_step(step, embedded.clone()))

    def _check_dtype(self, step: int, state: torch.Tensor) -> None:
        if state.dtype != self.state_dtype:
            raise EngineError(
                f"{self._steps[step]} of {self.name} returns {state.dtype} or "
                f"{self.state_dtype}, depending on the layers before it: its layers cannot be "
                "skipped one by one"
            )

    def _probe_ids(self, length: int) -> torch.Tensor:
        return (torch.arange(length, device=self.device)[None] + 2) % self.vocab_size


def _shortest_and_longest(windows: TokenWindows) -> TokenWindows:
    order = windows.lengths_N.argsort(kind="stable")
    return windows.select(np.unique([order[0], order[-1]]))


def _worst_difference(got_N: torch.Tensor, expected_N: torch.Tensor) -> float:
    return float(((got_N - expected_N).abs() / expected_N.abs().clamp(min=1e-6)).max())


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
