"""Runs a batch of masks over any LayerStack, computing each distinct (prefix, step) once.

Masks are over the steps of a stack. Two that agree on steps 0..i-1 have the same state entering
step i. The distinct masks are sorted, so a trie node is a contiguous range of them. At step i every
live range is split on bit i: the ones-children are computed together in micro-batches, the
zeros-child keeps its parent's state, uncopied. The walk goes breadth first while the live states
fit the memory budget and depth first beyond it: a frontier that would outgrow the budget is halved
and the halves are walked in turn. A state is freed when its last child is done; the head runs once
for each distinct mask. States have the dtype that the steps return; an embedding of another dtype
is kept as it is.

Knows no model library. Shapes: D distinct masks, N windows of a row group, T tokens, d width, C
metrics (NLL first).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import LayerStack
from lpserve.errors import InputError
from lpserve.masks import sort_distinct
from lpserve.types import BoolArray, FloatArray, Work
from lpserve.utility import needs_full_model


@dataclass(frozen=True, kw_only=True, slots=True)
class TrieSettings:
    """Memory and micro-batch shapes, decided once for a run; they do not change results."""

    state_budget_bytes: int
    """Upper bound on the bytes of the states alive at once. Final states of the full model, which
    are kept for metrics that compare with it, have a second budget of the same size."""
    micro_batch_tokens: int
    """Upper bound on the tokens given to a layer at once; never fewer than one window."""
    pack_states: bool
    """Fill micro-batches with states of several masks. Off, a micro-batch is one state, so that a
    mask's arithmetic does not depend on the masks around it (the default on CPU)."""


class LeafStates:
    """What the head is given under every mask of a walk, `[D, n, ...]`: kept, so that masks can be
    compared with one another.

    Args:
        block: the windows that are walked, in one row group.
        num_masks: D.
    """

    def __init__(self, block: TokenWindows, num_masks: int) -> None:
        self._block, self._num_masks = block, num_masks
        self.rows: torch.Tensor | None = None

    def keep(self, stack: LayerStack, batch: torch.Tensor, first: int) -> None:
        """Keep the states of stacked masks, whose places begin at `first`."""
        rows = stack.before_head(batch, self._block)
        if self.rows is None:
            self.rows = rows.new_empty((self._num_masks, *rows.shape[1:]))
        self.rows[first : first + len(rows)] = rows


@dataclass(slots=True)
class _Node:
    low: int
    high: int
    state_NTd: torch.Tensor


