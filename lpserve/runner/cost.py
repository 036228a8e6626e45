"""What a run will do and what that implies, before any GPU is rented. Imports no torch.

Reads a checkpoint's config and safetensors headers, walks the rounds that a run with these settings
walks, and counts: masks, distinct layer-forwards, heads, tokens, FLOP, memory. A time follows only
from a rate that the user names; nothing here knows the speed of any device.

Which masks a run asks for depends on scores that do not exist yet. Round sizes and the
sampled design are the run's own; scores come from a stand-in (a random loss
for every layer), in place of the surrogate's proposals stand sets of low stand-in loss, and random
masks stand for those that a run chooses for what they say about the values and for what they cost.
The latter share more prefixes, so a run takes fewer layer-forwards than estimated, rarely more.

Notation: M masks, P players (layers), N windows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_type_hints

import numpy as np

from lpserve.config import (
    Count,
    CountOr0,
    Dtype,
    Goal,
    Length,
    Positive,
    Text,
    resolved_max_removed,
)
from lpserve.errors import InputError
from lpserve.inputs.rules import default_round_size
from lpserve.inputs.shapes import check_value
from lpserve.masks import full_mask, ranking_mask, sort_distinct, trie_player_forwards
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.size import ITEM_BYTES, ModelSize, model_size
from lpserve.plan.targets import Target
from lpserve.rounds.history import AskedMasks, CompletedRound, KnownUtilities
from lpserve.rounds.planner import RoundPlanner
from lpserve.rounds.settings import RoundSettings
from lpserve.scoring.pace import unit_masks
from lpserve.surrogate import Surrogate
from lpserve.types import BoolArray, FloatArray
from lpserve.utility import utility_named

HELDOUT_CANDIDATES = 4
"""Sets of each size that held-out windows check: greedy, ranking, search and the best."""
_PROPOSALS = 16  # stand-in sets of each size for a round of proposals


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """What to count. Names are the flags of `lpserve run` where both have them."""

    model: Text
    budget: Count = 400
    max_removed: Count | None = None
    """Default: 3/8 of the layers."""
    num_windows: Count = 10
    heldout_windows: Count = 64
    length: Length = 128
    goal: Goal = "both"
    round_size: Count | None = None
    """Default: as a run's."""
    seed: CountOr0 = 0
    dtype: Dtype = "float32"
    engines: Count = 1
    gpus_per_engine: Count = 1
    tflops_per_gpu: Positive | None = None
    """TFLOP/s that one GPU keeps up on this work, as the user assumes; None: no time is given."""
    gpu_memory_gb: Positive | None = None
    """GiB of one GPU; None: nothing to compare with."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(CostSettings, include_extras=True)
        for key, kind in kinds.items():
            check_value(getattr(self, key), kind, key)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """The work of one part of a run; layer-forwards are of one layer over all its windows."""

    masks: int
    layer_forwards: int
    alone: int
    """Layer-forwards if every mask ran alone, its dropped layers skipped."""
    tokens: int
    """Tokens of all windows: what one layer-forward or one head takes."""
    flop: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The whole count."""

    settings: CostSettings
    size: ModelSize
    max_removed: int
    round_size: int
    rounds: list[int]
    """Masks of every round."""
    unit_masks: int
    """Most masks that one engine is handed at once."""
    scoring: Part
    heldout: Part

    @property
    def flop(self) -> float:
        return self.scoring.flop + self.heldout.flop

    @property
    def seconds(self) -> float | None:
        """Time of the arithmetic at the assumed rate, every engine busy; None without a rate."""
        rate = self.settings.tflops_per_gpu
        if rate is None:
            return None
        return self.flop / (self.settings.engines * self.settings.gpus_per_engine * rate * 1e12)

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights on one GPU, spread evenly over an engine's GPUs."""
        item = ITEM_BYTES[self.settings.dtype]
        return self.size.parameters * item / self.settings.gpus_per_engine

    @property
    def path_bytes(self) -> float:
        """Bytes of the states of one path down the trie: hidden state and residual, P + 1 times."""
        players = len(self.size.layer_parameters_P)
        item = ITEM_BYTES[self.settings.dtype]
        return 2.0 * (players + 1) * self.scoring.tokens * self.size.hidden_size * item


def cost(settings: CostSettings) -> Cost:
    """Count a run.

    Raises:
        InputError: the checkpoint cannot be read or understood, or a setting is out of range.
    """
    checkpoint = read_checkpoint(settings.model)
    size = model_size(checkpoint)
    players = len(size.layer_parameters_P)
    removed = resolved_max_removed(settings.max_removed, players)
    rounds_settings = RoundSettings(
        num_players=players,
        max_removed=removed,
        sizes=(players - removed, players - 1),
        seed=settings.seed,
        surrogate="ridge",
        round_size=settings.round_size or default_round_size(players, settings.goal),
        goal=settings.goal,
    )
    minimum = rounds_settings.minimum_budget()
    if settings.budget < minimum:
        raise InputError(
            f"budget must be at least {minimum} for {players} layers and max_removed {removed}: "
            f"got {settings.budget}"
        )
    rounds = sample_rounds(rounds_settings, settings.budget)
    tokens = settings.num_windows * settings.length
    unit = _unit_masks(settings, size, rounds, tokens)
    units = [u for masks_MP in rounds for u in split_units(masks_MP, unit, settings.engines)]
    heldout = _heldout_masks(rounds_settings)
    heldout_tokens = settings.heldout_windows * settings.length
    return Cost(
        settings=settings,
        size=size,
        max_removed=removed,
        round_size=rounds_settings.round_size,
        rounds=[len(r) for r in rounds],
        unit_masks=unit,
        scoring=_part(units, size, tokens, settings.length),
        heldout=_part(
            split_units(heldout, len(heldout), settings.engines),
            size,
            heldout_tokens,
            settings.length,
        ),
    )


