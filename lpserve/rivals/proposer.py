"""Searches for sets of players to remove, as proposers: they never score anything themselves.

A proposer is a coroutine. It yields an `Ask` and is sent the mean NLL of each of its masks,
`float64[M]` in nats per token, lower is better, non-finite where scoring failed; any driver can run
it (`drive` runs one on a function). It never asks twice for a mask on the same windows, and the
same arguments give the same sequence. The result of a search at any moment is the best set for each
target that was scored on all windows (`best_sets`): every scored set counts, the published answer
among them.

Notation: M masks, P players.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpserve.masks import best_row, keys, ranking_mask
from lpserve.plan.targets import Target
from lpserve.types import BoolArray, FloatArray


@dataclass(frozen=True, slots=True)
class Ask:
    """Masks whose mean NLLs a proposer wants."""

    masks_MP: BoolArray
    """`bool[M, P]`, True = the player is kept; distinct."""
    windows: range | None = None
    """Indices of the windows to score on; None: all windows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An `Ask` with the scores of its masks."""

    ask: Ask
    nll_M: FloatArray
    """Mean NLL over the asked windows in nats per token; non-finite where scoring failed."""


Proposer = Generator[Ask, FloatArray, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSetting:
    """What a search knows about the game before it starts."""

    num_players: int
    max_removed: int
    """Sets of 1 to so many removed players are looked for."""
    num_windows: int
    """Calibration windows of the game."""
    budget: int
    """Masks that the search may score; most searches are cut there whatever they plan."""
    seed: int
    parts: tuple[str, ...] = ()
    """Which part of its layer each player is (`Player.part`); empty: they are layers."""
    costs: tuple[Target, ...] = ()
    """Shares of a cost that the best sets are wanted for; empty: they are wanted of every size."""
    measured: Any = None
    """What the engine method of `Measurement` returned, for searches that look inside the model."""


def drive(
    proposer: Proposer,
    score: Callable[[Ask], FloatArray],
    budget: int,
    num_windows: int | None = None,
) -> list[Answer]:
    """Run a proposer to its end or until the budget is spent; returns all answers in order.

    Args:
        budget: distinct masks scored on any windows, as a run counts them. The `Ask` that would
            exceed it is cut where it does, and the proposer is closed without its answer.
        num_windows: windows of the game: a mask scored on some of them then counts for that share
            of a mask. None: every mask counts as one.
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


def best_sets(
    record: Sequence[Answer], targets: Sequence[Target]
) -> dict[Target, tuple[BoolArray, float]]:
    """The best set that meets each target and was scored on all windows.

    Returns:
        Target -> (mask `bool[P]`, its mean NLL); ties go to the smaller mask key, targets without a
        finite score are left out.
    """
    complete = [answer for answer in record if answer.ask.windows is None]
    if not complete:
        return {}
    masks_MP = np.concatenate([answer.ask.masks_MP for answer in complete])
    nll_M = np.concatenate([answer.nll_M for answer in complete])
    found = {}
    for target in targets:
        rows = np.flatnonzero(target.holds(masks_MP))
        best = best_row(masks_MP[rows], -nll_M[rows])
        if best is not None:
            found[target] = masks_MP[rows[best]], float(nll_M[rows[best]])
    return found


def ranked_sets(values_P: FloatArray, max_removed: int) -> Proposer:
    """One `Ask`: for each r = 1..max_removed the set of the r players of the lowest values."""
    largest = min(max_removed, len(values_P))
    yield Ask(np.array([ranking_mask(values_P, r) for r in range(1, largest + 1)]))


class KnownScores:
    """The scores that a proposer has been sent; it asks through this for what it lacks, once."""

    def __init__(self) -> None:
        self._nll: dict[tuple[range | None, bytes], float] = {}

    def score(
        self, masks_MP: BoolArray, windows: range | None = None
    ) -> Generator[Ask, FloatArray, FloatArray]:
        """Mean NLLs of any masks, `float64[M]`; unknown ones are asked for in one `Ask`."""
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
        """Mean NLLs of several groups of masks, in one `Ask`.

        The groups' masks alternate in it, so that the end of a budget cuts all groups alike.
        """
        place_M = np.concatenate([np.arange(len(group)) for group in groups])
        turn_M = np.argsort(place_M, kind="stable")
        nll_M = np.empty(len(turn_M))
        nll_M[turn_M] = yield from self.score(np.concatenate(groups)[turn_M], windows)
        return np.split(nll_M, np.cumsum([len(group) for group in groups])[:-1])
