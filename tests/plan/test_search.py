"""The search on a surrogate against exhaustive search, sampling and slow conditioning.

Values are compared exactly where both sides rank the same float64 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import norm

from lpserve.masks import all_masks, keys, removed_players, swap_one, without
from lpserve.plan.constraint import Constraint
from lpserve.plan.search import (
    MAX_EXHAUSTIVE,
    STD_INFLATION,
    best_predicted_sets,
    expected_improvement,
    probability_of_improvement,
    select_by_expected_improvement,
    starts,
)
from lpserve.plan.targets import Target, cost_targets, removing
from lpserve.surrogate import HeldOutError, KernelSurrogate
from lpserve.testing.games import mask_text, table_game
from lpserve.types import BoolArray, FloatArray, IntArray

pytestmark = pytest.mark.usefixtures("one_blas_thread")


class Fixed:
    """A surrogate that is a given function, equally sure of everything."""

    name = "fixed"
    heldout_error: HeldOutError
    rows: IntArray
    left_out_M: FloatArray

    def __init__(self, function: Callable[[BoolArray], FloatArray], std: float = 1.0) -> None:
        self._function, self._std = function, std

    def mean(self, queried_MP: BoolArray) -> FloatArray:
        return self._function(queried_MP)

    def fit(
        self, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None = None
    ) -> None:
        raise NotImplementedError

    def predict(self, queried_MP: BoolArray) -> tuple[FloatArray, FloatArray]:
        return self.mean(queried_MP), np.full(len(queried_MP), self._std)


def fitted_to_ratios(
    num_players: int, num_masks: int, rng: np.random.Generator, kind: str = "gp+ridge"
) -> KernelSurrogate:
    """Perplexity ratios of a game with pairs, from random masks with at least half kept."""
    main = rng.uniform(0.02, 0.3, num_players)
    pairs = np.triu(rng.normal(0, 0.05, (num_players, num_players)), 1)
    masks = np.unique(rng.random((2 * num_masks, num_players)) < 0.75, axis=0)
    masks = rng.permutation(masks[masks.sum(axis=1) >= num_players // 2])[:num_masks]
    d = 1.0 - masks
    surrogate = KernelSurrogate(kind)
    surrogate.fit(masks, np.exp(-d @ main - np.einsum("mi,ij,mj->m", d, pairs, d)))
    return surrogate


def for_sizes(best_of: dict[int, float], num_players: int) -> tuple[list[Target], FloatArray]:
    """Targets of these numbers removed, and the best utility of each."""
    within = Constraint(num_players)
    return [removing(r, within) for r in best_of], np.array(list(best_of.values()))


def unscored(surrogate: KernelSurrogate, sets: BoolArray) -> BoolArray:
    return sets[~np.isin(keys(sets), keys(surrogate.masks_MP))]


# -- best_predicted_sets -----------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("num_players", "num_removed"), [(1, 1), (6, 1), (9, 3), (12, 6), (10, 10)]
)
def test_small_sizes_are_searched_whole(num_players, num_removed, ties, rng):
    utility = table_game(num_players, rng, ties=ties)
    everything = [without(num_players, c) for c in combinations(range(num_players), num_removed)]
    everything.sort(key=lambda m: (-float(utility(m[None])[0]), mask_text(m)))
    got = best_predicted_sets(
        Fixed(utility),
        removing(num_removed, Constraint(num_players)),
        np.empty((0, num_players), dtype=bool),
    )
    assert [mask_text(m) for m in got] == [mask_text(m) for m in everything[:64]]


@pytest.mark.parametrize("trial", range(3))
def test_beam_search_climbs_to_the_best_of_an_additive_function(trial, rng):
    """From the worst set there is: every swap of a bad for a good player improves on it."""
    num_players, num_removed = 40, 8
    assert math.comb(num_players, num_removed) > 1000 * MAX_EXHAUSTIVE
    weight = rng.normal(size=num_players)
    calls = []

    def mean(masks: np.ndarray) -> np.ndarray:
        calls.append(len(masks))
        return masks @ weight

    worst = without(num_players, np.argsort(-weight)[:num_removed].tolist())
    got = best_predicted_sets(
        Fixed(mean), removing(num_removed, Constraint(num_players)), worst[None]
    )
    assert removed_players(got[0]) == tuple(sorted(np.argsort(weight)[:num_removed].tolist()))
    values = got @ weight
    assert (np.diff(values) <= 0).all()
    assert len(set(keys(got))) == len(got) == 64
    assert ((~got).sum(axis=1) == num_removed).all()
    assert sum(calls) < MAX_EXHAUSTIVE * 5


def test_beam_search_ends_where_no_swap_of_its_best_improves(rng):
    num_players, num_removed = 20, 7
    main, pairs = rng.normal(size=num_players), np.triu(rng.normal(0, 0.3, (20, 20)), 1)

    def mean(masks: np.ndarray) -> np.ndarray:
        return masks @ main + np.einsum("mi,ij,mj->m", masks * 1.0, pairs, masks * 1.0)

    starts = np.array([without(num_players, range(i, i + num_removed)) for i in (0, 5, 5, 13)])
    assert math.comb(num_players, num_removed) > MAX_EXHAUSTIVE
    got = best_predicted_sets(Fixed(mean), removing(num_removed, Constraint(num_players)), starts)
    best = mean(got[:1])[0]
    assert best >= mean(starts).max()
    assert mean(swap_one(got[0])).max() <= best
    again = best_predicted_sets(
        Fixed(mean), removing(num_removed, Constraint(num_players)), rng.permutation(starts)
    )
    np.testing.assert_array_equal(got, again)


# -- starts --------------------------------------------------------------------------------------


def test_starts_are_the_best_sets_and_those_one_player_from_the_next_sizes_best(rng):
    masks = np.unique(rng.random((400, 12)) < 0.7, axis=0)
    utilities = rng.normal(size=len(masks))
    utilities[rng.random(len(masks)) < 0.2] = np.nan
    best = {
        r: [
            removed_players(masks[row])
            for row in sorted(
                np.flatnonzero(((~masks).sum(axis=1) == r) & np.isfinite(utilities)),
                key=lambda row: -utilities[row],
            )[:4]
        ]
        for r in (2, 3, 4)
    }
    expected = {frozenset(some) for some in best[3]}
    expected |= {frozenset({*some, p}) for some in best[2] for p in range(12) if p not in some}
    expected |= {frozenset(some) - {p} for some in best[4] for p in some}
    got = starts(masks, utilities, removing(3, Constraint(12)))
    assert {frozenset(removed_players(mask)) for mask in got} == expected
    assert starts(masks[:0], utilities[:0], removing(3, Constraint(12))).shape == (0, 12)


def test_a_search_leaves_the_valley_of_its_best_scored_sets(rng):
    """Seven players are cheap together, and seven others cheaper; of those six were scored, while
    the best scored set of seven is the first."""
    num_players = 24
    group = rng.permutation(num_players)
    cheap = [group[:7], group[-7:]]

    def mean(masks: np.ndarray) -> np.ndarray:
        dropped = 1.0 - masks
        inside = [dropped[:, some].sum(axis=1) for some in cheap]
        return 1.0 * inside[0] ** 2 + 1.1 * inside[1] ** 2 - 3.0 * dropped.sum(axis=1)

    first, last = (without(num_players, some.tolist()) for some in cheap)
    six = without(num_players, cheap[1][:6].tolist())
    assert math.comb(num_players, 7) > MAX_EXHAUSTIVE
    assert mean(swap_one(first)).max() < mean(first[None])[0] < mean(last[None])[0]
    scored = np.stack([first, six])
    alone = best_predicted_sets(Fixed(mean), removing(7, Constraint(num_players)), first[None])
    found = best_predicted_sets(
        Fixed(mean),
        removing(7, Constraint(num_players)),
        starts(scored, mean(scored), removing(7, Constraint(num_players))),
    )
    assert mean(alone[:1])[0] < mean(last[None])[0]
    np.testing.assert_allclose(mean(found[:1]), mean(last[None]))


# -- expected improvement ----------------------------------------------------------------------


def test_expected_improvement_equals_the_integral(rng):
    mean, std = rng.normal(size=20), rng.uniform(0.05, 2, 20)
    best = rng.normal(size=20)
    got = expected_improvement(mean, std, best)
    for m, s, b, value in zip(mean, std, best, got, strict=True):
        u = np.linspace(m - 9 * s, m + 9 * s, 40_001)
        density = np.exp(-((u - m) ** 2) / (2 * s**2)) / (s * np.sqrt(2 * np.pi))
        # the trapezoid rule's error: the kink at `best` in steps of 5e-4 standard deviations
        integral = np.trapezoid(np.maximum(u - b, 0) * density, u)
        np.testing.assert_allclose(value, integral, atol=1e-6)


def test_expected_improvement_of_the_certain_and_the_unscored():
    mean = np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(
        expected_improvement(mean, np.zeros(3), np.full(3, 2.0)), [0.0, 0.0, 1.0], atol=1e-11
    )
    assert (expected_improvement(mean, np.ones(3), np.full(3, -np.inf)) == np.inf).all()


# -- swaps of a kernel surrogate ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ridge", "gp", "gp+ridge"])
def test_a_whole_swap_neighbourhood_equals_its_masks_one_by_one(kind, rng):
    """Scored neighbours apart: theirs is more than the smooth part. 1e-9 of the spread: two orders
    of the same sums, of up to 120 terms that cancel to about 1e-4 of the largest."""
    surrogate = fitted_to_ratios(13, 120, rng, kind)
    mask = without(13, rng.choice(13, int(rng.integers(1, 12)), replace=False).tolist())
    near = swap_one(mask)
    new = ~np.isin(keys(near), keys(surrogate.masks_MP))
    expected = surrogate.mean(near)
    got = surrogate.swap_means(mask)
    assert got.shape == (mask.sum(), (~mask).sum())
    np.testing.assert_allclose(
        got.ravel()[new], expected[new], rtol=0, atol=1e-9 * np.ptp(surrogate.mean(all_masks(13)))
    )


def test_the_beam_finds_with_swaps_what_it_finds_without(rng):
    """The same surrogate seen as a plain function is expanded mask by mask."""
    surrogate = fitted_to_ratios(22, 150, rng)
    starts = np.array([without(22, rng.choice(22, 8, replace=False).tolist()) for _ in range(4)])
    assert math.comb(22, 8) > MAX_EXHAUSTIVE
    fast = best_predicted_sets(surrogate, removing(8, Constraint(22)), starts)
    slow = best_predicted_sets(Fixed(surrogate.mean), removing(8, Constraint(22)), starts)
    np.testing.assert_array_equal(fast[0], slow[0])
    assert surrogate.mean(fast[:1])[0] >= surrogate.mean(swap_one(fast[0])).max() - 1e-12


# -- a batch -----------------------------------------------------------------------------------


def test_joint_predictions_are_those_of_single_masks_and_of_a_refit(rng):
    """Given one more score, the others' variances shrink as a refit of the same kernel says."""
    surrogate = fitted_to_ratios(10, 80, rng)
    sets = unscored(surrogate, all_masks(10, 6))[:40]
    mean, cov = surrogate.joint(sets)
    expected_mean, expected_std = surrogate.predict(sets)
    scale = expected_std.max()
    np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=1e-9 * scale)
    # variances are differences of numbers near the prior's: 1e-7 of the largest is rounding
    np.testing.assert_allclose(np.sqrt(np.diag(cov)), expected_std, rtol=0, atol=1e-5 * scale)
    kernel = surrogate.kernel
    assert kernel is not None
    more = np.concatenate([surrogate.masks_MP, sets[:1]])
    gram = kernel.gram(more, np.zeros(len(more)))
    cross = kernel.smooth(sets[1:], more)
    left = kernel.variance(sets[1:]) - np.einsum(
        "qm,qm->q", cross, np.linalg.solve(gram, cross.T).T
    )
    # a scored mask carries a jitter of 1e-10 of the prior's variance, up to 1e-3 of what is left
    reduced = np.diag(cov)[1:] - cov[0, 1:] ** 2 / cov[0, 0]
    factor = (surrogate.scale * max(1.0, surrogate.calibration)) ** 2
    np.testing.assert_allclose(reduced, factor * left, rtol=0, atol=2e-3 * factor * left.max())


