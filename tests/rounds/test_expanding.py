"""Short lists in a run's rounds: what is asked for, by whom, and that arrival does not matter."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from lpserve.masks import all_masks, drop_one, full_mask, keys, without
from lpserve.plan.constraint import Constraint, constraint_of
from lpserve.plan.expansion import EXPANSION
from lpserve.plan.targets import cost_targets, size_targets
from lpserve.rounds.expanding import CORRECTED, PROPOSERS, SEARCH, earned_places
from lpserve.rounds.history import CompletedRound, KnownUtilities
from lpserve.rounds.planner import RoundPlanner
from lpserve.rounds.settings import RoundSettings
from lpserve.utility import UTILITIES

P, R = 10, 5


class QuadraticGame:
    """Losses of second order in the dropped players, a little beside it, and the overlap."""

    def __init__(self, rng, noise=0.0):
        effects = rng.normal(size=(P, 4))
        self.overlap_PP = 0.02 * effects @ effects.T
        self.single_P = rng.uniform(0.05, 0.3, P)
        self.noise_M = noise * rng.normal(size=1 << P)

    def loss(self, masks_MP):
        gone = (~masks_MP).astype(float)
        between = self.overlap_PP - np.diag(self.overlap_PP.diagonal())
        pairs = np.einsum("mi,ij,mj->m", gone, between, gone) / 2
        many_M = (~masks_MP).sum(axis=1) > 1
        return (
            3 + gone @ self.single_P + pairs + many_M * self.noise_M[masks_MP @ (1 << np.arange(P))]
        )


def played(game, goal="plan", budget=100, seed=0, constraint=None, fails=False, costs=()):
    """The planner, and the rounds of a run: each chosen from those up to two before."""
    settings = RoundSettings(
        num_players=P,
        max_removed=R,
        sizes=(P - R, P - 1),
        seed=seed,
        surrogate="gp",
        round_size=P,
        goal=goal,
        constraint=constraint,
        costs=costs,
    )
    planner = RoundPlanner(settings, UTILITIES["neg_nll"], np.ones(1, np.int64), overlap=True)
    rounds, last, left = [], None, budget
    for index in itertools.count():
        asked = planner.propose(index, rounds).first(left)
        if not len(asked):
            break
        if last is not None:
            rounds.append(last)
        left -= len(asked)
        assert asked.overlap == (index == 0 and goal != "values")
        overlap = game.overlap_PP if asked.overlap and not fails else None
        loss = game.loss(asked.all_masks)[:, None]
        last = CompletedRound(asked.all_masks, loss, loss, overlap)
    return planner, [*rounds, *([last] if last is not None else [])]


@pytest.mark.parametrize("goal", ["plan", "both"])
def test_every_optimum_of_a_quadratic_game_is_found_by_the_walk(goal, rng):
    """Short lists are exact there, and every step holds the best of one."""
    game = QuadraticGame(rng)
    _, rounds = played(game, goal)
    asked = {key for done in rounds[: 2 * R - 1] for key in keys(done.masks_MP)}
    for r in range(1, R + 1):
        sets_MP = all_masks(P, P - r)
        assert keys(sets_MP[game.loss(sets_MP).argmin()][None])[0] in asked


@pytest.mark.parametrize("fails", [False, True])
def test_the_best_sets_for_shares_of_a_cost_are_found(fails, rng):
    """With short lists, and without: from all sets, whatever number of players they remove."""
    game, costs = QuadraticGame(rng), rng.choice([1.0, 2.0, 4.0], P).tolist()
    targets = cost_targets(Constraint(P), [0.8, 0.65, 0.5], costs, "params")
    _, rounds = played(game, budget=200, costs=targets, fails=fails)
    asked = {key for done in rounds for key in keys(done.masks_MP)}
    for target in targets:
        meeting_MP = all_masks(P)[target.holds(all_masks(P))]
        assert keys(meeting_MP[game.loss(meeting_MP).argmin()][None])[0] in asked


def test_a_set_may_become_the_best_of_two_targets():
    """Which counts twice: the second round's set has beaten the best at both shares."""
    rounds_MP = [np.array([without(4, (0,)), without(4, (0, 1))]), without(4, (2, 3))[None]]
    masks_MP = np.concatenate(rounds_MP)
    sources = dict(zip(keys(masks_MP), ["design", "design", SEARCH], strict=True))
    targets = cost_targets(Constraint(4), [0.75, 0.5], [1.0] * 4, "params")
    utility_M = np.array([0.3, 0.2, 0.4])
    known = KnownUtilities(masks_MP, utility_M, utility_M, utility_M)
    rounds = [CompletedRound(m, np.zeros((len(m), 1)), np.zeros((len(m), 1))) for m in rounds_MP]
    earned = np.array([1 / 8, 1 / 8, (2 + 1) / (1 + 8)])
    share = earned / earned.sum()
    ends = np.rint(90 * np.cumsum(share)).astype(int)
    places = earned_places(90, rounds, known, sources, targets)
    assert list(places.values()) == np.diff([0, *ends]).tolist()


