"""The two contracts of this package: what an engine does, and what the trie executor drives.

Notation: M masks, P players, N windows, T tokens, B rows of a micro-batch (a multiple
of N), d width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lpserve.errors import InputError
from lpserve.types import BoolArray, EngineInfo, Scores
from lpserve.windows import TokenWindows

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """Scores masks of one model.

    Any mask is legal, the empty one too (embedding, final norm, head). The score of a mask equals
    what the model gives with the dropped layers deleted, and does not depend on the other masks of
    the call. Several engines may be opened and closed one after another in one process.
    """

    info: EngineInfo

    def register(self, windows: TokenWindows) -> str:
        """Make more windows known; returns their content hash. Weights are not loaded again."""
        ...

    def score(self, masks_MP: BoolArray, windows: str | None = None) -> Scores:
        """Summed NLL of every window under every mask.

        Args:
            masks_MP: bool [M, P], True = kept; repeats are scored once.
            windows: hash of registered windows; None: those given at opening.
        """
        ...

    def close(self) -> None:
        """Free the model. Closing twice is allowed."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None: ...


class LayerStack(Protocol):
    """A model cut into embedding, players and head; what `trie.TrieExecutor` drives.

    A state is one tensor whose first axis counts windows, `[B, T, d]`; what the other axes hold is
    the stack's own affair. Inputs are never modified.
    """

    num_players: int

    def state_bytes(self, length: int) -> int:
        """Bytes of the state of one window of this padded length."""
        ...

    def embed(self, block: TokenWindows) -> torch.Tensor:
        """The state entering player 0, `[N, T, d]`."""
        ...

    def run_player(self, player: int, state_BTd: torch.Tensor) -> torch.Tensor:
        """The state after one player, same shape."""
        ...

    def reduce(self, state_BTd: torch.Tensor, block: TokenWindows, metric: str) -> torch.Tensor:
        """Head and metric: `float64[B]` on the state's device, B = k * N for k stacked masks.

        `metric` is `nll`: nats summed over each window's scored positions.
        """
        ...


def check_masks(masks_MP: Any, num_players: int) -> BoolArray:
    """Raise InputError unless masks are bool [M >= 1, P]."""
    masks = np.asarray(masks_MP)
    if masks.dtype != bool or masks.ndim != 2 or masks.shape[1] != num_players or not len(masks):
        raise InputError(
            f"masks must be bool [M >= 1, {num_players}], True = kept: "
            f"got {masks.dtype} {list(masks.shape)}"
        )
    return masks
