"""Acquisition for the values: the masks that reduce the values' variance most, for their cost.

Under a kernel surrogate the variance of a value after a mask is scored does not depend on the
score. So a batch is selected before any of its masks is scored, each pick conditioning the next
(sequential A-optimal design). With phi_i the values, u(q) the utility of candidate q, and all
scored, pending and picked masks given, a pick maximises

    sum_i Cov(phi_i, u(q))^2 / Var(u(q)) / cost(q)

where cost(q) is the number of layers that the batch's trie has not run yet (masks share prefixes),
plus the head. Masks chosen like this are no random sample of their strata: values are estimated by
the surrogate's posterior, never by a mean over these masks.

Notation: M masks (pending ones, then candidates), P players.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from lpserve.masks import all_masks, draw, sort_distinct
from lpserve.surrogate import KernelSurrogate
from lpserve.types import BoolArray, IntArray
from lpserve.values.semivalue import value_covariance

HEAD_COST = 2.0
"""Cost of the head in layer-forwards; 0.65 for Llama-2-7B, 2.4 for Llama-3-8B."""
_POOL_SIZE = 1536
_MIN_VARIANCE = 1e-12


def candidate_pool(
    num_players: int, sizes: tuple[int, int], rng: np.random.Generator, count: int = _POOL_SIZE
) -> BoolArray:
    """Random distinct masks of every stratum that values over `sizes` need, `bool[<=count, P]`.

    Small strata are enumerated. Of a larger one half of the masks are drawn independently; the
    other half share a prefix of random length with one of those, since independent masks share
    none, and shared prefixes make a batch cheaper.

    Args:
        sizes: (k_min, k_max), sizes before a player joins; strata are k_min..k_max+1.
    """
    strata = list(range(sizes[0], sizes[1] + 2))
    strata.sort(key=lambda kept: math.comb(num_players, kept))
    parts, left = [], count
    for place, kept in enumerate(strata):
        share = left // (len(strata) - place)
        if math.comb(num_players, kept) <= share:
            part = all_masks(num_players, kept)
        else:
            alone = draw(num_players, kept, share - share // 2, rng)
            part = np.concatenate([alone, _branches(alone[: share // 2], rng)])
        parts.append(part)
        left -= len(part)
    return sort_distinct(np.concatenate(parts))[0]


def _branches(masks_MP: BoolArray, rng: np.random.Generator) -> BoolArray:
    """Each mask with all players behind a random position shuffled, `bool[M, P]`."""
    num_players = masks_MP.shape[1]
    cut_M = rng.integers(1, num_players + 1, size=len(masks_MP))
    # players before the cut keep their places, the others get random ones behind them
    place_MP = rng.random(masks_MP.shape) + num_players
    before_MP = np.arange(num_players) < cut_M[:, None]
    place_MP[before_MP] = np.broadcast_to(np.arange(num_players), masks_MP.shape)[before_MP]
    return np.take_along_axis(masks_MP, np.argsort(place_MP, axis=1), axis=1)


def select_for_values(
    surrogate: KernelSurrogate,
    sizes: tuple[int, int],
    pool_MP: BoolArray,
    count: int,
    *,
    pending_MP: BoolArray,
    head_cost: float,
) -> BoolArray:
    """A batch of candidates by variance reduction for cost, see the module, `bool[<=count, P]`.

    Args:
        surrogate: fitted to the scored masks.
        sizes: (k_min, k_max) of the values, sizes before a player joins.
        pool_MP: candidates: distinct masks, none scored or pending.
        count: size of the batch; masks come in the order of selection.
        pending_MP: masks that are being scored, conditioned on like scored ones.
        head_cost: the head's part of a mask's cost, in layer-forwards.
    """
    masks_MP = np.concatenate([pending_MP, pool_MP])
    posterior = _Posterior(surrogate, sizes, masks_MP, room=len(pending_MP) + count)
    for row in range(len(pending_MP)):
        posterior.condition_on(row)
    free_M = np.arange(len(masks_MP)) >= len(pending_MP)
    cost_M = masks_MP.sum(axis=1) + head_cost
    picked: list[int] = []
    for _ in range(min(count, len(pool_MP))):
        reduction_M = (posterior.covariance_PM**2).sum(axis=0)
        gain_M = reduction_M / (posterior.variance_M * cost_M)
        pick = int(np.argmax(np.where(free_M, gain_M, -np.inf)))
        picked.append(pick)
        free_M[pick] = False
        posterior.condition_on(pick)
        cost_M = np.minimum(cost_M, _new_layers(masks_MP, masks_MP[pick]) + head_cost)
    return masks_MP[picked]


class _Posterior:
    """Variance of candidate masks and their covariance with the values, conditioned on scored and
    picked masks."""

    def __init__(
        self, surrogate: KernelSurrogate, sizes: tuple[int, int], masks_MP: BoolArray, room: int
    ) -> None:
        kernel = surrogate.kernel
        assert kernel is not None
        self._kernel, self._masks_MP = kernel, masks_MP
        self._own_M = np.maximum(kernel.nugget_of(masks_MP), _MIN_VARIANCE)
        scored_MP, whiten = surrogate.masks_MP, surrogate.whiten_MM
        self._known = len(scored_MP)
        # rows of the Cholesky factor: scored masks, then picks
        self._known_rows = np.empty((self._known + room, len(masks_MP)))
        self._known_rows[: self._known] = whiten @ kernel.smooth(scored_MP, masks_MP)
        value_of = partial(
            value_covariance, kernel, sizes=sizes, empty_known=surrogate.empty is not None
        )
        whitened = whiten @ value_of(scored_MP).T
        explained = self._known_rows[: self._known]
        self.covariance_PM = value_of(masks_MP) - whitened.T @ explained
        self.variance_M = kernel.variance(masks_MP) - (explained**2).sum(axis=0)
        self.variance_M = np.maximum(self.variance_M, self._own_M)

    def condition_on(self, row: int) -> None:
        """Condition on the score of one of the masks, whatever it will be."""
        known = self._known_rows[: self._known]
        deviation = np.sqrt(self.variance_M[row])
        new_M = self._kernel.smooth(self._masks_MP[row : row + 1], self._masks_MP)[0]
        new_M -= known[:, row] @ known
        new_M[row] = self.variance_M[row]
        new_M /= deviation
        self._known_rows[self._known] = new_M
        self._known += 1
        self.covariance_PM -= np.outer(self.covariance_PM[:, row] / deviation, new_M)
        self.variance_M = np.maximum(self.variance_M - new_M**2, self._own_M)


def _new_layers(masks_MP: BoolArray, run_P: BoolArray) -> IntArray:
    """Layer-forwards of each mask once `run_P` has run: its kept layers behind their common prefix,
    `int64[M]`."""
    differs_MP = masks_MP != run_P
    behind_MP = np.arange(masks_MP.shape[1]) >= differs_MP.argmax(axis=1)[:, None]
    return (masks_MP & behind_MP).sum(axis=1)
