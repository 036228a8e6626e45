"""The bundled model and texts of `lpserve run --demo`; see README.md in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def demo_values() -> dict[str, Any]:
    """Config values of the demonstration: 10 x 128 calibration tokens, 400 masks, r up to 6."""
    return {
        "model": str(FOLDER / "model"),
        "calibration": {"sherlock": str(FOLDER / "calibration.txt")},
        "heldout": {"dracula": str(FOLDER / "heldout.txt")},
        "num_windows": 10,
        "heldout_windows": 32,
        "length": 128,
        "budget": 400,
        "max_removed": 6,
        "out": "demo-run",
    }
