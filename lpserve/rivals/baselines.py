"""Rival searches for sets of players to remove, as proposers: they never score anything themselves.

A proposer is a coroutine. It yields an `Ask` and is sent the mean NLL of each of its masks,
`float64[M]` in nats per token, lower is better, non-finite where scoring failed; any driver can run
it (`drive` runs one on a function). It never asks twice for a mask on the same windows, and the
same arguments give the same sequence. What a rival has found at any moment is the best set of each
size that was scored on all windows (`best_sets`): it gets credit for everything that it scored, the
published answer among it.

Notation: M masks, P players, D random draws, Q coalitions of the paper's second stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

import numpy as np

from lpserve.errors import InputError
from lpserve.masks import (
    StratifiedDesign,
    draw,
    drop_one,
    full_mask,
    keys,
    paper_kept_counts,
    removed_players,
    without,
)
from lpserve.plan.sets import best_row, ranking_mask
from lpserve.rounds.history import CompletedRound
from lpserve.rounds.planner import RoundPlanner
from lpserve.rounds.settings import RoundSettings
from lpserve.surrogate import PaperSurrogate
from lpserve.types import BoolArray, FloatArray, IntArray
from lpserve.utility import utility_named
from lpserve.values.sampling import paper_values

RANDOM_BATCH = 256
"""Masks of an `Ask` of `random_search`: no choice depends on a score, so batches may be large."""

EVOPRESS_OFFSPRING = 32
EVOPRESS_INITIAL = 64
EVOPRESS_SURVIVORS = 2
EVOPRESS_MOST_SWAPS = 3
EVOPRESS_FIRST_SHARE = 2048 / 32768
"""Tokens of the first selection over those of the last."""
EVOPRESS_DIVISOR = 1.5
"""Generations for r removed of P are r (P - r) over this, rounded down."""

TAYLOR_SPARED_FIRST, TAYLOR_SPARED_LAST = 4, 2

PAPER_DRAWS = 8_000
PAPER_COALITIONS = 80_000
PAPER_LEAST_DRAWS = 5
"""The fewest distinct draws that its surrogate is trained on."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Masks whose mean NLLs a proposer wants."""

    masks_MP: BoolArray
    """Distinct."""
    windows: range | None = None
    """On which windows, by index; None is all."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An `Ask` with its answer."""

    ask: Ask
    nll_M: FloatArray
    """Mean NLL over the asked windows in nats per token; non-finite where scoring failed."""


Proposer = Generator[Ask, FloatArray, None]


def drive(
    proposer: Proposer,
    score: Callable[[Ask], FloatArray],
    budget: int,
    num_windows: int | None = None,
) -> list[Answer]:
    """Run a proposer to its end or to a number of masks; all that was scored, in order.

    Args:
        budget: distinct masks scored on any windows, as a run counts them. The `Ask` that would
            exceed it is cut where it does, and the proposer is closed without its answer.
        num_windows: of the game; a mask on some of them then counts for its share.
    """
    record: list[Answer] = []
    seen: dict[bytes, set[int]] = {}
    with closing(proposer), suppress(StopIteration):
        ask = next(proposer)
        while len(masks_MP := _within(ask, seen, budget, num_windows)):
            part = Ask(masks_MP, ask.windows)
            record.append(Answer(part, score(part)))
            if len(masks_MP) < len(ask.masks_MP):
                break
            ask = proposer.send(record[-1].nll_M)
    return record


def _within(
    ask: Ask, seen: dict[bytes, set[int]], budget: int, num_windows: int | None
) -> BoolArray:
    """The masks before the first one that a budget does not allow; they are added to `seen`, with
    the windows that they were scored on."""
    parts = num_windows or 1
    windows = range(parts) if num_windows is None or ask.windows is None else ask.windows
    used = sum(map(len, seen.values()))
    for row, key in enumerate(keys(ask.masks_MP)):
        new = set(windows) - seen.get(key, set())
        used += len(new)
        if used > budget * parts:
            return ask.masks_MP[:row]
        seen.setdefault(key, set()).update(new)
    return ask.masks_MP


def best_sets(record: Sequence[Answer]) -> dict[int, tuple[BoolArray, float]]:
    """Number removed -> the best mask scored on all windows and its NLL, ties to the smaller key.

    Sizes without a finite score are not in it.
    """
    whole = [scored for scored in record if scored.ask.windows is None]
    if not whole:
        return {}
    masks_MP = np.concatenate([scored.ask.masks_MP for scored in whole])
    nll_M = np.concatenate([scored.nll_M for scored in whole])
    removed_M = (~masks_MP).sum(axis=1)
    found = {}
    for r in np.unique(removed_M):
        rows = np.flatnonzero(removed_M == r)
        best = best_row(masks_MP[rows], -nll_M[rows])
        if best is not None:
            found[int(r)] = masks_MP[rows[best]], float(nll_M[rows[best]])
    return found


