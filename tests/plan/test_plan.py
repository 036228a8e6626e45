"""Choosing sets against exhaustive search, naive loops and hand-made ties.

Values are compared exactly: both sides rank the same float64 numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.masks import (
    all_masks,
    best_row,
    ranking_mask,
    removed_list,
    removed_players,
    without,
)
from lpserve.plan.greedy import greedy_path
from lpserve.plan.plan import Candidate, Plan, PlanEntry, load_plan
from lpserve.testing.games import mask_text, table_game

# -- best_row and ranking_mask -----------------------------------------------------------------


def test_best_row_is_the_highest_finite_utility(rng):
    masks = rng.permutation(all_masks(5))[:20]
    utilities = rng.normal(size=20)
    utilities[rng.choice(20, 8, replace=False)] = [np.nan, np.inf, -np.inf, np.nan] * 2
    row = best_row(masks, utilities)
    assert row is not None
    finite = [u for u in utilities if math.isfinite(u)]
    assert utilities[row] == max(finite)


def test_best_row_gives_ties_to_the_smaller_key(rng):
    masks = rng.permutation(all_masks(11))[:300]
    utilities = rng.integers(3, size=300) * 1.0
    row = best_row(masks, utilities)
    assert row is not None
    tied = [mask_text(m) for m, u in zip(masks, utilities, strict=True) if u == utilities.max()]
    assert mask_text(masks[row]) == min(tied)


def test_best_row_is_none_where_nothing_is_finite():
    masks = all_masks(2)
    assert best_row(masks, np.array([np.nan, np.inf, -np.inf, np.nan])) is None
    assert best_row(masks[:0], np.empty(0)) is None


def test_ranking_drops_the_lowest_values(rng):
    values = rng.normal(size=9)
    for r in range(10):
        dropped = set(removed_players(ranking_mask(values, r)))
        assert dropped == {int(i) for i in sorted(range(9), key=lambda i: values[i])[:r]}


def test_ranking_gives_ties_to_the_earlier_player():
    values = np.array([2.0, 1.0, 1.0, 3.0, 1.0, np.inf])
    assert [removed_players(ranking_mask(values, r)) for r in range(6)] == [
        (),
        (1,),
        (1, 2),
        (1, 2, 4),
        (0, 1, 2, 4),
        (0, 1, 2, 3, 4),
    ]


# -- greedy_path -------------------------------------------------------------------------------


def naive_greedy(utility, num_players: int, most: int) -> list[tuple[int, ...]]:
    removed: tuple[int, ...] = ()
    path = []
    for _ in range(most):
        options = [tuple(sorted((*removed, p))) for p in range(num_players) if p not in removed]
        best = max(float(utility(without(num_players, o)[None])[0]) for o in options)
        # a mask's key is smaller where the earlier players are dropped
        removed = min(
            (o for o in options if float(utility(without(num_players, o)[None])[0]) == best),
            key=lambda o: mask_text(without(num_players, o)),
        )
        path.append(removed)
    return path


@pytest.mark.parametrize("ties", [False, True])
def test_greedy_path_equals_the_naive_one(ties, rng):
    utility = table_game(7, rng, ties=ties)
    masks = rng.permutation(all_masks(7))
    got = [removed_players(mask) for mask in greedy_path(masks, utility(masks), 7)]
    assert got == naive_greedy(utility, 7, 7)


def test_greedy_path_passes_by_masks_without_a_score(rng):
    masks = all_masks(6)
    utilities = table_game(6, rng)(masks)
    first = greedy_path(masks, utilities, 1)[0]
    utilities[(masks == first).all(axis=1)] = np.nan
    second = greedy_path(masks, utilities, 1)[0]
    singles = {
        removed_players(m)[0]: u for m, u in zip(masks, utilities, strict=True) if m.sum() == 5
    }
    assert removed_players(second)[0] == max(
        (p for p in singles if math.isfinite(singles[p])), key=lambda p: singles[p]
    )


def test_greedy_path_ends_where_a_step_was_not_asked_for(rng):
    masks = all_masks(6)
    utilities = table_game(6, rng)(masks)
    whole = greedy_path(masks, utilities, 6)
    missing = whole[2].copy()
    missing[np.flatnonzero(missing)[0]] = False  # one option of step 4
    rest = (masks != missing).any(axis=1)
    path = greedy_path(masks[rest], utilities[rest], 6)
    np.testing.assert_array_equal(path, whole[:3])
    np.testing.assert_array_equal(greedy_path(masks, utilities, 2), whole[:2])
    nothing = np.where(masks.sum(axis=1) == 5, np.nan, utilities)
    assert greedy_path(masks, nothing, 6) == []


# -- the plan's file ---------------------------------------------------------------------------


def some_plan() -> Plan:
    candidates = [
        Candidate(removed=[2], source="search", calibration_ppl=3.25, predicted_ppl=3.5),
        Candidate(
            removed=[0],
            source="greedy",
            calibration_ppl=4.0,
            heldout_ppl=4.125,
            heldout_delta=-0.0625,
            heldout_delta_stderr=0.03,
        ),
    ]
    entries = [
        PlanEntry(
            num_removed=r,
            removed=list(range(r)),
            source="search",
            calibration_ppl=3.25 * r,
            predicted_ppl=None,
            heldout_ppl=1 / 3,
            candidates=candidates[:r],
            warnings=["held-out text prefers [0]"] * (r - 1),
        )
        for r in (1, 2)
    ]
    return Plan(
        model="models/small",
        model_hash="ab12",
        num_players=4,
        players=[{"index": i, "layer": i, "part": "layer"} for i in range(4)],
        utility="neg_nll",
        masks_scored=11,
        heldout_masks=5,
        full_calibration_ppl=math.e,
        full_heldout_ppl=None,
        plans=entries,
        protected=[3],
        forced=[0],
    )


def test_a_plan_is_read_back_as_it_was_written(tmp_path):
    plan = some_plan()
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json(), encoding="utf-8")
    assert load_plan(path) == plan
    assert load_plan(str(path)) == plan
    assert load_plan(path).to_json() == plan.to_json()


def test_entries_are_found_by_the_number_removed():
    plan = some_plan()
    assert [plan.entry(r).num_removed for r in (1, 2)] == [1, 2]
    for r in (0, 3, -1):
        with pytest.raises(InputError, match=f"1 to 2 players: got {r}"):
            plan.entry(r)
    with pytest.raises(InputError, match="1 to 0"):
        dataclasses.replace(plan, plans=[]).entry(1)


def changed(**values: object) -> str:
    return json.dumps({**json.loads(some_plan().to_json()), **values})


def lacking(name: str) -> str:
    data = json.loads(some_plan().to_json())
    del data[name]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(format=2), "plan format 2; this lpserve reads 1"),
        (changed(format=None), "plan format None"),
        (lacking("format"), "not an lpserve plan"),
        (lacking("plans"), "not an lpserve plan"),
        (lacking("model_hash"), "not an lpserve plan"),
        (changed(colour="red"), "unknown key 'colour'"),
        (changed(plans=None), "not an lpserve plan"),
        (changed(num_players=10**13, players=[]), "must be numbered from 0"),
        (changed(num_players=-3, players=[]), "must be numbered from 0"),
        (changed(plans=[{"num_removed": 1}]), "not an lpserve plan"),
        (changed(plans=["one"]), "not an lpserve plan"),
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ('"plan"', "no JSON object"),
        ("", "is no JSON"),
        (some_plan().to_json()[:-20], "is no JSON"),
        (b"\xff\xfe\x00", "is UTF-16"),
    ],
)
def test_what_is_no_plan_is_refused(content, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        load_plan(path)
    assert str(path) in str(error.value)


def test_a_missing_plan_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(InputError, match="is a folder, not a file"):
        load_plan(tmp_path)


def test_removed_players_are_plain_numbers():
    removed = removed_list(without(5, [3, 1]))
    assert json.dumps(removed) == "[1, 3]"
