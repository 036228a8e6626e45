"""Whole-window attention against its definition, one query at a time in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpserve.engine.vllm.worker.attention import AttentionSpec

LENGTH, WINDOWS, HEADS, SIZE = 13, 3, 4, 8


def slow_attention(q, k, v, spec: AttentionSpec) -> np.ndarray:
    """The definition: softmax over the keys that a query may see."""
    out = np.zeros((WINDOWS * LENGTH, HEADS, spec.head_size_v))
    group = HEADS // spec.num_kv_heads
    for w in range(WINDOWS):
        for i in range(LENGTH):
            for h in range(HEADS):
                seen = [
                    j
                    for j in range(i + 1)
                    if (spec.window is None or i - j < spec.window)
                    and (spec.chunk is None or i // spec.chunk == j // spec.chunk)
                ]
                at = [w * LENGTH + j for j in seen]
                score = k[at, h // group] @ q[w * LENGTH + i, h] * spec.scale
                if spec.soft_cap is not None:
                    score = spec.soft_cap * np.tanh(score / spec.soft_cap)
                if spec.alibi is not None:
                    score = score + float(spec.alibi[h]) * (np.array(seen) - i)
                weight = np.exp(score)
                sink = np.exp(float(spec.sinks[h])) if spec.sinks is not None else 0.0
                out[w * LENGTH + i, h] = weight @ v[at, h // group] / (weight.sum() + sink)
    return out.reshape(len(out), -1)


@pytest.mark.parametrize(
    "features",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_size_v": 5},
        {"window": 4},
        {"window": 1},
        {"window": 50},
        {"chunk": 5},
        {"chunk": 5, "window": 3},
        {"soft_cap": 1.5},
        {"soft_cap": 1.5, "window": 4, "num_kv_heads": 2},
        {"sinks": True},
        {"sinks": True, "window": 4, "num_kv_heads": 2},
        {"alibi": True},
        {"alibi": True, "num_kv_heads": 2, "window": 6},
        {"alibi": True, "soft_cap": 2.0},
    ],
    ids=str,
)
def test_attention_follows_its_definition(features, rng):
    kv_heads, size_v = features.get("num_kv_heads", HEADS), features.get("head_size_v", SIZE)
    spec = AttentionSpec(
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_size=SIZE,
        head_size_v=size_v,
        scale=0.7,
        window=features.get("window"),
        chunk=features.get("chunk"),
        soft_cap=features.get("soft_cap"),
        sinks=torch.from_numpy(rng.normal(size=HEADS)) if "sinks" in features else None,
        alibi=torch.from_numpy(rng.random(HEADS)) if "alibi" in features else None,
    )
    n = WINDOWS * LENGTH
    q, k, v = (
        rng.normal(size=(n, heads, size)).astype(np.float32)
        for heads, size in ((HEADS, SIZE), (kv_heads, SIZE), (kv_heads, size_v))
    )
    query, key, value = (torch.from_numpy(x.reshape(n, -1)) for x in (q, k, v))
    got = spec.attend(query, key, value, LENGTH).numpy()
    assert np.abs(got - slow_attention(q, k, v, spec)).max() < 1e-5
