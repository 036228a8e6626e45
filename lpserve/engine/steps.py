"""The steps that a model's layers are run in: whole layers, or their halves.

A step runs a layer, its attention or its feed-forward part. Where some layer is parallel
(`lpserve.engine.parts`), states are pairs of the hidden state and what the mixer of the layer at
work has given; a further step, which belongs to no player, ends such a layer: it makes the pair one
again, since a mask that drops the feed-forward part would leave it open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from lpserve.engine.parts import Halves, ParallelHalves, Run
from lpserve.model.players import ATTENTION, FULL_LAYER, MLP, NO_PLAYER


class Layout(Protocol):
    """States as the trie holds them, `[B, T, ...]`, and as a model's layers take them."""

    def ours(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def theirs(self, state: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What runs at once."""

    layer: int
    part: str
    player: int
    """Index of the player that it belongs to, or `NO_PLAYER`."""
    run: Callable[[Run, torch.Tensor, Layout], torch.Tensor]
    """(calls a module as the layer is called, a state, the model's layout) -> the state after."""

    def __str__(self) -> str:
        return f"layer {self.layer}" + ("" if self.part == FULL_LAYER else f" {self.part}")


def layer_steps(
    layers: Sequence[nn.Module],
    parts: Sequence[Mapping[str, int]],
    halves: Mapping[int, Halves],
    *,
    paired: bool,
    prepared: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> list[Step]:
    """The steps of layers in order.

    Args:
        parts: of each layer, what is run apart and its player (`players.layer_parts`).
        halves: of each layer that is not run whole.
        paired: whether states are pairs, since some layer of the model is parallel.
        prepared: makes a module ready to run: compiles it, say.
    """
    steps: list[Step] = []
    for layer, found in enumerate(parts):
        if FULL_LAYER in found:
            run = _alone(prepared(layers[layer]), paired=paired)
            steps.append(Step(layer, FULL_LAYER, found[FULL_LAYER], run))
            continue
        both = halves[layer]
        if isinstance(both, ParallelHalves):
            steps += [
                Step(layer, ATTENTION, found[ATTENTION], _mixed(both)),
                Step(layer, MLP, found[MLP], _added(both, feed_forward=True)),
                Step(layer, FULL_LAYER, NO_PLAYER, _added(both, feed_forward=False)),
            ]
            continue
        first, second = (
            Step(layer, part, found[part], _alone(prepared(half), paired=paired))
            for part, half in ((ATTENTION, both.mixer), (MLP, both.feed_forward))
        )
        steps += [first, second] if both.mixer_first else [second, first]
    return steps


def paired_state(hidden: torch.Tensor) -> torch.Tensor:
    """`[B, T, 2, ...]`: a hidden state, and zero for what a mixer gives."""
    return torch.stack([hidden, torch.zeros_like(hidden)], dim=2)


def _alone(
    module: nn.Module, *, paired: bool
) -> Callable[[Run, torch.Tensor, Layout], torch.Tensor]:
    """A module that takes the state and returns it."""

    def run(call: Run, state: torch.Tensor, layout: Layout) -> torch.Tensor:
        hidden = state[:, :, 0] if paired else state
        after = layout.ours(call(module, layout.theirs(hidden)))
        return paired_state(after) if paired else after

    return run


def _mixed(halves: ParallelHalves) -> Callable[[Run, torch.Tensor, Layout], torch.Tensor]:
    """The mixer of a parallel layer: its result goes beside the state."""

    def run(call: Run, state: torch.Tensor, layout: Layout) -> torch.Tensor:
        hidden = state[:, :, 0]
        mixed = halves.mixed(call, layout.theirs(hidden))
        return torch.stack([hidden, layout.ours(mixed)], dim=2)

    return run


def _added(
    halves: ParallelHalves, *, feed_forward: bool
) -> Callable[[Run, torch.Tensor, Layout], torch.Tensor]:
    """The end of a parallel layer, with its feed-forward part or without."""

    def run(call: Run, state: torch.Tensor, layout: Layout) -> torch.Tensor:
        hidden, mixed = (layout.theirs(each) for each in state.unbind(2))
        after = halves.added(call, hidden, mixed, feed_forward=feed_forward)
        return paired_state(layout.ours(after))

    return run
