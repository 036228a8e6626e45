"""The network of arXiv 2602.07804 (section 4.2 and its published code).

Linear(P, 2P)-CELU-Linear(2P, 1)-Sigmoid. Notation: M training masks, P players.
"""

from __future__ import annotations

import numpy as np

from lpserve.errors import InputError
from lpserve.surrogate.base import HeldOutError, heldout_error, training_set
from lpserve.types import BoolArray, FloatArray, IntArray

_FOLDS = 5


class PaperSurrogate:
    """As published: MSE, SGD lr 0.008 momentum 0.9, batch 300, 300 epochs, StepLR(100, 0.1).

    The output is a sigmoid, so utilities must lie in [0, 1] (`ppl_ratio`); it cannot express a
    removal that helps. The published network has no uncertainty: `predict` returns the root mean
    squared 5-fold error as every mask's standard deviation.
    """

    LEARNING_RATE, MOMENTUM, BATCH, EPOCHS, STEP, DECAY = 0.008, 0.9, 300, 300, 100, 0.1

    def __init__(self, seed: int = 0) -> None:
        self.name = "paper"
        self.heldout_error: HeldOutError
        self._seed = seed

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        """See `base.Surrogate`; the published training has no use for `noise_M`.

        Raises:
            InputError: see `base.training_set`; also for negative utilities.
        """
        masks_MP, targets_M, _ = training_set(masks_MP, utilities_M, noise_M)
        if targets_M.min() < 0:
            raise InputError("the paper's surrogate needs utilities of at least 0: use ppl_ratio")
        self.rows: IntArray = np.arange(len(masks_MP))
        """Rows of the training masks among the masks of the last fit: all of them."""
        fold_M = np.random.default_rng(self._seed).permutation(len(masks_MP)) % _FOLDS
        self.left_out_M = np.empty(len(masks_MP))
        """Utility of each training mask as predicted by a network trained without its fold."""
        for fold in range(min(_FOLDS, len(masks_MP))):
            out = fold_M == fold
            self.train(masks_MP[~out], targets_M[~out])
            self.left_out_M[out] = self.mean(masks_MP[out])
        rmse_M = np.full(len(masks_MP), np.sqrt(((targets_M - self.left_out_M) ** 2).mean()))
        self.heldout_error = heldout_error(targets_M, self.left_out_M, f"{_FOLDS}-fold", rmse_M)
        self.train(masks_MP, targets_M)

    def train(self, masks_MP: BoolArray, targets_M: FloatArray) -> None:
        """The published training alone, without a held-out error; masks may repeat."""
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

    def mean(self, queried_MP: BoolArray) -> FloatArray:
        """See `base.Predictor`."""
        hidden = np.asarray(queried_MP, dtype=np.float32) @ self._first[0]
        hidden += self._first[1]
        # CELU(x) = max(x, 0) + min(exp(x) - 1, 0)
        negative = np.minimum(hidden, 0.0)
        np.expm1(negative, out=negative)
        np.maximum(hidden, 0.0, out=hidden)
        hidden += negative
        return 1.0 / (1.0 + np.exp(-(hidden @ self._last[0] + self._last[1]).astype(np.float64)))

    def predict(self, queried_MP: BoolArray) -> tuple[FloatArray, FloatArray]:
        """See `base.Predictor`."""
        mean = self.mean(queried_MP)
        return mean, np.full(len(mean), self.heldout_error.rmse)


def build(kind: str, seed: int, *, quick: bool) -> PaperSurrogate:
    """See `lpserve.surrogate.make_surrogate`. A quick fit is the same."""
    assert kind == "paper"
    return PaperSurrogate(seed)
