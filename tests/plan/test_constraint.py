"""`Constraint` against plain loops over all sets, and the search within one."""

from __future__ import annotations

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.masks import all_masks, drop_one, keys, removed_players, swap_one, without
from lpserve.plan.constraint import Constraint, constraint_of, constraint_text
from lpserve.plan.greedy import greedy_path
from lpserve.plan.search import best_predicted_sets, starts
from lpserve.plan.targets import removing

CASES = [
    constraint_of(7),
    constraint_of(7, [2, 0]),
    constraint_of(7, [], [5]),
    constraint_of(7, [6, 1], [3, 0, 3]),
    constraint_of(7, range(3), range(3, 7)),
]
every_case = pytest.mark.parametrize("within", CASES, ids=lambda w: f"{w.protected}{w.forced}")


def holds(within: Constraint, mask_P: np.ndarray) -> bool:
    removed = {*removed_players(mask_P)}
    return not removed & {*within.protected} and {*within.forced} <= removed


@every_case
def test_a_constraint_says_which_masks_are_within(within):
    masks = all_masks(7)
    expected = [holds(within, mask) for mask in masks]
    np.testing.assert_array_equal(within.holds(masks), expected)
    assert within.given == (not all(expected))
    for r in range(8):
        of_size = masks[(~masks).sum(axis=1) == r]
        inside = {
            key for key, mask in zip(keys(of_size), of_size, strict=True) if holds(within, mask)
        }
        assert within.count(r) == len(inside)
        if inside:
            assert set(keys(within.all_sets(r))) == inside
    for mask in masks[np.array(expected)]:
        drops = drop_one(mask)
        np.testing.assert_array_equal(
            within.drops(mask), drops[[holds(within, one) for one in drops]]
        )


@every_case
def test_a_ranking_within_drops_what_must_go_then_the_lowest_that_may(within, rng):
    values = rng.permutation(7).astype(float)
    for r in range(len(within.forced), 8 - len(within.protected)):
        free = sorted(within.free, key=lambda player: values[player])
        expected = {*within.forced, *free[: r - len(within.forced)]}
        assert {*removed_players(within.ranking(values, r))} == expected


def test_a_ranking_never_drops_a_protected_player_for_one_without_a_score():
    values = np.array([np.inf, np.inf, 1.0, np.inf])
    assert removed_players(constraint_of(4, [0]).ranking(values, 2)) == (1, 2)


@every_case
def test_the_greedy_path_within_is_the_naive_one(within, rng):
    utilities = dict(zip(keys(all_masks(7)), rng.random(128), strict=True))
    masks = rng.permutation(all_masks(7))
    of = np.array([utilities[key] for key in keys(masks)])
    expected, current = [], None
    for r in within.sizes(7 - len(within.protected)):
        if current is None and within.forced:
            current = without(7, within.forced)
        else:
            above = np.ones(7, dtype=bool) if current is None else current
            options = [mask for mask in drop_one(above) if holds(within, mask)]
            current = max(options, key=lambda mask: utilities[keys(mask[None])[0]])
        assert (~current).sum() == r
        expected.append(current)
    path = greedy_path(masks, of, len(expected), within=within)
    np.testing.assert_array_equal(path, expected)


class Fixed:
    """A surrogate that predicts a given utility."""

    def __init__(self, mean) -> None:
        self.mean = mean


def test_a_beam_search_stays_within_and_finds_what_all_sets_hold(rng):
    """24 players, 8 removed: 735,471 sets, and with 4 players bound 38,760: beam search; the same
    with 8 bound: 12,870, exhaustive. An additive utility has one optimum, and swaps lead there."""
    cost = rng.random(24)

    def mean(masks: np.ndarray) -> np.ndarray:
        return -(~masks @ cost)

    for protected, forced in (([0, 5, 9], [2]), ([0, 5, 9, 11, 17, 20, 23], [2, 4])):
        within = constraint_of(24, protected, forced)
        scored = np.array([within.ranking(rng.random(24), r) for r in (7, 8, 9)])
        near = starts(scored, mean(scored), removing(8, within))
        assert len(near) > 1
        assert within.holds(near).all()
        found = best_predicted_sets(Fixed(mean), removing(8, within), near)  # pyright: ignore[reportArgumentType]
        assert within.holds(found).all()
        np.testing.assert_array_equal(found[0], within.ranking(cost, 8))
        for swapped in swap_one(found[0]):
            assert not within.holds(swapped[None])[0] or mean(swapped[None]) <= mean(found[:1])


@pytest.mark.parametrize(
    ("protect", "force", "max_removed", "words"),
    [
        ([7], [], 2, "protect: player 7 is not one of 0..6"),
        ([], [-1], 2, "force: player -1 is not one of 0..6"),
        ([1, 2], [2], 2, "player 2 cannot be both protected and forced"),
        ([], [1, 2, 3], 2, "force removes 3 players, max_removed is 2"),
        ([0, 1, 2, 3], [], 4, "protect leaves 3 players to remove, max_removed is 4"),
    ],
)
def test_constraints_that_no_set_can_meet_are_refused(protect, force, max_removed, words):
    with pytest.raises(InputError, match=words):
        constraint_of(7, protect, force).check(max_removed)


def test_a_constraint_in_words():
    assert constraint_text([0, 1], [7]) == "keep 0, 1 and remove 7"
    assert constraint_text([], [7, 8]) == "remove 7, 8"
    assert constraint_text([], []) == ""
