"""The sequence of rounds on games with a known answer, played as the coordinator plays it.

Round n is proposed when rounds up to n-2 are complete. Scores are exact float32 sums over three
windows; nothing here depends on a tolerance but the sums themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from lpserve.masks import all_masks, best_row, drop_one, keys, removed_players, without
from lpserve.plan.constraint import constraint_of
from lpserve.rounds.history import CompletedRound, Round, latest_scores
from lpserve.rounds.planner import RoundPlanner
from lpserve.rounds.settings import RoundSettings, StopRules, design_strata
from lpserve.surrogate import PaperSurrogate
from lpserve.types import BoolArray, FloatArray, IntArray
from lpserve.utility import UTILITIES

TOKENS = np.array([90, 100, 110])
Game = Callable[[BoolArray], FloatArray]


pytestmark = pytest.mark.usefixtures("one_blas_thread")


def pair_game(num_players: int, rng: np.random.Generator, pairs: float = 0.05) -> Game:
    """Mask -> mean NLL: a cost for each dropped player and an effect for each dropped pair."""
    main = rng.uniform(0.01, 0.3, num_players)
    effect = np.triu(rng.normal(0, pairs, (num_players, num_players)), 1)

    def mean_nll(masks: BoolArray) -> FloatArray:
        d = 1.0 - masks
        return 3 + d @ main + np.einsum("mi,ij,mj->m", d, effect, d)

    return mean_nll


def nll_of(game: Game, masks: BoolArray) -> np.ndarray:
    """float32[M, N]: what an engine would have stored."""
    return (game(masks)[:, None] * TOKENS * [0.9, 1.0, 1.1]).astype(np.float32)


def neg_nll(nll: np.ndarray) -> FloatArray:
    finite = np.asarray(np.isfinite(nll).all(axis=1))
    total = np.where(finite[:, None], nll, 0).astype(np.float64).sum(axis=1)
    return np.where(finite, -total / TOKENS.sum(), np.nan)


def planner_of(
    settings: RoundSettings, utility: str = "neg_nll", screen: IntArray | None = None
) -> RoundPlanner:
    return RoundPlanner(settings, UTILITIES[utility], TOKENS, screen=screen)


def completed(masks: Sequence[BoolArray], nll: Sequence[np.ndarray]) -> tuple[CompletedRound, ...]:
    """Rounds whose losses are their NLLs; masks without scores are left out."""
    return tuple(CompletedRound(m, n, n) for m, n in zip(masks, nll, strict=False))


def settings_of(num_players: int, max_removed: int, **changes: object) -> RoundSettings:
    settings = RoundSettings(
        num_players=num_players,
        max_removed=max_removed,
        sizes=(num_players - max_removed, num_players - 1),
        seed=0,
        surrogate="auto",
        round_size=num_players,
    )
    return replace(settings, **changes)  # pyright: ignore[reportArgumentType]


class Played:
    """A whole run: its rounds, its scores, its planner."""

    def __init__(
        self,
        settings: RoundSettings,
        game: Game,
        budget: int,
        utility: str = "neg_nll",
    ) -> None:
        self.planner = planner_of(settings, utility)
        self.rounds: list[BoolArray] = []
        self.nll: list[np.ndarray] = []
        self.ended = False
        asked = 0
        while asked < budget:
            complete = max(len(self.rounds) - 1, 0)
            history = completed(self.rounds[:complete], self.nll[:complete])
            masks = self.planner.propose(len(self.rounds), history).masks_MP[: budget - asked]
            if not len(masks):
                self.ended = True
                break
            asked += len(masks)
            self.rounds.append(masks)
            self.nll.append(nll_of(game, masks))

    @property
    def masks(self) -> BoolArray:
        return np.concatenate(self.rounds)

    @property
    def utilities(self) -> FloatArray:
        return neg_nll(np.concatenate(self.nll))

    def best(self, num_removed: int) -> tuple[int, ...]:
        rows = np.flatnonzero((~self.masks).sum(axis=1) == num_removed)
        row = best_row(self.masks[rows], self.utilities[rows])
        assert row is not None
        return removed_players(self.masks[rows][row])


def optimum(game: Game, num_players: int, num_removed: int) -> tuple[int, ...]:
    """The best of all sets of a size, as float32 scores rank them."""
    sets = list(combinations(range(num_players), num_removed))
    masks = np.array([without(num_players, s) for s in sets])
    row = best_row(masks, neg_nll(nll_of(game, masks)))
    assert row is not None
    return sets[row]


CASES = [
    settings_of(2, 1),
    settings_of(4, 3, sizes=(0, 3)),
    settings_of(7, 3),
    settings_of(8, 6, round_size=3, surrogate="gp"),
    settings_of(8, 7, sizes=(7, 7), surrogate="ridge"),
    settings_of(9, 3, sizes=(0, 2), seed=5, surrogate="ridge"),
    settings_of(12, 4, round_size=20),
    settings_of(16, 2, round_size=1, sizes=(4, 9), surrogate="ridge"),
    settings_of(30, 11, round_size=8, surrogate="ridge"),
]
NAMES = [f"{s.num_players}-{s.max_removed}-{s.sizes}-{s.round_size}" for s in CASES]


def enough(settings: RoundSettings) -> int:
    """Masks for a few rounds of every kind."""
    return settings.minimum_budget() + 24


every_case = pytest.mark.parametrize("settings", CASES, ids=NAMES)


@every_case
def test_no_mask_is_asked_for_twice(settings, rng):
    played = Played(settings, pair_game(settings.num_players, rng), 100)
    assert len(set(keys(played.masks))) == len(played.masks)
    assert len(played.masks) == 100 or played.ended
    assert played.masks[0].all()
    players = settings.num_players
    np.testing.assert_array_equal(played.rounds[0][1 : players + 1], drop_one(played.masks[0]))
    needs_empty = settings.sizes[0] == 0
    assert len(played.rounds[0]) == 1 + players + needs_empty
    assert not needs_empty or not played.rounds[0][-1].any()
    assert set(keys(played.masks)) <= played.planner.sources.keys()
    assert set(played.planner.sources.values()) <= {
        "full",
        "outward",
        "ranking",
        "search",
        "values",
        "design",
    }


@every_case
def test_the_least_budget_scores_a_set_of_every_size(settings, rng):
    played = Played(settings, pair_game(settings.num_players, rng), settings.minimum_budget())
    removed = set((~played.masks).sum(axis=1).tolist())
    assert set(range(1, settings.max_removed + 1)) <= removed


@every_case
def test_a_larger_budget_only_adds_masks(settings, rng):
    game = pair_game(settings.num_players, rng)
    most = enough(settings)
    large = Played(settings, game, most).masks
    for budget in (1, int(rng.integers(2, most)), most - 1):
        small = Played(settings, game, budget).masks
        np.testing.assert_array_equal(small, large[:budget])


@every_case
def test_the_same_seed_asks_the_same_and_another_seed_another_design(settings, rng):
    game = pair_game(settings.num_players, rng)
    one, same = (Played(settings, game, enough(settings)) for _ in range(2))
    np.testing.assert_array_equal(one.masks, same.masks)
    assert one.planner.sources == same.planner.sources
    if settings.num_players < 7:  # so small that every mask is asked for
        return
    other = Played(replace(settings, seed=settings.seed + 1), game, settings.minimum_budget())
    np.testing.assert_array_equal(one.rounds[0], other.rounds[0])
    assert set(keys(one.rounds[1])) != set(keys(other.rounds[1]))


@every_case
def test_a_round_reads_nothing_beyond_the_round_before_the_last(settings, rng):
    """The last round is absent, complete, or complete with nonsense: the proposal is the same."""
    game = pair_game(settings.num_players, rng)
    played = Played(settings, game, enough(settings))
    complete, poisoned = (planner_of(settings) for _ in range(2))
    for index, masks in enumerate(played.rounds[:-1]):  # the last one is cut by the budget
        before = max(index - 1, 0)
        history = completed(played.rounds[:index], played.nll[:index])
        np.testing.assert_array_equal(complete.propose(index, history).masks_MP, masks)
        nonsense = [
            rng.normal(500, 100, nll.shape).astype(np.float32) for nll in played.nll[before:]
        ]
        history = completed(played.rounds, played.nll[:before] + nonsense)
        np.testing.assert_array_equal(poisoned.propose(index, history).masks_MP, masks)


def test_scores_of_complete_rounds_are_read(rng):
    """The counterpart: other scores lead elsewhere."""
    settings = settings_of(10, 4)
    one, other = (Played(settings, pair_game(10, rng), 80) for _ in range(2))
    np.testing.assert_array_equal(one.rounds[1], other.rounds[1])
    assert set(keys(one.masks)) != set(keys(other.masks))


def test_a_small_game_is_asked_for_to_the_last_mask(rng):
    settings = settings_of(4, 3, sizes=(0, 3))
    played = Played(settings, pair_game(4, rng), 1000)
    assert played.ended
    assert sorted(keys(played.masks)) == keys(all_masks(4))
    history = completed(played.rounds, played.nll)
    for index in range(len(played.rounds) + 1, len(played.rounds) + 4):
        assert played.planner.propose(index, history).all_masks.shape == (0, 4)


@pytest.mark.parametrize("sizes", [(6, 6), (5, 6), (0, 1), (3, 3)])
def test_a_run_ends_only_when_plan_and_values_have_all_their_masks(sizes, rng):
    """Sizes that the values do not need are asked for once those they need are used up."""
    settings = settings_of(7, 3, sizes=sizes, surrogate="ridge")
    played = Played(settings, pair_game(7, rng), 1000)
    assert played.ended
    kept = all_masks(7).sum(axis=1)
    needed = (kept >= 4) | ((kept >= sizes[0]) & (kept <= sizes[1] + 1))
    assert set(keys(played.masks)) == set(keys(all_masks(7)[needed]))


def test_strata_are_those_of_the_values_then_those_of_the_plan():
    assert design_strata(settings_of(8, 3)) == [[7, 6, 5]]
    assert design_strata(settings_of(8, 3, sizes=(7, 7))) == [[7], [6, 5]]
    assert design_strata(settings_of(8, 2, sizes=(0, 1))) == [[2, 1, 0], [7, 6]]
    assert design_strata(settings_of(8, 2, sizes=(0, 7))) == [[7, 6, 5, 4, 3, 2, 1, 0]]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("settings", [CASES[1], CASES[2], CASES[4], CASES[6]], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_masks_without_a_finite_score_never_stop_a_run(settings, share, bad, rng):
    """All kept scores; any other mask fails with probability `share`."""
    healthy = pair_game(settings.num_players, rng)
    chance = np.random.default_rng(int(rng.integers(1 << 30)))
    seen: dict[bytes, bool] = {}

    def game(masks: BoolArray) -> FloatArray:
        fails = [seen.setdefault(key, bool(chance.random() < share)) for key in keys(masks)]
        return np.where(np.array(fails) & ~masks.all(axis=1), bad, healthy(masks))

    played = Played(settings, game, enough(settings))
    assert len(set(keys(played.masks))) == len(played.masks)
    assert len(played.masks) == enough(settings) or played.ended
    removed = set((~played.masks).sum(axis=1).tolist())
    assert set(range(1, settings.max_removed + 1)) <= removed


@pytest.mark.parametrize("constant", [True, False])
def test_games_without_any_structure_are_played(constant, rng):
    def game(masks: BoolArray) -> FloatArray:
        return np.full(len(masks), 2.0) if constant else rng.uniform(2, 3, len(masks))

    played = Played(settings_of(8, 3), game, 93)
    assert len(played.masks) == 93
    assert len(set(keys(played.masks))) == 93


@pytest.mark.thorough
@pytest.mark.parametrize(
    "rules", [StopRules(chance=0.01), StopRules(width=0.02), StopRules(chance=0.01, width=0.02)]
)
def test_a_run_ends_by_the_rules_that_are_given(rules, rng):
    game = pair_game(9, rng, pairs=0.0)
    settings = settings_of(9, 4)
    stopped = Played(replace(settings, stop=rules), game, 255)
    assert stopped.ended
    assert len(stopped.masks) < 150
    assert stopped.planner.stopped == str(rules)
    assert ("no unseen set" in str(rules)) == (rules.chance is not None)
    assert ("0.02" in str(rules)) == (rules.width is not None)
    whole = Played(settings, game, len(stopped.masks) + 20)
    assert len(whole.masks) == len(stopped.masks) + 20
    np.testing.assert_array_equal(whole.masks[: len(stopped.masks)], stopped.masks)
    assert whole.planner.stopped == ""
    assert len(stopped.rounds) >= 2 + 3  # the walk is over: a step for each of three sizes
    for r in range(1, 5):
        assert stopped.best(r) == optimum(game, 9, r)


def test_a_rule_that_cannot_hold_ends_nothing(rng):
    """A width below what is left of a random game, from a surrogate that knows."""

    def game(masks: BoolArray) -> FloatArray:
        return 2 + np.array([(hash(key) % 1000) / 1000 for key in keys(masks)])

    played = Played(settings_of(9, 4, stop=StopRules(width=1e-4)), game, 150)
    assert not played.planner.stopped
    assert len(played.masks) == 150


@pytest.mark.thorough
@pytest.mark.parametrize("goal", ["plan", "values"])
def test_a_run_may_have_one_goal_alone(goal, statistical_rng):
    """How much a search asks for depends on the game: 9 to 45 sets in 60 of them."""
    settings = settings_of(12, 4, goal=goal)
    played = Played(settings, pair_game(12, statistical_rng), 130)
    counts: dict[str, int] = dict.fromkeys(["outward", "search", "values"], 0)
    for key in keys(np.concatenate(played.rounds[3:])):
        source = played.planner.sources[key]
        counts[source] = counts.get(source, 0) + 1
    if goal == "values":
        assert counts["values"] >= 80
        assert counts["outward"] == counts["search"] == 0
    else:
        assert counts["search"] > 4  # what is left goes to the values: no set seems worth a score
        assert counts["outward"] > 0
    removed = set((~played.masks).sum(axis=1).tolist())
    assert set(range(1, 5)) <= removed


def test_an_additive_game_is_solved_by_the_least_budget(rng):
    game = pair_game(12, rng, pairs=0.0)
    settings = settings_of(12, 5)
    played = Played(settings, game, settings.minimum_budget())
    for r in range(1, 6):
        assert played.best(r) == optimum(game, 12, r)


@pytest.mark.thorough
def test_games_of_pairs_are_solved_by_two_fifths_of_their_sets(statistical_rng):
    """150 of 385 sets. In simulations 80 of 80 optima were found by 80; one miss is let pass."""
    found = []
    for _ in range(3):
        game = pair_game(10, statistical_rng)
        played = Played(settings_of(10, 4), game, 150)
        found += [played.best(r) == optimum(game, 10, r) for r in range(1, 5)]
    assert sum(found) >= len(found) - 1


def test_the_search_solves_games_of_strong_pairs_from_six_percent_of_their_sets(statistical_rng):
    """220 of 3472 sets, 105 effects. 80 of 80 optima were found in simulations, and 46 of 80 by
    greed, rankings and the design alone; one miss of 15 is let pass."""
    found, by_search = [], 0
    for _ in range(3):
        game = pair_game(14, statistical_rng, pairs=0.15)
        settings = settings_of(14, 5, surrogate="ridge", round_size=20)
        played = Played(settings, game, 220)
        for r in range(1, 6):
            best = optimum(game, 14, r)
            found.append(played.best(r) == best)
            key = keys(without(14, best)[None])[0]
            by_search += played.planner.sources.get(key) == "search"
    assert sum(found) >= len(found) - 1
    assert by_search > 0


def test_the_walk_takes_a_step_for_every_size_from_what_the_last_one_found(rng):
    """Every even round holds sets of one size, a player more than those of the last; odd ones hold
    sets of the sizes that are scored."""
    game = pair_game(13, rng, pairs=0.2)
    settings = settings_of(13, 6, goal="plan", round_size=24)
    played = Played(settings, game, settings.minimum_budget())
    step, beside = settings.walk_sizes
    removed = [(~masks).sum(axis=1) for masks in played.rounds]
    assert removed[1].tolist() == [2, 2]
    for size, index in enumerate(range(2, len(played.rounds), 2), start=2):
        assert removed[index].tolist() == [size] * len(removed[index])
        if index + 1 < len(played.rounds):
            assert len(removed[index]) == step == 3
        before = np.concatenate(played.rounds[: index - 1])
        fewer = before[(~before).sum(axis=1) == size - 1]
        grown = {key for mask in fewer for key in keys(drop_one(mask))}
        assert grown & set(keys(played.rounds[index]))
    for index in range(3, len(played.rounds), 2):
        known = set(np.concatenate(removed[: index - 1]).tolist())
        assert len(removed[index]) <= max(step, beside)
        assert set(removed[index].tolist()) <= known | {max(known) + 1, max(known) + 2}
    assert removed[-1].max() == 6


@pytest.mark.parametrize(
    ("within", "goal"),
    [
        (constraint_of(12, [1, 8]), "both"),
        (constraint_of(12, [], [4]), "both"),
        (constraint_of(12, [0, 11], [3, 5]), "plan"),
        (constraint_of(12, range(6)), "plan"),
    ],
    ids=["protect", "force", "both", "half"],
)
def test_a_run_within_a_constraint_searches_such_sets_alone(within, goal, statistical_rng):
    """And finds the best of each size, where it is among few enough to be looked for."""
    game = pair_game(12, statistical_rng, pairs=0.2)
    settings = settings_of(12, 5, goal=goal, constraint=within)
    played = Played(settings, game, 160)
    outside = np.concatenate(played.rounds)[~within.holds(np.concatenate(played.rounds))]
    sources = {played.planner.sources[key] for key in keys(outside)}
    singles = set(keys(drop_one(np.ones(12, dtype=bool))))
    outward = {k for k in keys(outside) if played.planner.sources[k] == "outward"}
    assert outward <= singles  # of round 0, which every run begins with
    assert sources <= {"full", "outward", "values", "design"}
    if goal == "plan":
        assert "design" not in sources
    for r in settings.plan_sizes:
        sets = within.all_sets(r)
        best = sets[int(np.argmax(neg_nll(nll_of(game, sets))))]
        inside = within.holds(played.masks) & ((~played.masks).sum(axis=1) == r)
        row = best_row(played.masks[inside], played.utilities[inside])
        assert row is not None
        np.testing.assert_array_equal(played.masks[inside][row], best)


def test_mixed_rounds_keep_a_third_for_the_values_and_grow_with_the_run(rng):
    settings = settings_of(14, 3, round_size=10, surrogate="ridge")
    played = Played(settings, pair_game(14, rng), 300)
    sources = [[played.planner.sources[key] for key in keys(masks)] for masks in played.rounds]
    before = np.cumsum([len(masks) for masks in played.rounds])
    assert set(sources[1]) == {"design"}
    for index in range(3, len(played.rounds) - 1):
        size = max(10, int(0.05 * before[index - 1]))
        if index < 2 * settings.max_removed - 1:  # the walk comes first
            assert set(sources[index]) <= {"outward", "search"}
            continue
        assert len(sources[index]) == size
        assert sources[index].count("values") >= size // 3
        assert "design" not in sources[index]  # the pool never runs dry here
        assert sources[index].count("ranking") <= (size - size // 3) // 4
    assert len(played.rounds[-2]) > 10


def test_the_design_covers_the_sizes_of_the_values_evenly(rng, monkeypatch):
    monkeypatch.setattr(PaperSurrogate, "EPOCHS", 2)  # it cannot tell which masks say most
    settings = settings_of(12, 3, sizes=(2, 9), surrogate="paper")
    played = Played(settings, pair_game(12, rng), 200, "ppl_ratio")
    design = [
        int(mask.sum())
        for mask, key in zip(played.masks, keys(played.masks), strict=True)
        if played.planner.sources[key] == "design"
    ]
    counts = [design.count(kept) for kept in range(2, 11)]
    assert sum(counts) == len(design)
    assert min(counts) > 0
    # dealt in turn; a set that was found otherwise is passed over
    assert max(counts) - min(counts) <= 1 + (len(played.masks) - len(design))


def test_the_papers_surrogate_plays_without_rankings(rng, monkeypatch):
    monkeypatch.setattr(PaperSurrogate, "EPOCHS", 2)

    settings = settings_of(7, 2, surrogate="paper")
    played = Played(settings, pair_game(7, rng), 29, "ppl_ratio")
    assert sorted((~played.masks).sum(axis=1).tolist()) == [0] + [1] * 7 + [2] * 21
    late = [played.planner.sources[key] for masks in played.rounds[3:] for key in keys(masks)]
    assert "ranking" not in late


@pytest.mark.parametrize(("kind", "growth"), [("gp", 1.0), ("boosting", 1.2), ("paper", 1.5)])
def test_slow_surrogates_wait_until_masks_have_grown(kind, growth, rng, monkeypatch):
    monkeypatch.setattr(PaperSurrogate, "EPOCHS", 1)
    monkeypatch.setattr("lpserve.surrogate.boosting._MAX_TREES", 2)
    settings = settings_of(9, 3, surrogate=kind)
    planner = planner_of(settings, "ppl_ratio")
    fitted: list[int] = []
    surrogate = planner.model.surrogate
    assert surrogate is not None
    fit = surrogate.fit
    monkeypatch.setattr(
        surrogate,
        "fit",
        lambda masks, *rest: (fitted.append(len(masks)), fit(masks, *rest)),
    )
    game, history = pair_game(9, rng), list[CompletedRound]()
    for index in range(12):
        batch_MP = planner.propose(index, history).masks_MP
        nll = nll_of(game, batch_MP)
        history.append(CompletedRound(batch_MP, nll, nll))
    expected: list[int] = []
    for index in range(2, 12):  # from all rounds but the last one
        count = sum(len(done.masks_MP) for done in history[: index - 1])
        if not expected or count >= growth * expected[-1]:
            expected.append(count)
    assert fitted == expected
    assert len(expected) > 2


# -- a screen ----------------------------------------------------------------------------------

SCREEN = np.array([0])
"""Of the three windows."""


class Screened:
    """A run whose sets are scored on one window first, played as the coordinator plays it."""

    def __init__(self, settings: RoundSettings, game: Game, other: Game, budget: int) -> None:
        """`other` is what the windows beyond the screen measure."""
        self.planner = planner_of(settings, screen=SCREEN)
        self.rounds: list[Round] = []
        self.history: list[CompletedRound] = []
        self._game, self._other = game, other
        asked = 0
        while asked < budget:
            found = self.planner.propose(len(self.rounds), self.history).first(budget - asked)
            if not len(found.all_masks):
                break
            asked += len(found)
            self.rounds.append(found)
            if len(self.rounds) > 1:
                self._score(self.rounds[-2])
        self._score(self.rounds[-1])
        while len((found := self.planner.settle(self.history)).promoted_MP):
            self.rounds.append(found)
            self._score(found)

    def true_nll(self, masks: BoolArray) -> np.ndarray:
        nll = nll_of(self._other, masks)
        nll[:, SCREEN] = nll_of(self._game, masks)[:, SCREEN]
        return nll

    def _score(self, asked: Round) -> None:
        nll = self.true_nll(asked.all_masks)
        nll[np.ix_(~asked.full_M, np.array([False, True, True]))] = np.nan
        self.history.append(CompletedRound(asked.all_masks, nll, nll))


@pytest.mark.thorough
def test_screened_sets_are_promoted_once_and_only_they(rng):
    settings = settings_of(12, 5)
    game, off = pair_game(12, rng), pair_game(12, rng)
    played = Screened(settings, game, lambda m: game(m) + 0.05 * off(m), 150)
    new = np.concatenate([r.masks_MP for r in played.rounds])
    whole = np.concatenate([r.full_M for r in played.rounds])
    promoted = np.concatenate([r.promoted_MP for r in played.rounds])
    assert len(set(keys(new))) == len(new) == 150
    assert len(set(keys(promoted))) == len(promoted) > 0
    assert set(keys(promoted)) < set(keys(new[~whole]))  # some are left on the screen
    screened = {played.planner.sources[key] for key in keys(new[~whole])}
    assert screened <= {"outward", "search", "ranking"}
    first_step = set(keys(drop_one(new[0])))
    assert first_step <= set(keys(new[whole]))
    latest = latest_scores(played.history)
    masks, nll = latest.masks_MP, latest.loss_MI
    np.testing.assert_array_equal(masks, new)
    done = np.isfinite(nll).all(axis=1)
    assert set(keys(masks[done])) == set(keys(new[whole])) | set(keys(promoted))
    np.testing.assert_array_equal(nll[done], played.true_nll(masks[done]))


@pytest.mark.thorough
def test_a_screened_search_finds_the_best_sets_on_all_windows(rng):
    """Losses on the screen are off by a sixth of their spread. All of 40 optima were found in
    simulations, 33 of them by the screen alone; one miss of 10 is let pass."""
    found = []
    for _ in range(2):
        game, off = pair_game(11, rng), pair_game(11, rng)
        played = Screened(settings_of(11, 5), game, lambda m: game(m) + 0.15 * off(m), 200)  # noqa: B023
        latest = latest_scores(played.history)
        masks, nll = latest.masks_MP, latest.loss_MI
        done = np.isfinite(nll).all(axis=1)
        masks, utilities = masks[done], neg_nll(nll[done])
        for r in range(1, 6):
            sets = all_masks(11, 11 - r)
            rows = np.flatnonzero((~masks).sum(axis=1) == r)
            best = float(neg_nll(played.true_nll(sets)).max())
            found.append(float(utilities[rows].max()) == best)
    assert sum(found) >= len(found) - 1


@pytest.mark.thorough
def test_a_screened_round_reads_nothing_beyond_the_round_before_the_last(rng):
    settings = settings_of(12, 5)
    game, off = pair_game(12, rng), pair_game(12, rng)
    played = Screened(settings, game, lambda m: game(m) + 0.1 * off(m), 140)
    again = planner_of(settings, screen=SCREEN)
    proposed = [r for r in played.rounds if len(r)]
    losses = [done.loss_MI for done in played.history]
    for index, asked in enumerate(proposed[:-1]):  # the last one is cut by the budget
        complete = max(index - 1, 0)
        later = [rng.normal(500, 100, n.shape).astype(np.float32) for n in losses]
        nll = losses[:complete] + later[complete:]
        found = again.propose(index, completed([done.masks_MP for done in played.history], nll))
        np.testing.assert_array_equal(found.masks_MP, asked.masks_MP)
        np.testing.assert_array_equal(found.full_M, asked.full_M)
        np.testing.assert_array_equal(found.promoted_MP, asked.promoted_MP)


def test_with_goal_values_nothing_is_screened(rng):
    game = pair_game(10, rng)
    played = Screened(settings_of(10, 4, goal="values"), game, game, 90)
    assert all(r.full_M.all() for r in played.rounds)
    assert not any(len(r.promoted_MP) for r in played.rounds)
