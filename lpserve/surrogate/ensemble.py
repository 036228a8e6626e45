"""Small neural networks on mask bits, trained together by torch: `ensemble`.

All members are one batched program: one product `[E, B, H] @ [E, H, H]` for every layer. A network
is Linear(P, 32) - f - Linear(32, 32) - f - Linear(32, 1); f is tanh for half of the units, for
thresholds, and SiLU for the others. AdamW with a cosine schedule; weight decay is a prior, so that
for a mean over M masks it is proportional to 1/M. All members keep the weights of the step with the
smallest total squared error on the masks that each leaves out. torch is imported when members are
trained; its random generator is not used.

Notation: M training masks, Q queried masks, P players, E members, B masks of a step, H units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lpserve.surrogate.crossfit import CrossFitted, Members
from lpserve.types import BoolArray, FloatArray

if TYPE_CHECKING:
    import torch

_WIDTH = 32
_RATE = 0.02
_DECAY = 100.0  # over the number of masks
_STEPS, _BATCH = 600, 256
_CHECK_EVERY, _PATIENCE = 5, 150  # steps; at least an epoch
_CHUNK = 2048  # masks at once outside of training

Layers = Sequence["torch.Tensor"]
"""Weights `[E, H, H]` and biases `[E, 1, H]` by turns."""


def train(
    masks_MP: BoolArray, member_targets: FloatArray, member_weights: FloatArray, seed: int
) -> Members:
    """Train all members together, see `crossfit.Train`."""
    import torch

    rng = np.random.default_rng(seed)
    num_members, num_masks = member_targets.shape
    initial = _initial(num_members, masks_MP.shape[1], rng)
    layers = [torch.from_numpy(array).requires_grad_() for array in initial]
    inputs = torch.from_numpy(_coded(masks_MP))
    targets = torch.from_numpy(member_targets.astype(np.float32))
    weights = member_weights / member_weights.mean(axis=1, keepdims=True)
    weights = torch.from_numpy(weights.astype(np.float32))
    optimizer = torch.optim.AdamW(layers, lr=_RATE, weight_decay=_DECAY / num_masks, foreach=True)
    num_batches = -(-num_masks // _BATCH)
    best, min_error, best_step = _as_arrays(layers), math.inf, 0
    batches: list[torch.Tensor] = []
    for step in range(_STEPS):
        if not batches:
            order = torch.from_numpy(rng.permutation(num_masks))
            batches = list(order.tensor_split(num_batches))
        rows = batches.pop()
        optimizer.param_groups[0]["lr"] = _RATE * (
            0.505 + 0.495 * math.cos(math.pi * step / _STEPS)
        )
        optimizer.zero_grad()
        residual = _network(inputs[rows], layers) - targets[:, rows]
        (weights[:, rows] * residual**2).mean(dim=1).sum().backward()
        optimizer.step()
        if (step + 1) % max(_CHECK_EVERY, num_batches) == 0:
            with torch.no_grad():
                error = _left_out_error(inputs, layers, targets, weights == 0)
            if error < min_error:
                best, min_error, best_step = _as_arrays(layers), error, step
            elif step - best_step > _PATIENCE:
                break
    return lambda queried_MP: _predict(_coded(queried_MP), best)


def _initial(
    num_members: int, num_players: int, rng: np.random.Generator
) -> list[NDArray[np.float32]]:
    """He initialisation; the output layer is small, so that predictions start near 0."""
    arrays = []
    sizes = (num_players, _WIDTH, _WIDTH, 1)
    for inputs, outputs in pairwise(sizes):
        scale = math.sqrt(2 / inputs) if outputs > 1 else 0.1 / math.sqrt(inputs)
        arrays.append(scale * rng.standard_normal((num_members, inputs, outputs)))
        arrays.append(np.zeros((num_members, 1, outputs)))
    return [array.astype(np.float32) for array in arrays]


def _coded(queried_MP: BoolArray) -> NDArray[np.float32]:
    return 2 * queried_MP.astype(np.float32) - 1


def _network(inputs: torch.Tensor, layers: Layers) -> torch.Tensor:
    """Predictions of every member: inputs `[B, P]` -> `[E, B]`."""
    import torch

    hidden = inputs.expand(len(layers[0]), *inputs.shape)
    for index in (0, 2):
        tanh_units, silu_units = torch.baddbmm(layers[index + 1], hidden, layers[index]).chunk(
            2, dim=-1
        )
        hidden = torch.cat([tanh_units.tanh(), torch.nn.functional.silu(silu_units)], dim=-1)
    return torch.baddbmm(layers[5], hidden, layers[4]).squeeze(-1)


def _left_out_error(
    inputs: torch.Tensor, layers: Layers, targets: torch.Tensor, out: torch.Tensor
) -> float:
    total = 0.0
    for start in range(0, len(inputs), _CHUNK):
        some = slice(start, start + _CHUNK)
        residual = _network(inputs[some], layers) - targets[:, some]
        total += float((residual[out[:, some]] ** 2).sum())
    return total


def _as_arrays(layers: Layers) -> list[NDArray[np.float32]]:
    return [layer.detach().numpy().copy() for layer in layers]


def _predict(inputs_MP: NDArray[np.float32], layers: list[NDArray[np.float32]]) -> FloatArray:
    """`_network` in numpy: predictions of every member, `float64[E, Q]`."""
    hidden = inputs_MP[None]
    for index in (0, 2):
        hidden = np.matmul(hidden, layers[index]) + layers[index + 1]
        tanh_units, silu_units = np.split(hidden, 2, axis=-1)
        np.tanh(tanh_units, out=tanh_units)
        silu_units *= 0.5 + 0.5 * np.tanh(0.5 * silu_units)  # SiLU without an overflow
    output = np.matmul(hidden, layers[4]) + layers[5]
    return output[..., 0].astype(np.float64)


def build(kind: str, seed: int, *, quick: bool) -> CrossFitted:
    """See `lpserve.surrogate.make_surrogate`. A quick fit is the same."""
    assert kind == "ensemble"
    return CrossFitted(kind, train, seed)
