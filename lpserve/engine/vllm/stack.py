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

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from lpserve.data.windows import TokenWindows
from lpserve.engine.head import Head, Vocabulary, on_device
from lpserve.engine.replay import same_value
from lpserve.engine.vllm.tap import LayerTap
from lpserve.errors import EngineError

STATE_KINDS = ("hidden", "sum", "pair")
"""What a state carries, smallest first."""
_MAX_CALLS = 16
"""Batch shapes whose recorded arguments are kept."""


class Link(Protocol):
    """To the neighbours in a pipeline of ranks; a rank that holds all layers is first and last."""

    is_first: bool
    is_last: bool

    def send(self, tensor: torch.Tensor) -> None: ...

    def receive(self, shape: torch.Size) -> torch.Tensor: ...


class DrivenModel(Protocol):
    """What a stack needs of a model; `worker/` makes one of vLLM's."""

    tap: LayerTap
    name: str
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    tensor_parallel_size: int
    length: int
    """Tokens of each window in the calls that follow."""

    @property
    def link(self) -> Link: ...

    def session(self) -> AbstractContextManager[None]: ...

    def run(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor: ...

    def vocabulary(self) -> Vocabulary: ...


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
        self._calls: dict[tuple[int, int], _Recorded] = {}
        self._prepared: set[int] = set()
        self._probe_length = 0
        self.num_steps = len(model.tap.layers)
        self.step_players: Sequence[int] = range(self.num_steps)
        self.width = 0
        self.state_dtype: torch.dtype = model.dtype
        self.state_kind = ""
        """`hidden`, `sum` or `pair`; see the module. All ranks must use the same."""

    def session(self) -> AbstractContextManager[None]:
        return self._model.session()

    def state_bytes(self, length: int) -> int:
        tensors = 2 if self.state_kind == "pair" else 1
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
        record = self._record(tokens_T, length, 1)
        other = self._record((tokens_T + 1) % self._model.vocab_size, length, 1)
        _check_text_alone_differs(self._model.name, record, other)
        self.width, self.state_dtype = record.hidden.shape[-1], record.hidden.dtype
        self._prepared.add(length)

    def embed(self, block: TokenWindows) -> torch.Tensor:
        shape = (block.num_windows, block.length, self.width)
        if not self._model.link.is_first:
            parts = (2,) if self.state_kind == "pair" else ()
            return self._model.link.receive(torch.Size((*shape[:2], *parts, self.width)))
        ids = on_device(block.tokens_NT.reshape(-1), self._model.device)
        state = self._record(ids, block.length, block.num_windows).hidden.view(shape)
        if self.state_kind == "pair":
            return torch.stack([state, torch.zeros_like(state)], dim=2)
        return state

    def run_step(self, step: int, batch: torch.Tensor) -> torch.Tensor:
        rows, length = batch.shape[:2]
        record = self._recorded(length, rows)
        hidden, residual = self._unpack(batch, record)
        out, left = self._layer(record, step, hidden, residual)
        if self.state_kind == "pair":
            return torch.stack([_flat(out), _flat(left)], dim=1).view(batch.shape)
        if self.state_kind == "sum":
            out = out + left
        return out.view(batch.shape)

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
        record = self._recorded(length, rows)
        return self._tail(record, *self._unpack(batch, record)).view(rows, length, -1)

    # -- calls ---------------------------------------------------------------------------------

    def _unpack(
        self, batch: torch.Tensor, record: _Recorded
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Fresh tensors in the model's own shape: layers may write into what they are given."""
        shape = record.hidden.shape
        if self.state_kind == "pair":
            hidden, residual = batch.flatten(0, 1).unbind(1)
            return hidden.reshape(shape).clone(), residual.reshape(shape).clone()
        return batch.reshape(shape).clone(), None

    def _layer(
        self, record: _Recorded, player: int, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._model.length = record.length
        arguments = record.arguments[player] | {"hidden_states": hidden}
        if self._tap.takes_residual[player]:
            arguments["residual"] = residual
        output: Any = self._tap.run(player, arguments)
        if not isinstance(output, tuple):
            return output, output
        left = output[-1] if self._tap.takes_residual[player] else output[0]
        # some take a residual by habit, do not read it and leave none (Gemma-4's)
        return output[0], torch.zeros_like(output[0]) if left is None else left

    def _tail(
        self, record: _Recorded, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """What the model does after its last layer, up to the head: usually a norm."""

        def pass_on(index: int, arguments: dict[str, Any]) -> Any:
            ends = index == self.num_steps - 1
            taken = hidden if ends else arguments["hidden_states"]
            if ends and residual is not None:
                arguments = arguments | {"residual": residual}
            return self._tap.identity_output(index, taken, arguments, ends=ends)

        with self._tap.handled(pass_on):
            return self._model.run(record.ids, record.positions)

    def _recorded(self, length: int, rows: int) -> _Recorded:
        if (length, rows) not in self._calls:
            ids = torch.zeros(length * rows, dtype=torch.long, device=self._model.device)
            self._record(ids, length, rows)
        return self._calls[length, rows]

    def _record(self, ids: torch.Tensor, length: int, rows: int) -> _Recorded:
        """One forward in which no layer does anything: embedding, and every layer's arguments."""
        device = self._model.device
        positions = torch.arange(length, device=device).repeat(rows)
        record = _Recorded(ids, positions, length)
        self._model.length = length
        handed: list[torch.Tensor] = []  # what the layer before returned

        def pass_on(index: int, arguments: dict[str, Any]) -> Any:
            hidden = arguments.pop("hidden_states")
            residual = arguments.pop("residual", None)
            if not index:
                record.hidden, record.residual = hidden, residual
            elif (
                not handed
                or hidden is not handed[0]
                or (self._tap.takes_residual[index] and residual is not handed[-1])
            ):
                raise EngineError(
                    f"something happens between layers {index - 1} and {index} of "
                    f"{self._model.name}: its layers cannot be skipped one by one"
                )
            record.arguments.append(arguments)
            hidden = hidden.view_as(hidden)  # a new object, so that the next layer shows it
            if not self._tap.takes_residual[index]:
                handed[:] = [hidden]
                return self._tap.with_beside(index, hidden, arguments)
            residual = torch.zeros_like(hidden) if residual is None else residual.view_as(residual)
            handed[:] = [hidden, residual]
            return hidden, residual

        with self._tap.handled(pass_on):
            final = self._model.run(ids, positions)
        if self._tap.returns_beside:
            _check_unread(self._model.name, record, final)
        if len(record.arguments) != self.num_steps:
            raise EngineError(
                f"{self._model.name} ran {len(record.arguments)} of its {self.num_steps} layers"
            )
        if len(self._calls) >= _MAX_CALLS:
            self._calls.clear()
        self._calls[length, rows] = record
        return record

    def probe(self) -> list[str]:
        """The kinds of state with which every layer here gives exactly what it gives by itself.

        Runs the model's own chain on the text that `prepare` saw; ranks of a pipeline hand it on.

        Raises:
            EngineError: the layers do not agree about what they take.
        """
        record = self._calls[self._probe_length, 1]
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
            hidden, residual = self._layer(record, 0, start.clone(), None)
            chain = range(1, self.num_steps + link.is_last)
        else:
            start = hidden = link.receive(record.hidden.shape)
            residual = link.receive(record.hidden.shape)
            chain = range(self.num_steps + link.is_last)
        fits = dict.fromkeys(kinds, True)
        for player in chain:
            zeros = torch.zeros_like(hidden) if player == self.num_steps else None
            real = self._next(record, player, hidden, residual)
            self._check_dtypes(player, real)
            alone = self._next(record, player, hidden, zeros)
            summed = self._next(record, player, hidden + residual, zeros)
            fits["hidden"] &= torch.equal(real[0], alone[0])
            if "sum" in fits:
                fits["sum"] &= torch.equal(real[0] + real[1], summed[0] + summed[1])
            hidden, residual = real
        if not link.is_last:
            link.send(hidden)
            link.send(residual)
        for player in range(self.num_steps if "pair" in fits else 0):
            none = self._next(record, player, start, None)
            zeros = self._next(record, player, start, torch.zeros_like(start))
            fits["pair"] &= torch.equal(none[0], zeros[0]) and torch.equal(none[1], zeros[1])
        return [kind for kind in kinds if fits[kind]]

    def _check_dtypes(self, player: int, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        for tensor in output if player < self.num_steps else ():
            if tensor.dtype != self.state_dtype:
                raise EngineError(
                    f"layer {player} of {self._model.name} is given {self.state_dtype} and "
                    f"returns {tensor.dtype}"
                )

    def _next(
        self, record: _Recorded, player: int, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next layer, or what follows the last one, on copies."""
        copy = None if residual is None else residual.clone()
        if player < self.num_steps:
            return self._layer(record, player, hidden.clone(), copy)
        final = self._tail(record, hidden.clone(), copy)
        return final, torch.zeros_like(final)


class _Recorded:
    """Arguments of every layer for one batch shape, hidden state and residual left out."""

    def __init__(self, ids: torch.Tensor, positions: torch.Tensor, length: int) -> None:
        self.ids = ids
        self.positions = positions
        self.length = length
        self.hidden = torch.empty(0)
        self.residual: torch.Tensor | None = None
        self.arguments: list[dict[str, Any]] = []


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _check_text_alone_differs(model: str, record: _Recorded, other: _Recorded) -> None:
    """Raise EngineError when an argument notices other tokens."""
    for index, (a, b) in enumerate(zip(record.arguments, other.arguments, strict=True)):
        for name, value in a.items():
            if not same_value(value, b.get(name)):
                raise EngineError(
                    f"layer {index} of {model} takes {name!r}, which depends on the text: its "
                    "layers cannot be skipped one by one"
                )


def _check_unread(model: str, record: _Recorded, final: Any) -> None:
    """Raise EngineError where what layers returned beside their state (NaN) was read."""
    for value in (final, *(a for each in record.arguments for a in each.values())):
        if isinstance(value, torch.Tensor) and value.isnan().any():
            raise EngineError(
                f"{model} reads what its layers return beside their state: its layers cannot be "
                "skipped one by one"
            )
