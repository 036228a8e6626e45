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
from lpserve.engine.calls import hidden_of, like_output
from lpserve.engine.head import Head, LocalVocabulary, on_device
from lpserve.engine.hf.arguments import LayerArguments, RowRepeater, learn_arguments
from lpserve.engine.hf.recording import (
    Call,
    Recording,
    layers_replaced,
    model_code,
    record_around_layers,
    record_layers,
)
from lpserve.engine.hf.replay_check import check_replay
from lpserve.engine.hf.structure import find_form, find_layers
from lpserve.engine.parts import Halves, Modules, ParallelHalves, find_halves
from lpserve.engine.steps import Step, layer_steps, paired_state
from lpserve.errors import EngineError, first_line
from lpserve.model.players import FULL_LAYER, layer_parts, layer_players, members
from lpserve.types import Player


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
        self.compiled = compile_layers
        self.steps: list[Step] = []
        self._paired = False
        self.modules: dict[int, Modules] = {}
        """Of each layer that is run in halves, the modules of its parts."""
        self.absent: dict[int, dict[str, Any]] = {}
        """And the form of what stands for each module that is left out (`Absent.form`)."""
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
        self.inputs_survive = True
        """Whether no layer writes into its input, as seen at start."""
        self.first_not_finite: int | None = None
        """The first layer that makes NaN or infinity of finite states, as seen at start."""

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    @property
    def step_players(self) -> list[int]:
        return [step.player for step in self.steps]

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
            with _compiling(self.name) if self.compiled else nullcontext():
                check_replay(self, _shortest_and_longest(windows))
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
        state = batch if self.inputs_survive else batch.clone()
        one = self.steps[step]

        def call(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
            arguments = self._arguments[batch.shape[1]][one.layer]
            text = self._block_calls[one.layer]
            output = arguments.call(module, self._form, hidden, len(batch), text, self._repeater)
            return hidden_of(output)

        return one.run(call, state, self._form.layout)

    def player_modules(self) -> list[list[nn.Module]]:
        """The modules that are each player."""
        return [
            [
                self.layers[layer].get_submodule(name)
                for layer, part in members(player)
                for name in ([""] if part == FULL_LAYER else self.modules[layer][part])
            ]
            for player in self.players
        ]

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
        if not self.steps:
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
            return torch.compile(module) if self.compiled else module

        parts = layer_parts(self.players, len(self.layers))
        halves = {n: halves_of(n) for n, found in enumerate(parts) if FULL_LAYER not in found}
        self.modules = {layer: found.modules for layer, found in halves.items()}
        for layer, found in halves.items():
            self.absent[layer] = {name: one.form for name, one in found.absent.items()}
        self._paired = any(isinstance(found, ParallelHalves) for found in halves.values())
        self.steps = layer_steps(self.layers, parts, halves, paired=self._paired, prepared=ready)

    def _probe_ids(self, length: int) -> torch.Tensor:
        return (torch.arange(length, device=self.device)[None] + 2) % self.vocab_size


def _shortest_and_longest(windows: TokenWindows) -> TokenWindows:
    order = windows.lengths_N.argsort(kind="stable")
    return windows.select(np.unique([order[0], order[-1]]))


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
