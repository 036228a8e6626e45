"""How much each layer changes hidden states and the loss: the criteria of one-shot rivals.

They are measured once, on the full model. Shapes: P players, N windows, T tokens, d width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import HiddenStates
from lpserve.engine.head import on_device, plain_nll
from lpserve.engine.hf.stack import RecordedStack
from lpserve.types import FloatArray


def hidden_states(stack: RecordedStack, blocks: list[TokenWindows]) -> HiddenStates:
    """Block influence and angular distances on windows, given in blocks of one padded length each
    that the stack is prepared for."""
    players = len(stack.players)
    cosines_P, angles = np.zeros(players), np.zeros((players + 1, players + 1))
    tokens = windows = 0
    for block in blocks:
        device_rows = torch.arange(block.num_windows)
        last_N = torch.from_numpy(block.lengths_N - 1)
        real_NT = torch.arange(block.length)[None] <= last_N[:, None]
        state = stack.embed(block)
        real = real_NT.to(state.device)
        hidden = stack.hidden(state)
        last_states = [_unit_vectors(hidden[device_rows, last_N])]
        for step, player in enumerate(stack.step_players):
            state, before = stack.run_step(step, state), hidden
            hidden = stack.hidden(state)
            if player < 0:  # the end of a parallel layer changes nothing
                continue
            cosine_NT = torch.nn.functional.cosine_similarity(
                before.flatten(2).float(), hidden.flatten(2).float(), dim=-1
            )
            cosines_P[player] += float((cosine_NT.double() * real).sum())
            last_states.append(_unit_vectors(hidden[device_rows, last_N]))
        last = torch.stack(last_states)
        cosine = torch.einsum("ind,jnd->ijn", last, last).clamp(-1, 1)
        angles += (cosine.arccos() / torch.pi).sum(-1).cpu().numpy()
        tokens += int(real_NT.sum())
        windows += block.num_windows
    distance = angles / windows
    np.fill_diagonal(distance, 0.0)
    return HiddenStates(1 - cosines_P / tokens, distance)


def _unit_vectors(states: torch.Tensor) -> torch.Tensor:
    """`float64[N, d]`, of states `[N, ...]`."""
    return torch.nn.functional.normalize(states.flatten(1).double(), dim=-1)


def taylor_importance(stack: RecordedStack, blocks: list[TokenWindows]) -> FloatArray:
    """Shortened-LLaMA's Taylor criterion (arXiv 2402.02834, eq. 3), `float64[P]`: the sum of
    |weight x gradient| over a player's matrices, of the mean NLL over all windows.

    Gradients of all players are held at once: as much memory again as their weights take.
    """
    model = stack.model
    weights: list[list[Any]] = [
        [p for module in modules for p in module.parameters() if p.ndim > 1]
        for modules in stack.player_modules()
    ]
    tokens = sum(int(block.num_tokens_N.sum()) for block in blocks)
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in (p for some in weights for p in some):
            parameter.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            for block in blocks:
                for row in range(block.num_windows):
                    window = block.select(np.array([row]))
                    ids = on_device(window.tokens_NT, model.device)
                    logits = model(input_ids=ids, use_cache=False).logits
                    (plain_nll(logits, window, model.device).sum() / tokens).backward()
        return np.array(
            [
                sum(float((p.detach() * p.grad).abs().double().sum()) for p in some)
                for some in weights
            ]
        )
    finally:
        for parameter, required in before:
            parameter.grad = None
            parameter.requires_grad_(required)
