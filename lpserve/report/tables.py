"""Values and interactions as CSV tables, and how players are named in tables and figures.

Notation: P players.
"""

from __future__ import annotations

import csv
import io

import numpy as np

from lpserve.analysis.build_plan import Outcome
from lpserve.types import Z90, Player


def player_label(player: Player) -> str:
    """The player's layer, followed by the part of it that the player is, unless that is all."""
    return str(player.layer) if player.part == "layer" else f"{player.layer} {player.part}"


def shapley_csv(outcome: Outcome) -> str:
    """shapley.csv: a row for each player, with its value, standard errors, 90% interval and the
    probability of being among the lowest values."""
    values = outcome.analysis.values
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "player",
            "layer",
            "part",
            "value",
            "stderr",
            "window_stderr",
            "total_stderr",
            "low90",
            "high90",
            "p_lowest",
            "k_min",
            "k_max",
            "estimator",
        ]
    )
    window_P = values.window_stderr_P
    for player in outcome.scored.players:
        i = player.index
        value, total = float(values.values_P[i]), float(values.total_stderr_P[i])
        writer.writerow(
            [
                i,
                player.layer,
                player.part,
                repr(value),
                repr(float(values.stderr_P[i])),
                "" if window_P is None else repr(float(window_P[i])),
                repr(total),
                repr(value - Z90 * total),
                repr(value + Z90 * total),
                float(outcome.analysis.lowest_probability_P[i]),
                *values.sizes,
                values.estimator,
            ]
        )
    return text.getvalue()


def interactions_csv(outcome: Outcome) -> str:
    """interactions.csv: a row for each pair of players, the largest magnitude first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["player", "other", "interaction", "k_min", "k_max"])
    sizes = outcome.analysis.values.sizes
    for i, j, index in strongest_pairs(outcome):
        writer.writerow([i, j, repr(index), *sizes])
    return text.getvalue()


def strongest_pairs(outcome: Outcome) -> list[tuple[int, int, float]]:
    """(player, other player, interaction index), the largest magnitude first; empty: not known."""
    index_PP = outcome.analysis.interactions_PP
    if index_PP is None:
        return []
    first, second = np.triu_indices(len(index_PP), 1)
    order = np.argsort(-np.abs(index_PP[first, second]), kind="stable")
    return [(int(first[n]), int(second[n]), float(index_PP[first[n], second[n]])) for n in order]