def test_a_batch_takes_the_best_and_then_what_is_best_given_that(rng):
    """Slow conditioning: the joint posterior of all candidates, one inverse for each pick."""
    surrogate = fitted_to_ratios(10, 60, rng)
    pending = unscored(surrogate, all_masks(10, 7))[:5]
    sets = np.concatenate([unscored(surrogate, all_masks(10, kept))[7:40] for kept in (6, 5)])
    best_of = {4: float(np.median(surrogate.mean(sets))), 5: float(surrogate.mean(sets).min())}
    picked = select_by_expected_improvement(
        surrogate, sets, *for_sizes(best_of, 10), 6, pending_MP=pending
    )
    everything = np.concatenate([pending, sets])
    mean, cov = surrogate.joint(everything)
    cov = STD_INFLATION**2 * cov
    known = list(range(len(pending)))
    best = np.array([best_of[int(r)] for r in (~sets).sum(axis=1)])
    rows = []
    for _ in range(6):
        told = cov[:, known] @ np.linalg.solve(cov[np.ix_(known, known)], cov[known])
        std = np.sqrt(np.maximum(np.diag(cov - told), 1e-14))[len(pending) :]
        gain = expected_improvement(mean[len(pending) :], std, best) / best
        gain[[row - len(pending) for row in known[len(pending) :]]] = -1
        rows.append(int(np.argmax(gain)))
        known.append(len(pending) + rows[-1])
    np.testing.assert_array_equal(picked, sets[rows])


