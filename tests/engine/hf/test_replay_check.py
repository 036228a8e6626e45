"""A model whose layers, run one by one, give something else is refused at start."""

from __future__ import annotations

import pytest
import torch

import lpserve
from lpserve.engine.hf import replay_check
from lpserve.engine.hf.stack import RecordedStack
from lpserve.errors import EngineError
from lpserve.testing.parity import some_windows


@pytest.mark.parametrize("players", ["layer", "half"])
def test_a_replay_that_is_off_is_refused(players, model_dir, rng, monkeypatch):
    honest = RecordedStack.run_step

    def off(self: RecordedStack, step: int, batch: torch.Tensor) -> torch.Tensor:
        return honest(self, step, batch) + (step == 2)

    monkeypatch.setattr(RecordedStack, "run_step", off)
    with pytest.raises(EngineError, match=r"replayed one by one score .* off the model's own"):
        lpserve.open_engine(model_dir("llama"), some_windows(rng), players=players)


def test_a_step_that_fails_is_named(model_dir, rng, monkeypatch):
    honest = RecordedStack.run_step

    def failing(self: RecordedStack, step: int, batch: torch.Tensor) -> torch.Tensor:
        if step == 3:
            raise RuntimeError("no kernel")
        return honest(self, step, batch)

    monkeypatch.setattr(RecordedStack, "run_step", failing)
    words = "layer 1 mlp of LlamaForCausalLM cannot be run by itself: RuntimeError: no kernel"
    with pytest.raises(EngineError, match=words):
        lpserve.open_engine(model_dir("llama"), some_windows(rng), players="half")


def test_tolerances_are_of_every_dtype_that_models_run_in():
    assert set(replay_check.PARITY_TOLERANCE) == {"float32", "bfloat16", "float16"}
