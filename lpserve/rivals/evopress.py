"""EvoPress for depth pruning (Sieberling et al., arXiv 2410.14649, algorithm 1).

Notation: M masks, P players.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from lpserve.masks import draw, removed_players
from lpserve.model.players import ATTENTION, MLP
from lpserve.rivals.proposer import KnownScores, Proposer, SearchSetting
from lpserve.types import BoolArray, FloatArray, IntArray

EVOPRESS_OFFSPRING = 32
EVOPRESS_INITIAL = 64
EVOPRESS_SURVIVORS = 2
EVOPRESS_MAX_SWAPS = 3
EVOPRESS_FIRST_SHARE = 2048 / 32768
"""Tokens of the first selection over those of the last."""
EVOPRESS_DIVISOR = 1.5
"""Generations for r removed of P are r (P - r) over this, rounded down."""


def evolutionary(
    num_players: int,
    max_removed: int,
    *,
    num_windows: int,
    seed: int,
    parts: Sequence[str] = (),
    first_share: float = EVOPRESS_FIRST_SHARE,
) -> Proposer:
    """EvoPress for depth pruning (Sieberling et al., arXiv 2410.14649, algorithm 1).

    A (1+lambda) evolution at a fixed number removed: the best of 64 random sets is the first
    parent; each generation makes 32 distinct offspring by level switches (a kept and a dropped
    player change places; 1 to 3 times, the smaller of two uniform draws), keeps the 2 best of them
    on few tokens, and of those and the parent the best on all. These numbers, and r (P - r) / 1.5
    generations, are its published script's; where a size has fewer sets, all are asked for.

    The published search finds sets of one size. Here the searches for r = 1..max_removed run side
    by side, a generation of each in one `Ask`, so that every size has had as many generations as
    any other until its published number is reached: the budget is shared evenly.

    Players that are layers are dropped whole (its `drop_entire_block`). Where they are halves, as
    many attention as feed-forward parts go, so that the sizes are even, and a switch is between two
    of one kind, drawn anew each time. Fitness is the NLL (its `ppl`), the few tokens are other
    windows in each generation, drawn as a block, and the last selection is on all windows: the
    published code draws others there, too.

    Args:
        num_windows: windows of the game.
        parts: which part of its layer each player is; empty: they are layers.
        first_share: windows of the first selection over all; 1: the first selection decides.
    """
    rng = np.random.default_rng(seed)
    known = KnownScores()

    kinds = _kinds(num_players, parts)
    sizes = range(len(kinds), min(max_removed, num_players) + 1, len(kinds))
    initial = [_first_parents(kinds, r // len(kinds), rng) for r in sizes]
    scores = yield from known.groups(initial, _few_windows(num_windows, first_share, rng))
    parents = {
        r: group_MP[_best(nll_M, 1)[0]]
        for r, group_MP, nll_M in zip(sizes, initial, scores, strict=True)
    }
    generation = 0
    while True:
        alive = [r for r in sizes if generation < evopress_generations(num_players, r)]
        if not alive:
            return
        broods = [offspring(parents[r], rng, kinds) for r in alive]
        scores = yield from known.groups(broods, _few_windows(num_windows, first_share, rng))
        finals = [
            np.concatenate([brood_MP[_best(nll_M, EVOPRESS_SURVIVORS)], parents[r][None]])
            for r, brood_MP, nll_M in zip(alive, broods, scores, strict=True)
        ]
        scores = yield from known.groups(finals, None)
        for r, finals_MP, nll_M in zip(alive, finals, scores, strict=True):
            parents[r] = finals_MP[_best(nll_M, 1)[0]]
        generation += 1


def _few_windows(num_windows: int, share: float, rng: np.random.Generator) -> range | None:
    """A random block of consecutive windows for a first selection; None: the share is all."""
    count = max(1, round(share * num_windows))
    start = int(rng.integers(num_windows - count + 1))
    return range(start, start + count) if count < num_windows else None


def evopress_generations(num_players: int, num_removed: int) -> int:
    """EvoPress' published number of generations for one number removed."""
    return int(num_removed * (num_players - num_removed) / EVOPRESS_DIVISOR)


def _best(nll_M: FloatArray, count: int) -> IntArray:
    """Rows of the lowest NLLs, ties to the earlier row; failed masks last."""
    return np.argsort(np.where(np.isfinite(nll_M), nll_M, np.inf), kind="stable")[:count]


def offspring(
    parent_P: BoolArray, rng: np.random.Generator, kinds: Sequence[IntArray] | None = None
) -> BoolArray:
    """Distinct offspring that differ from the parent, `bool[<=32, P]`.

    Args:
        kinds: players that change places with one another; None: all do.
    """
    kinds = kinds or [np.arange(len(parent_P))]
    # by number of switches, how many sets are within reach
    reach = np.array([1], dtype=object)
    for kind in kinds:
        kept = int(parent_P[kind].sum())
        switches = range(EVOPRESS_MAX_SWAPS + 1)
        of_kind = [math.comb(kept, n) * math.comb(len(kind) - kept, n) for n in switches]
        reach = np.convolve(reach, np.array(of_kind, dtype=object))
    count = min(EVOPRESS_OFFSPRING, int(reach[1 : EVOPRESS_MAX_SWAPS + 1].sum()))
    return _distinct(lambda: _mutant(parent_P, rng, kinds), count, other_than=parent_P)


def _mutant(parent_P: BoolArray, rng: np.random.Generator, kinds: Sequence[IntArray]) -> BoolArray:
    child_P = parent_P.copy()
    for _ in range(rng.integers(1, EVOPRESS_MAX_SWAPS + 1, size=2).min()):
        kind = kinds[0] if len(kinds) == 1 else kinds[int(rng.integers(len(kinds)))]
        out = rng.choice(kind[child_P[kind]])
        back = rng.choice(kind[~child_P[kind]])
        child_P[out], child_P[back] = False, True
    return child_P


def _kinds(num_players: int, parts: Sequence[str]) -> list[IntArray]:
    """Players of each kind: attention and feed-forward parts where there are as many of both and
    nothing else, or else all."""
    found = [np.flatnonzero([part == kind for part in parts]) for kind in (ATTENTION, MLP)]
    if parts and len(found[0]) == len(found[1]) == num_players / 2:
        return found
    return [np.arange(num_players)]


def _first_parents(kinds: Sequence[IntArray], each: int, rng: np.random.Generator) -> BoolArray:
    """Random sets of one size, that drop so many players of each kind."""
    count = min(EVOPRESS_INITIAL, math.prod(math.comb(len(kind), each) for kind in kinds))
    return _distinct(lambda: _drawn(kinds, each, rng), count)


def _drawn(kinds: Sequence[IntArray], each: int, rng: np.random.Generator) -> BoolArray:
    """A random mask that drops so many players of each kind."""
    mask_P = np.ones(sum(map(len, kinds)), dtype=bool)
    for kind in kinds:
        mask_P[kind] = draw(len(kind), len(kind) - each, 1, rng)[0]
    return mask_P


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


def propose(setting: SearchSetting) -> Proposer:
    """The proposer of the registry."""
    return evolutionary(
        setting.num_players,
        setting.max_removed,
        num_windows=setting.num_windows,
        seed=setting.seed,
        parts=setting.parts,
    )
