"""Surrogates: predict a mask's utility from its bits, with uncertainty and held-out error.

`gp`, `ridge` and `gp+ridge` are Gaussian processes on masks (`lpserve.kernel`), so one posterior,
one leave-one-out formula and one exact form for values (`lpserve.semivalue`) serve all. The game is
deterministic: scored masks are reproduced (but for a jitter of 1e-10), unseen ones keep the part of
a score that no neighbour shares as uncertainty. `paper` is the network of arXiv 2602.07804 (section
4.2 and its published code): Linear(P, 2P)-CELU-Linear(2P, 1)-Sigmoid.

Notation: M training masks, Q queried masks, P players.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.stats import rankdata

from lpserve.kernel import COMPONENTS, MaskKernel, tune, whitening
from lpserve.masks import keys
from lpserve.types import BoolArray, FloatArray, IntArray

KINDS = ("auto", *COMPONENTS, "paper")
MAX_TRAINING_MASKS = 3000
"""A kernel surrogate costs M^3; beyond this many masks it trains on an evenly spaced subset."""
_TUNING_MASKS = 250
_QUERY_MASKS = 2048  # at once: bounds the memory
_RETUNE_GROWTH = 1.25
_FOLDS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Error on masks that a fit has not seen."""

    r2: float
    spearman: float
    rmse: float
    method: str
    """`leave-one-out` or `5-fold`."""
    num_masks: int


class Surrogate(Protocol):
    """Contract of every surrogate. Fitting again replaces the fit; all are deterministic."""

    name: str

    @property
    def heldout(self) -> HeldOut: ...

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        """Fit to distinct masks with finite utilities, M >= 2; `noise_M` is a known variance."""
        ...

    def mean(self, masks_QP: BoolArray) -> FloatArray:
        """Predicted utility, `float64[Q]`."""
        ...

    def predict(self, masks_QP: BoolArray) -> tuple[FloatArray, FloatArray]:
        """Predicted utility and its standard deviation, `float64[Q]` each."""
        ...


def make_surrogate(kind: str, seed: int = 0) -> Surrogate:
    """A surrogate by name, see `KINDS`."""
    if kind == "auto":
        return AutoSurrogate()
    if kind in COMPONENTS:
        return KernelSurrogate(kind)
    if kind == "paper":
        return PaperSurrogate(seed)
    raise ValueError(f"unknown surrogate {kind!r}: one of {', '.join(KINDS)}")


