"""The bundled model and texts of `lpserve run --demo`; see README.md in this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def demo_values() -> dict[str, Any]:
    """Config values of the demonstration: 10 x 128 calibration tokens, 400 masks, r up to 6."""
    return {
        "model": str(FOLDER / "model"),
        **demo_texts(),
        "num_windows": 10,
        "heldout_windows": 32,
        "length": 128,
        "budget": 400,
        "max_removed": 6,
        "out": "demo-run",
    }


def demo_texts() -> dict[str, Any]:
    """The bundled texts: one novel to calibrate on, another held out."""
    return {
        "calibration": {"sherlock": str(FOLDER / "calibration.txt")},
        "heldout": {"dracula": str(FOLDER / "heldout.txt")},
    }


def demo_study() -> dict[str, Any]:
    """A study of the bundled model: 3 mixtures, 2 window counts, 2 utilities, 3 seeds; 36 points.

    Held-out windows come from the last fifth of both novels.
    """
    texts = {"sherlock": FOLDER / "calibration.txt", "dracula": FOLDER / "heldout.txt"}
    return {
        "model": str(FOLDER / "model"),
        "calibration": {name: str(path) for name, path in texts.items()},
        "heldout_windows": 16,
        "length": 128,
        "budget": 150,
        "max_removed": 6,
        "out": "demo-study",
        "sweep": {
            "calibration": {name: [name] for name in texts} | {"both": list(texts)},
            "num_windows": [5, 10],
            "utility": ["neg_nll", "ppl_ratio"],
            "seed": [0, 1, 2],
        },
    }