class StandInModel:
    """Proposes sets of low stand-in loss, in place of what a fit would propose (`RoundModel`)."""

    surrogate: Surrogate | None = None

    def __init__(self, settings: RoundSettings, loss_P: FloatArray) -> None:
        self._sizes, self._loss_P = settings.max_removed, loss_P
        self._rng = np.random.default_rng([settings.seed, settings.num_players])

    def fit(self, known: KnownUtilities) -> bool:
        return True

    def grown(self, known: KnownUtilities, target: Target) -> BoolArray:
        noisy = [
            target.ranking(self._loss_P * self._rng.lognormal(0.0, 0.5, len(self._loss_P)))
            for _ in range(_PROPOSALS)
        ]
        return sort_distinct(np.array(noisy))[0]

    def rankings(self, index: int) -> list[BoolArray]:
        sizes = self._sizes
        return [ranking_mask(self._loss_P, (r + index) % sizes + 1) for r in range(sizes)]

    def by_improvement(
        self,
        known: KnownUtilities,
        asked: AskedMasks,
        count: int,
        pending_MP: BoolArray,
        *,
        reached_alone: bool = False,
    ) -> BoolArray:
        most = self._sizes
        if reached_alone:
            most = min(most, int((~known.masks_MP).sum(axis=1).max()))
        sets = [
            ranking_mask(self._loss_P * self._rng.lognormal(0.0, 0.5, len(self._loss_P)), r)
            for _ in range(_PROPOSALS)
            for r in range(1, most + 1)
        ]
        fresh = asked.unseen(sort_distinct(np.array(sets))[0])
        return fresh[self._rng.permutation(len(fresh))[:count]]

    def promotions(
        self, known: KnownUtilities, waiting_MP: BoolArray, asked: AskedMasks, gain: float
    ) -> BoolArray:
        """None: a count screens nothing."""
        return waiting_MP[:0]

    def for_values(
        self, index: int, asked: AskedMasks, count: int, pending_MP: BoolArray
    ) -> BoolArray:
        """None: the sampled design stands for them."""
        return pending_MP[:0]

    def settled(
        self,
        known: KnownUtilities,
        waiting_MP: BoolArray,
        asked: AskedMasks,
        *,
        chance: float,
        gain: float,
    ) -> bool:
        return False

    def narrow(self, width: float) -> bool:
        return False


def sample_rounds(settings: RoundSettings, budget: int) -> list[BoolArray]:
    """The masks of every round, `bool[M, P]` each, up to the budget in total."""
    rng = np.random.default_rng([settings.seed, settings.num_players, 1])
    loss_P = rng.gamma(1.0, 1.0, settings.num_players)
    model = StandInModel(settings, loss_P)
    planner = RoundPlanner(settings, utility_named("neg_nll"), np.ones(1, np.int64), model=model)
    rounds: list[CompletedRound] = []
    asked = 0
    while asked < budget:
        masks_MP = planner.propose(len(rounds), rounds).masks_MP[: budget - asked]
        if not len(masks_MP):
            break
        asked += len(masks_MP)
        loss_column = (1.0 + (~masks_MP) @ loss_P)[:, None].astype(np.float32)
        rounds.append(CompletedRound(masks_MP, loss_column, loss_column))
    return [done.masks_MP for done in rounds]


