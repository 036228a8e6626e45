"""Metrics beside the NLL, against transformers with the layers deleted and plain arithmetic.

Tolerance: 1e-5 relative for divergences, as for the NLL (float32 sums of some hundred terms;
divergences here are of the same size). Misses are counts, and a truncated divergence picks tokens:
equal, but where logits are within rounding of each other.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import lpserve
from lpserve.engine.head import LocalVocabulary
from lpserve.engine.vllm.ranks import prompt_metrics
from lpserve.errors import InputError
from lpserve.testing.parity import (
    NUM_LAYERS,
    TOP,
    edge_masks,
    metrics_by_hand,
    overlap_by_hand,
    some_windows,
)
from lpserve.testing.reference import relative
from lpserve.utility import check_metric, top_of

TOLERANCE = 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("pack", [False, True])
def test_metrics_equal_those_of_the_model_without_the_layers(family, pack, model_dir, rng):
    folder, windows = model_dir(family), some_windows(rng, num=4)
    masks = np.concatenate([edge_masks(), rng.random((6, NUM_LAYERS)) < 0.6])
    expected, doubt = metrics_by_hand(folder, masks, windows)
    options: dict[str, Any] = {"micro_batch_tokens": 500} if pack else {}
    with lpserve.open_engine(folder, windows, **options) as engine:
        scores = engine.score(masks, extra_metrics=tuple(expected))
        plain = engine.score(masks)
    assert relative(scores.nll_MN, plain.nll_MN) < TOLERANCE
    assert (np.abs(scores.of("misses") - expected["misses"]) <= doubt["misses"]).all()
    # the full model from itself: two roundings of the same log-probabilities, 1e-6 a target
    assert (np.abs(scores.of("kl")[0]) < 1e-6 * windows.num_tokens_N).all()
    for name in ("kl", f"kl_top{TOP}"):
        got, wanted, doubt_MN = scores.of(name)[1:], expected[name][1:], doubt[name][1:]
        assert (np.abs(got - wanted) < TOLERANCE * wanted.max() + doubt_MN).all()
        assert wanted[~masks[1:].all(axis=1)].min() > 1e-2


def test_targets_are_worked_on_in_chunks_of_bounded_memory(model_dir, rng):
    folder, windows = model_dir("llama"), some_windows(rng)
    masks = rng.random((4, NUM_LAYERS)) < 0.6
    largest = []
    with lpserve.open_engine(folder, windows) as engine:
        extra_metrics = ("kl", f"kl_top{TOP}")
        whole = engine.score(masks, extra_metrics=extra_metrics)
        head = cast("Any", engine)._scorer.stack._reducer
        head._chunk_bytes = 97 * 8 * 5 * 7  # seven targets of one mask with their divergences
        original = head._vocabulary.logits
        head._vocabulary = LocalVocabulary(lambda rows: largest.append(len(rows)) or original(rows))
        chunked = engine.score(masks, extra_metrics=extra_metrics)
    assert max(largest) == 7
    for name in ("nll", *extra_metrics):  # a divergence of the full model from itself is 0
        difference = np.abs(chunked.of(name) - whole.of(name)).max()
        assert difference < TOLERANCE * max(1.0, whole.of(name).max())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 500, "state_budget_mb": 0.3}])
def test_the_overlap_of_effects_is_their_covariance_by_the_first_masks_predictions(
    family, options, model_dir, rng
):
    """With a budget of a few windows' states, and masks in no order; 1e-5 as for the NLL."""
    folder, windows = model_dir(family), some_windows(rng, num=5)
    masks = rng.permutation(np.unique(rng.random((9, NUM_LAYERS)) < 0.6, axis=0))
    expected = overlap_by_hand(folder, masks, windows)
    with lpserve.open_engine(folder, windows, **options) as engine:
        assert engine.info.has_overlap
        scores = cast("Any", engine).score_overlap(masks)
        plain = engine.score(masks)
        targets: list[int] = []
        head = cast("Any", engine)._scorer.stack._reducer
        head._chunk_bytes = 97 * 8 * 3 * 7 * len(masks)  # seven targets of all masks
        original = head._vocabulary.logits
        head._vocabulary = LocalVocabulary(
            lambda rows: targets.append(len(rows) // len(masks)) or original(rows)
        )
        chunked = cast("Any", engine).score_overlap(masks)
    assert relative(scores.nll_MN, plain.nll_MN) < TOLERANCE
    assert plain.overlap_MM is None
    assert scores.work.layer_forwards == plain.work.layer_forwards
    assert np.abs(expected).max() > 1.0
    for found in (scores, chunked):
        assert np.abs(found.overlap_MM - expected).max() < TOLERANCE * np.abs(expected).max()
    assert sum(n for n in targets if n == 7) > 0.5 * windows.num_tokens_N.sum()


@pytest.mark.vllm
@pytest.mark.parametrize("path", ["scoring", "requests"])
def test_vllm_gives_the_same_metrics(path, model_dir, rng):
    folder, windows = model_dir("llama"), some_windows(rng)
    masks = np.concatenate([edge_masks(), rng.random((4, NUM_LAYERS)) < 0.6])
    expected, doubt = metrics_by_hand(folder, masks, windows)
    with lpserve.open_engine(folder, windows, kind="vllm", path=path) as engine:
        assert set(engine.info.metrics) == {"nll", "misses", *(["kl"] * (path == "scoring"))}
        if path == "requests":
            with pytest.raises(InputError, match="'kl' cannot be had from engine vllm"):
                engine.score(masks, extra_metrics=("kl",))
            misses = engine.score(masks, extra_metrics=("misses",)).of("misses")
            assert (np.abs(misses - expected["misses"]) <= doubt["misses"]).all()
            with pytest.raises(InputError, match="cannot be had by requests"):
                cast("Any", engine).score_overlap(masks)
            return
        scores = engine.score(masks, extra_metrics=tuple(expected))
        overlap = cast("Any", engine).score_overlap(masks).overlap_MM
    wanted = overlap_by_hand(folder, masks, windows)
    assert np.abs(overlap - wanted).max() < TOLERANCE * np.abs(wanted).max()
    assert (np.abs(scores.of("misses") - expected["misses"]) <= doubt["misses"]).all()
    for name in ("kl", f"kl_top{TOP}"):
        bound_MN = TOLERANCE * expected[name].max() + doubt[name]
        assert (np.abs(scores.of(name) - expected[name]) < bound_MN).all()


@pytest.mark.vllm
def test_of_equal_tokens_vllms_first_choice_is_the_first(rng):
    """Logits of few values, as in half precision: up to three tokens share the highest."""
    from vllm.logprobs import Logprob

    logits = rng.integers(0, 3, (200, 9)).astype(float)
    highest = logits.max(axis=1, keepdims=True)
    logits[(logits == highest) & ((logits == highest).cumsum(axis=1) > 3)] = -1.0
    tokens, scored = rng.integers(0, 9, 200), rng.random(200) < 0.8
    found = []
    for row, token in zip(logits, tokens, strict=True):  # the token, and the likeliest four
        likeliest = rng.permutation(9)
        likeliest = likeliest[np.argsort(-row[likeliest], kind="stable")][:4]
        ranks = {int(token): int((row >= row[token]).sum())}
        ranks |= {int(other): place for place, other in enumerate(likeliest, 1)}
        found.append({other: Logprob(row[other], rank) for other, rank in ranks.items()})
    output = SimpleNamespace(prompt_token_ids=tokens.tolist(), prompt_logprobs=found)
    nll, misses = prompt_metrics(output, scored, ("misses",))
    assert nll == -logits[np.arange(200), tokens][scored].sum()
    assert misses == (logits.argmax(axis=1) != tokens)[scored].sum()
    assert prompt_metrics(output, scored, ()) == [nll]


@pytest.mark.parametrize("name", ["bleu", "kl_top", "kl_top0", "kl_top-3", "kl_topx", ""])
def test_unknown_metrics_are_refused(name):
    with pytest.raises(InputError, match="unknown metric"):
        check_metric(name)


def test_a_metric_is_named_with_its_number():
    assert (top_of("kl_top64"), top_of("kl"), top_of("nll")) == (64, None, None)
    with (
        lpserve.open_engine(
            "", lpserve.TokenWindows.from_tokens(np.ones((1, 3), dtype=int)), kind="synthetic"
        ) as engine,
        pytest.raises(InputError, match="it has nll"),
    ):
        engine.score(np.ones((1, 8), dtype=bool), extra_metrics=("misses",))
