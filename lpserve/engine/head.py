"""Reduces final hidden states to metrics summed over each window; shared by every LayerStack.

Logits are computed in chunks of bounded memory and reduced immediately.

Shapes: B rows (k stacked masks times N windows), T tokens, d width, n scored targets, V vocabulary,
C metrics (NLL first).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.utility import top_of

_MAX_CACHED = 64
_LEAST_TARGETS = 4
"""Targets of all masks that are compared at once, whatever their logits take: fewer would read the
head's weights once for every target."""

TokenMetrics = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""(states before the targets [k * n, ...], their ids [n], which targets) -> float32[k * n, C]."""


class Targets:
    """Device index tensors of a block's scored targets."""

    def __init__(self, block: TokenWindows, device: torch.device) -> None:
        window_rows, position = np.nonzero(block.scored_NT)
        self.window_rows = on_device(window_rows, device)
        self.flat = on_device(window_rows * block.length + position - 1, device)
        self.ids = on_device(block.tokens_NT[window_rows, position], device)


class TargetCache:
    """Targets by content of the block."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[str, Targets] = {}

    def of(self, block: TokenWindows) -> Targets:
        key = block.content_hash
        if key not in self._known:
            if len(self._known) >= _MAX_CACHED:
                self._known.clear()
            self._known[key] = Targets(block, self._device)
        return self._known[key]


class Vocabulary(Protocol):
    """Logits of the vocabulary, or of the part of it that a rank holds, and metrics of them.

    Shapes: k stacked masks, `k * n` rows.
    """

    def logits(self, rows: torch.Tensor, /) -> torch.Tensor:
        """Logits of states before the targets, `[n, V]`, in the model's dtype."""
        ...

    def nll(self, logits: torch.Tensor, ids: torch.Tensor, /) -> torch.Tensor:
        """NLL of the targets, `float32[n]` nats."""
        ...

    def misses(self, logits: torch.Tensor, ids: torch.Tensor, /) -> torch.Tensor:
        """`float32[n]`: 1 where the target is not the most probable token, else 0."""
        ...

    def divergence(self, full_logits: torch.Tensor, mask_logits: torch.Tensor, /) -> torch.Tensor:
        """`float32[k, n]` nats: KL divergence of the full model's prediction from each mask's."""
        ...

    def overlap(self, logits: torch.Tensor, reference: int, /) -> torch.Tensor:
        """`float64[k, k]` nats: see `types.Scores.overlap_MM`; of logits `[k, n, V]`."""
        ...


class LocalVocabulary:
    """All logits of the vocabulary are computed on one device.

    Args:
        compiled: reduce logits through `torch.compile`, which reads them once or twice in their
            own dtype where eager operations write two float32 copies.
    """

    def __init__(
        self, logits: Callable[[torch.Tensor], torch.Tensor], *, compiled: bool = False
    ) -> None:
        self._logits = logits
        self._nll: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = (
            torch.compile(_nll) if compiled else _nll
        )

    def logits(self, rows: torch.Tensor, /) -> torch.Tensor:
        return self._logits(rows)

    def nll(self, logits: torch.Tensor, ids: torch.Tensor, /) -> torch.Tensor:
        return self._nll(logits, ids)

    def misses(self, logits: torch.Tensor, ids: torch.Tensor, /) -> torch.Tensor:
        return (logits.argmax(-1) != ids).float()

    def divergence(self, full_logits: torch.Tensor, mask_logits: torch.Tensor, /) -> torch.Tensor:
        return _divergence(
            full_logits.log_softmax(-1, dtype=torch.float32),
            mask_logits.log_softmax(-1, dtype=torch.float32),
        )

    def overlap(self, logits: torch.Tensor, reference: int, /) -> torch.Tensor:
        p = logits[reference].softmax(-1, dtype=torch.float32)
        change = logits.float() - logits[reference].float()
        change -= (change * p).sum(-1, keepdim=True)
        weighted = change.mul_(p.sqrt()).flatten(1)
        return (weighted @ weighted.T).double()


