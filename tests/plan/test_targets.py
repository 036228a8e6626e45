"""Targets against all sets of small games: which sets meet them, and in which numbers."""

from __future__ import annotations

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.inputs.rules import COSTS
from lpserve.masks import all_masks, removed_players, swap_one
from lpserve.plan import search
from lpserve.plan.constraint import Constraint, constraint_of
from lpserve.plan.search import best_predicted_sets, starts
from lpserve.plan.targets import (
    cost_targets,
    read_targets,
    removing,
    size_targets,
)

P = 9
SHARES = (0.85, 0.6, 0.35)


class Fixed:
    """A surrogate that predicts a given utility."""

    def __init__(self, mean) -> None:
        self._mean = mean

    def mean(self, queried_MP):
        return self._mean(queried_MP)


def drawn_costs(rng, zeros=0):
    """Costs of few values, so that players tie, some of them nothing."""
    costs = rng.choice([1.0, 2.0, 3.5, 7.0], size=P)
    costs[rng.choice(P, zeros, replace=False)] = 0.0
    return costs


def kept_share(mask_P, costs):
    return sum(cost for kept, cost in zip(mask_P, costs, strict=True) if kept) / sum(costs)


def is_minimal(mask_P, costs, share, within):
    """Whether no player could be brought back."""
    for player in removed_players(mask_P):
        more_P = mask_P.copy()
        more_P[player] = True
        if player not in within.forced and kept_share(more_P, costs) <= share + 1e-9:
            return False
    return True


@pytest.mark.parametrize("zeros", [0, 3])
@pytest.mark.parametrize(("protect", "force"), [((), ()), ((4,), (1,))])
def test_a_share_is_met_by_the_sets_that_keep_no_more_in_as_many_players_as_may_be_needed(
    protect, force, zeros, rng
):
    costs, within = drawn_costs(rng, zeros), constraint_of(P, protect, force)
    masks_MP = all_masks(P)
    kept = np.array([kept_share(mask_P, costs) for mask_P in masks_MP])
    least = kept[within.holds(masks_MP) & masks_MP.any(axis=1)].min()
    reachable = [share for share in SHARES if least <= share]  # the others are refused
    assert reachable
    for target in cost_targets(within, reachable, costs.tolist(), "params"):
        assert target.share is not None
        naive = (kept <= target.share + 1e-9) & within.holds(masks_MP)
        np.testing.assert_array_equal(target.holds(masks_MP), naive)
        minimal = [m for m in masks_MP[naive] if is_minimal(m, costs, target.share, within)]
        sizes = [int((~mask_P).sum()) for mask_P in minimal]
        assert set(target.sizes) >= set(sizes)
        assert target.sizes[0] == min(sizes)
        # and the sets by a ranking are among these
        for mask_P in (target.ranking(rng.random(P)), target.largest_first()):
            assert target.holds(mask_P[None])[0]
        assert is_minimal(target.ranking(rng.random(P)), costs, target.share, within)
        assert (~target.largest_first()).sum() == min(sizes)


def test_a_ranking_drops_what_is_worth_least_for_its_cost():
    costs = [4.0, 1.0, 1.0, 4.0]
    (target,) = cost_targets(Constraint(4), [0.55], costs, "params")
    # 4.5 of 10 must go: player 1 (0.1 for 1), 0 (0.8 for 4), 2 (0.5 for 1) reach 6 of 10; and
    # 1 need not go with 0 and 2
    assert removed_players(target.ranking(np.array([0.8, 0.1, 0.5, 4.0]))) == (0, 1)
    assert removed_players(target.ranking(np.array([0.8, 0.7, 9.0, 0.4]))) == (0, 3)


def test_players_that_cost_nothing_are_not_dropped_for_a_cost():
    (target,) = cost_targets(Constraint(4), [0.5], [0.0, 1.0, 0.0, 1.0], "kv")
    assert target.sizes == range(1, 2)
    assert removed_players(target.ranking(np.array([-5.0, 2.0, -5.0, 1.0]))) == (3,)


def test_a_share_that_is_reached_exactly_is_met_in_spite_of_rounding():
    costs = [0.1] * 10
    for target in cost_targets(Constraint(10), [0.9, 0.8, 0.7, 0.6, 0.5, 0.3], costs, "params"):
        assert target.share is not None
        assert list(target.sizes) == [round(10 * (1 - target.share))]


