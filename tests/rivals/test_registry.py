"""Rival searches against slow obvious versions, on small games with random scores per window.

Scores are compared exactly: both sides read the same float64 numbers. The paper's network and
values have tests of their own (`test_surrogate.py`, `test_shapley.py`); here it is what is made of
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.masks import all_masks, full_mask, keys, paper_kept_counts, removed_players, without
from lpserve.model.players import ATTENTION, MLP
from lpserve.rivals.evopress import (
    EVOPRESS_INITIAL,
    EVOPRESS_MAX_SWAPS,
    EVOPRESS_OFFSPRING,
    EVOPRESS_SURVIVORS,
    evolutionary,
    evopress_generations,
    offspring,
)
from lpserve.rivals.greedy import greedy
from lpserve.rivals.one_shot import one_shot
from lpserve.rivals.paper import (
    PAPER_COALITIONS,
    PAPER_DRAWS,
    PAPER_MIN_DRAWS,
    paper,
    paper_draws,
)
from lpserve.rivals.proposer import Answer, Ask, Proposer, drive
from lpserve.rivals.random_sets import random_search
from lpserve.surrogate import PaperSurrogate
from lpserve.testing.games import NUM_WINDOWS, TableGame, best_by_size
from lpserve.types import BoolArray
from lpserve.values.sampling import paper_values
from tests.conftest import SEED

Rival = Callable[[int, int, int], Proposer]
RIVALS: dict[str, Rival] = {
    "random": lambda players, most, seed: random_search(players, most, seed),
    "one-shot": lambda players, most, seed: one_shot(players, most),
    "greedy": lambda players, most, seed: greedy(players, most),
    "evolutionary": lambda players, most, seed: evolutionary(
        players, most, num_windows=NUM_WINDOWS, seed=seed
    ),
    "evolutionary, all windows": lambda players, most, seed: evolutionary(
        players, most, num_windows=NUM_WINDOWS, seed=seed, first_share=1.0
    ),
    "paper": lambda players, most, seed: paper(players, most, budget=60, seed=seed),
}


@dataclass(frozen=True)
class Played:
    """One rival's search on a game some of whose masks fail, to its end."""

    make: Callable[[], Proposer]
    game: TableGame
    record: list[Answer]


@pytest.fixture(scope="module", params=RIVALS.values(), ids=list(RIVALS))
def played(request: pytest.FixtureRequest) -> Played:
    game = TableGame(10, np.random.default_rng(SEED), failing=0.3)
    make = partial(request.param, 10, 4, SEED)
    return Played(make, game, drive(make(), game.score, 1 << 10))


def asked(record: Sequence[Answer]) -> list[tuple[range | None, bytes]]:
    return [(s.ask.windows, key) for s in record for key in keys(s.ask.masks_MP)]


def distinct(record: Sequence[Answer]) -> set[bytes]:
    return {key for _, key in asked(record)}


# -- what every rival promises -----------------------------------------------------------------


def test_nothing_is_asked_twice(played):
    assert len(set(asked(played.record))) == len(asked(played.record)) > 0
    for scored in played.record:
        masks = scored.ask.masks_MP
        assert masks.dtype == bool
        assert masks.shape[1] == 10
        assert len(masks) > 0
        np.testing.assert_array_equal(scored.nll_M, played.game.score(scored.ask))


def test_the_same_seed_is_the_same_sequence(played):
    assert asked(drive(played.make(), played.game.score, 1 << 10)) == asked(played.record)


@pytest.mark.parametrize("name", ["random", "evolutionary", "evolutionary, all windows", "paper"])
def test_another_seed_is_another_sequence(name, rng):
    game = TableGame(10, rng)
    one, two = (asked(drive(RIVALS[name](10, 4, seed), game.score, 40)) for seed in (1, 2))
    assert one != two


def test_a_budget_cuts_the_sequence_and_changes_nothing_else(played, rng):
    for budget in rng.integers(1, len(distinct(played.record)), size=4).tolist():
        record = drive(played.make(), played.game.score, budget)
        assert len(distinct(record)) == budget
        assert asked(record) == asked(played.record)[: len(asked(record))]
    assert drive(played.make(), played.game.score, 0) == []


