"""Registers windows and scores masks on them through the trie; shared by all trie engines.

Windows of a set are grouped by padded length; each group is one block for the executor.

Masks over players are written out over the stack's steps, so that a player may be several steps. A
stack may hold only a run of consecutive steps (a pipeline stage). Its trie is then walked once for
each distinct prefix over the steps before it, in sorted order, which is the order in which the
previous stage sends its states.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import LayerStack, PaddingMattersError
from lpserve.engine.trie import LeafStates, TrieExecutor, TrieSettings
from lpserve.errors import InputError
from lpserve.masks import sort_distinct
from lpserve.types import BoolArray, FloatArray, IntArray, Work

PADDED_LENGTH_STEP = 32
CPU_MICRO_BATCH_TOKENS = 4096
CUDA_MICRO_BATCH_TOKENS = 32768
HEAD_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
MAX_STATE_BUDGET_BYTES = {"cpu": 1 << 30, "cuda": 32 << 30}
NOISE_MASKS = 4


class PreparedStack(LayerStack, Protocol):
    """A LayerStack that must see real windows of a padded length before it runs them."""

    def prepare(self, windows: TokenWindows) -> None:
        """Record and check this padded length; raises EngineError when it cannot be driven."""
        ...


@dataclass(frozen=True, slots=True)
class _Group:
    row_numbers: IntArray
    block: TokenWindows


class StackScorer:
    """Scores masks on registered windows over one LayerStack."""

    def __init__(
        self,
        stack: PreparedStack,
        settings: TrieSettings,
        *,
        padded_step: int = PADDED_LENGTH_STEP,
        stage: tuple[int, Sequence[int]] | None = None,
    ) -> None:
        """
        Args:
            stage: (first step of the stack, `step_players` of the full model) where the stack is
                one stage of a pipeline; None: it holds all steps.
        """
        self.stage = stage
        self.stack = stack
        self.executor = TrieExecutor(stack, settings)
        self.padded_step = padded_step
        """Windows are padded to a multiple of this many tokens; 1: not at all."""
        self._groups: dict[str, list[_Group]] = {}
        self._sizes: dict[str, IntArray] = {}

    def register(self, windows: TokenWindows) -> str:
        """Prepare the stack for these windows; returns their content hash.

        Raises:
            EngineError: the model cannot be driven layer by layer.
            InputError: the state budget does not hold them.
        """
        key = windows.content_hash
        if key not in self._groups:
            with full_precision():
                try:
                    groups = self._prepared(windows)
                except PaddingMattersError:
                    self.padded_step = 1  # windows of each length by themselves
                    groups = self._prepared(windows)
            self._groups[key] = groups
            self._sizes[key] = windows.num_tokens_N
        return key

    def _prepared(self, windows: TokenWindows) -> list[_Group]:
        groups = self._split(windows)
        for group in groups:
            self.stack.prepare(group.block)
            self._rows(group.block)
        return groups

    def num_tokens(self, key: str) -> IntArray:
        """Scored positions of each window, int64[N]."""
        if key not in self._sizes:
            raise InputError(f"windows {key!r} are not registered with this engine")
        return self._sizes[key]

    def blocks(self, key: str) -> list[TokenWindows]:
        """Registered windows in blocks of one padded length, no larger than a state may be."""
        self.num_tokens(key)
        return [part for group in self._groups[key] for _, part in self._parts(group.block)]

    @property
    def _first(self) -> int:
        """The first step of the stack in the full model."""
        return self.stage[0] if self.stage else 0

    @property
    def _step_players(self) -> IntArray:
        """The player of each step of the full model, `int64[S]`; -1: none."""
        return np.array(self.stage[1] if self.stage else self.stack.step_players, dtype=np.int64)

    def _over_steps(self, masks_MP: BoolArray) -> BoolArray:
        """Masks over steps, `bool[M, S]`: a step runs where its player is kept, or has none."""
        players_S = self._step_players
        return np.asarray(masks_MP[:, players_S] | (players_S < 0))

    def _own_steps(self, masks_MP: BoolArray) -> IntArray:
        """How many steps of players each mask runs, `int64[M]`."""
        players_S = self._step_players
        steps_P = np.bincount(players_S[players_S >= 0], minlength=masks_MP.shape[1])
        return masks_MP @ steps_P

    def score(
        self, masks_MP: BoolArray, key: str, extra_metrics: Sequence[str] = ()
    ) -> tuple[FloatArray, Work]:
        """Metrics `float64[M, N, C]` of registered windows, the NLL and those of `extra_metrics`,
        and the work it took."""
        started = time.perf_counter()
        sorted_MS, inverse_M = sort_distinct(self._over_steps(masks_MP))
        metric_values = np.empty(
            (len(sorted_MS), len(self.num_tokens(key)), 1 + len(extra_metrics))
        )
        layer_forwards = tokens = 0
        with full_precision():
            for group in self._groups[key]:
                values, layer_forwards = self._walk(sorted_MS, group.block, extra_metrics)
                metric_values[:, group.row_numbers] = values
                tokens += len(sorted_MS) * group.block.tokens_NT.size
        return metric_values[inverse_M], Work(
            masks=len(masks_MP),
            distinct_masks=len(sorted_MS),
            layer_forwards=layer_forwards,
            skip_layer_forwards=int(self._own_steps(masks_MP).sum()),
            tokens=tokens,
            seconds=time.perf_counter() - started,
        )

    def score_overlap(
        self, masks_MP: BoolArray, key: str, extra_metrics: Sequence[str] = ()
    ) -> tuple[FloatArray, Work, FloatArray]:
        """`score` of distinct masks, with the overlap of their effects (`types.Scores.overlap_MM`);
        zeros on a stage that is not the last of its pipeline."""
        started = time.perf_counter()
        sorted_MS, inverse_M = sort_distinct(self._over_steps(masks_MP))
        metric_values = np.empty(
            (len(sorted_MS), len(self.num_tokens(key)), 1 + len(extra_metrics))
        )
        overlap = np.zeros((len(sorted_MS), len(sorted_MS)))
        layer_forwards = tokens = 0
        is_last = self._first + self.stack.num_steps == len(self._step_players)
        with full_precision():
            for group in self._groups[key]:
                for columns, part in self._parts(group.block, held=2):
                    leaves = LeafStates(part, len(sorted_MS)) if is_last else None
                    values, layer_forwards = self._walk_part(sorted_MS, part, extra_metrics, leaves)
                    metric_values[:, group.row_numbers[columns]] = values
                    if leaves is not None and leaves.rows is not None:
                        found = self.stack.overlap(leaves.rows, int(inverse_M[0]))
                        overlap += found.cpu().numpy()
                tokens += len(sorted_MS) * group.block.tokens_NT.size
        work = Work(
            masks=len(masks_MP),
            distinct_masks=2 * len(sorted_MS),  # heads: for the metrics, and to be compared
            layer_forwards=layer_forwards,
            skip_layer_forwards=int(self._own_steps(masks_MP).sum()),
            tokens=tokens,
            seconds=time.perf_counter() - started,
        )
        return metric_values[inverse_M], work, overlap[np.ix_(inverse_M, inverse_M)]

    def _walk(
        self, sorted_MS: BoolArray, block: TokenWindows, extra_metrics: Sequence[str]
    ) -> tuple[FloatArray, int]:
        """Metrics [D, N, C] of one block, and its layer-forwards."""
        metric_values = np.empty((len(sorted_MS), block.num_windows, 1 + len(extra_metrics)))
        layer_forwards = 0
        for columns, part in self._parts(block):
            values, layer_forwards = self._walk_part(sorted_MS, part, extra_metrics)
            metric_values[:, columns] = values
        return metric_values, layer_forwards

    def _walk_part(
        self,
        sorted_MS: BoolArray,
        part: TokenWindows,
        extra_metrics: Sequence[str],
        leaves: LeafStates | None = None,
    ) -> tuple[FloatArray, int]:
        """Metrics [D, N, C] of windows that fit one state, and the layer-forwards."""
        metric_values = np.empty((len(sorted_MS), part.num_windows, 1 + len(extra_metrics)))
        mine = slice(self._first, self._first + self.stack.num_steps)
        layer_forwards = 0
        for low, high in pairwise(prefix_bounds(sorted_MS, self._first)):
            metric_values[low:high], work = self.executor.score(
                sorted_MS[low:high, mine], part, extra_metrics, leaves and (leaves, low)
            )
            layer_forwards += work.layer_forwards
        return metric_values, layer_forwards

    def _parts(self, block: TokenWindows, held: int = 1) -> Iterator[tuple[slice, TokenWindows]]:
        """The parts of a block that fit one state each, with their columns in the block."""
        rows = self._rows(block, held)
        if rows == block.num_windows:
            yield slice(0, rows), block
            return
        for start in range(0, block.num_windows, rows):
            stop = min(start + rows, block.num_windows)
            yield slice(start, stop), block.select(np.arange(start, stop))

    def _rows(self, block: TokenWindows, held: int = 1) -> int:
        """Windows in one state: the same for every stage, whatever its own number of steps."""
        return self.executor.group_rows(
            block.num_windows, block.length, len(self._step_players), held=held
        )

    def batch_noise(self, key: str, seed: int = 0) -> float:
        """How much the other masks of a batch change a score: nats per token, root mean square over
        random masks, scored together and one by one.

        Zero on CPU by default, where a micro-batch is one state; on a GPU a kernel's rounding
        depends on the shape of its batch.
        """
        rng = np.random.default_rng(seed)
        masks_MP = rng.random((NOISE_MASKS, 1 + int(self._step_players.max()))) < 0.8
        together, _ = self.score(masks_MP, key)
        alone = np.concatenate([self.score(mask_P[None], key)[0] for mask_P in masks_MP])
        difference_M = (together - alone)[..., 0].sum(axis=1) / self.num_tokens(key).sum()
        return float(np.sqrt(np.mean(difference_M**2)))

    def _split(self, windows: TokenWindows) -> list[_Group]:
        step = self.padded_step
        padded_N = np.minimum(-(-windows.lengths_N // step) * step, windows.length)
        groups = []
        for length in np.unique(padded_N):
            row_numbers = np.flatnonzero(padded_N == length)
            groups.append(_Group(row_numbers, windows.select(row_numbers, int(length))))
        return groups


def prefix_bounds(sorted_MS: BoolArray, num_before: int) -> list[int]:
    """Where the first `num_before` bits of sorted masks change: 0, ..., D."""
    changes = (sorted_MS[1:, :num_before] != sorted_MS[:-1, :num_before]).any(axis=1)
    return [0, *(np.flatnonzero(changes) + 1).tolist(), len(sorted_MS)]


def trie_settings(options: Any, device_type: str, free_bytes: int) -> TrieSettings:
    """Settings from an engine's options `state_budget_mb` and `micro_batch_tokens`.

    By default a quarter of the free memory, at most 1 GiB on CPU and 32 GiB on a GPU, and a
    micro-batch of one state of at most 4,096 tokens on CPU, of packed states up to 32,768 tokens on
    a GPU. Setting `micro_batch_tokens` packs states on CPU too.
    """
    for name in ("state_budget_mb", "micro_batch_tokens"):
        value = options.get(name)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise InputError(f"{name} must be a number above 0: got {value!r}")
    budget_mb, tokens = options.get("state_budget_mb"), options.get("micro_batch_tokens")
    default = CPU_MICRO_BATCH_TOKENS if device_type == "cpu" else CUDA_MICRO_BATCH_TOKENS
    return TrieSettings(
        state_budget_bytes=(
            int(float(budget_mb) * 2**20)
            if budget_mb is not None
            else min(free_bytes // 4, MAX_STATE_BUDGET_BYTES[device_type])
        ),
        micro_batch_tokens=int(tokens) if tokens is not None else default,
        pack_states=tokens is not None or device_type != "cpu",
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


@contextmanager
def full_precision() -> Iterator[None]:
    """No gradients; float32 means float32 (no TF32); settings are put back afterwards."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = False
        with torch.inference_mode():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
