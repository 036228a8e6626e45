"""Several ranks on CPU: tensor and pipeline parallel, both paths, against one process.

Each engine starts two worker processes: minutes in all, hence slow. Tolerance as in test_vllm:
a sum over two ranks is rounded in another order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lpserve.model.players import half_players
from lpserve.testing.parity import (
    NUM_LAYERS,
    edge_masks,
    metrics_by_hand,
    overlap_by_hand,
    some_windows,
)
from lpserve.testing.reference import (
    reference_model,
    relative,
    window_nll,
    with_layers_deleted,
    with_parts_zeroed,
)

pytestmark = [pytest.mark.vllm, pytest.mark.process, pytest.mark.slow]

SCRIPT = """
import json, sys
import numpy as np
import lpserve

if __name__ == "__main__":
    folder, data, dtype, options = sys.argv[1], np.load(sys.argv[2]), sys.argv[3], sys.argv[4]
    windows = lpserve.TokenWindows.from_tokens(data["tokens"], data["scored"])
    with lpserve.open_engine(
        folder, windows, kind="vllm", dtype=dtype, **json.loads(options)
    ) as engine:
        before = engine.layer_calls()
        extra = ("misses", "kl") if "kl" in engine.info.metrics else ("misses",)
        scores = engine.score(data["masks"], extra_metrics=extra)
        calls = engine.layer_calls()
        overlap = engine.score_overlap(data["masks"])
        requests = engine.score_by_requests(data["masks"], windows).nll_MN
        print("RESULT", json.dumps({
            "scoring": scores.nll_MN.tolist(), "requests": requests.tolist(),
            "overlap": overlap.overlap_MM.tolist(), "overlap_nll": overlap.nll_MN.tolist(),
            "others": {name: scores.of(name).tolist() for name in extra},
            "path": engine.info.path, "layer_forwards": scores.work.layer_forwards,
            "calls": [
                [b - a for a, b in zip(x["calls"], y["calls"])] for x, y in zip(before, calls)
            ],
        }))
"""


def run(folder, windows, masks, tmp_path, dtype: str = "float32", **options):
    """Scores of an engine in a process of its own."""
    data = tmp_path / "data.npz"
    np.savez(data, tokens=windows.tokens_NT, scored=windows.scored_NT, masks=masks)
    script = tmp_path / "score.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(data), dtype, json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[4],
        env=os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tensor_parallel_size": 2}),
        ("gemma2", {"tensor_parallel_size": 2}),
        ("qwen3-moe", {"tensor_parallel_size": 2}),
        ("llama", {"pipeline_parallel_size": 2}),
        ("gpt2", {"pipeline_parallel_size": 2}),
        ("gpt-neox", {"pipeline_parallel_size": 2}),
    ],
    ids=str,
)
def test_two_ranks_equal_deleting_layers_on_both_paths(family, options, model_dir, tmp_path, rng):
    folder, windows = model_dir(family), some_windows(rng)
    masks = np.concatenate([edge_masks(), rng.random((6, NUM_LAYERS)) < 0.6])
    half = NUM_LAYERS // 2
    masks = np.concatenate([masks, [np.arange(NUM_LAYERS) < half, np.arange(NUM_LAYERS) >= half]])
    got = run(folder, windows, masks, tmp_path, **options)
    model = reference_model(folder)
    expected = np.array(
        [
            window_nll(with_layers_deleted(model, m), windows.tokens_NT, windows.scored_NT)
            for m in masks
        ]
    )
    assert got["path"] == "vllm/scoring"
    wanted = overlap_by_hand(folder, masks, windows)
    assert np.abs(np.array(got["overlap"]) - wanted).max() < 1e-5 * np.abs(wanted).max()
    for path in ("scoring", "requests", "overlap_nll"):
        nll_MN = np.array(got[path])
        assert relative(nll_MN.sum(axis=1), expected.sum(axis=1)) < 1e-5, path
        assert relative(nll_MN, expected) < 1e-4, path
    others, doubt = metrics_by_hand(folder, masks, windows)
    assert set(got["others"]) == {"misses", *(["kl"] * ("tensor_parallel_size" in options))}
    assert (np.abs(np.array(got["others"]["misses"]) - others["misses"]) <= doubt["misses"]).all()
    if "kl" in got["others"]:
        assert (
            np.abs(np.array(got["others"]["kl"]) - others["kl"]).max() < 1e-5 * others["kl"].max()
        )
    groups = len({-(-n // 32) for n in windows.lengths_N})
    if "tensor_parallel_size" in options:  # every rank runs every layer
        assert all(sum(calls) == got["layer_forwards"] * groups for calls in got["calls"])
    else:  # each stage its own, the trie shared across both
        assert sum(map(sum, got["calls"])) == got["layer_forwards"] * groups


def test_tensor_and_pipeline_parallel_in_bfloat16_agree_between_paths(model_dir, tmp_path, rng):
    windows, masks = some_windows(rng), edge_masks()
    for options in ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        got = run(model_dir("llama"), windows, masks, tmp_path, dtype="bfloat16", **options)
        scoring, requests = (np.array(got[p]).sum(axis=1) for p in ("scoring", "requests"))
        assert relative(scoring, requests) < 2e-2


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tensor_parallel_size": 2}),
        ("mixtral", {"tensor_parallel_size": 2}),
        ("llama", {"pipeline_parallel_size": 2}),
        ("gpt-neox", {"pipeline_parallel_size": 2}),  # parallel layers: pairs go between stages
    ],
    ids=str,
)
def test_two_ranks_drop_halves_on_both_paths(family, options, model_dir, tmp_path, rng):
    folder, windows = model_dir(family), some_windows(rng)
    players = half_players([False] * NUM_LAYERS)
    masks = rng.random((10, len(players))) < 0.6
    masks[:2] = [[True], [False]]
    got = run(folder, windows, masks, tmp_path, players="half", **options)
    model, expected = reference_model(folder), []
    for mask in masks:
        with with_parts_zeroed(model, family, players, mask) as zeroed:
            expected.append(window_nll(zeroed, windows.tokens_NT, windows.scored_NT))
    assert got["path"] == "vllm/scoring"
    for path in ("scoring", "requests", "overlap_nll"):
        nll_MN = np.array(got[path])
        assert relative(nll_MN.sum(axis=1), np.sum(expected, axis=1)) < 1e-5, path
        assert relative(nll_MN, np.array(expected)) < 1e-4, path