def test_a_batch_is_no_crowd(rng):
    """Twins, which say the same, are not both asked for while others promise as much."""
    surrogate = fitted_to_ratios(9, 40, rng, "gp")
    sets = unscored(surrogate, all_masks(9, 5))
    level = float(surrogate.mean(sets).max())
    batch = select_by_expected_improvement(
        surrogate, sets, *for_sizes({4: level}, 9), 5, pending_MP=sets[:0]
    )
    _, cov = surrogate.joint(sets)
    one_by_one = np.argsort(
        -expected_improvement(*surrogate.predict(sets), np.full(len(sets), level))
    )[:5]
    rows = [keys(sets).index(key) for key in keys(batch)]

    def shared(rows) -> float:
        part = cov[np.ix_(rows, rows)]
        return float(np.linalg.slogdet(part / np.outer(*[np.sqrt(np.diag(part))] * 2))[1])

    assert shared(rows) >= shared(one_by_one) - 1e-9


def test_sizes_without_a_score_come_first_and_hopeless_sets_never(rng):
    surrogate = fitted_to_ratios(9, 60, rng)
    sets = np.concatenate([unscored(surrogate, all_masks(9, kept))[:20] for kept in (7, 6, 5)])
    removed = (~sets).sum(axis=1)
    best_of = {2: 1e3, 3: -np.inf, 4: -np.inf}  # nothing can beat 1000
    picked = select_by_expected_improvement(
        surrogate, sets, *for_sizes(best_of, 9), 40, pending_MP=sets[:0]
    )
    first = (~picked[:2]).sum(axis=1)
    assert sorted(first.tolist()) == [3, 4]
    for r in (3, 4):
        likeliest = sets[removed == r][np.argmax(surrogate.mean(sets[removed == r]))]
        assert keys(likeliest[None])[0] in keys(picked[:2])
    assert 2 not in (~picked).sum(axis=1)
    assert not len(
        select_by_expected_improvement(
            surrogate, sets[:0], *for_sizes(best_of, 9), 3, pending_MP=sets[:0]
        )
    )
    assert not len(
        select_by_expected_improvement(
            surrogate, sets, *for_sizes(best_of, 9), 0, pending_MP=sets[:0]
        )
    )