def random_search(num_players: int, max_removed: int, seed: int) -> Proposer:
    """Uniform sets of 1..max_removed players, of every size in turn, none twice; to the last."""
    strata = range(num_players - 1, num_players - max_removed - 1, -1)
    design = StratifiedDesign(num_players, list(strata), seed)
    while len(masks_MP := design.take(RANDOM_BATCH)):
        yield Ask(masks_MP)


def one_shot(num_players: int, max_removed: int) -> Proposer:
    """Shortened-LLaMA's perplexity criterion (Kim et al., arXiv 2402.02834).

    Every player is dropped alone; the set of size r are the r players whose loss cost least. Sets
    that would hold a player without a finite score are not asked for. Published on 10 windows of
    128 tokens; here on the run's.
    """
    singles_PP = drop_one(full_mask(num_players))
    nll_P = yield Ask(singles_PP)
    cost_P = np.where(np.isfinite(nll_P), nll_P, np.inf)
    most = min(max_removed, int(np.isfinite(nll_P).sum()))
    sets = [ranking_mask(cost_P, r) for r in range(2, most + 1)]
    if sets:
        yield Ask(np.array(sets))


def last_layers(num_players: int, max_removed: int) -> Proposer:
    """The last r players; a strong start for fine-tuning (Lu et al., arXiv 2411.15558)."""
    yield from _ranked(-np.arange(num_players, dtype=np.float64), max_removed)


def block_influence(influence_P: FloatArray, max_removed: int) -> Proposer:
    """ShortGPT (Men et al., arXiv 2403.03853): the r players that turn the hidden state least.

    Args:
        influence_P: 1 - mean cosine of a player's input and output
            (`engine.criteria.HiddenStates`).
    """
    yield from _ranked(influence_P, max_removed)


def contiguous_layers(distance_LL: FloatArray, max_removed: int) -> Proposer:
    """Gromov et al. (arXiv 2403.17887): the r players in a row whose two ends are most alike.

    Args:
        distance_LL: angular distance of the states entering players i and j, `float64[P+1, P+1]`
            (`engine.criteria.HiddenStates`).
    """
    num_players = len(distance_LL) - 1
    sets = []
    for r in range(1, min(max_removed, num_players) + 1):
        start = int(np.argmin([distance_LL[i, i + r] for i in range(num_players - r + 1)]))
        sets.append(without(num_players, list(range(start, start + r))))
    yield Ask(np.array(sets))


def taylor(importance_P: FloatArray, max_removed: int) -> Proposer:
    """Shortened-LLaMA's Taylor+ (Kim et al., arXiv 2402.02834): the r players whose weights matter
    least to first order, the first 4 and last 2 spared as long as others are left.

    Args:
        importance_P: sum of |weight x gradient| over a player (`engine.criteria`).
    """
    spared_P = np.ones(len(importance_P), dtype=bool)
    spared_P[TAYLOR_SPARED_FIRST : len(importance_P) - TAYLOR_SPARED_LAST] = False
    # the spared ones come last, in the same order
    yield from _ranked(
        np.where(spared_P, importance_P + importance_P.sum(), importance_P), max_removed
    )


def _ranked(values_P: FloatArray, max_removed: int) -> Proposer:
    most = min(max_removed, len(values_P))
    yield Ask(np.array([ranking_mask(values_P, r) for r in range(1, most + 1)]))


def ours(settings: RoundSettings) -> Proposer:
    """lpserve's own rounds, as a run plays them: round n is chosen from rounds up to n - 2."""
    planner = RoundPlanner(settings, utility_named("neg_nll"), np.ones(1, dtype=np.int64))
    rounds: list[CompletedRound] = []
    last: CompletedRound | None = None
    for index in itertools.count():
        asked = planner.propose(index, rounds)
        if not len(asked.all_masks):
            return
        if last is not None:
            rounds.append(last)
        nll_M = yield Ask(asked.all_masks)
        nll_M1 = nll_M[:, None]  # means, not rounded as a store would round them
        last = CompletedRound(asked.all_masks, nll_M1, nll_M1)


def greedy(num_players: int, max_removed: int) -> Proposer:
    """SLEB's greedy, every step evaluated anew (Song et al., arXiv 2402.09025, its metric 3).

    A step drops each player left beside those already gone and keeps the best set; ties go to the
    smaller mask key. Every player may go: the published code spares the first and the last one.
    """
    current_P = full_mask(num_players)
    for _ in range(min(max_removed, num_players)):
        options_MP = drop_one(current_P)
        nll_M = yield Ask(options_MP)
        best = best_row(options_MP, -nll_M)
        if best is None:
            return
        current_P = options_MP[best]


