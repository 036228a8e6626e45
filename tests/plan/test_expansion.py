"""Expansions against games that they describe exactly, and against their own formula by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lpserve.masks import all_masks, drop_one, full_mask, keys, sort_distinct, swap_one, without
from lpserve.plan.constraint import constraint_of
from lpserve.plan.correction import CorrectedExpansion
from lpserve.plan.expansion import Expansion
from lpserve.plan.targets import removing

P = 9


def drawn(rng, players=P, size=0.1):
    """Single losses, and an overlap as a matrix of inner products."""
    effects = rng.normal(size=(players, 6))
    single_P = rng.uniform(0.2, 0.3, players)
    return single_P, size * effects @ effects.T


def loss_of(masks_MP, single_P, overlap_PP, scale=1.0, base=2.0):
    """The quadratic loss, pair by pair."""
    losses = []
    for mask_P in masks_MP:
        gone = np.flatnonzero(~mask_P)
        pairs = sum(overlap_PP[i, j] for i, j in itertools.combinations(gone, 2))
        losses.append(base + single_P[gone].sum() + scale * pairs)
    return np.array(losses)


def first_masks(players=P):
    full_P = full_mask(players)
    return np.concatenate([full_P[None], drop_one(full_P)])


def fitted(rng, masks_MP=None, scale=1.0, within=None, size=0.1):
    single_P, overlap_PP = drawn(rng, size=size)
    masks_MP = first_masks() if masks_MP is None else masks_MP
    expansion = Expansion(overlap_PP, within or constraint_of(P))
    assert expansion.fit(masks_MP, loss_of(masks_MP, single_P, overlap_PP, scale))
    return expansion, single_P, overlap_PP


def test_a_quadratic_game_is_predicted_exactly_from_single_players_alone(rng):
    expansion, single_P, overlap_PP = fitted(rng)
    masks_MP = all_masks(P)
    expected = loss_of(masks_MP, single_P, overlap_PP) - 2.0
    np.testing.assert_allclose(expansion.predicted(masks_MP), expected, atol=1e-12)
    for mask_P in masks_MP[rng.integers(1, len(masks_MP) - 1, 20)]:
        swaps = loss_of(swap_one(mask_P), single_P, overlap_PP) - 2.0
        np.testing.assert_allclose(expansion.swap_losses(mask_P).ravel(), swaps, atol=1e-12)


@pytest.mark.parametrize("num_removed", [2, 3, 5])
def test_the_shortlist_of_a_quadratic_game_begins_with_its_best_sets(num_removed, rng):
    expansion, single_P, overlap_PP = fitted(rng)
    sets_MP, losses = expansion.shortlist(removing(num_removed, constraint_of(P)))
    all_MP = all_masks(P, P - num_removed)
    every = np.sort(loss_of(all_MP, single_P, overlap_PP) - 2.0)
    assert len(np.unique(sets_MP, axis=0)) == len(sets_MP) == min(64, len(all_MP))
    assert (np.diff(losses) >= 0).all()
    np.testing.assert_allclose(losses[:3], every[:3], atol=1e-12)
    np.testing.assert_allclose(losses, loss_of(sets_MP, single_P, overlap_PP) - 2.0, atol=1e-12)


def test_about_scored_sets_the_lowest_prediction_counts_and_real_steps_replace_predicted_ones(rng):
    """Every expansion by hand: from the best sets of near sizes, each change by one player as it
    was scored, or as the formula has it there."""
    single_P, overlap_PP = drawn(rng)
    every_MP = all_masks(P)[rng.permutation(1 << P)]
    masks_MP = np.concatenate([first_masks(), every_MP[every_MP.sum(axis=1) < P - 1][:60]])
    noise = rng.normal(0, 0.3, len(masks_MP)) * ((~masks_MP).sum(axis=1) > 1)
    loss_M = loss_of(masks_MP, single_P, overlap_PP) + noise
    expansion = Expansion(overlap_PP, constraint_of(P))
    assert expansion.fit(masks_MP, loss_M)
    known = {key: loss - 2.0 for key, loss in zip(keys(masks_MP), loss_M, strict=True)}

    def predicted(anchor_P, mask_P):
        near = anchor_P ^ mask_P
        found, before = known[keys(anchor_P[None])[0]], ~anchor_P
        for player in np.flatnonzero(near):
            one_P = anchor_P.copy()
            one_P[player] ^= True
            others = np.flatnonzero(before & (np.arange(P) != player))
            change = single_P[player] + expansion.scale * overlap_PP[player, others].sum()
            step = known.get(keys(one_P[None])[0])
            signed = -change if before[player] else change
            found += signed if step is None else step - known[keys(anchor_P[None])[0]]
        for i, j in itertools.combinations(np.flatnonzero(near), 2):
            sign = 1 if before[i] == before[j] else -1
            found += sign * expansion.scale * overlap_PP[i, j]
        return found

    removed_M = (~masks_MP).sum(axis=1)
    sets_MP, losses = expansion.shortlist(removing(4, constraint_of(P)))
    assert not set(keys(sets_MP)) & set(known)
    anchors = []
    for removed in (2, 3, 4, 5):
        rows = np.flatnonzero(removed_M == removed)
        rows = rows[np.argsort(loss_M[rows])][:4]
        anchors += [(removed, masks_MP[row]) for row in rows]
    for mask_P, loss in zip(sets_MP[:8], losses[:8], strict=True):
        by_hand = [expansion.predicted(mask_P[None])[0]]
        for removed, anchor_P in anchors:
            away = (anchor_P ^ mask_P).sum()
            if away <= max(2, abs(4 - removed)) and away == max(
                abs(4 - removed), 2 * (removed == 4)
            ):
                by_hand.append(predicted(anchor_P, mask_P))
        assert loss == pytest.approx(min(by_hand), abs=1e-9)


def test_the_scale_of_overlaps_is_fitted_to_sets_near_the_best(rng):
    singles = first_masks()
    pairs = np.array([without(P, pair) for pair in itertools.combinations(range(P), 2)])
    masks_MP = np.concatenate([singles, pairs])
    expansion, *_ = fitted(rng, masks_MP, scale=1.4, size=0.01)
    assert expansion.scale == pytest.approx(1.4, rel=1e-6)
    few, *_ = fitted(rng, masks_MP[: P + 4], scale=1.4)
    assert few.scale == 1.0  # too few sets to say


def test_sets_keep_to_the_constraint_and_leave_out_players_without_a_score(rng):
    within = constraint_of(P, protect=(2, 7), force=(4,))
    single_P, overlap_PP = drawn(rng)
    masks_MP = first_masks()
    loss_M = loss_of(masks_MP, single_P, overlap_PP)
    loss_M[1 + 5] = np.nan  # player 5 could not be scored
    expansion = Expansion(overlap_PP, within)
    assert expansion.fit(masks_MP, loss_M)
    sets_MP, _ = expansion.shortlist(removing(3, within))
    assert len(sets_MP) == 10  # two of the five players that are left
    assert within.holds(sets_MP).all()
    assert sets_MP[:, 5].all()
    assert not expansion.fit(masks_MP, np.full(len(masks_MP), np.nan))


def test_a_player_whose_effect_is_not_finite_is_in_no_set_and_harms_no_other(rng):
    single_P, overlap_PP = drawn(rng)
    single_P[3] = 0.1  # the cheapest by its loss: sets would grow from it
    masks_MP = first_masks()
    loss_M = loss_of(masks_MP, single_P, overlap_PP)
    broken_PP = overlap_PP.copy()
    broken_PP[3] = broken_PP[:, 3] = np.nan
    expansion = Expansion(broken_PP, constraint_of(P))
    assert expansion.fit(masks_MP, loss_M)
    sets_MP, losses = expansion.shortlist(removing(3, constraint_of(P)))
    assert len(sets_MP) == 56  # three of eight
    assert sets_MP[:, 3].all()
    np.testing.assert_allclose(losses, loss_of(sets_MP, single_P, overlap_PP) - 2.0, atol=1e-12)


def test_a_corrected_expansion_knows_the_scored_sets_and_learns_what_the_expansion_lacks(rng):
    """The game has third-order terms; the correction predicts unseen sets better than the
    expansion alone does."""
    single_P, overlap_PP = drawn(rng, 8, size=0.01)
    triple_PPP = rng.uniform(0, 0.05, (8, 8, 8))
    masks_MP = all_masks(8)
    masks_MP = masks_MP[((~masks_MP).sum(axis=1) <= 4)][::-1]
    loss_M = loss_of(masks_MP, single_P, overlap_PP)
    gone = (~masks_MP).astype(float)
    loss_M += np.einsum("mi,mj,mk,ijk->m", gone, gone, gone, triple_PPP) / 6
    order = np.argsort((~masks_MP).sum(axis=1), kind="stable")
    masks_MP, loss_M = masks_MP[order], loss_M[order]
    loss_M[1:9] = 2.0 + single_P[(~masks_MP[1:9]).argmax(axis=1)]
    seen = np.concatenate([np.arange(9), rng.permutation(np.arange(9, len(masks_MP)))[:70]])
    unseen = np.setdiff1d(np.arange(len(masks_MP)), seen)
    expansion = Expansion(overlap_PP, constraint_of(8))
    assert expansion.fit(masks_MP[seen], loss_M[seen])
    corrected = CorrectedExpansion()
    corrected.fit(expansion)
    near_MP, near_M = expansion.near_best()
    np.testing.assert_allclose(corrected.mean(near_MP), -near_M, atol=0.02)
    mean, std = corrected.predict(masks_MP[unseen])
    np.testing.assert_allclose(mean, corrected.mean(masks_MP[unseen]))
    assert (std > 0).all()
    wrong = expansion.predicted(masks_MP[unseen]) - (loss_M[unseen] - 2.0)
    left = -mean - (loss_M[unseen] - 2.0)
    assert (left**2).mean() < 0.5 * (wrong**2).mean()
    mask_P = masks_MP[unseen[-1]]
    swaps, place = sort_distinct(swap_one(mask_P))
    expected = corrected.mean(swaps)[place]
    np.testing.assert_allclose(corrected.swap_means(mask_P).ravel(), expected, atol=0.02)
