"""A LayerStack over layers that hand on (hidden, residual), as vLLM's do.

`tap.LayerTap` patches the layers once; `VllmStack` drives them for the trie executor. Neither names
anything of vLLM: what a model is and how its forward is called comes from `worker/`.

vLLM's layers mostly return two tensors whose sum is the hidden state, so that the next norm can
add and normalise at once. What a state must carry between layers is found by probing every layer
on real data, and is exact, bit for bit:

* `hidden`: one tensor; the layer takes no residual or does not read it;
* `sum`: one tensor, hidden + residual, given to the next layer without a residual;
* `pair`: both tensors, where rounding makes the sum differ.

Shapes: B rows, T tokens, n = B * T flat tokens, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from lpserve.data.windows import TokenWindows
from lpserve.engine.head import Head, on_device
from lpserve.engine.parts import Halves, ParallelHalves, find_halves
from lpserve.engine.steps import Step, layer_steps, paired_state
from lpserve.engine.vllm.calls import DrivenModel, LayerCalls, Recorded, check_text_alone_differs
from lpserve.errors import EngineError
from lpserve.model.players import FULL_LAYER

STATE_KINDS = ("hidden", "sum", "pair")
"""What a state carries, smallest first."""


class VllmStack:
    """See `lpserve.engine.base.LayerStack`. Use inside `session()`."""

    def __init__(self, model: DrivenModel, *, head_chunk_bytes: int) -> None:
        self._model = model
        self._tap = model.tap
        self._head = Head(
            model.vocabulary(),
            vocab_size=-(-model.vocab_size // model.tensor_parallel_size),
            chunk_bytes=head_chunk_bytes,
            dtype=model.dtype,
            device=model.device,
        )
        self._calls = LayerCalls(model)
        self._prepared: set[int] = set()
        self._probe_length = 0
        layers = model.tap.layers
        self._parts: Sequence[Mapping[str, int]] = [{FULL_LAYER: n} for n in range(len(layers))]
        self._halves: dict[int, Halves] = {}
        self._steps: list[Step] = layer_steps(layers, self._parts, {}, paired=False)
        self._paired = False
        self.width = 0
        self.state_dtype: torch.dtype = model.dtype
        self.state_kind = ""
        """`hidden`, `sum` or `pair`; see the module. All ranks must use the same."""

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    @property
    def step_players(self) -> list[int]:
        return [step.player for step in self._steps]

    def session(self) -> AbstractContextManager[None]:
        return self._model.session()

    def state_bytes(self, length: int) -> int:
        tensors = 2 if self.state_kind == "pair" or self._paired else 1
        return length * self.width * tensors * self.state_dtype.itemsize

    def prepare(self, windows: TokenWindows) -> None:
        """Record this padded length, and find once what a state carries.

        Raises:
            EngineError: the layers cannot be driven one by one.
        """
        if windows.length in self._prepared:
            return
        self._probe_length = windows.length
        tokens_T = on_device(windows.tokens_NT[0], self._model.device)
        length = windows.length
        record = self._calls.record(tokens_T, length, 1)
        other = self._calls.record((tokens_T + 1) % self._model.vocab_size, length, 1)
        check_text_alone_differs(self._model.name, record, other)
        self.width, self.state_dtype = record.hidden.shape[-1], record.hidden.dtype
        self._prepared.add(length)

    def embed(self, block: TokenWindows) -> torch.Tensor:
        shape = (block.num_windows, block.length, self.width)
        if not self._model.link.is_first:
            parts = (2,) if self.state_kind == "pair" or self._paired else ()
            return self._model.link.receive(torch.Size((*shape[:2], *parts, self.width)))
        ids = on_device(block.tokens_NT.reshape(-1), self._model.device)
        state = self._calls.record(ids, block.length, block.num_windows).hidden.view(shape)
        if self.state_kind == "pair":
            return torch.stack([state, torch.zeros_like(state)], dim=2)
        return paired_state(state) if self._paired else state

    def run_step(self, step: int, batch: torch.Tensor) -> torch.Tensor:
        record = self._calls.recorded(batch.shape[1], batch.shape[0])
        one = self._steps[step]

        def call(module: nn.Module, state: torch.Tensor) -> torch.Tensor:
            hidden, residual = self._unpack(state, record)
            out, left = self._calls.layer(record, one.layer, hidden, residual, module)
            if self.state_kind == "pair":
                return torch.stack([_flat(out), _flat(left)], dim=1)
            return out + left if self.state_kind == "sum" else out

        return one.run(call, batch, _Layout(record, batch.shape[:2]))

    def find_halves(self, parts: Sequence[Mapping[str, int]]) -> bool:
        """Find the halves of this rank's layers that are not run whole; returns whether some layer
        is parallel. Runs a text through the ranks of a pipeline, as `probe` does.

        Args:
            parts: of each layer here, what is run apart and its player (`players.layer_parts`).

        Raises:
            EngineError: a layer cannot be taken apart.
        """
        record, link = self._calls.recorded(self._probe_length, 1), self._model.link
        state = record.hidden if link.is_first else link.receive(record.hidden.shape)
        self._parts, self._halves = parts, {}
        for layer, found in enumerate(parts):

            def call(module: nn.Module, hidden: torch.Tensor, layer: int = layer) -> torch.Tensor:
                out, left = self._calls.layer(record, layer, hidden.clone(), None, module)
                return out if self.state_kind == "hidden" else out + left

            whole = self._tap.layers[layer]
            if FULL_LAYER not in found:
                who = f"layer {self._tap.first + layer} of {self._model.name}"
                # a pair enters a norm as two arguments, on which a sum says nothing
                lean = self.state_kind != "pair"
                halves = find_halves(who, whole, call, state.clone(), state.ndim - 2, lean=lean)
                self._halves[layer] = halves
                self._tap.halves[layer] = halves.alone
            state = call(whole, state)
        if not link.is_last:
            link.send(state)
        return any(isinstance(halves, ParallelHalves) for halves in self._halves.values())

    def modules(self) -> dict[int, dict[str, list[str]]]:
        """Of each layer here that is run in halves, the child modules of its parts."""
        first = self._tap.first
        return {
            first + layer: {part: list(names) for part, names in halves.modules.items()}
            for layer, halves in self._halves.items()
        }

    def make_steps(self, *, paired: bool) -> list[int]:
        """Make the steps; returns the player of each.

        Args:
            paired: whether a layer on some rank is parallel.
        """
        if paired and self.state_kind == "pair":
            raise EngineError(
                f"{self._model.name} has parallel layers, and its layers hand on two tensors that "
                "cannot be added up: its halves cannot be dropped apart"
            )
        self._paired = paired
        layers = self._tap.layers
        self._steps = layer_steps(layers, self._parts, self._halves, paired=paired)
        return self.step_players

    def reduce(
        self,
        batch: torch.Tensor,
        block: TokenWindows,
        extra_metrics: Sequence[str] = (),
        full_NTd: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = len(batch)
        if not self._model.link.is_last:
            for state in batch.split(block.num_windows):
                self._model.link.send(state)
            return batch.new_zeros((rows, 1 + len(extra_metrics)), dtype=torch.float64)
        full = None if full_NTd is None else self._final(full_NTd)
        return self._head.reduce(self._final(batch), block, extra_metrics, full)

    def before_head(self, batch: torch.Tensor, block: TokenWindows) -> torch.Tensor:
        return self._head.before(self._final(batch), block)

    def overlap(self, rows: torch.Tensor, reference: int) -> torch.Tensor:
        return self._head.overlap(rows, reference)

    def _final(self, batch: torch.Tensor) -> torch.Tensor:
        """What the model gives its head, `[B, T, d]`."""
        rows, length = batch.shape[:2]
        record = self._calls.recorded(length, rows)
        if self._paired:
            batch = batch[:, :, 0]
        return self._calls.tail(record, *self._unpack(batch, record)).view(rows, length, -1)

    # -- calls ---------------------------------------------------------------------------------

    def _unpack(
        self, batch: torch.Tensor, record: Recorded
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Fresh tensors in the model's own shape: layers may write into what they are given."""
        shape = record.hidden.shape
        if self.state_kind == "pair":
            hidden, residual = batch.reshape(-1, 2, batch.shape[-1]).unbind(1)
            return hidden.reshape(shape).clone(), residual.reshape(shape).clone()
        return batch.reshape(shape).clone(), None

    def probe(self) -> list[str]:
        """The kinds of state with which every layer here gives exactly what it gives by itself.

        Runs the model's own chain on the text that `prepare` saw; ranks of a pipeline hand it on.

        Raises:
            EngineError: the layers do not agree about what they take.
        """
        record = self._calls.recorded(self._probe_length, 1)
        link = self._model.link
        if not any(self._tap.takes_residual):
            kinds = ["hidden"]
        elif not all(self._tap.takes_residual):
            raise EngineError(f"{self._model.name}: some layers take a residual and some do not")
        else:
            kinds = list(STATE_KINDS)
        if link.is_first:
            if record.residual is not None:
                raise EngineError(f"{self._model.name} gives its first layer a residual")
            start = record.hidden
            hidden, residual = self._calls.layer(record, 0, start.clone(), None)
            chain = range(1, self._calls.num_layers + link.is_last)
        else:
            start = hidden = link.receive(record.hidden.shape)
            residual = link.receive(record.hidden.shape)
            chain = range(self._calls.num_layers + link.is_last)
        fits = dict.fromkeys(kinds, True)
        for player in chain:
            zeros = torch.zeros_like(hidden) if player == self._calls.num_layers else None
            real = self._calls.next(record, player, hidden, residual)
            self._check_dtypes(player, real)
            alone = self._calls.next(record, player, hidden, zeros)
            summed = self._calls.next(record, player, hidden + residual, zeros)
            fits["hidden"] &= torch.equal(real[0], alone[0])
            if "sum" in fits:
                fits["sum"] &= torch.equal(real[0] + real[1], summed[0] + summed[1])
            hidden, residual = real
        if not link.is_last:
            link.send(hidden)
            link.send(residual)
        for player in range(self._calls.num_layers if "pair" in fits else 0):
            none = self._calls.next(record, player, start, None)
            zeros = self._calls.next(record, player, start, torch.zeros_like(start))
            fits["pair"] &= torch.equal(none[0], zeros[0]) and torch.equal(none[1], zeros[1])
        return [kind for kind in kinds if fits[kind]]

    def _check_dtypes(self, player: int, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        for tensor in output if player < self._calls.num_layers else ():
            if tensor.dtype != self.state_dtype:
                raise EngineError(
                    f"layer {player} of {self._model.name} is given {self.state_dtype} and "
                    f"returns {tensor.dtype}"
                )


class _Layout:
    """States `[B, T, ...]`, and flat tokens as the layers take them."""

    def __init__(self, record: Recorded, rows_and_length: torch.Size) -> None:
        self._flat, self._shape = record.hidden.shape, rows_and_length

    def ours(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape == self._flat:
            return hidden.reshape(*self._shape, -1)
        return hidden.view(*self._shape, *hidden.shape[1:])

    def theirs(self, state: torch.Tensor) -> torch.Tensor:
        return state.reshape(self._flat) if state.ndim == 3 else state.flatten(0, 1)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