def evolutionary(
    num_players: int,
    max_removed: int,
    *,
    num_windows: int,
    seed: int,
    first_share: float = EVOPRESS_FIRST_SHARE,
) -> Proposer:
    """EvoPress for depth pruning (Sieberling et al., arXiv 2410.14649, algorithm 1).

    A (1+lambda) evolution at a fixed number removed: the best of 64 random sets is the first
    parent; each generation makes 32 distinct offspring by level switches (a kept and a dropped
    player change places; 1 to 3 times, the smaller of two uniform draws), keeps the 2 best of them
    on few tokens, and of those and the parent the best on all. These numbers, and r (P - r) / 1.5
    generations, are its published script's; where a size has fewer sets, all are asked for.

    It searches one size a run. Here the runs for r = 1..max_removed go side by side, a generation
    of each in one `Ask`, so that every size has had as many generations as any other until its
    published number is reached: the budget is shared evenly.

    Players move whole (attention and MLP together: its `drop_entire_block`), fitness is the NLL
    (its `ppl`), the few tokens are other windows in each generation, drawn as a block, and the last
    selection is on all windows: the published code draws others there, too.

    Args:
        num_windows: windows of the game.
        first_share: windows of the first selection over all; 1: the first selection decides.
    """
    rng = np.random.default_rng(seed)
    known = _Known()

    def few() -> range | None:
        count = max(1, round(first_share * num_windows))
        start = int(rng.integers(num_windows - count + 1))
        return range(start, start + count) if count < num_windows else None

    sizes = range(1, min(max_removed, num_players) + 1)
    initial = []
    for r in sizes:
        count = min(EVOPRESS_INITIAL, math.comb(num_players, r))
        initial.append(_distinct(lambda r=r: draw(num_players, num_players - r, 1, rng)[0], count))
    scores = yield from known.groups(initial, few())
    parents = {
        r: group_MP[_best(nll_M, 1)[0]]
        for r, group_MP, nll_M in zip(sizes, initial, scores, strict=True)
    }
    generation = 0
    while True:
        alive = [r for r in sizes if generation < evopress_generations(num_players, r)]
        if not alive:
            return
        broods = [_brood(parents[r], rng) for r in alive]
        scores = yield from known.groups(broods, few())
        finals = [
            np.concatenate([brood_MP[_best(nll_M, EVOPRESS_SURVIVORS)], parents[r][None]])
            for r, brood_MP, nll_M in zip(alive, broods, scores, strict=True)
        ]
        scores = yield from known.groups(finals, None)
        for r, finals_MP, nll_M in zip(alive, finals, scores, strict=True):
            parents[r] = finals_MP[_best(nll_M, 1)[0]]
        generation += 1


def evopress_generations(num_players: int, num_removed: int) -> int:
    """Its published number of generations for one size."""
    return int(num_removed * (num_players - num_removed) / EVOPRESS_DIVISOR)


def _best(nll_M: FloatArray, count: int) -> IntArray:
    """Rows of the lowest NLLs, ties to the earlier row; failed masks last."""
    return np.argsort(np.where(np.isfinite(nll_M), nll_M, np.inf), kind="stable")[:count]


def _brood(parent_P: BoolArray, rng: np.random.Generator) -> BoolArray:
    """Distinct offspring that differ from the parent, `bool[<=32, P]`."""
    kept, dropped = int(parent_P.sum()), int((~parent_P).sum())
    within_reach = sum(
        math.comb(kept, swaps) * math.comb(dropped, swaps)
        for swaps in range(1, EVOPRESS_MOST_SWAPS + 1)
    )
    count = min(EVOPRESS_OFFSPRING, within_reach)
    return _distinct(lambda: _mutant(parent_P, rng), count, other_than=parent_P)


def _mutant(parent_P: BoolArray, rng: np.random.Generator) -> BoolArray:
    child_P = parent_P.copy()
    for _ in range(rng.integers(1, EVOPRESS_MOST_SWAPS + 1, size=2).min()):
        out = rng.choice(np.flatnonzero(child_P))
        back = rng.choice(np.flatnonzero(~child_P))
        child_P[out], child_P[back] = False, True
    return child_P


def _distinct(
    make: Callable[[], BoolArray], count: int, other_than: BoolArray | None = None
) -> BoolArray:
    """`count` different masks from a random source, in the order in which they came up."""
    made: dict[tuple[int, ...], BoolArray] = {}
    avoided = removed_players(other_than) if other_than is not None else None
    while len(made) < count:
        mask_P = make()
        if (removed := removed_players(mask_P)) != avoided:
            made.setdefault(removed, mask_P)
    return np.array(list(made.values()))