class TrieExecutor:
    """Scores masks on a LayerStack within a memory budget.

    Buffers for states are allocated once for a shape and reused: after the first call the executor
    allocates nothing that outlives a layer call.
    """

    def __init__(self, stack: LayerStack, settings: TrieSettings) -> None:
        self._stack = stack
        self._settings = settings
        self._free: list[torch.Tensor] = []
        self._num_buffers = 0
        self._batch: torch.Tensor | None = None
        self._full_states: dict[str, torch.Tensor] = {}

    def group_rows(
        self, num_windows: int, length: int, num_steps: int | None = None, *, held: int = 1
    ) -> int:
        """Windows in one state: all of them, or as many as let the S + 1 states of a path fit.

        Args:
            num_steps: of the full model, where the stack is one stage of a pipeline.
            held: how many times S + 1 states are held, as far as the budget allows it.

        Raises:
            InputError: the budget does not hold S + 1 states of one window.
        """
        num_steps = num_steps or self._stack.num_steps
        path_bytes = self._stack.state_bytes(length) * (num_steps + 1)
        fitting_rows = self._settings.state_budget_bytes // path_bytes
        if fitting_rows < 1:
            raise InputError(
                f"state_budget_mb is too small: {num_steps + 1} states of one "
                f"{length}-token window take {path_bytes / 2**20:.2f} MiB"
            )
        fitting_rows = max(1, fitting_rows // held)
        batch_rows = max(1, self._settings.micro_batch_tokens // length)
        return int(min(num_windows, fitting_rows, batch_rows))

    def score(
        self,
        masks_MS: BoolArray,
        block: TokenWindows,
        extra_metrics: Sequence[str] = (),
        leaves: tuple[LeafStates, int] | None = None,
    ) -> tuple[FloatArray, Work]:
        """Metrics of every mask on windows of one padded length, `float64[M, N, C]`: the NLL, then
        those of `extra_metrics`; and the work.

        Args:
            leaves: where to keep final states, and the place of the first mask there; the block is
                one row group.
        """
        started = time.perf_counter()
        sorted_MS, inverse_M = sort_distinct(masks_MS)
        rows = self.group_rows(block.num_windows, block.length)
        metric_values = np.empty((len(sorted_MS), block.num_windows, 1 + len(extra_metrics)))
        layer_forwards = 0
        for start in range(0, block.num_windows, rows):
            group = block.select(np.arange(start, min(start + rows, block.num_windows)))
            walk = _Walk(self, sorted_MS, group, extra_metrics, leaves)
            try:
                metric_values[:, start : start + group.num_windows] = walk.run()
            except BaseException:
                self._drop_buffers()  # an interrupted walk leaves them in use
                raise
            layer_forwards = walk.layer_forwards
        work = Work(
            masks=len(masks_MS),
            distinct_masks=len(sorted_MS),
            layer_forwards=layer_forwards,
            skip_layer_forwards=int(np.asarray(masks_MS).sum()),
            tokens=len(sorted_MS) * block.tokens_NT.size,
            seconds=time.perf_counter() - started,
        )
        return metric_values[inverse_M], work

    def prepare(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> int:
        """Drop buffers of another shape; returns how many of this one the budget allows."""
        if self._free and (self._free[0].shape != shape or self._free[0].dtype != dtype):
            self._drop_buffers()
        self._make = lambda: torch.empty(shape, dtype=dtype, device=device)
        size = int(np.prod(shape)) * dtype.itemsize
        return max(self._settings.state_budget_bytes // size, 1)

    def _drop_buffers(self) -> None:
        self._free.clear()
        self._batch = None
        self._num_buffers = 0

    def full_state(self, block: TokenWindows, embedded: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The state of these windows after all steps, and the layer-forwards that computing it
        took. States are kept for later calls while they fit the memory budget together."""
        key = block.content_hash
        if key in self._full_states:
            return self._full_states[key], 0
        state = embedded
        for step in range(self._stack.num_steps):
            state = self._stack.run_step(step, state)
        size = state.numel() * state.element_size()
        if size * (len(self._full_states) + 1) > self._settings.state_budget_bytes:
            self._full_states.clear()
        self._full_states[key] = state.clone()
        return self._full_states[key], sum(player >= 0 for player in self._stack.step_players)

    def states_per_batch(self, shape: torch.Size) -> int:
        if not self._settings.pack_states:
            return 1
        return max(1, self._settings.micro_batch_tokens // (shape[0] * shape[1]))

    def take(self) -> torch.Tensor:
        if self._free:
            return self._free.pop()
        self._num_buffers += 1
        return self._make()

    def give(self, state: torch.Tensor) -> None:
        self._free.append(state)

    @property
    def num_live(self) -> int:
        return self._num_buffers - len(self._free)

    def stacked(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Several states as one micro-batch, in a reused buffer."""
        if len(states) == 1:
            return states[0]
        rows = states[0].shape[0] * len(states)
        if self._batch is None or self._batch.shape[0] < rows:
            self._batch = states[0].new_empty((rows, *states[0].shape[1:]))
        return torch.cat(states, out=self._batch[:rows])


class _Walk:
    """One pass over the trie of one set of masks and one row group."""

    def __init__(
        self,
        executor: TrieExecutor,
        sorted_MS: BoolArray,
        block: TokenWindows,
        extra_metrics: Sequence[str],
        leaves: tuple[LeafStates, int] | None,
    ) -> None:
        self._leaves = leaves
        self._executor = executor
        self._stack = executor._stack
        self._masks_MS = sorted_MS
        self._block = block
        self._extra_metrics = tuple(extra_metrics)
        self._full_NTd: torch.Tensor | None = None
        self._metric_values = torch.empty(0)
        self.layer_forwards = 0

    def run(self) -> FloatArray:
        """`float64[D, N, C]`."""
        embedded = self._stack.embed(self._block)
        if any(needs_full_model(name) for name in self._extra_metrics):
            self._full_NTd, self.layer_forwards = self._executor.full_state(self._block, embedded)
        dtype = self._stack.state_dtype
        self._limit = self._executor.prepare(embedded.shape, dtype, embedded.device)
        self._per_batch = self._executor.states_per_batch(embedded.shape)
        if embedded.dtype == dtype:
            root = self._executor.take()
            root.copy_(embedded)
        else:  # kept as it is, beside the buffers, until the last mask has run a step
            root = embedded
            self._limit -= 1
        del embedded
        self._metric_values = torch.empty(
            (len(self._masks_MS), self._block.num_windows, 1 + len(self._extra_metrics)),
            dtype=torch.float64,
            device=root.device,
        )
        self._walk([_Node(0, len(self._masks_MS), root)], 0)
        return self._metric_values.cpu().numpy()

    def _walk(self, nodes: list[_Node], step: int) -> None:
        num_steps = self._stack.num_steps
        while step < num_steps:
            splits = [self._split(node, step) for node in nodes]
            if len(nodes) > 1:
                branching = sum(n.low < s < n.high for n, s in zip(nodes, splits, strict=True))
                # walking one path to its end may still take one state for each step
                if self._executor.num_live + branching > self._limit - num_steps:
                    half = len(nodes) // 2
                    self._walk(nodes[:half], step)
                    self._walk(nodes[half:], step)
                    return
            nodes = self._step(nodes, splits, step)
            step += 1
        self._finish(nodes)

    def _split(self, node: _Node, step: int) -> int:
        """First mask of the range that keeps the step (dropped sort first)."""
        if node.high - node.low == 1:
            return node.low if self._masks_MS[node.low, step] else node.high
        column = self._masks_MS[node.low : node.high, step]
        return node.low + int(column.searchsorted(True))

    def _step(self, nodes: list[_Node], splits: list[int], step: int) -> list[_Node]:
        """Split every range on the step's bit and compute the ones-children."""
        children: list[_Node] = []
        inputs: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        for node, split in zip(nodes, splits, strict=True):
            if split > node.low:
                children.append(_Node(node.low, split, node.state_NTd))
            if split < node.high:
                inputs.append(node.state_NTd)
                # without a zeros-child the parent's own buffer takes the result
                reused = split == node.low and self._is_buffer(node.state_NTd)
                outputs.append(node.state_NTd if reused else self._executor.take())
                children.append(_Node(split, node.high, outputs[-1]))
        for part in self._batches(inputs):
            result = self._stack.run_step(step, self._executor.stacked(inputs[part]))
            rows = result.split(self._block.num_windows)
            for out, rows_NTd in zip(outputs[part], rows, strict=True):
                out.copy_(rows_NTd)
        if self._stack.step_players[step] >= 0:
            self.layer_forwards += len(inputs)
        return children

    def _finish(self, nodes: list[_Node]) -> None:
        for part in self._batches([node.state_NTd for node in nodes]):
            batch = nodes[part]
            stacked = self._executor.stacked([node.state_NTd for node in batch])
            if self._leaves is not None:
                kept, first = self._leaves
                kept.keep(self._stack, stacked, first + batch[0].low)
            reduced = self._stack.reduce(stacked, self._block, self._extra_metrics, self._full_NTd)
            # leaves of a frontier are neighbours in key order
            self._metric_values[batch[0].low : batch[-1].high] = reduced.view(
                len(batch), -1, reduced.shape[1]
            )
        for node in nodes:
            if self._is_buffer(node.state_NTd):
                self._executor.give(node.state_NTd)

    def _batches(self, states: list[torch.Tensor]) -> Iterator[slice]:
        """Micro-batches of consecutive states. An embedding of another dtype is the first one by
        itself, because masks that have kept no step so far are first in the order."""
        start = 0
        if states and not self._is_buffer(states[0]):
            yield slice(0, 1)
            start = 1
        for low in range(start, len(states), self._per_batch):
            yield slice(low, low + self._per_batch)

    def _is_buffer(self, state_NTd: torch.Tensor) -> bool:
        return state_NTd.dtype == self._stack.state_dtype
