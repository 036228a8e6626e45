"""The trie executor over a small honest LayerStack with a known answer.

Not covered here: real models (test_hf_parity), speed (scripts/bench/scoring.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lpserve
from lpserve.engine.trie import TrieExecutor, TrieSettings
from lpserve.errors import InputError
from lpserve.masks import trie_layer_forwards

WIDTH = 4


class AffineStack:
    """Player p maps h to h * a_p + b_p; a window's score is the weighted sum of its last state.

    Records every (prefix, player) that was computed, and refuses to see one twice.
    """

    def __init__(self, num_players: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.num_steps = num_players
        self.step_players = range(num_players)
        self.state_dtype = torch.float64
        self.scale_P = rng.uniform(0.5, 1.5, num_players)
        self.shift_P = rng.normal(size=num_players)
        self.rows_run: list[int] = []
        self.fail_at: int | None = None

    def state_bytes(self, length: int) -> int:
        return length * WIDTH * 8

    def embed(self, block):
        tokens = torch.from_numpy(block.tokens_NT).double()
        return tokens[..., None].expand(*tokens.shape, WIDTH).contiguous()

    def run_step(self, step, batch):
        if step == self.fail_at:
            raise RuntimeError("this player fails")
        self.rows_run.append(len(batch))
        return batch * self.scale_P[step] + self.shift_P[step]

    def reduce(self, batch, block, extra_metrics=(), full_NTd=None):
        columns = [batch.sum(dim=(1, 2))]
        for name in extra_metrics:
            if name == "kl":  # what is left of the full model's sum
                assert full_NTd is not None
                whole_B = full_NTd.sum(dim=(1, 2)).repeat(len(batch) // block.num_windows)
                columns.append(whole_B - columns[0])
            else:
                columns.append(2 * columns[0])
        return torch.stack(columns, dim=1)

    def before_head(self, batch, block):
        return batch.view(len(batch) // block.num_windows, -1, WIDTH)

    def overlap(self, rows, reference):
        change = (rows - rows[reference]).flatten(1)
        return change @ change.T

    def expected(self, mask_P, tokens_NT):
        state = tokens_NT.astype(float)
        for player in np.flatnonzero(mask_P):
            state = state * self.scale_P[player] + self.shift_P[player]
        return WIDTH * state.sum(axis=1)


def settings(**changes) -> TrieSettings:
    values = {"state_budget_bytes": 1 << 30, "micro_batch_tokens": 1 << 20, "pack_states": False}
    return TrieSettings(**(values | changes))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("num_players", [1, 2, 9])
@pytest.mark.parametrize("budget_states", [None, 1, 3, 20])
@pytest.mark.parametrize("micro_batch_tokens", [1, 12, 50, 1 << 20])
def test_scores_are_right_at_any_budget_and_micro_batch(
    rng, pack, num_players, budget_states, micro_batch_tokens
):
    stack = AffineStack(num_players, int(rng.integers(1 << 30)))
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 9, (5, 6)))
    budget = 1 << 30
    if budget_states is not None:  # states of one window beyond what a single path needs
        budget = (num_players + 1) * stack.state_bytes(6) * budget_states
    executor = TrieExecutor(
        stack,
        settings(
            state_budget_bytes=budget, micro_batch_tokens=micro_batch_tokens, pack_states=pack
        ),
    )
    for _ in range(2):  # buffers are reused by the second call
        masks = rng.random((60, num_players)) < rng.uniform(0.2, 0.9)
        got, work = executor.score(masks, windows)
        expected = np.array([stack.expected(mask, windows.tokens_NT) for mask in masks])
        assert np.abs(got[..., 0] - expected).max() < 1e-9 * np.abs(expected).max()
        assert work.layer_forwards == trie_layer_forwards(masks)
        assert work.distinct_masks == len(np.unique(masks, axis=0))
        assert executor.num_live == 0  # so all buffers are among the free ones
        assert sum(state.nbytes for state in executor._free) <= budget


def test_further_metrics_stand_beside_the_first_and_the_whole_model_runs_once(rng):
    stack = AffineStack(6, int(rng.integers(1 << 30)))
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 9, (5, 6)))
    executor = TrieExecutor(stack, settings(micro_batch_tokens=12, pack_states=True))
    masks = rng.random((30, 6)) < 0.6
    plain, without = executor.score(masks, windows)
    got, first = executor.score(masks, windows, ("misses", "kl"))
    again, second = executor.score(masks, windows, ("kl",))
    whole = stack.expected(np.ones(6, dtype=bool), windows.tokens_NT)
    assert (got[..., :1] == plain).all()
    assert (got[..., 1] == 2 * plain[..., 0]).all()
    assert np.abs(got[..., 2] - (whole - plain[..., 0])).max() < 1e-9 * np.abs(whole).max()
    assert (again[..., 1] == got[..., 2]).all()
    assert first.layer_forwards == without.layer_forwards + 6
    assert second.layer_forwards == without.layer_forwards


def test_each_prefix_and_player_is_computed_once(rng):
    stack = AffineStack(8, 0)
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 9, (2, 3)))
    masks = rng.random((200, 8)) < 0.6
    _, work = TrieExecutor(stack, settings(pack_states=True)).score(masks, windows)
    assert sum(stack.rows_run) == 2 * work.layer_forwards  # two windows a state
    assert len(stack.rows_run) < work.layer_forwards  # micro-batches were filled
    assert work.skip_layer_forwards == masks.sum()


def test_a_budget_below_one_path_is_refused(rng):
    stack = AffineStack(8, 0)
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 9, (2, 3)))
    executor = TrieExecutor(stack, settings(state_budget_bytes=9 * stack.state_bytes(3) - 1))
    with pytest.raises(InputError, match="state_budget_mb is too small"):
        executor.score(np.ones((1, 8), dtype=bool), windows)


def test_a_failed_walk_leaves_the_executor_usable(rng):
    stack = AffineStack(6, 0)
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 9, (2, 3)))
    executor = TrieExecutor(stack, settings(pack_states=True))
    masks = rng.random((40, 6)) < 0.6
    before, _ = executor.score(masks, windows)
    stack.fail_at = 4
    with pytest.raises(RuntimeError, match="this player fails"):
        executor.score(masks, windows)
    stack.fail_at = None
    after, _ = executor.score(masks, windows)
    assert (after == before).all()
    assert executor.num_live == 0


MEMORY_SCRIPT = """
import sys, threading, time
import numpy as np, psutil, torch
import lpserve
from lpserve.masks import draw
torch.set_num_threads(1)
rng = np.random.default_rng(0)
windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 97, (8, 64)))
engine = lpserve.open_engine(sys.argv[1], windows, state_budget_mb=24)
num_players = engine.info.num_players
engine.score(draw(num_players, num_players - 1, 4, rng))
process = psutil.Process()
start = process.memory_info().rss
seen = []
for _ in range(5):
    for _ in range(4):
        masks = np.concatenate([draw(num_players, k, 100, rng) for k in range(1, 6)])
        engine.score(masks)
    seen.append(process.memory_info().rss - start)
chunk = engine.info.settings["head_chunk_bytes"]
print(24 * 2**20 + chunk, *seen)
"""


@pytest.mark.process
def test_memory_stays_within_the_budget_and_flat_over_ten_thousand_masks(model_dir):
    """RSS above RSS after loading: at most 1.2 x (state budget + head chunk), and flat."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(model_dir("llama"))],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    allowed, *grown = map(int, done.stdout.split())
    assert max(grown) <= 1.2 * allowed
    assert grown[-1] - grown[1] < 4 * 2**20
