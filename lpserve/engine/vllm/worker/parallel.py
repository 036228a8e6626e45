"""What passes between ranks: numbers of a split vocabulary, and states along a pipeline.

Shapes: n scored targets, d width, V vocabulary of this rank, k stacked masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class VocabularyPart:
    """The part of a vocabulary that one tensor-parallel rank holds. A few numbers a target travel
    between ranks, never logits; every rank has the same results.

    Shapes: R ranks.
    """

    def __init__(
        self,
        shard_indices: Callable[[torch.Tensor], Any],
        logits: Callable[[torch.Tensor], torch.Tensor],
        num_ranks: int,
    ) -> None:
        """
        Args:
            shard_indices: which rows of the vocabulary this rank holds, as vLLM describes them.
            logits: of states `[n, d]`, over those rows.
        """
        self._shard_indices, self._logits, self._num_ranks = shard_indices, logits, num_ranks
        self._start = self._size = 0

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        shard = self._shard_indices(rows)
        self._start, self._size = shard.org_vocab_start_index, shard.num_org_elements
        return self._logits(rows)[:, : self._size].float()

    def nll(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        here = (ids >= self._start) & (ids < self._start + self._size)
        local = (ids - self._start).clamp(0, max(self._size - 1, 0))
        maxima, sums = _max_and_sum(logits)
        targets = torch.where(here, logits.gather(1, local[:, None])[:, 0], 0.0)
        rank_max, rank_sums, rank_targets = self._gathered(maxima, sums, targets)
        return _log_sum(rank_max, rank_sums) - rank_targets.sum(dim=0)

    def misses(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        maxima, places = logits.max(dim=1)
        # vocabulary rows are exact in float64
        rank_max, rank_at = self._gathered(maxima.double(), (places + self._start).double())
        # ranks hold the vocabulary in order: of equals, the first
        first = rank_at.gather(0, rank_max.argmax(dim=0, keepdim=True))[0]
        return (first != ids).float()

    def divergence(self, full_logits: torch.Tensor, mask_logits: torch.Tensor) -> torch.Tensor:
        num_stacked, num_targets = mask_logits.shape[:2]
        max_p, sums_p = _max_and_sum(full_logits)
        max_q, sums_q = _max_and_sum(mask_logits.flatten(0, 1))
        gaps = (full_logits - max_p[:, None]).exp() * (full_logits - mask_logits)
        parts = self._gathered(
            max_p.repeat(num_stacked),
            sums_p.repeat(num_stacked),
            max_q,
            sums_q,
            gaps.sum(-1).flatten(),
        )
        log_p, log_q = _log_sum(parts[0], parts[1]), _log_sum(parts[2], parts[3])
        gap = (parts[4] * (parts[0] - log_p).exp()).sum(dim=0)  # sum of p (logit p - logit q)
        return (gap - log_p + log_q).view(num_stacked, num_targets)

    def overlap(self, logits: torch.Tensor, reference: int) -> torch.Tensor:
        num_masks, num_targets = logits.shape[:2]
        maxima, sums = _max_and_sum(logits[reference])
        log_p = logits[reference] - _log_sum(*self._gathered(maxima, sums))[:, None]
        change = logits - logits[reference]
        parts = self._gathered((change * log_p.exp()).sum(-1).flatten())[0]
        change -= parts.sum(dim=0).view(num_masks, num_targets, 1)
        weighted = (change * (log_p / 2).exp()).flatten(1)
        products = (weighted @ weighted.T).double()
        return self._gathered(products.flatten())[0].sum(dim=0).view(num_masks, num_masks)

    def _gathered(self, *numbers: torch.Tensor) -> torch.Tensor:
        """Numbers of every rank, `[len(numbers), R, n]`."""
        from vllm.distributed import tensor_model_parallel_all_gather

        parts = tensor_model_parallel_all_gather(torch.stack(numbers), dim=1)
        return parts.view(len(numbers), self._num_ranks, -1)


def _max_and_sum(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row, and the sum of exponentials beside it."""
    maxima = logits.amax(dim=1)
    return maxima, (logits - maxima[:, None]).exp().sum(dim=1)


def _log_sum(rank_max: torch.Tensor, rank_sums: torch.Tensor) -> torch.Tensor:
    """log of the sum of exponentials over all ranks, `float32[n]`."""
    top = rank_max.amax(dim=0)
    return top + (rank_sums * (rank_max - top).exp()).sum(dim=0).log()


class PipelineLink:
    """To the ranks before and after in vLLM's pipeline."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        from vllm.distributed import get_pp_group

        self._group = get_pp_group()
        self._device, self._dtype = device, dtype
        self.is_first: bool = self._group.is_first_rank
        self.is_last: bool = self._group.is_last_rank

    def send(self, tensor: torch.Tensor) -> None:
        self._group.send(tensor.contiguous())

    def receive(self, shape: torch.Size) -> torch.Tensor:
        return self._group.recv(shape, self._dtype)
