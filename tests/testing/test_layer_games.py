"""Layer games with values known at any depth: against enumeration, sampling and their own formula.

Not covered here: how alike deep games are to deep models, which nobody has enumerated.
"""

from __future__ import annotations

import numpy as np
import pytest

from lpserve.masks import all_masks, draw, full_mask, swap_one
from lpserve.testing.game_statistics import statistics
from lpserve.testing.layer_games import NUM_TOKENS, layer_game, reference_best
from lpserve.values.exact import exact_values

ROUNDING = 1e-10  # nats: sums of some thousand products near 1, each good to 1e-16
STRAY = 6.0  # standard errors: one draw in 5e8 lies farther out


def game_of(rng, num_players, num_windows):
    seed, window_seed = (int(s) for s in rng.integers(1 << 30, size=2))
    return layer_game(num_players, num_windows, seed=seed, window_seed=window_seed)


def test_a_score_is_the_formula_term_by_term(rng):
    game = game_of(rng, 7, 3)
    for mask_P in all_masks(7)[rng.permutation(128)[:10]]:
        for n in range(3):
            mean = game.base_N[n] + sum(game.main_PN[i, n] for i in range(7) if not mask_P[i])
            for logs_P, coefficients_N in zip(
                game.log_factors_TP, game.coefficients_TN, strict=True
            ):
                product = 1.0
                for i in range(7):
                    product *= 1.0 if mask_P[i] else np.exp(logs_P[i])
                mean += coefficients_N[n] * (product - 1.0).real
            assert game.nll(mask_P[None])[0, n] == pytest.approx(
                NUM_TOKENS * mean, abs=NUM_TOKENS * ROUNDING
            )


@pytest.mark.parametrize("num_players", range(4, 10))
def test_values_are_those_of_enumeration(num_players, rng):
    game = game_of(rng, num_players, int(rng.integers(1, 6)))
    masks_MP = all_masks(num_players)
    low, high = sorted(int(k) for k in rng.integers(num_players, size=2))
    for sizes in ((low, high), (0, num_players - 1), (num_players - 1, num_players - 1)):
        for some in (game, game.population):
            utility_MN = -some.nll(masks_MP) / some.tokens_N
            exact_PN = exact_values(masks_MP, utility_MN, sizes)
            assert some.window_values(sizes) == pytest.approx(exact_PN, abs=ROUNDING)
            assert some.exact(sizes) == pytest.approx(exact_PN.mean(axis=1), abs=ROUNDING)


@pytest.mark.parametrize(("num_players", "most"), [(32, 3), (80, 2)])
def test_values_of_deep_games(num_players, most, rng):
    """Near the full model all coalitions can still be listed; over all sizes values must sum to
    the NLL of nothing kept less that of all."""
    game = game_of(rng, num_players, 4)
    listed_P = np.zeros(num_players)
    for r in range(1, most + 1):
        masks_MP, before_MP = (all_masks(num_players, num_players - n) for n in (r, r - 1))
        dropped_P, kept_P = (~masks_MP).sum(axis=0), before_MP.sum(axis=0)
        listed_P += game.mean_nll(masks_MP) @ ~masks_MP / dropped_P
        listed_P -= game.mean_nll(before_MP) @ before_MP / kept_P
    found_P = game.exact((num_players - most, num_players - 1))
    assert found_P == pytest.approx(listed_P / most, abs=ROUNDING)
    full, empty = game.mean_nll(np.array([full_mask(num_players), ~full_mask(num_players)]))
    total = game.exact((0, num_players - 1)).sum()
    assert total == pytest.approx(empty - full, abs=num_players * ROUNDING)


def test_windows_have_the_mean_of_the_population(rng):
    """Scores and values both, within the error of 20,000 windows."""
    game = game_of(rng, 8, 20_000)
    mean, sizes = game.population, (3, 7)
    masks_MP = all_masks(8)[rng.permutation(256)[:40]]
    for sample, expected in (
        (game.nll(masks_MP), mean.nll(masks_MP)[:, 0]),
        (game.window_values(sizes), mean.exact(sizes)),
    ):
        stderr = sample.std(axis=1, ddof=1) / np.sqrt(sample.shape[1])
        assert (stderr > 0).all()
        assert (np.abs(sample.mean(axis=1) - expected) / stderr).max() < STRAY