def test_a_failed_score_is_never_chosen(played):
    found = best_by_size(played.record)
    for r, (mask, nll) in found.items():
        assert len(removed_players(mask)) == r
        assert math.isfinite(nll)
        assert nll == played.game.of(removed_players(mask))
    assert found


def test_where_every_score_fails_nothing_is_chosen_and_the_search_ends(played, rng):
    game = TableGame(10, rng, failing=1.0)
    record = drive(played.make(), game.score, 1 << 10)
    assert record
    assert best_by_size(record) == {}


@pytest.mark.parametrize(("players", "most"), [(1, 1), (2, 1), (2, 2), (5, 5), (6, 3)])
@pytest.mark.parametrize("name", [name for name in RIVALS if name != "paper"])
def test_the_smallest_games_are_searched_too(name, players, most, rng):
    game = TableGame(players, rng)
    record = drive(RIVALS[name](players, most, 0), game.score, 1 << players)
    assert distinct(record) <= set(keys(all_masks(players)))
    if not name.startswith("evolutionary") or players > 2:
        assert set(best_by_size(record)) >= set(range(1, most + (most < players)))


# -- the driver --------------------------------------------------------------------------------


def test_the_driver_sends_scores_back_and_closes_what_it_cuts(rng):
    game = TableGame(6, rng)
    parts = np.split(rng.permutation(all_masks(6)), 8)
    answers, closed = [], []

    def proposer() -> Proposer:
        try:
            for part in parts:
                answers.append((yield Ask(part, range(3))))
        finally:
            closed.append(True)

    record = drive(proposer(), game.score, 20)
    assert closed == [True]
    assert [len(s.ask.masks_MP) for s in record] == [8, 8, 4]
    assert len(answers) == 2  # a cut batch has no answer
    for part, answer in zip(parts, answers, strict=False):
        np.testing.assert_array_equal(answer, game.score(Ask(part, range(3))))
    assert [len(s.ask.masks_MP) for s in drive(proposer(), game.score, 16)] == [8, 8]


def test_a_mask_counts_once_on_however_many_windows(rng):
    game, masks = TableGame(5, rng), rng.permutation(all_masks(5))[:6]

    def proposer() -> Proposer:
        yield Ask(masks[:4], range(2))
        yield Ask(masks[:2])
        yield Ask(masks[[3, 4, 2, 5]])

    sizes = [[len(s.ask.masks_MP) for s in drive(proposer(), game.score, b)] for b in (3, 4, 5, 9)]
    assert sizes == [[3], [4, 2, 1], [4, 2, 3], [4, 2, 4]]


@pytest.mark.parametrize("ties", [False, True])
def test_best_sets_are_the_lowest_finite_scores_on_all_windows(ties, rng):
    masks = rng.permutation(all_masks(6))
    nll = rng.integers(3, size=64) * 1.0 if ties else rng.normal(size=64)
    nll[rng.choice(64, 12, replace=False)] = [np.nan, np.inf, -np.inf] * 4
    windows = [None, range(2), None, range(16)]
    record = [Answer(Ask(masks[i::4], windows[i]), nll[i::4]) for i in range(4)]
    expected: dict[int, tuple[float, bytes]] = {}
    for row in range(0, 64, 2):  # parts 0 and 2: on all windows
        r, key = int((~masks[row]).sum()), keys(masks[row : row + 1])[0]
        if math.isfinite(nll[row]):
            expected[r] = min(expected.get(r, (math.inf, b"")), (float(nll[row]), key))
    got = {r: (value, keys(mask[None])[0]) for r, (mask, value) in best_by_size(record).items()}
    assert got == expected
    assert best_by_size([]) == {}


# -- random, one-shot, greedy ------------------------------------------------------------------


def test_random_search_draws_from_every_size_in_turn_until_all_are_drawn(rng):
    players, most = 9, 4
    game = TableGame(players, rng)
    record = drive(random_search(players, most, 0), game.score, 1 << players)
    everything = [
        keys(without(players, c)[None])[0]
        for r in range(1, most + 1)
        for c in combinations(range(players), r)
    ]
    assert sorted(key for _, key in asked(record)) == sorted(everything)
    removed = (~np.concatenate([s.ask.masks_MP for s in record])).sum(axis=1)
    assert removed[: players * most].tolist() == list(range(1, most + 1)) * players
    for r, (_, nll) in best_by_size(record).items():
        assert nll == min(game.of(c) for c in combinations(range(players), r))