def test_shares_that_no_set_reaches_are_refused():
    for shares, protect, costs, words in (
        ([0.5], (0, 1), [4, 4, 1, 1], "params=0.5 cannot be reached: what is protected keeps 0.8"),
        ([0.1], (), [1, 1, 1], "params=0.1 cannot be reached: it leaves no player"),
        ([0.5], (), [0, 0], "none of the 2 players has any"),
    ):
        with pytest.raises(InputError, match=words):
            cost_targets(constraint_of(len(costs), protect), shares, costs, "params")


def test_players_that_are_forced_may_reach_a_share_alone():
    (target,) = cost_targets(constraint_of(4, (), (0, 1)), [0.8], [1.0] * 4, "params")
    assert target.sizes == range(2, 3)
    assert removed_players(target.ranking(np.ones(4))) == (0, 1)


def test_targets_of_sizes_are_met_by_one_size_each():
    within = constraint_of(P, (2,), (0,))
    targets = size_targets(within, 4)
    masks_MP = all_masks(P)
    assert [target.sizes[0] for target in targets] == [1, 2, 3, 4]
    for target in targets:
        expected = within.holds(masks_MP) & ((~masks_MP).sum(axis=1) == target.sizes[0])
        np.testing.assert_array_equal(target.holds(masks_MP), expected)


@pytest.mark.parametrize("share", SHARES)
def test_small_games_are_searched_whole_for_a_share(share, rng):
    """In all the numbers that can be needed; of a monotone utility the best set is minimal."""
    costs, weight_P = drawn_costs(rng), rng.random(P)
    (target,) = cost_targets(Constraint(P), [share], costs.tolist(), "params")
    masks_MP = all_masks(P)
    meeting_MP = masks_MP[target.holds(masks_MP)]
    found = best_predicted_sets(Fixed(lambda m: m @ weight_P), target, masks_MP[:0])
    assert target.holds(found).all()
    # the set itself: sums of another shape may differ in the last digit
    np.testing.assert_array_equal(found[0], meeting_MP[(meeting_MP @ weight_P).argmax()])


def test_a_beam_search_for_a_share_ends_where_no_swap_improves_and_reaches_every_size(
    rng, monkeypatch
):
    """From the set of the costliest players alone, in a game too large for the exhaustive way."""
    monkeypatch.setattr(search, "MAX_EXHAUSTIVE", 0)
    players = 24
    costs = np.tile([1.0, 2.0], players // 2)
    main, pairs = rng.random(players), np.triu(rng.normal(0, 0.05, (players, players)), 1)

    def mean(masks: np.ndarray) -> np.ndarray:
        return masks @ main + np.einsum("mi,ij,mj->m", masks * 1.0, pairs, masks * 1.0)

    (target,) = cost_targets(Constraint(players), [0.7], costs.tolist(), "params")
    assert len(target.sizes) > 4
    found = best_predicted_sets(Fixed(mean), target, target.largest_first()[None])
    assert target.holds(found).all()
    near = swap_one(found[0])
    assert mean(near[target.holds(near)]).max(initial=-np.inf) <= mean(found[:1])[0]
    # every number of players has its start: the best of each alone is no worse than by ranking
    for size in target.sizes:
        of_size = target.ranking(rng.random(players))
        assert mean(found[:1])[0] >= mean(of_size[None])[0], size


def test_a_search_for_a_share_starts_from_scored_sets_that_meet_it_or_nearly_do(rng):
    costs = np.tile([1.0, 3.0], 5)
    (target,) = cost_targets(Constraint(10), [0.6], costs.tolist(), "params")
    masks_MP = all_masks(10)[rng.permutation(1024)[:300]]
    near_MP = starts(masks_MP, rng.random(300), target)
    assert len(near_MP)
    assert target.holds(near_MP).all()
    assert set((~near_MP).sum(axis=1).tolist()) <= set(target.sizes)


@pytest.mark.parametrize("text", ["params=0.9,0.8", "kv=.5", "flops=0.125"])
def test_shares_are_read_as_they_are_written(text):
    cost, shares = read_targets(text)
    assert text.startswith(f"{cost}=")
    assert cost in COSTS
    assert list(shares) == [float(share) for share in text.partition("=")[2].split(",")]


@pytest.mark.parametrize(
    "text", ["", "params", "params=", "params=1", "params=0", "params=1.5", "bytes=0.5", "kv=0.5,"]
)
def test_what_is_no_share_is_refused(text):
    with pytest.raises(InputError, match="a target is one of params, flops, kv"):
        read_targets(text)


def test_a_target_of_a_number_removed_costs_nothing():
    target = removing(3, Constraint(P))
    masks_MP = all_masks(P, P - 3)
    assert not target.kept_cost(masks_MP).any()
    assert target.reached(target.kept_cost(masks_MP)).all()