def test_seeds_decide_the_game_and_its_windows_apart(rng):
    seed, window_seed = (int(s) for s in rng.integers(1 << 30, size=2))
    masks_MP = draw(20, 15, 30, rng)
    game = layer_game(20, 6, seed=seed, window_seed=window_seed)
    again = layer_game(20, 6, seed=seed, window_seed=window_seed)
    fewer = layer_game(20, 4, seed=seed, window_seed=window_seed)
    elsewhere = layer_game(20, 6, seed=seed, window_seed=window_seed + 1)
    another = layer_game(20, 6, seed=seed + 1, window_seed=window_seed)
    nll_MN = game.nll(masks_MP)
    assert (again.nll(masks_MP) == nll_MN).all()
    assert fewer.nll(masks_MP) == pytest.approx(nll_MN[:, :4], rel=1e-12)
    assert (elsewhere.nll(masks_MP) != nll_MN).all()
    assert (elsewhere.population.nll(masks_MP) == game.population.nll(masks_MP)).all()
    assert (another.population.nll(masks_MP) != game.population.nll(masks_MP)).all()


@pytest.mark.thorough
@pytest.mark.usefixtures("one_blas_thread")
def test_interactions_are_like_those_of_a_real_game(rng):
    """Medians of 8 games; the enumerated game's figures are in the comments. No median of 20,000
    resampled ones of 160 games lay outside the bands."""
    bands = {
        "loss of one: first": (4.2, 4.75),  # 4.45
        "loss of one: last": (0.1, 0.26),  # 0.18
        "loss of one: others, least": (0.02, 0.06),  # 0.035
        "loss of one: others, median": (0.04, 0.075),  # 0.066
        "pair/sqrt(l l'): neighbours": (0.55, 1.0),  # 0.61
        "pair/sqrt(l l'): 0.6 to 1.0 of the depth": (-0.3, 0.03),  # -0.15
        "pairs, largest": (0.3, 1.1),  # 0.61
        "loss, 3/12 removed, first kept: mean": (0.27, 0.43),  # 0.36
        "loss, 6/12 removed, first kept: mean": (0.8, 1.3),  # 1.06
        "loss, 6/12 removed, first kept: spread": (0.2, 0.8),  # 0.41
        "R2 of main effects, 3/12, first kept": (0.34, 0.67),  # 0.40
        "R2 of pairs, 3/12, first kept": (0.965, 0.995),  # 0.973
        "best known, 6 removed": (0.4, 0.75),  # 0.58
        "regret %, exact ranking: worst": (4.0, 25.0),  # 16
        "regret %, greedy: worst": (0.0, 4.0),  # 0.5
        "windows, 3/12 removed, first kept: spread": (0.07, 0.115),  # 0.094
        "windows, 3/12 removed, first kept: correlation of two masks": (0.12, 0.47),  # 0.32
        "windows, first dropped: correlation with base": (-0.95, -0.4),  # -0.74
    }
    found = []
    for _ in range(8):
        game = game_of(rng, 12, 16)
        found.append(statistics(game, reference_best(game, 6, seed=0, starts=4), seed=0))
    median = {name: float(np.median([one[name] for one in found])) for name in bands}
    outside = {n: median[n] for n, (low, high) in bands.items() if not low < median[n] < high}
    assert not outside


@pytest.mark.thorough
def test_the_reference_is_the_optimum_where_that_can_be_listed(rng):
    game = game_of(rng, 10, 4)
    best_RP = reference_best(game, 8, seed=int(rng.integers(1 << 30)))
    assert ((~best_RP).sum(axis=1) == np.arange(1, 9)).all()
    for r in range(1, 9):
        least = game.mean_nll(all_masks(10, 10 - r)).min()
        assert game.mean_nll(best_RP[r - 1 : r])[0] == pytest.approx(least, abs=ROUNDING)


def test_no_swap_betters_the_reference_of_a_deep_game(rng):
    game = game_of(rng, 80, 4)
    best_RP = reference_best(game, 6, seed=0, starts=2)
    for best_P in best_RP:
        least = game.mean_nll(swap_one(best_P)).min()
        assert game.mean_nll(best_P[None])[0] <= least + ROUNDING


def test_a_game_of_three_players_is_refused():
    with pytest.raises(ValueError, match="4 players: got 3"):
        layer_game(3, 1, seed=0)
