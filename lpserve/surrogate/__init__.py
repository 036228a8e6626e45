"""Surrogates: models that predict a mask's utility, behind one contract (`base.Surrogate`).

`make_surrogate` makes one by name. A new one is one module with a function `build` and one entry in
`lpserve.config.SURROGATES`, see `base.Surrogate`.
"""

from __future__ import annotations

from importlib import import_module

from lpserve.config import SURROGATES as KINDS
from lpserve.surrogate.auto import AutoSurrogate
from lpserve.surrogate.base import HeldOutError, Predictor, Surrogate
from lpserve.surrogate.crossfit import CrossFitted
from lpserve.surrogate.gaussian import MAX_TRAINING_MASKS, QUICK_TUNING_MASKS, KernelSurrogate
from lpserve.surrogate.paper import PaperSurrogate
from lpserve.surrogate.stack import Stack

__all__ = [
    "KINDS",
    "MAX_TRAINING_MASKS",
    "QUICK_TUNING_MASKS",
    "AutoSurrogate",
    "CrossFitted",
    "HeldOutError",
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
    """An unfitted surrogate by name, by the `build` function of its module.

    Args:
        kind: one of `KINDS`.
        seed: of what a kind draws at random; kernels draw nothing.
        quick: for choosing masks, where time matters: kernels are tuned to fewer masks, and `auto`
            has no other models.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown surrogate {kind!r}: one of {', '.join(KINDS)}")
    surrogate: Surrogate = import_module(KINDS[kind]).build(kind, seed, quick=quick)
    return surrogate


def kernel_of(surrogate: Predictor) -> KernelSurrogate | None:
    """The kernel surrogate that makes this one's predictions: itself, or what `auto` selected; None
    where another model, or a stack, makes them."""
    best = surrogate.best if isinstance(surrogate, AutoSurrogate) else surrogate
    return best if isinstance(best, KernelSurrogate) else None


def acquisition_model(surrogate: object) -> KernelSurrogate | None:
    """The kernel surrogate that acquisition uses: itself; for `auto` its best kernel, even if
    another model predicts; else None."""
    best = surrogate.best_kernel if isinstance(surrogate, AutoSurrogate) else surrogate
    return best if isinstance(best, KernelSurrogate) else None