@pytest.mark.parametrize("failing", [0.0, 0.4])
def test_one_shot_removes_the_players_whose_loss_costs_least(failing, rng):
    game = TableGame(8, rng, failing)
    record = drive(one_shot(8, 8), game.score, 1 << 8)
    cost = [game.of([p]) for p in range(8)]
    able = sorted((p for p in range(8) if math.isfinite(cost[p])), key=lambda p: cost[p])
    expected = [(p,) for p in range(8)]
    expected += [tuple(sorted(able[:r])) for r in range(2, len(able) + 1)]
    masks = np.concatenate([s.ask.masks_MP for s in record])
    assert [removed_players(mask) for mask in masks] == expected
    assert len(record) == 1 + (len(able) > 1)


@pytest.mark.parametrize("failing", [0.0, 0.4])
@pytest.mark.parametrize("ties", [False, True])
def test_greedy_equals_the_naive_one(ties, failing, rng):
    game = TableGame(8, rng, failing)
    if ties:
        game.nll_MN = np.repeat(np.ceil(game.nll_MN[:, :1]), NUM_WINDOWS, axis=1)
    removed: tuple[int, ...] = ()
    expected = []
    for _ in range(6):
        options = [tuple(sorted((*removed, p))) for p in range(8) if p not in removed]
        expected.append(set(options))
        # a key is smaller where earlier players are dropped: so is the tuple
        able = [(game.of(o), o) for o in options if math.isfinite(game.of(o))]
        if not able:
            break
        removed = min(able)[1]
    record = drive(greedy(8, 6), game.score, 1 << 8)
    assert [{removed_players(m) for m in s.ask.masks_MP} for s in record] == expected


# -- the evolution -----------------------------------------------------------------------------


def swaps(one_P: BoolArray, other_P: BoolArray) -> int:
    assert one_P.sum() == other_P.sum()
    return int((one_P & ~other_P).sum())


@pytest.mark.parametrize(("players", "removed"), [(2, 1), (4, 2), (6, 3), (7, 1), (14, 5)])
def test_a_brood_is_lambda_distinct_neighbours_or_all_there_are(players, removed, rng):
    parent = without(players, rng.choice(players, removed, replace=False).tolist())
    near = [
        mask
        for mask in all_masks(players, players - removed)
        if 1 <= swaps(parent, mask) <= EVOPRESS_MAX_SWAPS
    ]
    brood = offspring(parent, rng)
    assert len(brood) == len(set(keys(brood))) == min(EVOPRESS_OFFSPRING, len(near))
    assert set(keys(brood)) <= set(keys(np.array(near)))


@pytest.mark.parametrize(("layers", "each"), [(1, 1), (2, 1), (3, 2), (7, 2)])
def test_halves_change_places_with_halves_of_their_kind(layers, each, rng):
    """Against all sets of as many attention as feed-forward parts, by hand."""
    parts = [ATTENTION, MLP] * layers
    kinds = [np.arange(0, 2 * layers, 2), np.arange(1, 2 * layers, 2)]
    drops = [rng.choice(kind, each, replace=False).tolist() for kind in kinds]
    parent = without(2 * layers, drops[0] + drops[1])
    if each < layers:
        brood = offspring(parent, rng, kinds)
        near = [
            mask
            for a in combinations(kinds[0].tolist(), each)
            for b in combinations(kinds[1].tolist(), each)
            if 1 <= swaps(parent, mask := without(2 * layers, [*a, *b])) <= EVOPRESS_MAX_SWAPS
        ]
        assert len(brood) == len(set(keys(brood))) == min(EVOPRESS_OFFSPRING, len(near))
        assert set(keys(brood)) <= set(keys(np.array(near)))
    proposer = evolutionary(2 * layers, 2 * layers, num_windows=4, seed=1, parts=parts)
    record = drive(proposer, lambda ask: rng.random(len(ask.masks_MP)), 200)
    for answer in record:
        for mask in answer.ask.masks_MP:
            assert (~mask[kinds[0]]).sum() == (~mask[kinds[1]]).sum()
    sizes = {int((~mask).sum()) for answer in record for mask in answer.ask.masks_MP}
    assert sizes == set(range(2, 2 * layers + 1, 2))