def split_units(masks_MP: BoolArray, largest: int, engines: int) -> list[BoolArray]:
    """A round cut in key order into units of at most `most` masks, and at least one an engine."""
    sorted_MP, _ = sort_distinct(masks_MP)
    size = max(1, min(largest, -(-len(sorted_MP) // engines)))
    return [sorted_MP[start : start + size] for start in range(0, len(sorted_MP), size)]


def _unit_masks(
    settings: CostSettings, size: ModelSize, rounds: list[BoolArray], tokens: int
) -> int:
    """Masks of a unit at the assumed rate; without a rate a whole round."""
    largest = max(len(masks_MP) for masks_MP in rounds)
    if settings.tflops_per_gpu is None:
        return largest
    round_work = _part(rounds, size, tokens, settings.length)
    rate = settings.gpus_per_engine * settings.tflops_per_gpu * 1e12
    return min(largest, unit_masks(round_work.flop / round_work.masks / rate))


def _heldout_masks(settings: RoundSettings) -> BoolArray:
    """All kept and `HELDOUT_CANDIDATES` stand-in sets of each size."""
    players = settings.num_players
    rng = np.random.default_rng([settings.seed, players, 2])
    sets = [full_mask(players)]
    for r in range(1, settings.max_removed + 1):
        sets += [ranking_mask(rng.random(players), r) for _ in range(HELDOUT_CANDIDATES)]
    return sort_distinct(np.array(sets))[0]


def _part(units: list[BoolArray], size: ModelSize, tokens: int, length: int) -> Part:
    forwards_P = sum((trie_player_forwards(u) for u in units), np.zeros(1, dtype=np.int64))
    masks = sum(len(unit) for unit in units)
    per_token = float(forwards_P @ size.layer_flop_P(length)) + masks * size.head_flop()
    return Part(
        masks=masks,
        layer_forwards=int(forwards_P.sum()),
        alone=int(sum(unit.sum() for unit in units)),
        tokens=tokens,
        flop=per_token * tokens,
    )


def describe(found: Cost) -> str:
    """The count as text: what was counted, what was assumed, what to look out for."""
    settings, size = found.settings, found.size
    players, gpus = len(size.layer_parameters_P), settings.engines * settings.gpus_per_engine
    layer = size.layer_parameters_P
    spread = (
        f"{layer.min():,}" if layer.min() == layer.max() else f"{layer.min():,}-{layer.max():,}"
    )
    lines = [
        f"model      {players} layers, {size.parameters:,} parameters; a layer {spread}, "
        f"the head {size.head_parameters:,}",
        f"rounds     {len(found.rounds)} of {min(found.rounds)} to {max(found.rounds)} masks, "
        f"sets of up to {found.max_removed} removed layers",
        *_part_lines("scoring", found.scoring, settings.num_windows, settings.length),
        *_part_lines("held out", found.heldout, settings.heldout_windows, settings.length),
        f"FLOP       {found.flop:.3e}, of it held out {found.heldout.flop / found.flop:.0%}",
        f"memory     {found.weight_bytes / 2**30:.1f} GiB of weights on a GPU ({settings.dtype}, "
        f"{settings.gpus_per_engine} for an engine); {found.path_bytes / 2**30:.2f} GiB for the "
        "states of one path",
    ]
    seconds = found.seconds
    if seconds is None:
        lines.append("time       unknown: give --tflops-per-gpu, the rate that you assume")
    else:
        lines.append(
            f"time       {_duration(seconds)} = FLOP / (engines {settings.engines} x "
            f"GPUs {settings.gpus_per_engine} x {settings.tflops_per_gpu:g} TFLOP/s); "
            f"{gpus * seconds / 3600:.2f} GPU-hours"
        )
    return "\n".join([*lines, "", *_assumptions(found), *_warnings(found)])


def _part_lines(name: str, part: Part, windows: int, length: int) -> list[str]:
    return [
        f"{name:<9}  {part.masks:,} masks on {windows} x {length} tokens: "
        f"{part.layer_forwards:,} layer-forwards ({part.alone:,} with no prefix shared, "
        f"{part.alone / part.layer_forwards:.2f} x), {part.masks:,} heads, "
        f"{part.flop:.3e} FLOP",
    ]


def _assumptions(found: Cost) -> list[str]:
    settings = found.settings
    unit = "a whole round" if settings.tflops_per_gpu is None else f"{found.unit_masks} masks"
    lines = [
        "Counted: parameters (headers), masks, and layer-forwards after skipping, de-duplication "
        "and prefix sharing,",
        f"  on sampled rounds (seed {settings.seed}) cut into units of at most {unit}, at least "
        "one an engine. Which sets the search",
        f"  asks for is known only to a run: stand-ins of the same sizes; held out, "
        f"{HELDOUT_CANDIDATES} sets of each size.",
        "Assumed: 2 FLOP a parameter and token; attention 4 x T x heads x head size a token and "
        "layer, no window, no causal",
        "  halving; the rate is yours and holds for layers and head alike; every engine is always "
        "busy.",
        "Not in it: loading, the checks at start, choosing the masks of each round (on the "
        "driver's CPU; a fast cluster waits for it),",
        "  the network, a scorer other than `scoring`, export.",
    ]
    if found.size.experts:
        lines.append(found.size.experts[0].upper() + found.size.experts[1:] + ".")
    return lines


def _warnings(found: Cost) -> list[str]:
    settings, lines = found.settings, []
    if settings.gpu_memory_gb is not None:
        need = (found.weight_bytes + found.path_bytes) / 2**30
        if need > settings.gpu_memory_gb:
            lines.append(
                f"WARNING: weights and one path of states take {need:.1f} GiB, a GPU has "
                f"{settings.gpu_memory_gb:g}: more GPUs an engine, fewer windows, or a smaller "
                "dtype"
            )
    if found.round_size < 2 * settings.engines:
        lines.append(
            f"WARNING: a round of {found.round_size} masks cannot keep {settings.engines} engines "
            f"busy: --round-size {8 * settings.engines} or more"
        )
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