def test_a_set_that_meets_several_targets_improves_on_the_one_that_is_hardest_to_meet(rng):
    """Shares of a cost: what meets 0.4 meets 0.7 too, and need not beat the best set there."""
    surrogate = fitted_to_ratios(9, 60, rng)
    targets = cost_targets(Constraint(9), [0.7, 0.4], [1.0] * 9, "params")
    sets = unscored(surrogate, np.concatenate([all_masks(9, kept) for kept in (6, 3)]))
    mean, std = surrogate.predict(sets)
    hard = (~sets).sum(axis=1) == 6
    best = np.array([mean.max() + 9.0, float(np.median(mean[hard]))])  # 0.7 cannot be improved on
    picked = select_by_expected_improvement(
        surrogate, sets, targets, best, len(sets), pending_MP=sets[:0]
    )
    assert len(picked)
    assert ((~picked).sum(axis=1) == 6).all()
    gain = expected_improvement(mean[hard], STD_INFLATION * std[hard], np.full(hard.sum(), best[1]))
    np.testing.assert_array_equal(picked[0], sets[hard][gain.argmax()])
    nothing = cost_targets(Constraint(9), [0.2], [1.0] * 9, "params")
    assert not len(
        select_by_expected_improvement(
            surrogate, sets, nothing, np.array([-np.inf]), 3, pending_MP=sets[:0]
        )
    )


def test_other_surrogates_are_asked_set_by_set(rng):
    utility = table_game(8, rng)
    sets = all_masks(8, 4)
    best = float(np.quantile(utility(sets), 0.9))
    got = select_by_expected_improvement(
        Fixed(utility, 0.3), sets, *for_sizes({4: best}, 8), 7, pending_MP=sets[:0]
    )
    gain = expected_improvement(utility(sets), np.full(70, 0.3 * STD_INFLATION), np.full(70, best))
    np.testing.assert_array_equal(got, sets[np.argsort(-gain, kind="stable")[:7]])


# -- chances -----------------------------------------------------------------------------------


def test_the_chance_to_be_better_is_that_of_draws(rng):
    """200,000 draws: 5 standard errors of a share are at most 0.0056."""
    mean, std, best, gain = 0.5 + 0.1 * rng.normal(), 0.05, 0.5, float(rng.uniform(0, 0.1))
    surrogate = Fixed(lambda masks: np.full(len(masks), mean), std)
    draws = rng.normal(mean, STD_INFLATION * std, 200_000)
    better = np.log(draws[draws > 0]) > math.log(best) - math.log1p(-gain)  # a lower perplexity
    share = better.sum() / len(draws)
    got = probability_of_improvement(surrogate, all_masks(3, 2), best, gain)
    np.testing.assert_allclose(got, share, atol=0.006)
    below = probability_of_improvement(surrogate, all_masks(3, 2), -0.4, gain)
    np.testing.assert_allclose(below, norm.sf((-0.4 + gain - mean) / (STD_INFLATION * std)))