class KernelSurrogate:
    """A kind of `COMPONENTS`. Tuned again whenever the masks grew by a quarter.

    The empty coalition is no training point: a model without any layer is like no other, however
    few are left (26.6 nats against at most 10.3 with one layer, on the bundled model). Where its
    score is known it is used as it is.
    """

    def __init__(self, kind: str) -> None:
        self.name = kind
        self.heldout: HeldOut
        self.kernel: MaskKernel | None = None
        self._tuned_at = 0

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        masks_MP = np.asarray(masks_MP, dtype=bool)
        targets_M = np.asarray(utilities_M, dtype=np.float64)
        noise_M = np.zeros(len(masks_MP)) if noise_M is None else np.asarray(noise_M)
        empty = np.flatnonzero(~masks_MP.any(axis=1))
        self.empty_row = int(empty[0]) if len(empty) and len(masks_MP) > 2 else None
        """Row of the empty coalition among the masks of the last fit; None: not scored."""
        trained = np.flatnonzero(np.arange(len(masks_MP)) != self.empty_row)
        self.rows = trained[_spaced(len(trained), MAX_TRAINING_MASKS)]
        """Training masks among those of the last fit."""
        self.empty = float(targets_M[empty[0]]) if self.empty_row is not None else None
        self.masks_MP = masks_MP[self.rows]
        targets_M = targets_M[self.rows]
        self.offset = float(targets_M.mean())
        self.scale = float(targets_M.std()) if np.ptp(targets_M) > 0 else 1.0
        self.scaled_M = (targets_M - self.offset) / self.scale
        self.noise_M = noise_M[self.rows] / self.scale**2
        if self.kernel is None or len(masks_MP) >= _RETUNE_GROWTH * self._tuned_at:
            self.kernel = self.tuned(np.arange(len(self.rows)))
            self._tuned_at = len(masks_MP)
        self.whiten_MM = whitening(self.kernel.gram(self.masks_MP, self.noise_M))
        """W with W K W' = 1, K the training masks' covariance."""
        self.alpha_M = self.whiten_MM.T @ (self.whiten_MM @ self.scaled_M)
        # Gaussian-process leave-one-out in closed form (Rasmussen & Williams 2006, eq. 5.12)
        variance_M = 1.0 / (self.whiten_MM**2).sum(axis=0)
        residual_M = self.alpha_M * variance_M
        self.calibration = float(np.sqrt(np.mean(residual_M**2 / variance_M)))
        """Root mean squared standardised residual: above 1, the intervals are too narrow."""
        self.left_out_M = targets_M - self.scale * residual_M
        """What each training mask is predicted to score from all the others."""
        self.heldout = _heldout(targets_M, self.left_out_M, "leave-one-out")

    def tuned(self, rows: IntArray) -> MaskKernel:
        """The kernel that some of the training masks alone would make likeliest."""
        some = rows[_spaced(len(rows), _TUNING_MASKS)]
        return tune(
            self.name, self.masks_MP[some], self.scaled_M[some], self.noise_M[some], self.kernel
        )

    def mean(self, masks_QP: BoolArray) -> FloatArray:
        masks_QP = np.asarray(masks_QP, dtype=bool)
        parts = [
            self._cross(masks_QP[start : start + _QUERY_MASKS]) @ self.alpha_M
            for start in range(0, len(masks_QP), _QUERY_MASKS)
        ]
        return self._or_empty(masks_QP, np.concatenate([np.empty(0), *parts]))

    def predict(self, masks_QP: BoolArray) -> tuple[FloatArray, FloatArray]:
        assert self.kernel is not None
        masks_QP = np.asarray(masks_QP, dtype=bool)
        cross_QM = self._cross(masks_QP)
        half_MQ = self.whiten_MM @ cross_QM.T
        variance_Q = self.kernel.variance(masks_QP) - (half_MQ**2).sum(axis=0)
        if self.empty is not None:
            variance_Q *= masks_QP.any(axis=1)
        std_Q = self.scale * max(1.0, self.calibration) * np.sqrt(np.maximum(variance_Q, 0.0))
        return self._or_empty(masks_QP, cross_QM @ self.alpha_M), std_Q

    def _or_empty(self, masks_QP: BoolArray, scaled_Q: FloatArray) -> FloatArray:
        """Utilities from scaled ones; the empty coalition's as it was scored."""
        mean_Q = self.offset + self.scale * scaled_Q
        if self.empty is not None:
            mean_Q[~masks_QP.any(axis=1)] = self.empty
        return mean_Q

    def _cross(self, masks_QP: BoolArray) -> FloatArray:
        """Covariance with the training masks; a training mask's own part included, `[Q, M]`."""
        assert self.kernel is not None
        cross_QM = self.kernel.smooth(masks_QP, self.masks_MP)
        row_of = {key: row for row, key in enumerate(keys(self.masks_MP))}
        known = [(q, row_of[key]) for q, key in enumerate(keys(masks_QP)) if key in row_of]
        if known:
            rows_Q, rows_M = np.array(known).T
            cross_QM[rows_Q, rows_M] += self.kernel.nugget_of(self.masks_MP[rows_M])
        return cross_QM


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


