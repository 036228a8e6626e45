"""The covariance against its formula term by term, and tuning against its own objective.

Tolerances: covariances are sums of at most P^2 terms, so rounding alone: 1e-12 of the largest.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from lpserve.masks import all_masks
from lpserve.surrogate.kernel import (
    PRIOR_DECAY,
    PRIOR_GROWTH,
    PRIOR_NUGGET,
    MaskKernel,
    _Likelihood,
    tune,
    whitening,
)
from lpserve.testing.kernels import KINDS, covariance, pair_game, random_kernel, scored_covariance

pytestmark = pytest.mark.usefixtures("one_blas_thread")


def entry(kernel: MaskKernel, s: list[bool], t: list[bool]) -> float:
    """k(S, T) as the module's formula reads."""
    players = range(len(s))
    z_s, z_t = ([1 if kept else -1 for kept in mask] for mask in (s, t))
    total = kernel.constant
    total += kernel.linear * sum(z_s[i] * z_t[i] for i in players)
    for j in players:
        for i in range(j):
            total += kernel.pairs * z_s[i] * z_s[j] * z_t[i] * z_t[j]
    scale = apart = 1.0
    for i in players:
        for mask in (s, t):
            if not mask[i]:
                scale *= math.exp(kernel.growth_P[i])
        if s[i] != t[i]:
            apart *= math.exp(-kernel.decay_P[i])
    return total + scale * (kernel.product * apart + (kernel.nugget if s == t else 0.0))


