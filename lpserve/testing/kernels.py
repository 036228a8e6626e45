"""Covariances of a game and of its values as the formulas read, over all 2^P masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np

from lpserve.masks import all_masks
from lpserve.surrogate import KernelSurrogate
from lpserve.surrogate.kernel import COMPONENTS, MaskKernel

KINDS = tuple(COMPONENTS)


def random_kernel(num_players: int, rng: np.random.Generator, kind: str = "gp+ridge") -> MaskKernel:
    """Variances within two orders of magnitude of each other: no part hides behind another."""
    variance = dict(zip("cabvn", np.exp(rng.uniform(-2, 2, 5)).tolist(), strict=True))
    smooth = "v" in COMPONENTS[kind]
    return MaskKernel(
        constant=variance["c"],
        linear=variance["a"] if "a" in COMPONENTS[kind] else 0.0,
        pairs=variance["b"] / num_players if "b" in COMPONENTS[kind] else 0.0,
        product=variance["v"] if smooth else 0.0,
        nugget=variance["n"],
        decay_P=rng.uniform(0.01, 1.0, num_players) if smooth else np.zeros(num_players),
        growth_P=rng.normal(0.05, 0.2, num_players) if smooth else np.zeros(num_players),
    )


def covariance(kernel: MaskKernel, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """k(S, T) for every pair, the nugget of equal masks included, `float64[Q, M]`."""
    first, second = np.triu_indices(right.shape[1], 1)
    rows = []
    for mask in left:
        agree = np.where(mask == right, 1.0, -1.0)  # z_S z_T of every player
        pairs = (agree[:, first] * agree[:, second]).sum(axis=1)
        grown = np.exp((~mask) @ kernel.growth_P + (~right) @ kernel.growth_P)
        apart = np.exp(-((mask != right) @ kernel.decay_P))
        same = (mask == right).all(axis=1)
        row = kernel.constant + kernel.linear * agree.sum(axis=1) + kernel.pairs * pairs
        rows.append(row + grown * (kernel.product * apart + kernel.nugget * same))
    return np.array(rows)


def scored_covariance(kernel: MaskKernel, masks: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Of scored masks: with noise, and the jitter of 1e-10 of each variance beyond the
    mask's own part."""
    gram = covariance(kernel, masks, masks)
    own = kernel.nugget * np.exp(2 * (~masks) @ kernel.growth_P)
    return gram + np.diag(noise + 1e-10 * (gram.diagonal() - own))


def posterior(surrogate: KernelSurrogate, every: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the utilities of `every` mask in the surrogate's own units.

    The empty coalition, where scored, is known and tells nothing about the others.
    """
    kernel, masks = surrogate.kernel, surrogate.masks_MP
    assert kernel is not None
    cross = covariance(kernel, every, masks)
    gram = scored_covariance(kernel, masks, surrogate.noise_M)
    mean = cross @ np.linalg.solve(gram, surrogate.scaled_M)
    left = covariance(kernel, every, every) - cross @ np.linalg.solve(gram, cross.T)
    if surrogate.empty is not None:
        empty = ~every.any(axis=1)
        mean[empty] = (surrogate.empty - surrogate.offset) / surrogate.scale
        left[empty], left[:, empty] = 0.0, 0.0
    return mean, left


def weight_matrix(num_players: int, sizes: tuple[int, int]) -> np.ndarray:
    """float64[P, 2^P]: the values as a linear map of the utilities of all masks in key order."""
    every = all_masks(num_players)
    row_of = {frozenset(np.flatnonzero(mask).tolist()): row for row, mask in enumerate(every)}
    weights = np.zeros((num_players, len(every)))
    for player in range(num_players):
        others = [p for p in range(num_players) if p != player]
        for size in range(sizes[0], sizes[1] + 1):
            share = 1 / ((sizes[1] - sizes[0] + 1) * math.comb(num_players - 1, size))
            for coalition in map(frozenset, combinations(others, size)):
                weights[player, row_of[coalition | {player}]] += share
                weights[player, row_of[coalition]] -= share
    return weights


def pair_game(
    num_players: int, rng: np.random.Generator, triples: float = 0.0
) -> Callable[[np.ndarray], np.ndarray]:
    """Mask -> utility: a cost for each dropped player, an effect for each pair and triple."""
    main = rng.uniform(0.01, 0.3, num_players)
    pairs = np.triu(rng.normal(0, 0.05, (num_players, num_players)), 1)
    third = rng.normal(0, triples, (num_players,) * 3) / 6

    def utility(masks: np.ndarray) -> np.ndarray:
        d = 1.0 - masks
        return -(
            1
            + d @ main
            + np.einsum("mi,ij,mj->m", d, pairs, d)
            + np.einsum("mi,mj,mk,ijk->m", d, d, d, third)
        )

    return utility


def rough_game(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Utilities of a pair game plus something different on every mask."""
    return pair_game(masks.shape[1], rng)(masks) + rng.normal(0, 0.1, len(masks))


def naive_values(
    value: dict[frozenset, float], num_players: int, sizes: tuple[int, int]
) -> np.ndarray:
    """The definition: over every size, over every coalition of that size without i."""
    values = []
    for player in range(num_players):
        others = [p for p in range(num_players) if p != player]
        means = []
        for size in range(sizes[0], sizes[1] + 1):
            gains = [
                value[frozenset(coalition) | {player}] - value[frozenset(coalition)]
                for coalition in combinations(others, size)
            ]
            means.append(sum(gains) / len(gains))
        values.append(sum(means) / len(means))
    return np.array(values)


def as_dict(masks: np.ndarray, utilities: np.ndarray) -> dict[frozenset, float]:
    """Players kept -> utility."""
    return {
        frozenset(np.flatnonzero(mask).tolist()): float(u)
        for mask, u in zip(masks, utilities, strict=True)
    }


def masks_with_or_without_empty(
    num_players: int, count: int, with_empty: bool, rng: np.random.Generator
) -> np.ndarray:
    """Distinct masks of all sizes in random order, the empty coalition among them or not."""
    every = all_masks(num_players)
    rows = 1 + rng.choice(len(every) - 1, count, replace=False)
    if with_empty:
        rows[int(rng.integers(count))] = 0
    return every[rows]


def some_masks(num_players: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Distinct masks of all sizes but 0."""
    return masks_with_or_without_empty(num_players, count, False, rng)


def fitted_kernel(
    kind: str,
    num_players: int,
    count: int,
    rng: np.random.Generator,
    *,
    with_empty: bool = False,
    noise: float = 0.0,
) -> KernelSurrogate:
    """A kernel surrogate of a rough game on `count` masks; variances of noise are below `noise`."""
    masks = masks_with_or_without_empty(num_players, count, with_empty, rng)
    surrogate = KernelSurrogate(kind)
    noise_M = rng.uniform(0, noise, len(masks)) if noise else None
    surrogate.fit(masks, rough_game(masks, rng), noise_M)
    assert (surrogate.empty is not None) == with_empty
    return surrogate
