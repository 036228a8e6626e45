"""The transformers engine against transformers with the layers deleted, on random tiny models.

Tolerance: 1e-5 relative on every window's summed NLL, float32 on CPU. One NLL is some hundred
float32 terms, so rounding is worth about 1e-7; a structural mistake (a wrong window, a wrong
position) is worth 1e-2 and more, and the spread of the masks' scores is asserted to show it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lpserve
from lpserve.testing.parity import NUM_LAYERS, edge_masks, some_windows
from lpserve.testing.reference import (
    FAMILIES,
    SPREAD,
    reference_model,
    relative,
    slow_but,
    window_nll,
    with_layers_deleted,
)

TOLERANCE = 1e-5


@pytest.mark.parametrize("family", slow_but(FAMILIES, "llama", "gpt2", mark="thorough"))
def test_skipping_layers_equals_deleting_them(family, model_dir, rng):
    path = model_dir(family)
    windows = some_windows(rng)
    masks = np.concatenate([edge_masks(), rng.random((6, NUM_LAYERS)) < 0.6])
    with lpserve.open_engine(path, windows) as engine:
        got = engine.score(masks).nll_MN
    model = reference_model(path)
    expected = np.array(
        [
            window_nll(with_layers_deleted(model, m), windows.tokens_NT, windows.scored_NT)
            for m in masks
        ]
    )
    assert relative(got, expected) < TOLERANCE
    # a score per window tells any two masks apart by far more than the tolerance
    distinct = expected[np.unique(masks, axis=0, return_index=True)[1]]
    gaps = np.abs(distinct[:, None] - distinct[None]).max(axis=-1) / expected.max()
    assert gaps[np.triu_indices(len(distinct), k=1)].min() > SPREAD


@pytest.mark.thorough
@pytest.mark.parametrize("family", slow_but(FAMILIES, "llama"))
def test_other_masks_budget_and_micro_batch_do_not_matter(family, model_dir, rng):
    path = model_dir(family)
    windows = some_windows(rng, num=5)
    masks = rng.random((24, NUM_LAYERS)) < 0.6
    with lpserve.open_engine(path, windows) as engine:
        together = engine.score(masks).nll_MN
        alone = np.concatenate([engine.score(mask[None]).nll_MN for mask in masks[:10]])
        # on CPU a micro-batch is one state: sharing changes nothing at all
        assert (together[:10] == alone).all()
    state = 40 * 64 * 4
    for budget, tokens in [
        ((NUM_LAYERS + 1) * state, None),  # one window at a time, one path
        ((NUM_LAYERS + 1) * state * 5, None),
        ((NUM_LAYERS + 4) * state * 5, 3 * 5 * 40),
        (None, 40),
        (None, 2 * 5 * 40),
        (None, 1 << 20),
    ]:
        options = {"micro_batch_tokens": tokens} if tokens else {}
        if budget:
            options["state_budget_mb"] = budget / 2**20
        with lpserve.open_engine(path, windows, **options) as engine:
            assert relative(engine.score(masks).nll_MN, together) < TOLERANCE


def test_work_counts_the_trie(model_dir, rng):
    from lpserve.masks import trie_layer_forwards

    masks = rng.random((40, NUM_LAYERS)) < 0.6
    with lpserve.open_engine(model_dir("llama"), some_windows(rng)) as engine:
        work = engine.score(masks).work
    assert work.masks == 40
    assert work.distinct_masks == len(np.unique(masks, axis=0))
    assert work.skip_layer_forwards == masks.sum()
    prefixes = {tuple(m[: p + 1]) for m in masks for p in range(NUM_LAYERS) if m[p]}
    assert work.layer_forwards == len(prefixes) == trie_layer_forwards(masks)


def test_other_windows_are_registered_once_and_named(model_dir, rng):
    first, second = some_windows(rng), some_windows(rng, num=2, length=24, ragged=False)
    mask = rng.random((1, NUM_LAYERS)) < 0.6
    with lpserve.open_engine(model_dir("llama"), first) as engine:
        before = engine.score(mask).nll_MN
        key = engine.register(second)
        assert key == engine.register(second) == second.content_hash
        got = engine.score(mask, windows=key)
        assert (engine.score(mask).nll_MN == before).all()
    with lpserve.open_engine(model_dir("llama"), second) as engine:
        assert relative(got.nll_MN, engine.score(mask).nll_MN) < TOLERANCE
    assert (got.num_tokens_N == second.scored_NT.sum(axis=1)).all()


def test_global_state_is_left_as_found(model_dir, rng):
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    with lpserve.open_engine(model_dir("llama"), some_windows(rng)) as engine:
        engine.score(np.ones((1, NUM_LAYERS), dtype=bool))
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() == dtype
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    assert not torch.is_inference_mode_enabled()


@pytest.mark.slow  # compiling takes half a minute
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_score_alike(model_dir, rng):
    windows = some_windows(rng)
    masks = rng.random((8, NUM_LAYERS)) < 0.6
    with lpserve.open_engine(model_dir("qwen3"), windows) as engine:
        plain = engine.score(masks).nll_MN
    with lpserve.open_engine(model_dir("qwen3"), windows, compile_layers=True) as engine:
        assert engine.info.path == "transformers/sdpa/compiled"
        assert relative(engine.score(masks).nll_MN, plain) < TOLERANCE


def test_half_precision_scores_close_to_float32(model_dir, rng):
    """bfloat16 keeps 8 bits: single scores move by some percent, not by structure."""
    windows = some_windows(rng)
    masks = rng.random((8, NUM_LAYERS)) < 0.6
    with lpserve.open_engine(model_dir("llama"), windows) as engine:
        exact = engine.score(masks).nll_MN
    with lpserve.open_engine(model_dir("llama"), windows, dtype="bfloat16") as engine:
        assert engine.info.dtype == "bfloat16"
        assert relative(engine.score(masks).nll_MN, exact) < 0.1
