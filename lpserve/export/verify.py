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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.errors import ExportError
from lpserve.masks import without
from lpserve.model.architecture import read_architecture
from lpserve.model.checkpoint import Checkpoint
from lpserve.types import EngineSpec, FloatArray, Player

VERIFY_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Relative, summed NLL of a window. Half precision rounds with the batch shape, which differs."""
GENERATION_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""Standard deviations of the logits by which a token chosen with a cache may miss the best one of a
forward pass without: rounding may swap two that are almost alike."""
RANDOM_WINDOWS, RANDOM_LENGTH = 4, 64
"""Windows of random tokens that are compared where none are given, and their tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """How a reloaded checkpoint compares with the skip engine."""

    worst_relative_difference: float
    """Largest difference of a window's summed NLL."""
    ppl: float
    """Perplexity of the reloaded checkpoint."""
    generates: bool
    """Whether `generate` with a cache chooses what a forward pass without one finds most probable;
    False only where the original model does not either."""


def verify_checkpoint(
    folder: Path,
    windows: TokenWindows,
    expected_nll_N: FloatArray,
    dtype: str,
    device: str = "auto",
    *,
    original: Checkpoint,
) -> Verification:
    """Reload a checkpoint in a fresh process, compare its scores, and have it generate.

    Args:
        expected_nll_N: the skip engine's summed NLL of every window, nats.
        dtype: one of `VERIFY_TOLERANCE`.
        original: the unpruned checkpoint, which is asked to generate where this one does not.

    Raises:
        ExportError: it does not load, a window's NLL differs by more than the tolerance, or it does
            not generate with a cache as without, where the original does.
    """
    attention = read_architecture(original).attention
    reloaded = reload_checkpoint(folder, windows, dtype, device, attention)
    found_N = reloaded.nll_N
    worst = float((np.abs(found_N - expected_nll_N) / np.abs(expected_nll_N)).max())
    if not worst <= VERIFY_TOLERANCE[dtype]:
        raise ExportError(
            f"the exported checkpoint scores up to {worst:.1e} (relative) off the skip "
            f"engine, tolerance {VERIFY_TOLERANCE[dtype]:.0e} in {dtype}: not exported"
        )
    if not reloaded.generates:
        one = windows.select([0])
        if reload_checkpoint(original.path, one, dtype, device, attention).generates:
            raise ExportError(
                "the exported checkpoint scores as it should, but its generate() with a cache "
                f"{reloaded.generation}, and the original's does not: not exported"
            )
    mean_nll = found_N.sum() / windows.num_tokens_N.sum()
    return Verification(
        worst_relative_difference=worst,
        ppl=float(np.exp(mean_nll)),
        generates=reloaded.generates,
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reloaded:
    """What a fresh process found of a checkpoint."""

    nll_N: FloatArray
    """Summed NLL of every window."""
    generates: bool
    """Whether `generate` with a cache agrees with forward passes without one."""
    generation: str
    """How it fails or differs, "" where it agrees."""


def reload_checkpoint(
    folder: Path,
    windows: TokenWindows,
    dtype: str,
    device: str = "auto",
    attention: str | None = None,
) -> Reloaded:
    """Score a checkpoint, and generate with it, in a fresh process that knows only transformers.

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
    found = json.loads(done.stdout.strip().splitlines()[-1])
    generation = ""
    if isinstance(found["regret"], str):
        generation = f"fails ({found['regret']})"
    elif not found["regret"] <= GENERATION_TOLERANCE[dtype]:
        generation = f"chooses tokens {found['regret']:.2g} standard deviations below the best"
    return Reloaded(nll_N=np.array(found["nll"]), generates=not generation, generation=generation)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Skipped:
    """What the skip engine knows of a set."""

    nll_N: FloatArray
    """Summed NLL of every window with the set skipped."""
    modules: dict[int, dict[str, list[str]]]
    """Of each layer that it runs in halves, the child modules of its parts."""
    absent: dict[int, dict[str, Any]]
    """And the forms of what stands for modules that are left out (`engine.parts.Absent.form`)."""


def skip_engine(
    checkpoint: Checkpoint,
    players: Sequence[Player],
    removed: Sequence[int],
    windows: TokenWindows,
    dtype: str,
    device: str,
) -> Skipped:
    """Score a set of removed players with an engine that is opened for it."""
    from lpserve.engine import build_engine

    spec = EngineSpec(
        kind="transformers",
        model=str(checkpoint.path),
        dtype=dtype,
        device=device,
        players=tuple(players),
    )
    with build_engine(spec, windows) as engine:
        mask_P = without(engine.info.num_players, removed)
        settings = engine.info.settings
        nll_N = engine.score(mask_P[None]).nll_MN[0]
        return Skipped(nll_N=nll_N, modules=settings["modules"], absent=settings["absent"])


def random_windows(vocab_size: int) -> TokenWindows:
    """The windows that are compared where none are given: the same for every model of a size."""
    rng = np.random.default_rng(0)
    return TokenWindows.from_tokens(rng.integers(0, vocab_size, (RANDOM_WINDOWS, RANDOM_LENGTH)))
