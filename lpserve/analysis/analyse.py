"""From scores to answers: the surrogate and the values, as pure functions of what was scored.

Notation: M masks, P players.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lpserve.analysis.record import RunRecord
from lpserve.errors import InputError
from lpserve.rounds.screening import estimated
from lpserve.surrogate import HeldOutError, Surrogate, acquisition_model, make_surrogate
from lpserve.types import (
    FloatArray,
    IntArray,
)
from lpserve.utility import SEARCH_UTILITY
from lpserve.values.closed_form import kernel_values, value_calibration
from lpserve.values.exact import is_enumerated
from lpserve.values.interactions import exact_interactions, kernel_interactions
from lpserve.values.residual_correction import corrected
from lpserve.values.result import ShapleyValues
from lpserve.values.sampling import monte_carlo_values
from lpserve.values.shapley import shapley_values

_MONTE_CARLO_COALITIONS = 80_000  # as many as the paper draws


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """Surrogate and values of a run."""

    utilities_M: FloatArray
    surrogate_name: str
    heldout: HeldOutError
    predicted_M: FloatArray
    """Each mask's utility as predicted from the other masks; NaN where unknown."""
    searcher: Surrogate
    """Of the utility that sets are searched on (`UtilityView.search`)."""
    guess_M: FloatArray
    """That utility of every mask; estimated where a mask was scored on the screen alone."""
    values: ShapleyValues
    interactions_PP: FloatArray | None
    """Pairwise interaction index (`lpserve.values.interactions`); None: a single size, or a
    surrogate without a closed form."""
    lowest_probability_P: FloatArray
    """Probability that a player is among the `max_removed` lowest values."""


def analyse(scored: RunRecord) -> Analysis:
    """Fit the surrogate to all finite scores and estimate the values."""
    view = scored.view
    utilities_M = view.of(scored.loss_MI)
    rows = np.flatnonzero(np.isfinite(utilities_M))
    if len(rows) < 3:
        raise InputError(f"only {len(rows)} masks have finite scores: nothing can be estimated")
    masks_MP, finite_M = scored.masks_MP[rows], utilities_M[rows]
    surrogate = make_surrogate(scored.surrogate, scored.seed)
    surrogate.fit(masks_MP, finite_M, scored.objective.noise_variance(finite_M, scored.noise_nll))
    searcher, guess_M = surrogate, view.search(scored.loss_MI)
    noise_M = None
    if scored.screen:
        few_M = view.search(scored.loss_MI, scored.screen)
        guess_M, noise_M = estimated(scored.masks_MP, guess_M, few_M)
    if scored.objective != SEARCH_UTILITY or noise_M is not None:
        known = np.flatnonzero(np.isfinite(guess_M))
        noise = None if noise_M is None else noise_M[known]
        searcher = make_surrogate(scored.surrogate, scored.seed)
        searcher.fit(scored.masks_MP[known], guess_M[known], noise)
    values = _values(scored, surrogate, rows, finite_M)
    predicted_M = np.full(len(utilities_M), np.nan)
    predicted_M[rows[surrogate.rows]] = surrogate.left_out_M
    return Analysis(
        utilities_M=utilities_M,
        surrogate_name=surrogate.name,
        heldout=surrogate.heldout_error,
        predicted_M=predicted_M,
        searcher=searcher,
        guess_M=guess_M,
        values=values,
        interactions_PP=_interactions(scored, surrogate, rows, finite_M),
        lowest_probability_P=lowest_probability(values, scored.max_removed, scored.seed),
    )


def lowest_probability(values: ShapleyValues, num_removed: int, seed: int) -> FloatArray:
    """Share of normal draws of all values in which a player is among the lowest."""
    errors_P = np.nan_to_num(values.total_stderr_P)
    draws = np.random.default_rng(seed).normal(
        values.values_P, errors_P, (4000, len(values.values_P))
    )
    lowest = np.argsort(draws, axis=1, kind="stable")[:, :num_removed]
    return np.bincount(lowest.ravel(), minlength=draws.shape[1]) / len(draws)


def _values(
    scored: RunRecord, surrogate: Surrogate, rows: IntArray, finite_M: FloatArray
) -> ShapleyValues:
    masks_MP = scored.masks_MP[rows]
    resampled = scored.resampled(scored.loss_MI[rows])
    if is_enumerated(masks_MP, scored.sizes):
        return shapley_values(
            masks_MP,
            finite_M,
            scored.sizes,
            noise_M=scored.objective.noise_variance(finite_M, scored.noise_nll),
            resampled=resampled,
        )
    kernel = acquisition_model(surrogate)
    if kernel is not None:
        calibration = value_calibration(kernel, scored.sizes)
        return kernel_values(kernel, scored.sizes, resampled, calibration=calibration)
    values = monte_carlo_values(
        surrogate.mean, scored.num_players, scored.sizes, _MONTE_CARLO_COALITIONS, scored.seed
    )
    drawn_M = np.array([scored.sources[row] == "design" for row in rows[surrogate.rows]])
    residual_M = finite_M[surrogate.rows] - surrogate.left_out_M
    drawn_MP = masks_MP[surrogate.rows][drawn_M]
    return corrected(values, drawn_MP, residual_M[drawn_M], scored.seed)


def _interactions(
    scored: RunRecord, surrogate: Surrogate, rows: IntArray, finite_M: FloatArray
) -> FloatArray | None:
    if scored.sizes[0] == scored.sizes[1]:
        return None
    if is_enumerated(scored.masks_MP[rows], scored.sizes):
        return exact_interactions(scored.masks_MP[rows], finite_M, scored.sizes)
    kernel = acquisition_model(surrogate)
    return kernel_interactions(kernel, scored.sizes) if kernel is not None else None
