"""Steps of layers and halves, on layers that are formulas: what each mask of parts leaves."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from lpserve.engine.parts import find_halves
from lpserve.engine.steps import layer_steps, paired_state
from lpserve.model.players import ATTENTION, FULL_LAYER, MLP, NO_PLAYER


class Mean(torch.nn.Linear):
    """Attention: a running mean, projected."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.cumsum(1) / torch.arange(1, input.shape[1] + 1)[:, None])


class Layer(torch.nn.Module):
    def __init__(self, *, parallel: bool) -> None:
        super().__init__()
        self.attend, self.feed = Mean(4, 4), torch.nn.Linear(4, 4)
        self.parallel = parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.parallel:
            return x + self.attend(x) + self.feed(x)
        x = x + self.attend(x)
        return x + self.feed(x)

    def by_hand(self, x: torch.Tensor, *, attend: bool, feed: bool) -> torch.Tensor:
        mixed = self.attend(x) * attend
        if self.parallel:
            return x + mixed + self.feed(x) * feed
        x = x + mixed
        return x + self.feed(x) * feed


class Same:
    """States that layers take as the trie holds them."""

    def ours(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def theirs(self, state: torch.Tensor) -> torch.Tensor:
        return state


def call(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    return module(hidden)


@pytest.mark.parametrize("kinds", [(False, False), (True, True), (False, True), (True, False)])
def test_every_set_of_halves_leaves_what_the_formulas_say(kinds):
    """Layers 0 and 2 in halves, layer 1 whole between them; parallel ones carry pairs through."""
    with torch.inference_mode():
        layers = [Layer(parallel=kind) for kind in (kinds[0], False, kinds[1])]
        start = torch.randn(2, 5, 4)
        parts = [{ATTENTION: 0, MLP: 1}, {FULL_LAYER: 2}, {ATTENTION: 3, MLP: 4}]
        halves = {n: find_halves("it", layers[n], call, start[:1], 1) for n in (0, 2)}
        paired = any(kinds)
        steps = layer_steps(layers, parts, halves, paired=paired)
        wanted = [str(n) for n in range(5)]
        assert [str(s.player) for s in steps if s.player != NO_PLAYER] == wanted
        assert sum(step.player == NO_PLAYER for step in steps) == sum(kinds)
        for kept in product([False, True], repeat=5):
            state = paired_state(start) if paired else start
            for step in steps:
                if step.player == NO_PLAYER or kept[step.player]:
                    state = step.run(call, state, Same())
            if paired:
                assert not state[:, :, 1].any()
                state = state[:, :, 0]
            expected = layers[0].by_hand(start, attend=kept[0], feed=kept[1])
            if kept[2]:
                expected = layers[1](expected)
            expected = layers[2].by_hand(expected, attend=kept[3], feed=kept[4])
            torch.testing.assert_close(state, expected)


def test_steps_are_named_as_users_name_layers():
    layer = Layer(parallel=False)
    with torch.inference_mode():
        halves = {0: find_halves("it", layer, call, torch.randn(1, 5, 4), 1)}
    steps = layer_steps([layer], [{ATTENTION: 0, MLP: 1}], halves, paired=False)
    assert list(map(str, steps)) == ["layer 0 attention", "layer 0 mlp"]
    steps = layer_steps([layer], [{FULL_LAYER: 0}], {}, paired=False)
    assert list(map(str, steps)) == ["layer 0"]
