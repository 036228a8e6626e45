"""Surrogates behind one contract (`base.Surrogate`); `make_surrogate` knows them by name.

Notation: M training masks, Q queried masks.
"""

from __future__ import annotations

from lpserve.config import SURROGATES as KINDS
from lpserve.surrogate.auto import RIVALS, AutoSurrogate
from lpserve.surrogate.base import HeldOut, Predictor, Surrogate
from lpserve.surrogate.crossfit import CrossFitted
from lpserve.surrogate.gaussian import (
    MAX_TRAINING_MASKS,
    QUICK_TUNING_MASKS,
    TUNING_MASKS,
    KernelSurrogate,
)
from lpserve.surrogate.kernel import COMPONENTS
from lpserve.surrogate.paper import PaperSurrogate
from lpserve.surrogate.stack import Stack

__all__ = [
    "KINDS",
    "MAX_TRAINING_MASKS",
    "QUICK_TUNING_MASKS",
    "AutoSurrogate",
    "CrossFitted",
    "HeldOut",
    "KernelSurrogate",
    "PaperSurrogate",
    "Predictor",
    "Stack",
    "Surrogate",
    "acquisition_model",
    "kernel_of",
    "make_surrogate",
]


def make_surrogate(kind: str, seed: int = 0, *, quick: bool = False) -> Surrogate:
    """A surrogate by name, see `KINDS`.

    `quick`: for choosing masks. Kernels are tuned to fewer of them, and `auto` has no others: those
    take seconds to fit and found no better sets (`scripts/bench/results/large_games.md`).
    """
    tuning_masks = QUICK_TUNING_MASKS if quick else TUNING_MASKS
    if kind == "auto":
        return AutoSurrogate(seed, () if quick else tuple(RIVALS), tuning_masks)
    if kind in COMPONENTS:
        return KernelSurrogate(kind, tuning_masks)
    if kind in RIVALS:
        return CrossFitted(kind, RIVALS[kind], seed)
    if kind == "paper":
        return PaperSurrogate(seed)
    raise ValueError(f"unknown surrogate {kind!r}: one of {', '.join(KINDS)}")


def kernel_of(surrogate: Predictor) -> KernelSurrogate | None:
    """The kernel surrogate that answers for this one, if one alone does."""
    best = surrogate.best if isinstance(surrogate, AutoSurrogate) else surrogate
    return best if isinstance(best, KernelSurrogate) else None


def acquisition_model(surrogate: Predictor) -> KernelSurrogate | None:
    """The kernel surrogate that says which masks to score next, if there is one: for `auto` the
    best of its kernels, whoever answers."""
    best = surrogate.best_kernel if isinstance(surrogate, AutoSurrogate) else surrogate
    return best if isinstance(best, KernelSurrogate) else None
