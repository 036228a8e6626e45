"""Compares a pruned checkpoint, as others load it, with what the skip engine scores.

The checkpoint is loaded in a fresh process that knows transformers alone (`reload.py`), so that
nothing of lpserve can hide what is wrong with it.

Notation: N windows, T tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.errors import ExportError
from lpserve.export.pruned_config import PrunedConfig
from lpserve.model.checkpoint import Checkpoint
from lpserve.types import FloatArray

VERIFY_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Relative, summed NLL of a window. Half precision rounds with the batch shape, which differs."""
RANDOM_WINDOWS, RANDOM_LENGTH = 4, 64
"""Windows of random tokens that are compared where none are given, and their tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """How a reloaded checkpoint compares with the skip engine."""

    worst_relative_difference: float
    """Largest difference of a window's summed NLL."""
    ppl: float
    """Perplexity of the reloaded checkpoint."""


def verify_checkpoint(
    folder: Path,
    windows: TokenWindows,
    expected_nll_N: FloatArray,
    dtype: str,
    device: str = "auto",
    attention: str | None = None,
) -> Verification:
    """Reload a checkpoint in a fresh process and compare its scores.

    Args:
        expected_nll_N: the skip engine's summed NLL of every window, nats.
        dtype: one of `VERIFY_TOLERANCE`.
        attention: attention implementation of transformers; None: its own choice.

    Raises:
        ExportError: it does not load, or a window's NLL differs by more than the tolerance.
    """
    found_N = reloaded_nll(folder, windows, dtype, device, attention)
    worst = float((np.abs(found_N - expected_nll_N) / np.abs(expected_nll_N)).max())
    if not worst <= VERIFY_TOLERANCE[dtype]:
        raise ExportError(
            f"the exported checkpoint scores up to {worst:.1e} (relative) off the skip "
            f"engine, tolerance {VERIFY_TOLERANCE[dtype]:.0e} in {dtype}: not exported"
        )
    mean_nll = found_N.sum() / windows.num_tokens_N.sum()
    return Verification(worst_relative_difference=worst, ppl=float(np.exp(mean_nll)))


def reloaded_nll(
    folder: Path,
    windows: TokenWindows,
    dtype: str,
    device: str = "auto",
    attention: str | None = None,
) -> FloatArray:
    """Summed NLL of every window from a fresh process that knows only transformers, `float64[N]`.

    Args:
        attention: attention implementation of transformers; None: its own choice.

    Raises:
        ExportError: that process fails.
    """
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    script = Path(__file__).with_name("reload.py")
    chosen = [attention] if attention else []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "windows.npz"
        np.savez(path, tokens=windows.tokens_NT, scored=windows.scored_NT)
        done = subprocess.run(
            [sys.executable, str(script), str(folder), str(path), dtype, device, *chosen],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"the exported checkpoint does not load in a fresh process: {last}")
    return np.array(json.loads(done.stdout.strip().splitlines()[-1]))


def skip_engine_nll(
    checkpoint: Checkpoint, pruned: PrunedConfig, windows: TokenWindows, dtype: str, device: str
) -> FloatArray:
    """Summed NLL of every window with the removed layers skipped, `float64[N]`; opens an engine."""
    from lpserve.engine import open_engine

    mask_P = np.zeros(pruned.num_layers, dtype=bool)
    mask_P[pruned.kept] = True
    with open_engine(str(checkpoint.path), windows, dtype=dtype, device=device) as engine:
        return engine.score(mask_P[None]).nll_MN[0]


def random_windows(vocab_size: int) -> TokenWindows:
    """The windows that are compared where none are given: the same for every model of a size."""
    rng = np.random.default_rng(0)
    return TokenWindows.from_tokens(rng.integers(0, vocab_size, (RANDOM_WINDOWS, RANDOM_LENGTH)))
