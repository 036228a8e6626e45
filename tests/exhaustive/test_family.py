"""The family of small removals against a list of all masks. Counts and order are exact."""

from __future__ import annotations

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.exhaustive.family import SmallRemovals
from lpserve.masks import all_masks, keys, trie_layer_forwards


def members(num_players: int, max_removed: int) -> np.ndarray:
    """The family by its definition, in key order."""
    masks = all_masks(num_players)
    removed = (~masks).sum(axis=1)
    return masks[(removed <= max_removed) | (removed == num_players)]


@pytest.mark.parametrize("num_players", [1, 2, 3, 7, 10])
def test_masks_are_those_of_the_definition_in_key_order(num_players, rng):
    for max_removed in range(1, num_players + 1):
        family = SmallRemovals(num_players, max_removed)
        wanted = members(num_players, max_removed)
        assert family.count == len(wanted)
        np.testing.assert_array_equal(family.masks(0, family.count), wanted)
        assert keys(wanted) == sorted(keys(wanted))
        start, stop = sorted(rng.integers(0, family.count + 1, 2).tolist())
        np.testing.assert_array_equal(family.masks(start, stop), wanted[start:stop])


@pytest.mark.parametrize(("num_players", "max_removed"), [(1, 1), (6, 2), (9, 4), (8, 8)])
def test_ranks_are_the_inverse_and_tell_others_apart(num_players, max_removed, rng):
    family = SmallRemovals(num_players, max_removed)
    masks = rng.permutation(all_masks(num_players))
    place = {key: number for number, key in enumerate(keys(members(num_players, max_removed)))}
    wanted = [place.get(key, -1) for key in keys(masks)]
    assert family.ranks(masks).tolist() == wanted


def test_ranks_of_a_deep_model(rng):
    family = SmallRemovals(80, 4)
    numbers = rng.integers(0, family.count, 500)
    masks = np.concatenate([family.masks(n, n + 1) for n in numbers.tolist()])
    np.testing.assert_array_equal(family.ranks(masks), numbers)
    assert (~masks).sum(axis=1).max() <= 80


@pytest.mark.parametrize(("num_players", "max_removed"), [(1, 1), (6, 2), (9, 4), (10, 10)])
def test_layer_forwards_are_those_of_the_trie(num_players, max_removed):
    family = SmallRemovals(num_players, max_removed)
    masks = members(num_players, max_removed)
    assert family.layer_forwards == trie_layer_forwards(masks)
    assert family.skip_layer_forwards == int(masks.sum())


def test_the_sharing_that_the_documents_name():
    """32 players and sets of up to 6: counted by the formula alone, there are 1,149,018 masks."""
    family = SmallRemovals(32, 6)
    assert family.count == 1_149_018
    assert family.skip_layer_forwards / family.layer_forwards == pytest.approx(6.7, abs=0.05)


@pytest.mark.parametrize(("num_players", "max_removed"), [(8, 0), (8, 9), (8, -1), (80, 10)])
def test_what_is_out_of_range_is_refused(num_players, max_removed):
    with pytest.raises(InputError, match="max_removed"):
        SmallRemovals(num_players, max_removed)