def test_small_steps_are_the_likelier(rng):
    """Of a thousand offspring in a wide game: 5/9, 3/9 and 1/9 make 1, 2 and 3 switches, of which
    one in 20 or so leads back. Bounds: 5 standard deviations and that."""
    parent = without(80, range(40))
    steps = [swaps(parent, mask) for _ in range(40) for mask in offspring(parent, rng)]
    shares = np.bincount(steps, minlength=4)[1:] / len(steps)
    np.testing.assert_allclose(shares, [5 / 9, 3 / 9, 1 / 9], atol=5 * 0.5 / 1280**0.5 + 0.05)


@pytest.mark.parametrize("failing", [0.0, 0.2])
def test_generations_are_as_published(failing, rng):
    """Replayed from what was asked: after the first generation the parent is the best set scored on
    all windows, since what lost to a parent once loses to its successors."""
    players, most = 10, 4
    game = TableGame(players, rng, failing)
    record = drive(
        evolutionary(players, most, num_windows=NUM_WINDOWS, seed=int(rng.integers(99))),
        game.score,
        1 << players,
    )
    initial, *rest = record
    assert isinstance(initial.ask.windows, range)
    kept = initial.ask.masks_MP.sum(axis=1)
    whole: list[Answer] = []
    parents: dict[int, BoolArray] = {}
    for r in range(1, most + 1):
        rows = np.flatnonzero(kept == players - r)
        assert len(rows) == min(EVOPRESS_INITIAL, math.comb(players, r))
        nll = np.where(np.isfinite(initial.nll_M[rows]), initial.nll_M[rows], np.inf)
        parents[r] = initial.ask.masks_MP[rows[nll.argmin()]]
    generations, brood = 0, initial
    blocks = set()
    for scored in rest:
        masks = scored.ask.masks_MP
        removed = (~masks).sum(axis=1)
        if scored.ask.windows is not None:
            generations, brood = generations + 1, scored
            blocks.add(scored.ask.windows)
            assert len(scored.ask.windows) == 1
            for mask, r in zip(masks, removed, strict=True):
                assert 1 <= swaps(parents[r], mask) <= EVOPRESS_MAX_SWAPS
                assert evopress_generations(players, int(r)) >= generations
            assert max(np.bincount(removed)) <= EVOPRESS_OFFSPRING
            continue
        tokens = brood.ask.windows
        for r in set(removed.tolist()):
            finals = masks[removed == r]
            others = [m for m in finals if (m != parents[r]).any()]
            assert len(others) <= EVOPRESS_SURVIVORS
            siblings = brood.nll_M[(~brood.ask.masks_MP).sum(axis=1) == r]
            for nll in game.score(Ask(np.array(others).reshape(-1, players), tokens)):
                better = np.isfinite(siblings) & ~(siblings >= nll)
                assert better.sum() < EVOPRESS_SURVIVORS or not np.isfinite(nll)
        whole.append(scored)
        parents.update({r: mask for r, (mask, _) in best_by_size(whole).items()})
    assert generations == evopress_generations(players, most)
    assert len(blocks) > 1
    assert set(best_by_size(record)) == set(range(1, most + 1))


def test_with_all_windows_at_once_the_first_selection_decides(rng):
    game = TableGame(9, rng)
    proposer = evolutionary(9, 3, num_windows=NUM_WINDOWS, seed=0, first_share=1.0)
    record = drive(proposer, game.score, 1 << 9)
    assert {s.ask.windows for s in record} == {None}
    assert len(record) <= 1 + evopress_generations(9, 3)


def test_published_number_of_generations():
    assert evopress_generations(32, 12) == 160  # int(12 * 20 / 1.5)
    assert evopress_generations(12, 1) == 7
    assert evopress_generations(5, 5) == 0


def test_the_evolution_finds_the_best_sets_of_an_additive_game(rng):
    """Where every window says the same and a better set is always one switch away."""
    players = 9
    cost = rng.normal(size=players)
    game = TableGame(players, rng)
    game.nll_MN = np.repeat((~all_masks(players)[:, ::-1] @ cost)[:, None], NUM_WINDOWS, axis=1)
    record = drive(
        evolutionary(players, 3, num_windows=NUM_WINDOWS, seed=int(rng.integers(99))),
        game.score,
        1 << players,
    )
    for r in range(1, 4):
        best = tuple(sorted(np.argsort(cost)[:r].tolist()))
        assert removed_players(best_by_size(record)[r][0]) == best


