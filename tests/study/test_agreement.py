"""Agreement between a study's points, against definitions written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from lpserve.study.agreement import PointAnswer, choices, overlap, tau

MIXTURES, UTILITIES = ("a", "b", "c"), ("u", "v")


def answers_of(rng, seeds=("0", "1", "2"), players=9, sizes=(2, 4)) -> list[PointAnswer]:
    """A full study with random answers."""
    return [
        PointAnswer(
            id=f"{mixture}{utility}{seed}",
            levels={"calibration": mixture, "utility": utility, "seed": seed, "model": "m"},
            values_P=rng.normal(size=players),
            removed={r: frozenset(rng.choice(players, r, replace=False).tolist()) for r in sizes},
            heldout_nll={r: float(rng.normal()) for r in sizes},
        )
        for mixture, utility, seed in itertools.product(MIXTURES, UTILITIES, seeds)
    ]


def tau_by_hand(first, second) -> float:
    """Concordant minus discordant pairs, over all pairs (values without ties)."""
    signs = [
        np.sign(first[i] - first[j]) * np.sign(second[i] - second[j])
        for i, j in itertools.combinations(range(len(first)), 2)
    ]
    return float(np.mean(signs))


def test_every_pair_of_levels_is_compared_over_matched_points(rng):
    answers = answers_of(rng)
    by_id = {answer.id: answer for answer in answers}
    found = {c.dimension: c for c in choices(answers, ("calibration", "utility", "seed"))}
    assert set(found) == {"calibration", "utility", "seed"}
    for dimension, first, second in (
        ("calibration", "a", "c"),
        ("utility", "u", "v"),
        ("seed", "0", "2"),
    ):
        pair = next(p for p in found[dimension].pairs if p.levels == (first, second))
        matched = []
        for mixture, utility, seed in itertools.product(MIXTURES, UTILITIES, "012"):
            levels = {"calibration": mixture, "utility": utility, "seed": seed}
            if levels[dimension] == first:
                other = levels | {dimension: second}
                matched.append((by_id["".join(levels.values())], by_id["".join(other.values())]))
        assert pair.points == len(matched)
        expected = np.mean([tau_by_hand(a.values_P, b.values_P) for a, b in matched])
        assert pair.tau.mean == pytest.approx(expected, abs=1e-12)
        for r in (2, 4):
            shared = np.mean([len(a.removed[r] & b.removed[r]) / r for a, b in matched])
            assert pair.overlap[r].mean == pytest.approx(shared, abs=1e-12)
            behind = np.mean([b.heldout_nll[r] - a.heldout_nll[r] for a, b in matched])
            assert pair.heldout[r].mean == pytest.approx(behind, abs=1e-12)


def test_the_interval_is_students_over_the_means_of_the_seeds(rng):
    answers = answers_of(rng, seeds=tuple("01234"))
    choice = next(c for c in choices(answers, ("utility",)))
    by_id = {answer.id: answer for answer in answers}
    means = [
        np.mean(
            [by_id[f"{m}v{s}"].heldout_nll[2] - by_id[f"{m}u{s}"].heldout_nll[2] for m in MIXTURES]
        )
        for s in "01234"
    ]
    low, high = stats.t.interval(0.9, 4, np.mean(means), np.std(means, ddof=1) / np.sqrt(5))
    estimate = choice.pairs[0].heldout[2]
    assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))


def test_intervals_need_seeds_and_stay_within_what_is_possible(rng):
    two = {c.dimension: c for c in choices(answers_of(rng, seeds=("0", "1")), ("utility", "seed"))}
    assert two["utility"].tau.low is not None
    assert two["seed"].tau.low is None
    one = choices(answers_of(rng, seeds=("0",)), ("utility", "seed"))
    assert [c.dimension for c in one] == ["utility"]
    assert one[0].tau.low is None
    three = {c.dimension: c for c in choices(answers_of(rng), ("utility", "seed"))}
    assert three["seed"].tau.low is not None
    for choice in (*two.values(), *three.values()):
        for estimate, least in ((choice.tau, -1.0), *((o, 0.0) for o in choice.overlap.values())):
            if estimate.low is not None and estimate.high is not None:
                assert least <= estimate.low <= estimate.mean <= estimate.high <= 1.0


@pytest.mark.thorough
def test_the_interval_covers_as_it_says(statistical_rng):
    """Random answers do not depend on the utility: the true mean of every difference is 0.

    200 studies; a 90% interval's hits are binomial, four standard deviations are 8.5%.
    """
    hits = []
    for _ in range(200):
        choice = choices(answers_of(statistical_rng, seeds=tuple("0123")), ("utility",))[0]
        estimate = choice.pairs[0].heldout[2]
        assert estimate.low is not None
        assert estimate.high is not None
        hits.append(estimate.low <= 0 <= estimate.high)
    assert 0.815 <= np.mean(hits) <= 0.985


def test_seeds_that_share_points_are_not_taken_for_independent(rng):
    """Of three seeds two agree and one is elsewhere: two of three pairs say the same, one seed."""
    answers = []
    for seed in "012":
        values = np.array(range(6), dtype=np.float64) * (-1 if seed == "2" else 1)
        levels = {"seed": seed, "utility": "u"}
        answers.append(
            PointAnswer(id=seed, levels=levels, values_P=values, removed={}, heldout_nll={})
        )
    choice = choices(answers, ("seed",))[0]
    assert choice.tau.mean == pytest.approx((1 - 1 - 1) / 3)
    assert choice.tau.low == -1.0  # no wider than possible, and nothing is excluded
    assert choice.tau.high == 1.0


def test_what_cannot_be_compared_is_left_out(rng):
    answers = answers_of(rng)
    lost = [a for a in answers if a.id != "au0"]  # a failed point
    pair = next(p for p in choices(lost, ("utility",))[0].pairs)
    assert pair.points == len(MIXTURES) * 3 - 1
    models = [
        PointAnswer(
            id=a.id + m,
            levels={**a.levels, "model": m},
            values_P=a.values_P[: 9 - (m == "n")],
            removed=a.removed,
            heldout_nll=a.heldout_nll,
        )
        for a in answers
        for m in ("m", "n")
    ]
    found = choices(models, ("model", "utility"))  # models of other depths never meet
    assert [c.dimension for c in found] == ["utility"]
    flat = [
        PointAnswer(id=a.id, levels=a.levels, values_P=np.zeros(9), removed={}, heldout_nll={})
        for a in answers[:2]
    ]
    assert np.isnan(tau(*flat))
    assert overlap(answers[0], answers[0], 4) == 1.0