def test_all_proposers_have_their_turn(rng):
    planner, rounds = played(QuadraticGame(rng, noise=0.05), budget=150)
    found = Counter(planner.sources.values())
    assert found["outward"] >= P + R - 1  # single players, and a set of every size at least
    assert found["design"] >= 2  # in round 1
    assert found[EXPANSION] > 0
    assert found[CORRECTED] > 0
    assert found[SEARCH] > 0
    assert found["ranking"] == 0
    assert sum(map(len, (done.masks_MP for done in rounds))) <= 150
    both, _ = played(QuadraticGame(rng, noise=0.05), "both", budget=150)
    assert Counter(both.sources.values())["values"] > 0


def test_where_the_overlap_cannot_be_had_nothing_is_expanded(rng):
    planner, _ = played(QuadraticGame(rng), fails=True)
    found = Counter(planner.sources.values())
    assert found["outward"] >= P + R - 1
    assert found[EXPANSION] == found[CORRECTED] == 0


def test_short_lists_keep_to_the_constraint(rng):
    within = constraint_of(P, protect=(0, 3), force=(6,))
    planner, rounds = played(QuadraticGame(rng), constraint=within)
    masks_MP = np.concatenate([done.masks_MP for done in rounds])
    ours = [planner.sources[key] in PROPOSERS for key in keys(masks_MP)]
    assert sum(ours) > 20
    assert within.holds(masks_MP[ours]).all()


def test_the_same_scores_give_the_same_rounds(rng):
    game = QuadraticGame(rng, noise=0.05)
    (_, first), (_, second) = played(game), played(game)
    for one, other in zip(first, second, strict=True):
        assert (one.masks_MP == other.masks_MP).all()


def test_places_go_to_those_whose_sets_became_the_best_of_their_size():
    singles = np.concatenate([full_mask(4)[None], drop_one(full_mask(4))])
    pairs = [without(4, pair) for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    rounds_MP = [singles, np.array(pairs[:2]), np.array(pairs[2:4]), np.array(pairs[4:])]
    sources = dict.fromkeys(keys(singles), "greedy")
    names = [EXPANSION, SEARCH, CORRECTED, SEARCH, EXPANSION, SEARCH]
    sources |= dict(zip(keys(np.array(pairs)), names, strict=True))
    masks_MP = np.concatenate(rounds_MP)
    # the first pairs are no finds; then the search's improves on them, then expansion's on that
    utility_M = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.15, 0.3, 0.4, 0.35])
    known = KnownUtilities(masks_MP, utility_M, utility_M, utility_M)
    targets = size_targets(Constraint(4), 2)
    rounds = [CompletedRound(m, np.zeros((len(m), 1)), np.zeros((len(m), 1))) for m in rounds_MP]
    asked = {EXPANSION: 0.8**2 + 1, CORRECTED: 0.8, SEARCH: 0.8**2 + 0.8 + 1}
    hits = {EXPANSION: 1.0, CORRECTED: 0.0, SEARCH: 0.8}
    earned = np.array([(hits[name] + 1) / (asked[name] + 8) for name in PROPOSERS])
    ends = np.rint(100 * np.cumsum(earned / earned.sum())).astype(int)
    places = earned_places(100, rounds, known, sources, targets)
    assert list(places.values()) == np.diff([0, *ends]).tolist()
    assert places[EXPANSION] > places[SEARCH] > places[CORRECTED]
    assert sum(earned_places(7, rounds, known, sources, targets).values()) == 7
