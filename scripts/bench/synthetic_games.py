"""How alike synthetic layer games and the bundled model's enumerated game are, in a table.

    PYTHONPATH=. python scripts/bench/synthetic_games.py --game demo12.npz

The games are those of `lpserve.testing.layer_games`, the rows of `lpserve.testing.game_statistics`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lpserve.testing.game_statistics import EnumeratedGame, losses, statistics
from lpserve.testing.layer_games import PUBLISHED, ProductGame, layer_game, reference_best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--game", type=Path, required=True, help="a game file of 12 players")
    real = EnumeratedGame(parser.parse_args().game)
    columns = {"enumerated": [statistics(real, real.best(6), seed=0)]}
    lines = []
    for num_players, num_seeds, max_removed in ((12, 8, 6), (32, 4, 12), (80, 2, 24)):
        games = [layer_game(num_players, len(real.tokens_N), seed=s) for s in range(num_seeds)]
        columns[f"P = {num_players}, {num_seeds} seeds"] = [
            statistics(game, reference_best(game, max_removed, seed=0), seed=0) for game in games
        ]
        lines += _published_lines(games)
    print_table(columns)
    print("\nLosses of the best known sets in the mean of all windows (the best in print):")
    print("\n".join(lines))


def print_table(columns: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """One row a figure, one column a list of games: median [least, most]."""
    print(f"| | {' | '.join(columns)} |\n|---|{' ---: |' * len(columns)}")
    for name in next(iter(columns.values()))[0]:
        cells = []
        for games in columns.values():
            figures = np.array([one[name] for one in games])
            spread = f" [{figures.min():.3f}, {figures.max():.3f}]" if len(games) > 1 else ""
            cells.append(f"{np.median(figures):.3f}{spread}")
        print(f"| {name} | {' | '.join(cells)} |")


def _published_lines(games: Sequence[ProductGame]) -> list[str]:
    published = PUBLISHED.get(games[0].num_players)
    if published is None:
        return []
    means = [game.population for game in games]
    best_SRP = [reference_best(game, max(published), seed=0) for game in means]
    loss_SR = np.array([losses(g, best)[:, 0] for g, best in zip(means, best_SRP, strict=True)])
    return [
        f"P = {games[0].num_players}, {r} removed: median {np.median(loss_SR[:, r - 1]):.3f} "
        f"({math.log(after / before):.3f})"
        for r, (before, after) in published.items()
    ]


if __name__ == "__main__":
    main()
