"""Surrogates behind one contract (`base.Surrogate`); `make_surrogate` knows them by name.

Notation: M training masks, Q queried masks.
"""

from __future__ import annotations

from lpserve.kernel import COMPONENTS
from lpserve.surrogate.base import HeldOut, Surrogate
from lpserve.surrogate.gaussian import MAX_TRAINING_MASKS, KernelSurrogate
from lpserve.surrogate.paper import PaperSurrogate
from lpserve.types import BoolArray, FloatArray

KINDS = ("auto", *COMPONENTS, "paper")

__all__ = [
    "KINDS", "MAX_TRAINING_MASKS", "AutoSurrogate", "HeldOut", "KernelSurrogate", "PaperSurrogate",
    "Surrogate", "kernel_of", "make_surrogate",
]  # fmt: skip


def make_surrogate(kind: str, seed: int = 0) -> Surrogate:
    """A surrogate by name, see `KINDS`."""
    if kind == "auto":
        return AutoSurrogate()
    if kind in COMPONENTS:
        return KernelSurrogate(kind)
    if kind == "paper":
        return PaperSurrogate(seed)
    raise ValueError(f"unknown surrogate {kind!r}: one of {', '.join(KINDS)}")


class AutoSurrogate:
    """The kernel surrogate with the smaller held-out error at each fit."""

    def __init__(self) -> None:
        self._candidates = [KernelSurrogate(kind) for kind in COMPONENTS]
        self.best = self._candidates[0]
        self.name = "auto"

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        for candidate in self._candidates:
            candidate.fit(masks_MP, utilities_M, noise_M)
        self.best = min(self._candidates, key=lambda candidate: candidate.heldout.rmse)
        self.name = f"auto:{self.best.name}"

    @property
    def heldout(self) -> HeldOut:
        return self.best.heldout

    def mean(self, masks_QP: BoolArray) -> FloatArray:
        return self.best.mean(masks_QP)

    def predict(self, masks_QP: BoolArray) -> tuple[FloatArray, FloatArray]:
        return self.best.predict(masks_QP)


def kernel_of(surrogate: Surrogate) -> KernelSurrogate | None:
    """The kernel surrogate that answers for this one, if one does."""
    best = surrogate.best if isinstance(surrogate, AutoSurrogate) else surrogate
    return best if isinstance(best, KernelSurrogate) else None
