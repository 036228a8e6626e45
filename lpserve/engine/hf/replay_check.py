"""Whether a model's layers, run one by one, give what the model gives: checked at start.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import LayerStack, PaddingMattersError
from lpserve.engine.head import on_device, plain_nll
from lpserve.engine.hf.recording import model_code
from lpserve.engine.replay import same_tensor
from lpserve.engine.steps import Step
from lpserve.errors import EngineError

PARITY_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 1e-2}
"""Relative, summed NLL of a window, replayed against the model's own forward at start. Half
precision only has to show that the structure is right: rounding differs with the batch shape."""


class ReplayedStack(LayerStack, Protocol):
    """What is checked: a stack over a transformers model."""

    model: Any
    name: str
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    steps: list[Step]
    compiled: bool
    inputs_survive: bool
    first_not_finite: int | None


def check_replay(stack: ReplayedStack, pair: TokenWindows) -> None:
    """All steps replayed at batch 2 must give the NLL that the model gives for each window by
    itself, and never look ahead. Notes in the stack what it sees of its layers.

    Raises:
        EngineError: the model cannot be driven step by step.
        PaddingMattersError: a window that is shorter than the padded length scores otherwise than
            by itself.
    """
    own = [_own_logits(stack, pair, row) for row in range(pair.num_windows)]
    expected_N = torch.cat(
        [
            plain_nll(logits, pair.select(np.array([row]), logits.shape[1]), stack.device)
            for row, logits in enumerate(own)
        ]
    )
    got_N = stack.reduce(_replayed(stack, pair), pair)[:, 0]
    tolerance = PARITY_TOLERANCE[str(stack.dtype).removeprefix("torch.")]
    worst = _worst_difference(got_N, expected_N)
    if torch.isfinite(expected_N).all() and not worst <= tolerance:
        tokens_NT = on_device(pair.tokens_NT, stack.device)
        padded = stack.model(input_ids=tokens_NT, use_cache=False).logits
        padded_N = plain_nll(padded, pair, stack.device)
        if _worst_difference(got_N, padded_N) <= tolerance:
            raise PaddingMattersError(
                f"{stack.name} scores a window otherwise when it is padded, by {worst:.1e}"
            )
        raise EngineError(
            f"{stack.name}: layers replayed one by one score {worst:.1e} "
            f"(relative) off the model's own forward pass; tolerance {tolerance:.0e}"
        )
    logits = own[-1]
    changed = on_device(pair.tokens_NT[-1:, : logits.shape[1]], stack.device)
    changed[:, -1] = (changed[:, -1] + 1) % stack.vocab_size
    ahead = stack.model(input_ids=changed, use_cache=False).logits[:, :-1]
    if torch.isfinite(logits).all() and not torch.allclose(
        ahead, logits[:, :-1], rtol=1e-2, atol=1e-2 * float(logits.abs().max())
    ):
        raise EngineError(f"{stack.name} is not a decoder: it looks ahead")


def _own_logits(stack: ReplayedStack, pair: TokenWindows, row: int) -> torch.Tensor:
    """`[1, T', V]` of one window without padding."""
    tokens_NT = pair.tokens_NT[row : row + 1, : pair.lengths_N[row]]
    return stack.model(input_ids=on_device(tokens_NT, stack.device), use_cache=False).logits


def _replayed(stack: ReplayedStack, pair: TokenWindows) -> torch.Tensor:
    """The state after all steps, each of which is checked on the way."""
    state = stack.embed(pair)
    if state.shape[:2] != pair.tokens_NT.shape:
        raise EngineError(
            f"the layers of {stack.name} take {state.shape[1]} states for {pair.length} tokens"
        )
    _check_first_states(stack, state)
    for step in range(stack.num_steps):
        before = state.clone()
        after = _tried(stack, step, state)
        if not same_tensor(before, state):  # a layer that writes into its input
            stack.inputs_survive = False
            after = _tried(stack, step, before)
        if after.shape != state.shape:
            raise EngineError(
                f"{stack.steps[step]} of {stack.name} changes the state's shape "
                f"from {list(state.shape)} to {list(after.shape)}"
            )
        _check_dtype(stack, step, after)
        if stack.first_not_finite is None and not after.isfinite().all():
            stack.first_not_finite = stack.steps[step].layer
        state = after
    return state


def _tried(stack: ReplayedStack, step: int, state: torch.Tensor) -> torch.Tensor:
    """One step; raises EngineError, with its name, for whatever the layer raises."""
    if stack.compiled:  # what the compiler raises is told by itself
        return stack.run_step(step, state)
    with model_code(f"{stack.steps[step]} of {stack.name} cannot be run by itself"):
        return stack.run_step(step, state)


def _check_first_states(stack: ReplayedStack, embedded: torch.Tensor) -> None:
    """Every step may be the first that runs: given the embedding, whose dtype may be another, it
    must return a state as all others do."""
    if embedded.dtype != stack.state_dtype:
        for step in range(stack.num_steps):
            _check_dtype(stack, step, stack.run_step(step, embedded.clone()))


def _check_dtype(stack: ReplayedStack, step: int, state: torch.Tensor) -> None:
    if state.dtype != stack.state_dtype:
        raise EngineError(
            f"{stack.steps[step]} of {stack.name} returns {state.dtype} or "
            f"{stack.state_dtype}, depending on the layers before it: its layers cannot be "
            "skipped one by one"
        )


def _worst_difference(got_N: torch.Tensor, expected_N: torch.Tensor) -> float:
    return float(((got_N - expected_N).abs() / expected_N.abs().clamp(min=1e-6)).max())