def by_double_loop(kernel: MaskKernel, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.array([[entry(kernel, s, t) for t in right.tolist()] for s in left.tolist()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_players", [1, 2, 7, 20])
def test_covariances_equal_the_formula_as_a_double_loop(kind, num_players, rng):
    kernel = random_kernel(num_players, rng, kind)
    left = np.unique(rng.random((20, num_players)) < rng.random((20, 1)), axis=0)
    right = rng.random((15, num_players)) < rng.random((15, 1))
    both = np.concatenate([left, right])
    expected = by_double_loop(kernel, both, both)
    tolerance = {"rtol": 0, "atol": 1e-12 * np.abs(expected).max()}
    np.testing.assert_allclose(kernel.variance(both), expected.diagonal(), **tolerance)
    # off the diagonal equal masks share their own part
    same = (both[:, None] == both[None]).all(axis=2)
    smooth = expected - same * kernel.nugget_of(both)
    np.testing.assert_allclose(kernel.smooth(both, both), smooth, **tolerance)
    count = len(left)
    np.testing.assert_allclose(kernel.smooth(left, right), smooth[:count, count:], **tolerance)
    own = [kernel.nugget * math.exp(2 * kernel.growth_P[~mask].sum()) for mask in both]
    np.testing.assert_allclose(kernel.nugget_of(both), own, rtol=1e-12)
    # the sums over all masks that other tests use
    np.testing.assert_allclose(covariance(kernel, both, both), expected, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_scored_masks_add_their_own_part_noise_and_a_jitter_of_1e_10(kind, rng):
    kernel = random_kernel(6, rng, kind)
    masks = all_masks(6)
    noise = rng.uniform(0, 2, len(masks))
    expected = by_double_loop(kernel, masks, masks) + np.diag(noise)
    got = kernel.gram(masks, noise)
    jitter = 1e-10 * kernel.smooth(masks, masks).diagonal()
    # sums of 64 terms, far below the jitter itself
    tolerance = np.sqrt(np.outer(jitter, jitter))
    assert (np.abs(got - expected - np.diag(jitter)) <= 1e-3 * tolerance).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_players", [1, 3, 8])
def test_covariances_have_no_negative_eigenvalue(kind, num_players, rng):
    masks = all_masks(num_players)
    for _ in range(5):
        kernel = random_kernel(num_players, rng, kind)
        smooth = kernel.smooth(masks, masks)
        np.testing.assert_allclose(smooth, smooth.T, rtol=0, atol=1e-12 * smooth.max())
        values = np.linalg.eigvalsh(smooth)
        assert values[0] > -1e-12 * values[-1]  # rounding, of the largest
        least_own = kernel.nugget_of(masks).min()
        of_scored = np.linalg.eigvalsh(kernel.gram(masks, np.zeros(len(masks))))
        assert of_scored[0] > 0.999 * least_own


@pytest.mark.parametrize("num_masks", [1, 2, 63, 64, 65, 200])
def test_whitening_makes_a_covariance_the_identity(num_masks, rng):
    masks = all_masks(8)[rng.choice(256, num_masks, replace=False)]
    gram = random_kernel(8, rng).gram(masks, rng.uniform(0, 1, num_masks))
    before = gram.copy()
    whiten = whitening(gram)
    np.testing.assert_array_equal(gram, before)
    np.testing.assert_array_equal(whiten, np.tril(whiten))
    # a condition number below 1e6 costs as many digits
    np.testing.assert_allclose(whiten @ gram @ whiten.T, np.eye(num_masks), atol=1e-9)
    np.testing.assert_allclose(
        whiten, np.linalg.inv(np.linalg.cholesky(gram)), atol=1e-9 * np.abs(whiten).max()
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_covariance_that_overflowed_is_not_factorised(bad, rng):
    gram = random_kernel(8, rng).gram(all_masks(8), rng.uniform(0, 1, 256))
    gram[3] = gram[:, 3] = bad
    with np.errstate(invalid="ignore"), pytest.raises(np.linalg.LinAlgError):
        whitening(gram)


def fresh_problem(kind: str, rng: np.random.Generator):
    """Objective of 30 masks of 6 players with noise, and a point of ordinary size."""
    masks = all_masks(6)[rng.choice(64, 30, replace=False)]
    target, noise = rng.normal(size=30), rng.uniform(0, 0.5, 30)
    point = np.concatenate(
        [
            rng.uniform(-2, 1, 5),
            rng.uniform(-3, 0, 1),
            rng.uniform(-0.2, 0.3, 1),
            rng.normal(0, 0.7, 6),
            rng.normal(0, 0.2, 6),
        ]
    )
    return masks, target, noise, point


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_the_likelihood_and_the_prior_by_hand(kind, rng):
    masks, target, noise, point = fresh_problem(kind, rng)
    problem = _Likelihood(kind, masks, target, noise)
    kernel = problem.kernel(point)
    gram = scored_covariance(kernel, masks, noise)
    value = 0.5 * target @ np.linalg.solve(gram, target) + 0.5 * np.linalg.slogdet(gram)[1]
    value += 0.5 * ((point[4] - PRIOR_NUGGET[0]) / PRIOR_NUGGET[1]) ** 2
    if kind != "ridge":
        decay, growth = point[7:13], point[13:]
        np.testing.assert_allclose(kernel.decay_P, np.exp(point[5] + decay), rtol=1e-12)
        np.testing.assert_allclose(kernel.growth_P, point[6] + growth, rtol=1e-12)
        value += 0.5 * (decay**2).sum() / PRIOR_DECAY**2 + 0.5 * (growth**2).sum() / PRIOR_GROWTH**2
    np.testing.assert_allclose(problem(point)[0], value, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_of_the_objective_equal_central_differences(kind, rng):
    masks, target, noise, point = fresh_problem(kind, rng)
    problem = _Likelihood(kind, masks, target, noise)
    slope = problem(point)[1]
    step, expected = 1e-5, np.empty_like(point)
    for index, unit in enumerate(np.eye(len(point))):
        ahead, behind = problem(point + step * unit)[0], problem(point - step * unit)[0]
        expected[index] = (ahead - behind) / (2 * step)
    # the value rounds to 1e-13 of itself, a third derivative of its size adds 1e-10
    np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    lacks = {"ridge": [3, *range(5, 19)], "gp": [2], "gp+ridge": []}[kind]
    np.testing.assert_array_equal(np.flatnonzero(expected == 0), lacks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_has_the_parts_of_its_kind_alone(kind, rng):
    masks = all_masks(5)
    kernel = tune(kind, masks, rng.normal(size=32), np.zeros(32))
    assert (kernel.linear > 0, kernel.constant > 0, kernel.nugget > 0) == (True, True, True)
    assert (kernel.pairs > 0) == (kind != "gp")
    assert (kernel.product > 0) == (kernel.decay_P > 0).all() == (kind != "ridge")
    assert (kernel.growth_P == 0).all() == (kind == "ridge")


def drawn_game(kernel: MaskKernel, num_players: int, rng: np.random.Generator) -> np.ndarray:
    """Utilities of all masks from the kernel itself."""
    masks = all_masks(num_players)
    factor = np.linalg.cholesky(kernel.gram(masks, np.zeros(len(masks))))
    return factor @ rng.normal(size=len(masks))


def scaled(utilities: np.ndarray) -> np.ndarray:
    return (utilities - utilities.mean()) / utilities.std()


@pytest.mark.parametrize("kind", ["gp", "gp+ridge"])
def test_tuning_tells_players_that_matter_from_those_that_do_not(kind, rng):
    """Masks that disagree about one of three players share a third of what others share."""
    matters = np.zeros(8, dtype=bool)
    matters[rng.choice(8, 3, replace=False)] = True
    truth = MaskKernel(
        constant=1.0,
        linear=1e-3,
        pairs=0.0,
        product=1.0,
        nugget=1e-3,
        decay_P=np.where(matters, 1.0, 0.01),
        growth_P=np.zeros(8),
    )
    rows = rng.choice(256, 150, replace=False)
    utilities = drawn_game(truth, 8, rng)[rows]
    kernel = tune(kind, all_masks(8)[rows], scaled(utilities), np.zeros(150))
    assert kernel.decay_P[matters].min() > 2 * kernel.decay_P[~matters].max()


def test_tuning_finds_players_whose_loss_leaves_more_to_say(rng):
    truth = MaskKernel(
        constant=1.0,
        linear=1e-3,
        pairs=0.0,
        product=1.0,
        nugget=1e-3,
        decay_P=np.full(8, 0.2),
        growth_P=np.where(np.arange(8) == 3, 1.5, 0.0),
    )
    rows = rng.choice(256, 150, replace=False)
    utilities = drawn_game(truth, 8, rng)[rows]
    kernel = tune("gp", all_masks(8)[rows], scaled(utilities), np.zeros(150))
    assert kernel.growth_P.argmax() == 3


def objective(kind: str, kernel: MaskKernel, masks: np.ndarray, target: np.ndarray) -> float:
    """What tuning minimises, at the best means of the players' decays and growths."""
    gram = scored_covariance(kernel, masks, np.zeros(len(masks)))
    value = 0.5 * target @ np.linalg.solve(gram, target) + 0.5 * np.linalg.slogdet(gram)[1]
    if kind != "ridge":
        value += 0.5 * len(kernel.decay_P) * np.log(kernel.decay_P).var() / PRIOR_DECAY**2
        value += 0.5 * len(kernel.growth_P) * kernel.growth_P.var() / PRIOR_GROWTH**2
    return float(value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_start_from_four_fifths_of_the_masks_ends_as_well_as_a_cold_one(
    kind, statistical_rng
):
    """A search stops before it has converged, and may end on another hill: of 360 games 2 ended
    more than 0.5 worse, the worst by 7, while searches gain tens to hundreds."""
    worse_by = []
    for _ in range(5):
        rows = statistical_rng.choice(256, 120, replace=False)
        masks = all_masks(8)[rows]
        game = drawn_game(random_kernel(8, statistical_rng, kind), 8, statistical_rng)
        target = scaled(game[rows])
        fewer = tune(kind, masks[:96], target[:96], np.zeros(96))
        warm, cold = (tune(kind, masks, target, np.zeros(120), start) for start in (fewer, None))
        worse_by.append(objective(kind, warm, masks, target) - objective(kind, cold, masks, target))
    assert np.median(worse_by) < 0.5
    assert max(worse_by) < 25


SMOOTH = ("product", "decay_P", "growth_P")


@pytest.mark.parametrize("kind", KINDS)
def test_a_warm_start_begins_at_the_kernel_given_and_inside_the_bounds(kind, rng):
    masks = all_masks(8)[rng.choice(256, 50, replace=False)]
    problem = _Likelihood(kind, masks, rng.normal(size=50), np.zeros(50))
    low, high = np.array(problem.bounds).T
    ordinary = dataclasses.replace(
        random_kernel(8, rng, kind),
        constant=0.7,
        linear=0.3,
        pairs=0.01,
        product=1.3,
        nugget=0.05,
        decay_P=rng.uniform(0.1, 1, 8),
        growth_P=rng.normal(0, 0.1, 8),
    )
    begun = problem.kernel(problem.begin(ordinary))
    names = {"ridge": ("pairs",), "gp": SMOOTH, "gp+ridge": ("pairs", *SMOOTH)}[kind]
    for name in ("constant", "linear", "nugget", *names):
        expected = getattr(ordinary, name)
        np.testing.assert_allclose(getattr(begun, name), expected, rtol=1e-9, err_msg=name)
    tiny = dataclasses.replace(
        ordinary,
        constant=0.0,
        linear=0.0,
        pairs=0.0,
        product=0.0,
        nugget=0.0,
        decay_P=np.full(8, 1e-9),
        growth_P=np.full(8, -5.0),
    )
    for start in (ordinary, tiny):
        assert (problem.begin(start) > low).all()
        assert (problem.begin(start) < high).all()


PARTS = [
    (kind, part)
    for kind, parts in {
        "ridge": ("constant", "linear", "pairs", "nugget"),
        "gp": ("constant", "linear", "product", "nugget"),
        "gp+ridge": ("constant", "linear", "pairs", "product", "nugget"),
    }.items()
    for part in parts
]


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_a_part_that_was_tiny_comes_back_when_masks_ask_for_it(kind, part, rng):
    """As after a tuning to masks that said nothing about it: the search ends no worse than one
    from nothing. Single games may end on another hill."""
    worse_by = []
    for _ in range(5):
        masks = rng.permutation(all_masks(7))[:100]
        target = scaled(pair_game(7, rng)(masks) + rng.normal(0, 0.01, 100))
        cold = tune(kind, masks, target, np.zeros(100))
        start = dataclasses.replace(cold, **{part: 1e-11})
        warm = tune(kind, masks, target, np.zeros(100), start)
        worse_by.append(objective(kind, warm, masks, target) - objective(kind, cold, masks, target))
    assert np.median(worse_by) < 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warm", [False, True])
def test_tuning_is_deterministic(kind, warm, rng):
    masks = all_masks(7)[rng.choice(128, 50, replace=False)]
    target, noise = scaled(rng.normal(size=50)), rng.uniform(0, 0.1, 50)
    start = random_kernel(7, rng, kind) if warm else None
    one, other = (tune(kind, masks, target, noise, start) for _ in range(2))
    for name in MaskKernel.__slots__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
