"""Masks, strata and designs against enumeration.

Chi-square tests fail a right sampler with probability 1e-6 each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import chi2

from lpserve import masks

FALSE_ALARM = 1e-6


def as_tuples(masks_MP: np.ndarray) -> list[tuple[bool, ...]]:
    return [tuple(mask) for mask in masks_MP.tolist()]


def every_mask(num_players: int, kept: int) -> list[tuple[bool, ...]]:
    """One stratum by enumeration: lexicographic in the kept players."""
    return [
        tuple(i in chosen for i in range(num_players))
        for chosen in itertools.combinations(range(num_players), kept)
    ]


def assert_frequencies(counts: np.ndarray, probabilities: np.ndarray) -> None:
    expected = counts.sum() * probabilities
    assert expected.min() > 20
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert chi2.sf(statistic, len(counts) - 1) > FALSE_ALARM


# -- arrays and keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_players", [1, 7, 8, 9, 32, 80])
def test_keys_sort_as_the_masks_do(num_players, rng):
    some = rng.random((300, num_players)) < rng.random()
    tuples, some_keys = as_tuples(some), masks.keys(some)
    by_mask = sorted(range(300), key=lambda i: tuples[i])
    assert by_mask == sorted(range(300), key=lambda i: some_keys[i])


@pytest.mark.parametrize("num_players", [1, 7, 8, 9, 32, 80])
def test_keys_are_reversible_and_one_for_each_mask(num_players, rng):
    some = rng.random((200, num_players)) < 0.5
    some_keys = masks.keys(some)
    assert np.array_equal(masks.from_keys(some_keys, num_players), some)
    assert len(set(some_keys)) == len(set(as_tuples(some)))
    assert masks.keys(some[:0]) == []
    assert masks.from_keys([], num_players).shape == (0, num_players)


@pytest.mark.parametrize("num_players", [1, 5, 12, 33])
def test_sort_distinct_gives_sorted_masks_and_where_each_input_went(num_players, rng):
    some = rng.random((200, num_players)) < 0.7
    distinct, row_M = masks.sort_distinct(some)
    assert as_tuples(distinct) == sorted(set(as_tuples(some)))
    assert np.array_equal(distinct[row_M], some)


def test_removed_players_and_without_are_inverse(rng):
    for num_players in (1, 6, 80):
        removed = np.flatnonzero(rng.random(num_players) < 0.4).tolist()
        mask = masks.without(num_players, removed)
        assert masks.removed_players(mask) == tuple(removed)
        assert mask.sum() == num_players - len(removed)
    assert masks.removed_players(masks.full_mask(9)) == ()


def test_neighbours_are_all_masks_one_step_or_one_exchange_away(rng):
    for mask in (rng.random((5, 9)) < 0.6).tolist():
        everything = list(itertools.product((False, True), repeat=9))

        def changes(other: tuple[bool, ...], mask: list[bool] = mask) -> tuple[int, int]:
            pairs = list(zip(mask, other, strict=True))
            return pairs.count((True, False)), pairs.count((False, True))

        dropped = masks.drop_one(np.array(mask))
        added = masks.add_one(np.array(mask))
        swapped = masks.swap_one(np.array(mask))
        assert sorted(as_tuples(dropped)) == [m for m in everything if changes(m) == (1, 0)]
        assert sorted(as_tuples(added)) == [m for m in everything if changes(m) == (0, 1)]
        assert sorted(as_tuples(swapped)) == [m for m in everything if changes(m) == (1, 1)]


def test_all_masks_enumerates_in_key_order():
    assert as_tuples(masks.all_masks(5)) == list(itertools.product((False, True), repeat=5))
    assert as_tuples(masks.all_masks(6, 2)) == every_mask(6, 2)


@pytest.mark.parametrize("num_players", [1, 6, 12, 40])
def test_trie_layer_forwards_counts_distinct_prefixes(num_players, rng):
    for count in (1, 2, 100):
        some = rng.random((count, num_players)) < rng.uniform(0.2, 1.0)
        prefixes = {
            tuple(mask[: player + 1])
            for mask in some.tolist()
            for player in range(num_players)
            if mask[player]
        }
        assert masks.trie_layer_forwards(some) == len(prefixes)


# -- strata ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_players", "strata"),
    [
        (32, (30, 27, 24, 21, 18)),
        (12, (11, 10, 9, 8, 7)),
        (80, (75, 68, 60, 53, 45)),
        (3, (2,)),
        (2, (1,)),
    ],
)
def test_the_papers_strata_scale_to_any_depth(num_players, strata):
    assert masks.paper_kept_counts(num_players) == strata


@pytest.mark.parametrize("num_players", range(1, 10))
def test_unrank_enumerates_each_stratum_once_in_order(num_players):
    for kept in range(num_players + 1):
        ranks = np.arange(math.comb(num_players, kept))
        assert as_tuples(masks.unrank(ranks, num_players, kept)) == every_mask(num_players, kept)


@pytest.mark.parametrize(("num_players", "kept"), [(32, 18), (48, 24), (60, 30), (80, 65), (80, 1)])
def test_unrank_finds_the_mask_of_any_rank(num_players, kept, rng):
    total = math.comb(num_players, kept)
    ranks = [0, total - 1, *rng.integers(total, size=50).tolist()]
    for rank, mask in zip(ranks, masks.unrank(np.array(ranks), num_players, kept), strict=True):
        assert mask.sum() == kept
        # masks that come before: alike up to a player this one drops and they keep
        before, need = 0, kept
        for player, keep in enumerate(mask.tolist()):
            if not keep and need:
                before += math.comb(num_players - player - 1, need - 1)
            need -= keep
        assert before == rank


@pytest.mark.parametrize("rank", [-1, 10])
def test_unrank_refuses_ranks_outside_the_stratum(rank):
    with pytest.raises(ValueError, match=r"0\.\.9"):
        masks.unrank(np.array([rank]), 5, 2)


def test_unrank_refuses_a_stratum_too_large_for_int64():
    with pytest.raises(ValueError, match="too large"):
        masks.unrank(np.array([0]), 80, 40)


# -- drawing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_players", "kept"), [(8, 3), (6, 5), (7, 1)])
def test_draw_is_uniform_over_a_stratum(num_players, kept, rng):
    place = {mask: i for i, mask in enumerate(every_mask(num_players, kept))}
    drawn = masks.draw(num_players, kept, 200 * len(place), rng)
    counts = np.bincount([place[m] for m in as_tuples(drawn)], minlength=len(place))
    assert_frequencies(counts, np.full(len(place), 1 / len(place)))


@pytest.mark.parametrize("how", ["draw", "stream"])
@pytest.mark.parametrize(("num_players", "kept"), [(40, 20), (80, 40)])
def test_large_strata_keep_every_group_of_players_equally_often(how, num_players, kept, rng):
    """The pattern kept among four random players is hypergeometric; (80, 40) is beyond 2**62."""
    if how == "draw":
        drawn = masks.draw(num_players, kept, 20_000, rng)
    else:
        design = masks.StratifiedDesign(num_players, [kept], int(rng.integers(1 << 31)))
        drawn = design.take(20_000)
        assert len(set(masks.keys(drawn))) == 20_000
    assert (drawn.sum(axis=1) == kept).all()
    group = rng.choice(num_players, 4, replace=False)
    counts = np.bincount(drawn[:, group] @ (1 << np.arange(4)), minlength=16)
    ones = np.array([pattern.bit_count() for pattern in range(16)])
    probability = [math.comb(num_players - 4, kept - int(k)) for k in ones]
    assert_frequencies(counts, np.array(probability) / math.comb(num_players, kept))


def test_the_first_mask_of_a_stream_is_uniform_over_seeds(rng):
    place = {mask: i for i, mask in enumerate(every_mask(5, 2))}
    seeds = rng.integers(1 << 31, size=1000)
    firsts = np.concatenate([next(masks.stratum_stream(5, 2, int(s)))[:1] for s in seeds])
    counts = np.bincount([place[m] for m in as_tuples(firsts)], minlength=10)
    assert_frequencies(counts, np.full(10, 0.1))


@pytest.mark.parametrize(
    "limits", [{}, {"_PERMUTED": 0}, {"_PERMUTED": 0, "_MAX_RANK": 1}], ids=["whole", "rank", "key"]
)
def test_a_stream_ends_when_its_stratum_is_exactly_enumerated(limits, rng, monkeypatch):
    """Also by the two ways that are meant for strata too large to shuffle or to rank."""
    seed = int(rng.integers(1 << 31))
    for name, value in {**limits, "_CHUNK": 16}.items():
        monkeypatch.setattr(masks, name, value)
    for kept in range(9):
        dealt = np.concatenate(list(masks.stratum_stream(8, kept, seed)))
        assert sorted(as_tuples(dealt)) == sorted(every_mask(8, kept))


# -- designs ---------------------------------------------------------------------------------------

DESIGNS = [
    (4, (3, 2, 1)),
    (7, (6, 3, 0, 7)),
    (12, masks.paper_kept_counts(12)),
    (32, masks.paper_kept_counts(32)),
    (80, (79, 40, 2)),
]


def dealt_slowly(num_players: int, kept_counts: tuple[int, ...], seed: int) -> Iterator[tuple]:
    """One mask from each stratum in turn until all are exhausted."""
    streams = [
        (
            tuple(m)
            for chunk in masks.stratum_stream(num_players, kept, seed)
            for m in chunk.tolist()
        )
        for kept in kept_counts
    ]
    while streams:
        for stream in list(streams):
            mask = next(stream, None)
            if mask is None:
                streams.remove(stream)
            else:
                yield mask


@pytest.mark.parametrize(("num_players", "kept_counts"), DESIGNS)
def test_a_design_deals_its_strata_in_turn_and_never_repeats(num_players, kept_counts, rng):
    seed = int(rng.integers(1 << 31))
    expected = list(itertools.islice(dealt_slowly(num_players, kept_counts, seed), 700))
    dealt = as_tuples(masks.StratifiedDesign(num_players, kept_counts, seed).take(700))
    assert dealt == expected
    assert len(set(dealt)) == len(dealt)


@pytest.mark.parametrize(("num_players", "kept_counts"), DESIGNS)
def test_a_longer_design_begins_with_the_shorter(num_players, kept_counts, rng):
    seed, more = int(rng.integers(1 << 31)), int(rng.integers(1, 3000))
    whole = masks.StratifiedDesign(num_players, kept_counts, seed).take(7 + more)
    parts = masks.StratifiedDesign(num_players, kept_counts, seed)
    assert np.array_equal(np.concatenate([parts.take(7), parts.take(more)]), whole)


def test_an_exhausted_design_has_dealt_every_mask_and_deals_no_more(rng):
    design = masks.StratifiedDesign(6, (5, 3, 6), int(rng.integers(1 << 31)))
    dealt = design.take(1000)
    assert sorted(as_tuples(dealt)) == sorted(
        every_mask(6, 5) + every_mask(6, 3) + every_mask(6, 6)
    )
    assert design.take(5).shape == (0, 6)


def test_the_seed_alone_decides_a_design(rng):
    seed = int(rng.integers(1 << 31))
    first, again, other = (
        masks.StratifiedDesign(32, (30, 18), s).take(500) for s in (seed, seed, seed + 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_stratum_is_dealt_the_same_beside_any_others(rng):
    seed = int(rng.integers(1 << 31))
    alone = masks.StratifiedDesign(32, (24,), seed).take(200)
    beside = masks.StratifiedDesign(32, (30, 24, 18), seed).take(600)
    assert np.array_equal(beside[beside.sum(axis=1) == 24], alone)


@pytest.mark.parametrize("kept_counts", [(), (5, -1), (13,), (4, 4)])
def test_designs_refuse_kept_counts_that_are_none_outside_or_repeated(kept_counts):
    with pytest.raises(ValueError, match="kept counts"):
        masks.StratifiedDesign(12, kept_counts, 0)
