"""Steps of the walk outwards: which targets, from what is known, and none twice."""

from __future__ import annotations

import numpy as np
import pytest

from lpserve.masks import drop_one, full_mask, keys, without
from lpserve.plan.constraint import constraint_of
from lpserve.plan.targets import cost_targets
from lpserve.rounds.expanding import ExpansionSource
from lpserve.rounds.history import AskedMasks, KnownUtilities
from lpserve.rounds.model import FittedModel
from lpserve.rounds.outward import OUTWARD, OutwardWalk
from lpserve.rounds.settings import RoundSettings

P, R = 8, 4


def settings_of(**changes):
    given = {
        "num_players": P,
        "max_removed": R,
        "sizes": (P - R, P - 1),
        "seed": 0,
        "surrogate": "ridge",
        "round_size": P,
        "goal": "plan",
    }
    return RoundSettings(**(given | changes))


def known_of(masks_MP, loss_P):
    utility_M = np.exp(-((~masks_MP) @ loss_P))
    return KnownUtilities(masks_MP, utility_M, utility_M, utility_M)


def test_steps_go_from_size_to_size_and_hold_the_best_predicted_sets(rng):
    """Of an additive game, whose best sets of every size the single players' losses tell."""
    settings, loss_P = settings_of(), rng.uniform(0.1, 1.0, P)
    model, asked = FittedModel(settings, own_search_fit=False), AskedMasks(P)
    walk, expansion = OutwardWalk(settings), ExpansionSource(settings)
    masks_MP = np.concatenate([full_mask(P)[None], drop_one(full_mask(P))])
    asked.add(masks_MP, OUTWARD)
    for size in range(2, R + 1):
        assert not walk.ended
        known = known_of(masks_MP, loss_P)
        assert model.fit(known)
        batch = walk.take(model, known, asked, 3, expansion)
        assert len(batch) == 3
        assert {int((~mask_P).sum()) for mask_P in batch} == {size}
        cheapest = without(P, np.argsort(loss_P)[:size].tolist())
        assert any((mask_P == cheapest).all() for mask_P in batch)
        masks_MP = np.concatenate([masks_MP, batch])
    assert walk.take(model, known_of(masks_MP, loss_P), asked, 3, expansion) == []
    assert walk.ended


def test_sizes_without_scores_are_grown_over(rng):
    """Where every score of the last step failed, sets grow by more than a player."""
    settings, loss_P = settings_of(), rng.uniform(0.1, 1.0, P)
    model, asked = FittedModel(settings, own_search_fit=False), AskedMasks(P)
    walk, expansion = OutwardWalk(settings), ExpansionSource(settings)
    masks_MP = np.concatenate([full_mask(P)[None], drop_one(full_mask(P))])
    asked.add(masks_MP, OUTWARD)
    known = known_of(masks_MP, loss_P)
    assert model.fit(known)
    for size in range(2, R + 1):
        batch = walk.take(model, known, asked, 3, expansion)
        assert [int((~mask_P).sum()) for mask_P in batch] == [size] * 3


@pytest.mark.parametrize("force", [(), (2,)])
def test_shares_of_a_cost_have_steps_a_player_apart(force, rng):
    costs = rng.choice([1.0, 2.0], P).tolist()
    targets = cost_targets(constraint_of(P, force=force), [0.8, 0.5], costs, "params")
    steps = settings_of(costs=targets, constraint=constraint_of(P, force=force)).walk_targets
    shares = [1.0 - sum(costs[p] for p in force) / sum(costs)]
    shares += [step.share for step in steps if step.share is not None]
    free = [cost for p, cost in enumerate(costs) if p not in force]
    apart = -np.diff(shares)
    assert {target.share for target in targets} <= set(shares)
    assert (apart > 0).all()
    assert apart.max() < 2 * np.mean(free) / sum(costs)


def test_the_first_pairs_remove_two_beside_those_that_must_be():
    pairs = settings_of(seed=3).random_pairs()
    assert (~pairs).sum(axis=1).tolist() == [2, 2]
    assert len(set(keys(pairs))) == 2
    within = constraint_of(P, (0, 1), (5,))
    pairs = settings_of(constraint=within, seed=3).random_pairs()
    assert (~pairs).sum(axis=1).tolist() == [3, 3]
    assert within.holds(pairs).all()
    assert not len(settings_of(max_removed=1).random_pairs())
