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

    def logits(self, rows_nd: torch.Tensor) -> torch.Tensor:
        shard = self._shard_indices(rows_nd)
        self._start, self._size = shard.org_vocab_start_index, shard.num_org_elements
        return self._logits(rows_nd)[:, : self._size].float()

    def nll(self, logits_nV: torch.Tensor, ids_n: torch.Tensor) -> torch.Tensor:
        here_n = (ids_n >= self._start) & (ids_n < self._start + self._size)
        local_n = (ids_n - self._start).clamp(0, max(self._size - 1, 0))
        most_n, sums_n = _most_and_sum(logits_nV)
        target_n = torch.where(here_n, logits_nV.gather(1, local_n[:, None])[:, 0], 0.0)
        most_Rn, sums_Rn, target_Rn = self._gathered(most_n, sums_n, target_n)
        return _log_sum(most_Rn, sums_Rn) - target_Rn.sum(dim=0)

    def misses(self, logits_nV: torch.Tensor, ids_n: torch.Tensor) -> torch.Tensor:
        most_n, at_n = logits_nV.max(dim=1)
        # vocabulary rows are exact in float64
        most_Rn, at_Rn = self._gathered(most_n.double(), (at_n + self._start).double())
        # ranks hold the vocabulary in order: of equals, the first
        first_n = at_Rn.gather(0, most_Rn.argmax(dim=0, keepdim=True))[0]
        return (first_n != ids_n).float()

    def divergence(self, whole_nV: torch.Tensor, logits_knV: torch.Tensor) -> torch.Tensor:
        num_stacked, num_targets = logits_knV.shape[:2]
        most_p, sums_p = _most_and_sum(whole_nV)
        most_q, sums_q = _most_and_sum(logits_knV.flatten(0, 1))
        gaps = (whole_nV - most_p[:, None]).exp() * (whole_nV - logits_knV)
        parts = self._gathered(
            most_p.repeat(num_stacked),
            sums_p.repeat(num_stacked),
            most_q,
            sums_q,
            gaps.sum(-1).flatten(),
        )
        log_p, log_q = _log_sum(parts[0], parts[1]), _log_sum(parts[2], parts[3])
        gap = (parts[4] * (parts[0] - log_p).exp()).sum(dim=0)  # sum of p (logit p - logit q)
        return (gap - log_p + log_q).view(num_stacked, num_targets)

    def _gathered(self, *numbers_n: torch.Tensor) -> torch.Tensor:
        """Numbers of every rank, `[len(numbers_n), R, n]`."""
        from vllm.distributed import tensor_model_parallel_all_gather

        parts = tensor_model_parallel_all_gather(torch.stack(numbers_n), dim=1)
        return parts.view(len(numbers_n), self._num_ranks, -1)


def _most_and_sum(logits_nV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row, and the sum of exponentials beside it."""
    most_n = logits_nV.amax(dim=1)
    return most_n, (logits_nV - most_n[:, None]).exp().sum(dim=1)


def _log_sum(most_Rn: torch.Tensor, sums_Rn: torch.Tensor) -> torch.Tensor:
    """log of the sum of exponentials over all ranks, `float32[n]`."""
    top_n = most_Rn.amax(dim=0)
    return top_n + (sums_Rn * (most_Rn - top_n).exp()).sum(dim=0).log()


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
