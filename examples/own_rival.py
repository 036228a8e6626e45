"""A rival of one's own: the best contiguous block of layers, compared with greedy.

PYTHONPATH=. python examples/own_rival.py [OUT]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from lpserve.cli.compare import comparison_table
from lpserve.demo import demo_values
from lpserve.rivals.compare import CompareConfig, compare
from lpserve.rivals.proposer import Ask, Proposer, SearchSetting
from lpserve.rivals.registry import RIVALS, Rival


def propose(setting: SearchSetting) -> Proposer:
    """Every block of 1..max_removed layers; a search may read what `yield` returns, their NLLs."""
    for size in range(1, setting.max_removed + 1):
        masks_MP = np.ones((setting.num_players - size + 1, setting.num_players), dtype=bool)
        for start, mask_P in enumerate(masks_MP):
            mask_P[start : start + size] = False  # True = kept
        yield Ask(masks_MP)


def main(out: str = "own-rival") -> None:
    """Print what each rival found on the bundled model, and what it cost."""
    RIVALS["blocks"] = Rival("every contiguous block", propose)
    windows = {"num_windows": 4, "heldout_windows": 4, "length": 64, "max_removed": 3, "out": out}
    config: dict[str, Any] = demo_values() | windows | {"budget": 60}
    comparison = compare(CompareConfig(**config, rivals=("blocks", "greedy")))
    print(*comparison_table(comparison), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