# -- the paper's pipeline ----------------------------------------------------------------------


@pytest.mark.thorough
def test_the_papers_pipeline_equals_its_parts(rng):
    players, most, budget = 10, 4, 70
    game, seed = TableGame(players, rng, failing=0.3), int(rng.integers(1 << 30))
    game.nll_MN[-1] = rng.gamma(2.0, size=NUM_WINDOWS)  # all kept is scored
    record = drive(paper(players, most, budget=budget, seed=seed), game.score, budget)
    draw_rng = np.random.default_rng(seed)
    draws = paper_draws(players, PAPER_DRAWS, draw_rng)
    coalitions = paper_draws(players, PAPER_COALITIONS, draw_rng)
    taken, seen = [], set()
    for mask, key in zip(draws, keys(draws), strict=True):
        if key not in seen and len(seen) == budget - 1 - most:
            break
        seen.add(key)
        taken.append(mask)
    assert len(taken) > len(seen)  # repeats among them
    first = record[0].ask.masks_MP
    assert first[0].all()
    assert keys(first[1:]) == list(dict.fromkeys(keys(np.array(taken))))
    full = game.of([])
    pairs = [
        (m, math.exp(full - game.of(removed_players(m))))
        for m in taken
        if math.isfinite(game.of(removed_players(m)))
    ]
    surrogate = PaperSurrogate(seed)
    surrogate.train(np.array([m for m, _ in pairs]), np.array([ratio for _, ratio in pairs]))
    values = paper_values(surrogate.mean, coalitions).values_P
    order = sorted(range(players), key=lambda p: values[p])
    ranked = [keys(without(players, order[:r])[None])[0] for r in range(1, most + 1)]
    assert [key for _, key in asked(record[1:])] == [k for k in ranked if k not in seen]
    assert len(distinct(record)) <= budget


def test_draws_are_dealt_from_the_papers_strata_and_repeat(rng):
    players = 12
    strata = paper_kept_counts(players)
    draws = paper_draws(players, 23, rng)
    assert draws.sum(axis=1).tolist() == [strata[i % len(strata)] for i in range(23)]
    masks = paper_draws(players, 5000, rng)
    singles = masks[masks.sum(axis=1) == players - 1]
    assert len(singles) == 1000
    # uniform: each player is left out of 1000/12 of them, within 5 standard deviations
    assert np.abs((~singles).sum(axis=0) - 1000 / 12).max() < 5 * (1000 / 12) ** 0.5


def test_the_papers_pipeline_draws_from_the_strata_that_it_is_given(rng):
    game = TableGame(10, rng)
    record = drive(paper(10, 3, budget=60, seed=1, strata=[9, 7]), game.score, 60)
    assert set(record[0].ask.masks_MP.sum(axis=1).tolist()) == {10, 9, 7}
    draws = paper_draws(10, 5, rng, [9, 7])
    assert draws.sum(axis=1).tolist() == [9, 7, 9, 7, 9]


def test_with_room_for_them_all_8000_draws_are_made():
    draws = paper_draws(9, PAPER_DRAWS, np.random.default_rng(4))
    ask = next(paper(9, 3, budget=1 << 9, seed=4))
    assert keys(ask.masks_MP) == keys(
        np.concatenate(
            [full_mask(9)[None], list(dict.fromkeys(map(tuple, draws.tolist())))]
        ).astype(bool)
    )


def test_the_papers_pipeline_ends_where_it_has_nothing_to_train_on(rng):
    game = TableGame(10, rng)
    game.nll_MN[-1] = np.nan
    assert len(drive(paper(10, 3, budget=40, seed=0), game.score, 40)) == 1


def test_a_budget_too_small_for_the_papers_pipeline_is_refused():
    least = 1 + PAPER_MIN_DRAWS + 4
    with pytest.raises(InputError, match=f"at least {least} masks: got {least - 1}"):
        next(paper(10, 4, budget=least - 1, seed=0))
    assert len(next(paper(10, 4, budget=least, seed=0)).masks_MP) == 1 + PAPER_MIN_DRAWS