class PaperSurrogate:
    """As published: MSE, SGD lr 0.008 momentum 0.9, batch 300, 300 epochs, StepLR(100, 0.1).

    The output is a sigmoid, so utilities must lie in [0, 1] (`ppl_ratio`); it cannot express a
    removal that helps. The published network has no uncertainty: `predict` gives the root mean
    squared 5-fold error as every mask's standard deviation.
    """

    LEARNING_RATE, MOMENTUM, BATCH, EPOCHS, STEP, DECAY = 0.008, 0.9, 300, 300, 100, 0.1

    def __init__(self, seed: int = 0) -> None:
        self.name = "paper"
        self.heldout: HeldOut
        self._seed = seed

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        masks_MP = np.asarray(masks_MP, dtype=bool)
        targets_M = np.asarray(utilities_M, dtype=np.float64)
        if targets_M.min() < 0:
            raise ValueError("the paper's surrogate needs utilities of at least 0: use ppl_ratio")
        fold_M = np.random.default_rng(self._seed).permutation(len(masks_MP)) % _FOLDS
        predicted_M = np.empty(len(masks_MP))
        for fold in range(min(_FOLDS, len(masks_MP))):
            out = fold_M == fold
            self._train(masks_MP[~out], targets_M[~out])
            predicted_M[out] = self.mean(masks_MP[out])
        self.heldout = _heldout(targets_M, predicted_M, f"{_FOLDS}-fold")
        self._train(masks_MP, targets_M)

    def _train(self, masks_MP: BoolArray, targets_M: FloatArray) -> None:
        import torch

        num_players = masks_MP.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            network = torch.nn.Sequential(
                torch.nn.Linear(num_players, 2 * num_players),
                torch.nn.CELU(),
                torch.nn.Linear(2 * num_players, 1),
                torch.nn.Sigmoid(),
            )
            inputs = torch.from_numpy(masks_MP.astype(np.float32))
            targets = torch.from_numpy(targets_M.astype(np.float32))
            optimizer = torch.optim.SGD(
                network.parameters(), lr=self.LEARNING_RATE, momentum=self.MOMENTUM
            )
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, self.STEP, self.DECAY)
            for _ in range(self.EPOCHS):
                for rows in torch.randperm(len(inputs)).split(self.BATCH):
                    optimizer.zero_grad()
                    error = network(inputs[rows]).squeeze(1) - targets[rows]
                    (error**2).mean().backward()
                    optimizer.step()
                schedule.step()
        first, last = network[0], network[2]
        assert isinstance(first, torch.nn.Linear)
        assert isinstance(last, torch.nn.Linear)
        self._first = first.weight.detach().numpy().T.copy(), first.bias.detach().numpy()
        self._last = last.weight.detach().numpy()[0].copy(), float(last.bias.detach())

    def mean(self, masks_QP: BoolArray) -> FloatArray:
        hidden = np.asarray(masks_QP, dtype=np.float32) @ self._first[0]
        hidden += self._first[1]
        # CELU(x) = max(x, 0) + min(exp(x) - 1, 0)
        negative = np.minimum(hidden, 0.0)
        np.expm1(negative, out=negative)
        np.maximum(hidden, 0.0, out=hidden)
        hidden += negative
        return 1.0 / (1.0 + np.exp(-(hidden @ self._last[0] + self._last[1]).astype(np.float64)))

    def predict(self, masks_QP: BoolArray) -> tuple[FloatArray, FloatArray]:
        mean_Q = self.mean(masks_QP)
        return mean_Q, np.full(len(mean_Q), self.heldout.rmse)


def _spaced(have: int, most: int) -> np.ndarray:
    return np.arange(have) if have <= most else np.linspace(0, have - 1, most).astype(np.int64)


def _heldout(targets_M: FloatArray, predicted_M: FloatArray, method: str) -> HeldOut:
    residual = targets_M - predicted_M
    spread = float(((targets_M - targets_M.mean()) ** 2).sum())
    ranked = np.ptp(targets_M) > 0 and np.ptp(predicted_M) > 0
    ranks = np.corrcoef(rankdata(targets_M), rankdata(predicted_M)) if ranked else None
    return HeldOut(
        r2=1.0 - float((residual**2).sum()) / spread if spread > 0 else float("nan"),
        spearman=float(ranks[0, 1]) if ranks is not None else float("nan"),
        rmse=float(np.sqrt((residual**2).mean())),
        method=method,
        num_masks=len(targets_M),
    )
