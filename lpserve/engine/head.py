"""From final hidden states to the summed NLL of each window; shared by every LayerStack.

Logits are never kept: they come in chunks of bounded memory and are reduced at once.

Shapes: B rows (k stacked masks times N windows), T tokens, d width, n scored targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lpserve.windows import TokenWindows

_MAX_CACHED = 64


class Targets:
    """Device index tensors of a block's scored targets."""

    def __init__(self, block: TokenWindows, device: torch.device) -> None:
        window_n, position_n = np.nonzero(block.scored_NT)
        self.window_n = on_device(window_n, device)
        self.flat_n = on_device(window_n * block.length + position_n - 1, device)
        self.ids_n = on_device(block.tokens_NT[window_n, position_n], device)


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


def summed_nll(
    state_BTd: torch.Tensor,
    num_windows: int,
    targets: Targets,
    chunk: int,
    token_nll: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`float64[B]`: nats summed over each row's scored positions.

    Args:
        state_BTd: states of k masks, stacked; axes after T are the stack's own.
        chunk: most targets of one mask given to `token_nll` at once.
        token_nll: (rows [n, ...], ids [n]) -> float32[n] nats.
    """
    num_stacked = state_BTd.shape[0] // num_windows
    states = state_BTd.view(num_stacked, -1, *state_BTd.shape[2:])
    sums_B = torch.zeros(state_BTd.shape[0], dtype=torch.float64, device=state_BTd.device)
    for start in range(0, len(targets.flat_n), chunk):
        part = slice(start, start + chunk)
        # one row for each scored target: the state just before it
        rows = states[:, targets.flat_n[part]].flatten(0, 1)
        nll_n = token_nll(rows, targets.ids_n[part].repeat(num_stacked))
        window_n = torch.cat([targets.window_n[part] + k * num_windows for k in range(num_stacked)])
        sums_B.index_add_(0, window_n, nll_n.double())
    return sums_B


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
