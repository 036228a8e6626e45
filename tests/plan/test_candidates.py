"""Which scored sets of a size a plan lists, against naive loops and hand-made ties.

Values are compared exactly: both sides rank the same float64 numbers.
"""

from __future__ import annotations

import numpy as np
import pytest

from lpserve.masks import all_masks, keys, removed_players, without
from lpserve.plan.candidates import choose_alternatives, choose_candidates
from lpserve.plan.constraint import Constraint, constraint_of
from lpserve.plan.targets import removing
from lpserve.testing.games import mask_text


def test_candidates_are_the_two_best_and_those_asked_for(rng):
    masks = all_masks(6, kept=4)
    utilities = rng.normal(size=len(masks))
    order = np.argsort(-utilities)
    greedy = [without(6, [0]), masks[order[4]]]
    ranking = masks[order[7]]
    sources = {keys(masks[order[0]][None])[0]: "search"}
    got = choose_candidates(
        masks,
        utilities,
        removing(2, Constraint(masks.shape[1])),
        greedy=greedy,
        ranking=ranking,
        sources=sources,
    )
    assert got == [
        (order[0], "search"),
        (order[1], "design"),
        (order[4], "greedy"),
        (order[7], "ranking"),
    ]
    # a set that is several things at once is listed once, as greedy before ranking before source
    both = choose_candidates(
        masks,
        utilities,
        removing(2, Constraint(6)),
        greedy=[greedy[0], masks[order[0]]],
        ranking=masks[order[0]],
        sources=sources,
    )
    assert both == [(order[0], "greedy"), (order[1], "design")]
    short = choose_candidates(
        masks,
        utilities,
        removing(2, Constraint(masks.shape[1])),
        greedy=greedy[:1],
        ranking=None,
        sources={},
    )
    assert short == [(order[0], "design"), (order[1], "design")]


def test_candidates_have_the_size_asked_for(rng):
    masks = rng.permutation(all_masks(5))
    utilities = rng.normal(size=32)
    for r in range(1, 5):
        rows = choose_candidates(
            masks,
            utilities,
            removing(r, Constraint(masks.shape[1])),
            greedy=[],
            ranking=None,
            sources={},
        )
        assert [(~masks[row]).sum() for row, _ in rows] == [r, r]
        assert rows[0][0] == max(
            np.flatnonzero((~masks).sum(axis=1) == r), key=lambda row: utilities[row]
        )
    assert (
        choose_candidates(
            masks[:0],
            utilities[:0],
            removing(2, Constraint(masks.shape[1])),
            greedy=[],
            ranking=None,
            sources={},
        )
        == []
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sets_without_a_finite_score_are_never_chosen(bad, rng):
    masks = all_masks(6, kept=3)
    utilities = rng.normal(size=20)
    hidden = rng.choice(20, 15, replace=False)
    utilities[hidden] = bad
    greedy = [masks[hidden[2]], masks[hidden[2]], masks[hidden[0]]]
    rows = choose_candidates(
        masks,
        utilities,
        removing(3, Constraint(6)),
        greedy=greedy,
        ranking=masks[hidden[1]],
        sources={},
    )
    assert len(rows) == 2
    assert not {row for row, _ in rows} & set(hidden.tolist())
    utilities[:] = bad
    assert (
        choose_candidates(
            masks,
            utilities,
            removing(3, Constraint(masks.shape[1])),
            greedy=greedy,
            ranking=None,
            sources={},
        )
        == []
    )


def test_protected_players_are_kept(rng):
    masks = all_masks(6, kept=4)
    utilities = rng.normal(size=15)
    protected = [1, 4]
    within = constraint_of(6, protected)
    greedy = [without(6, [1]), without(6, [1, 2])]
    rows = choose_candidates(
        masks,
        utilities,
        removing(2, within),
        greedy=greedy,
        ranking=without(6, [0, 5]),
        sources={},
    )
    allowed = [row for row in range(15) if masks[row, protected].all()]
    best = sorted(allowed, key=lambda row: -utilities[row])
    assert [row for row, _ in rows][:2] == best[:2]
    assert {row for row, _ in rows} <= set(allowed)
    assert "greedy" not in {source for _, source in rows}
    assert "ranking" in {source for _, source in rows}
    everyone = constraint_of(6, range(6))
    none = choose_candidates(
        masks,
        utilities,
        removing(2, everyone),
        greedy=[],
        ranking=None,
        sources={},
    )
    assert none == []


def test_tied_candidates_go_by_key(rng):
    masks = rng.permutation(all_masks(7, kept=4))
    rows = choose_candidates(
        masks,
        np.ones(35),
        removing(3, Constraint(masks.shape[1])),
        greedy=[],
        ranking=None,
        sources={},
    )
    assert [mask_text(masks[row]) for row, _ in rows] == sorted(mask_text(m) for m in masks)[:2]


# -- choose_alternatives -----------------------------------------------------------------------


@pytest.mark.parametrize("min_distance", [1, 2, 3, 4])
def test_alternatives_are_the_best_sets_that_are_unlike_all_before(min_distance, rng):
    masks = rng.permutation(all_masks(8))[:200]
    utilities = rng.integers(40, size=200) * 1.0  # with ties
    utilities[rng.choice(200, 20, replace=False)] = np.nan
    within = constraint_of(8, [6])
    chosen = int(rng.choice(np.flatnonzero(((~masks).sum(axis=1) == 3) & masks[:, 6])))
    got = choose_alternatives(
        masks, utilities, chosen, removing(3, within), count=4, min_distance=min_distance
    )
    sets = [set(removed_players(mask)) for mask in masks]
    rows = [
        row
        for row in range(200)
        if len(sets[row]) == 3 and 6 not in sets[row] and np.isfinite(utilities[row])
    ]
    wanted = []
    for row in sorted(rows, key=lambda row: (-utilities[row], keys(masks[[row]]))):
        others = [sets[chosen], *(sets[other] for other in wanted)]
        if all(len(sets[row] - other) >= min_distance for other in others):
            wanted.append(row)
    assert got == wanted[:4]
    assert chosen not in got


def test_alternatives_run_out():
    """Of two players out of four, only the other two differ in both."""
    masks = all_masks(4, kept=2)
    values = np.arange(6, dtype=np.float64)
    chosen = int(np.flatnonzero((masks == without(4, [0, 1])).all(axis=1))[0])
    (row,) = choose_alternatives(
        masks, values, chosen, removing(2, Constraint(4)), count=3, min_distance=2
    )
    assert removed_players(masks[row]) == (2, 3)
    assert (
        choose_alternatives(
            masks, values, chosen, removing(2, Constraint(4)), count=3, min_distance=3
        )
        == []
    )
    assert (
        choose_alternatives(
            masks, values, chosen, removing(2, Constraint(4)), count=0, min_distance=2
        )
        == []
    )