def paper(
    num_players: int,
    max_removed: int,
    *,
    budget: int,
    seed: int,
    strata: Sequence[int] | None = None,
) -> Proposer:
    """The pipeline of arXiv 2602.07804: random masks, a network, values, the r lowest removed.

    Masks are drawn with replacement, as many from each stratum (`paper_kept_counts`); the published
    8,000, or as many as leave masks of the budget for the rest of the pipeline. A repeated draw
    counts as one of the 8,000 and trains the network again, as published, but is scored once.
    Utility is the perplexity ratio; failed masks train nothing. Values come from 80,000 coalitions
    of the same strata, and their ranking is scored for every r last.

    Args:
        strata: kept counts to draw from, where the published ones are not all to be had.

    Raises:
        InputError: the budget does not hold all kept, `PAPER_LEAST_DRAWS` draws and a set for every
            r; raised at the first step.
    """
    room = budget - 1 - max_removed
    if room < PAPER_LEAST_DRAWS:
        raise InputError(
            f"the paper's pipeline removing up to {max_removed} needs a budget of at least "
            f"{1 + PAPER_LEAST_DRAWS + max_removed} masks: got {budget}"
        )
    rng = np.random.default_rng(seed)
    draws_DP = paper_draws(num_players, PAPER_DRAWS, rng, strata)
    coalitions_QP = paper_draws(num_players, PAPER_COALITIONS, rng, strata)
    draws_DP = draws_DP[_distinct_so_far(draws_DP) <= room]
    known = _Known()
    nll_M = yield from known.score(np.concatenate([full_mask(num_players)[None], draws_DP]))
    finite_D = np.isfinite(nll_M[1:])
    if not np.isfinite(nll_M[0]) or finite_D.sum() < 2:
        return
    surrogate = PaperSurrogate(seed)
    # not `fit`, which refuses repeated masks and measures a held-out error that nobody asks for
    surrogate.train(draws_DP[finite_D], np.exp(nll_M[0] - nll_M[1:][finite_D]))
    values_P = paper_values(surrogate.mean, coalitions_QP).values_P
    sets_MP = np.array([ranking_mask(values_P, r) for r in range(1, max_removed + 1)])
    yield from known.score(sets_MP)


def paper_draws(
    num_players: int,
    count: int,
    rng: np.random.Generator,
    strata: Sequence[int] | None = None,
) -> BoolArray:
    """Random masks of strata (None: the paper's), dealt in turn, with replacement,
    `bool[count, P]`."""
    strata = paper_kept_counts(num_players) if strata is None else strata
    share = -(-count // len(strata))
    masks_SDP = np.array([draw(num_players, kept, share, rng) for kept in strata])
    return masks_SDP.swapaxes(0, 1).reshape(-1, num_players)[:count]


def _distinct_so_far(masks_DP: BoolArray) -> IntArray:
    """How many different masks there are up to each, `int64[D]`."""
    seen: set[bytes] = set()
    counts = []
    for key in keys(masks_DP):
        seen.add(key)
        counts.append(len(seen))
    return np.array(counts, dtype=np.int64)


class _Known:
    """The scores that a proposer was sent, so that it asks for nothing twice."""

    def __init__(self) -> None:
        self._nll: dict[tuple[range | None, bytes], float] = {}

    def score(
        self, masks_MP: BoolArray, windows: range | None = None
    ) -> Generator[Ask, FloatArray, FloatArray]:
        """NLLs of any masks; what is not known is asked for in one `Ask`."""
        mask_keys = [(windows, key) for key in keys(masks_MP)]
        fresh: dict[tuple[range | None, bytes], BoolArray] = {}
        for key, mask_P in zip(mask_keys, masks_MP, strict=True):
            if key not in self._nll:
                fresh.setdefault(key, mask_P)
        if fresh:
            nll_M = yield Ask(np.array(list(fresh.values())), windows)
            self._nll.update(zip(fresh, nll_M.tolist(), strict=True))
        return np.array([self._nll[key] for key in mask_keys], dtype=np.float64)

    def groups(
        self, groups: Sequence[BoolArray], windows: range | None
    ) -> Generator[Ask, FloatArray, list[FloatArray]]:
        """The same for several groups, dealt in turn: a budget's end cuts all of them alike."""
        place_M = np.concatenate([np.arange(len(group)) for group in groups])
        turn_M = np.argsort(place_M, kind="stable")
        nll_M = np.empty(len(turn_M))
        nll_M[turn_M] = yield from self.score(np.concatenate(groups)[turn_M], windows)
        return np.split(nll_M, np.cumsum([len(group) for group in groups])[:-1])