class Head:
    """Reduces final states to metrics, chunk by chunk.

    Args:
        vocab_size: logits of one target on this device.
        chunk_bytes: upper bound on the memory of the logits that are held at once.
        dtype: of the logits, as the model gives them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        vocab_size: int,
        chunk_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._chunk_bytes = chunk_bytes
        # logits, float32, log-softmax
        self._logit_bytes = 8 if dtype == torch.float32 else 10
        self._targets = TargetCache(device)
        self._tables: dict[tuple[str, int], _TopTable] = {}

    def reduce(
        self,
        batch: torch.Tensor,
        block: TokenWindows,
        extra_metrics: Sequence[str] = (),
        full_NTd: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `lpserve.engine.base.LayerStack.reduce`."""
        vocabulary, targets = self._vocabulary, self._targets.of(block)
        tables = {
            k: self._table(block, k, targets, full_NTd)
            for name in extra_metrics
            if (k := top_of(name))
        }

        def metrics(mask_rows: torch.Tensor, ids: torch.Tensor, part: slice) -> torch.Tensor:
            num_stacked = len(mask_rows) // len(ids)
            logits = vocabulary.logits(mask_rows)
            all_ids = ids.repeat(num_stacked)
            columns = [vocabulary.nll(logits, all_ids)]
            stacked = logits.view(num_stacked, len(ids), -1)
            for name in extra_metrics:
                if name == "misses":
                    columns.append(vocabulary.misses(logits, all_ids))
                elif name == "kl":
                    assert full_NTd is not None
                    rows = full_NTd.flatten(0, 1)[targets.flat[part]]
                    found = vocabulary.divergence(vocabulary.logits(rows), stacked)
                    columns.append(found.flatten())
                else:
                    columns.append(tables[top_of(name) or 0].divergence(stacked, part).flatten())
            return torch.stack(columns, dim=1)

        # beside the logits: log-probabilities of both, and their products
        factor = 5 if "kl" in extra_metrics else 3 if tables else 1
        return summed(
            batch,
            block.num_windows,
            targets,
            self._chunk(batch, block, factor),
            1 + len(extra_metrics),
            metrics,
        )

    def before(self, batch: torch.Tensor, block: TokenWindows) -> torch.Tensor:
        """States before the scored targets, `[k, n, ...]`, of k stacked masks."""
        states = batch.view(batch.shape[0] // block.num_windows, -1, *batch.shape[2:])
        return states[:, self._targets.of(block).flat]

    def overlap(self, rows: torch.Tensor, reference: int) -> torch.Tensor:
        """See `lpserve.engine.base.LayerStack.overlap`."""
        num_masks, num_targets = rows.shape[:2]
        # beside the logits: their changes, and the products with the probabilities
        target_bytes = 3 * self._logit_bytes * self._vocab_size * num_masks
        chunk = max(_LEAST_TARGETS, self._chunk_bytes // target_bytes)
        total = torch.zeros((num_masks, num_masks), dtype=torch.float64, device=rows.device)
        for start in range(0, num_targets, chunk):
            part = rows[:, start : start + chunk]
            logits = self._vocabulary.logits(part.flatten(0, 1))
            total += self._vocabulary.overlap(logits.view(*part.shape[:2], -1), reference)
        return total

    def _chunk(self, batch: torch.Tensor, block: TokenWindows, factor: int) -> int:
        """Targets of a mask that may be worked on at once."""
        num_stacked = batch.shape[0] // block.num_windows
        target_bytes = self._logit_bytes * factor * self._vocab_size * num_stacked
        return max(1, self._chunk_bytes // target_bytes)

    def _table(
        self, block: TokenWindows, k: int, targets: Targets, full_NTd: torch.Tensor | None
    ) -> _TopTable:
        key = (block.content_hash, k)
        if key not in self._tables:
            assert full_NTd is not None
            if len(self._tables) >= _MAX_CACHED:
                self._tables.clear()
            if not isinstance(self._vocabulary, LocalVocabulary):
                raise InputError("kl_topK needs tensor_parallel_size 1; kl does not")
            rows = full_NTd.flatten(0, 1)[targets.flat]
            chunk, k = self._chunk(full_NTd, block, 3), min(k, self._vocab_size)
            log_p, ids, log_rest = [], [], []
            for start in range(0, len(rows), chunk):
                logits = self._vocabulary.logits(rows[start : start + chunk])
                all_log_p = logits.log_softmax(-1, dtype=torch.float32)
                top = all_log_p.topk(k)
                log_p.append(top.values)
                ids.append(top.indices)
                log_rest.append(_log_rest(all_log_p, top.indices))
            self._tables[key] = _TopTable(torch.cat(log_p), torch.cat(ids), torch.cat(log_rest))
        return self._tables[key]


class _TopTable:
    """The K most probable next tokens of the full model before every target of a block.

    Args:
        log_p: of those tokens, `float32[n, K]`, most probable first.
        ids: of those tokens, `int64[n, K]`.
        log_rest: log-probability of all other tokens together, `float32[n]`.
    """

    def __init__(self, log_p: torch.Tensor, ids: torch.Tensor, log_rest: torch.Tensor) -> None:
        self._log_p = torch.cat([log_p, log_rest[:, None]], dim=-1)
        self._ids = ids

    def divergence(self, mask_logits: torch.Tensor, part: slice) -> torch.Tensor:
        """KL divergence, `float32[k, n]` nats; all tokens outside of the K are one outcome."""
        mask_logits = mask_logits.float()
        ids = self._ids[part].expand(len(mask_logits), -1, -1)
        outcomes = torch.cat(
            [mask_logits.gather(-1, ids), _log_rest(mask_logits, ids)[..., None]], dim=-1
        )
        return _divergence(self._log_p[part], outcomes.log_softmax(-1))


def _nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), ids, reduction="none")


def _log_rest(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """logsumexp over all tokens but those of `ids`; -inf where there is no other.

    Summed, not subtracted from 1: where the others share a millionth, float32 has one digit of it.
    """
    return scores.scatter(-1, ids, -torch.inf).logsumexp(-1)


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis of p (log p - log q); tokens without probability add nothing."""
    return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0).sum(-1)


def summed(
    batch: torch.Tensor,
    num_windows: int,
    targets: Targets,
    chunk: int,
    num_metrics: int,
    token_metrics: TokenMetrics,
) -> torch.Tensor:
    """`float64[B, C]`: metrics summed over each row's scored positions.

    Args:
        batch: states of k masks, stacked; axes after T are the stack's own.
        chunk: upper bound on the targets of one mask given to `token_metrics` at once.
    """
    num_stacked = batch.shape[0] // num_windows
    states = batch.view(num_stacked, -1, *batch.shape[2:])
    first_rows = torch.arange(num_stacked, device=batch.device)[:, None] * num_windows
    sums = batch.new_zeros((batch.shape[0], num_metrics), dtype=torch.float64)
    for start in range(0, len(targets.flat), chunk):
        part = slice(start, start + chunk)
        # one row for each scored target: the state just before it
        rows = states[:, targets.flat[part]].flatten(0, 1)
        values = token_metrics(rows, targets.ids[part], part)
        window_rows = (first_rows + targets.window_rows[part]).flatten()
        sums.index_add_(0, window_rows, values.double())
    return sums


def plain_nll(logits: torch.Tensor, windows: TokenWindows, device: torch.device) -> torch.Tensor:
    """`float64[N]` nats from a model's own logits [N, T, V], the slow and obvious way."""
    tokens_NT = on_device(windows.tokens_NT, device)
    scored_NT = torch.from_numpy(windows.scored_NT).to(device)
    log_probs = logits[:, :-1].float().log_softmax(-1)
    nll = -log_probs.gather(-1, tokens_NT[:, 1:, None]).squeeze(-1).double()
    return (nll * scored_NT[:, 1:]).sum(1)


def on_device(array: Any, device: torch.device) -> torch.Tensor:
    """An integer array as int64 on a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).long().to(device)
