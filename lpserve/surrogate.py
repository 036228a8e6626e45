"""Surrogates: predict a mask's utility from its bits, with uncertainty and held-out error.

`ridge` and `gp` are Gaussian processes whose kernel depends on two masks only through their
Hamming distance h, so one posterior, one leave-one-out formula and one closed form for Shapley
values (`shapley.kernel_values`) serve both. With P players and bits coded z = -1, +1,
<z, z'> = P - 2h:

    ridge  kappa(h) = a (P - 2h) + b (P - 2h)^2    Bayesian ridge regression on a constant, main
                                                   effects and pairs, since
                                                   (P - 2h)^2 = P + 2 sum_{i<j} z_i z_j z'_i z'_j
    gp     kappa(h) = a (P - 2h) + b rho^h         main effects and an RBF, rho = exp(-2 / l^2)

plus a nugget at h = 0. The game is deterministic, so the nugget is the part of a mask's own score
that the smooth kernel cannot carry, not noise: scored masks are reproduced (but for a jitter of
1e-10), and unseen ones keep it as uncertainty. Hyperparameters are scikit-learn's, by marginal
likelihood. `paper` is the network of arXiv 2602.07804 (section 4.2 and its published code):
Linear(P, 2P)-CELU-Linear(2P, 1)-Sigmoid.

Notation: M training masks, Q queried masks, P players.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import (
    RBF,
    ConstantKernel,
    DotProduct,
    Exponentiation,
    Kernel,
    WhiteKernel,
)

from lpserve.types import BoolArray, FloatArray

KINDS = ("auto", "gp", "ridge", "paper")
MAX_TRAINING_MASKS = 3000
"""A kernel surrogate costs M^3; beyond this many masks it trains on an evenly spaced subset."""
_TUNING_MASKS = 250
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
    if kind in ("gp", "ridge"):
        return KernelSurrogate(kind)
    if kind == "paper":
        return PaperSurrogate(seed)
    raise ValueError(f"unknown surrogate {kind!r}: one of {', '.join(KINDS)}")


class KernelSurrogate:
    """`gp` or `ridge`. Hyperparameters are tuned again when the masks grew by a quarter."""

    def __init__(self, kind: str) -> None:
        self.name = kind
        self.heldout: HeldOut
        self._tuned: Kernel | None = None
        self._tuned_at = 0

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        masks_MP = np.asarray(masks_MP, dtype=bool)
        noise_M = np.zeros(len(masks_MP)) if noise_M is None else np.asarray(noise_M)
        rows = _spaced(len(masks_MP), MAX_TRAINING_MASKS)
        self.rows = rows
        self.masks_MP = masks_MP[rows]
        targets_M = np.asarray(utilities_M, dtype=np.float64)[rows]
        self.offset = float(targets_M.mean())
        self.scale = float(targets_M.std()) if np.ptp(targets_M) > 0 else 1.0
        scaled_M = (targets_M - self.offset) / self.scale
        noise_M = noise_M[rows] / self.scale**2
        if self._tuned is None or len(masks_MP) >= _RETUNE_GROWTH * self._tuned_at:
            self._tuned = _tune(self.name, self.masks_MP, scaled_M, noise_M)
            self._tuned_at = len(masks_MP)
        self.kappa = _kappa(self.name, self._tuned, masks_MP.shape[1])
        gram = self.kappa[_hamming(self.masks_MP, self.masks_MP)]
        gram[np.diag_indices_from(gram)] += noise_M + 1e-10 * self.kappa[0]
        self.factor = cho_factor(gram, lower=True)
        self.alpha_M = cho_solve(self.factor, scaled_M)
        inverse = cho_solve(self.factor, np.eye(len(scaled_M)))
        # Gaussian-process leave-one-out in closed form (Rasmussen & Williams 2006, eq. 5.12)
        variance_M = 1.0 / np.diag(inverse)
        residual_M = self.alpha_M * variance_M
        self.calibration = float(np.sqrt(np.mean(residual_M**2 / variance_M)))
        """Root mean squared standardised residual: above 1, the intervals are too narrow."""
        self.left_out_M = targets_M - self.scale * residual_M
        """What each training mask is predicted to score from all the others."""
        self.heldout = _heldout(targets_M, self.left_out_M, "leave-one-out")

    def mean(self, masks_QP: BoolArray) -> FloatArray:
        distance = _hamming(np.asarray(masks_QP, dtype=bool), self.masks_MP)
        return self.offset + self.scale * (self.kappa[distance] @ self.alpha_M)

    def predict(self, masks_QP: BoolArray) -> tuple[FloatArray, FloatArray]:
        cross_QM = self.kappa[_hamming(np.asarray(masks_QP, dtype=bool), self.masks_MP)]
        half_MQ = solve_triangular(self.factor[0], cross_QM.T, lower=True)
        variance_Q = np.maximum(self.kappa[0] - (half_MQ**2).sum(axis=0), 0.0)
        std_Q = self.scale * max(1.0, self.calibration) * np.sqrt(variance_Q)
        return self.offset + self.scale * (cross_QM @ self.alpha_M), std_Q


class AutoSurrogate:
    """The kernel surrogate with the smaller held-out error at each fit."""

    def __init__(self) -> None:
        self._candidates = [KernelSurrogate("gp"), KernelSurrogate("ridge")]
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


def _hamming(masks_QP: BoolArray, masks_MP: BoolArray) -> np.ndarray:
    """Hamming distances `intp[Q, M]`."""
    left, right = masks_QP.astype(np.float32) * 2 - 1, masks_MP.astype(np.float32) * 2 - 1
    return ((masks_MP.shape[1] - left @ right.T) / 2 + 0.5).astype(np.intp)


def _spaced(have: int, most: int) -> np.ndarray:
    return np.arange(have) if have <= most else np.linspace(0, have - 1, most).astype(np.int64)


def _tune(kind: str, masks_MP: BoolArray, scaled_M: FloatArray, noise_M: FloatArray) -> Kernel:
    """Hyperparameters of maximal marginal likelihood, by scikit-learn (L-BFGS).

    Always from the same start: few masks can drive an effect's variance to its lower bound, where
    the gradient in log units vanishes, and a search that began there would never leave it.
    """
    num_players = masks_MP.shape[1]
    white = WhiteKernel(1e-4, (1e-9, 1.0))
    dot = DotProduct(sigma_0=0.0, sigma_0_bounds="fixed")
    first = ConstantKernel(1.0 / num_players, (1e-9, 1e3)) * dot
    if kind == "gp":
        second = ConstantKernel(1.0, (1e-3, 1e5)) * RBF(np.sqrt(num_players), (0.3, 1e2))
    else:
        second = ConstantKernel(0.1 / num_players**2, (1e-12, 1e2)) * Exponentiation(dot, 2)
    kernel = first + second + white
    rows = _spaced(len(masks_MP), _TUNING_MASKS)
    alpha: Any = noise_M[rows] + 1e-10  # one for each mask: scikit-learn annotates none
    process = GaussianProcessRegressor(kernel, alpha=alpha)
    with warnings.catch_warnings():  # a hyperparameter at its bound is an answer here
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(masks_MP[rows] * 2.0 - 1.0, scaled_M[rows])
    tuned: Any = process.kernel_
    return tuned


def _kappa(kind: str, kernel: Kernel, num_players: int) -> FloatArray:
    """The tuned kernel as a table over Hamming distances 0..P, the nugget at 0."""
    distance = np.arange(num_players + 1)
    values = kernel.get_params()
    product = num_players - 2.0 * distance
    kappa = values["k1__k1__k1__constant_value"] * product
    if kind == "gp":
        # coded -1, +1, the squared distance of two masks is 4h
        decay = np.exp(-2.0 * distance / values["k1__k2__k2__length_scale"] ** 2)
        kappa = kappa + values["k1__k2__k1__constant_value"] * decay
    else:
        kappa = kappa + values["k1__k2__k1__constant_value"] * product**2
    kappa[0] += values["k2__noise_level"]
    return kappa


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
