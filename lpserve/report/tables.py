"""Values and interactions as CSV tables.

Notation: P players.
"""

from __future__ import annotations

import numpy as np

from lpserve.analysis.build_plan import Outcome
from lpserve.report.csv_rows import csv_text
from lpserve.types import Z90


def shapley_csv(outcome: Outcome) -> str:
    """shapley.csv: a row for each player, with its value, standard errors, 90% interval and the
    probability of being among the lowest values."""
    header = "player layer part value stderr window_stderr total_stderr low90 high90 p_lowest"
    values = outcome.analysis.values
    window_P = values.window_stderr_P
    rows = []
    for player in outcome.scored.players:
        i = player.index
        value, total = float(values.values_P[i]), float(values.total_stderr_P[i])
        rows.append(
            [
                i,
                player.layer,
                player.part,
                value,
                values.stderr_P[i],
                None if window_P is None else window_P[i],
                total,
                value - Z90 * total,
                value + Z90 * total,
                outcome.analysis.lowest_probability_P[i],
                *values.sizes,
                values.estimator,
            ]
        )
    return csv_text([*header.split(), "k_min", "k_max", "estimator"], rows)


def interactions_csv(outcome: Outcome) -> str:
    """interactions.csv: a row for each pair of players, the largest magnitude first."""
    sizes = outcome.analysis.values.sizes
    rows = [[i, j, index, *sizes] for i, j, index in strongest_pairs(outcome)]
    return csv_text(["player", "other", "interaction", "k_min", "k_max"], rows)


def strongest_pairs(outcome: Outcome) -> list[tuple[int, int, float]]:
    """(player, other player, interaction index), the largest magnitude first; empty: not known."""
    index_PP = outcome.analysis.interactions_PP
    if index_PP is None:
        return []
    first, second = np.triu_indices(len(index_PP), 1)
    order = np.argsort(-np.abs(index_PP[first, second]), kind="stable")
    return [(int(first[n]), int(second[n]), float(index_PP[first[n], second[n]])) for n in order]
