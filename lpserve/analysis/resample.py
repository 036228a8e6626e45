"""Paired bootstrap over stored per-window losses: what other windows of the same source would give.

Every draw gives the windows weights, which all masks share, so that common changes of two masks
cancel (a paired comparison). For each corpus n - 1 of its n windows are drawn with replacement and
weigh n / (n - 1) each, which makes the variance over draws unbiased for a mean; drawing n of n
would understate it (Rao & Wu 1988, rescaling bootstrap). Corpora keep their shares. A corpus of a
single window has no spread to estimate; then all windows are drawn as one corpus.

Notation: M masks, N windows, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpserve.types import FloatArray, IntArray

DRAWS = 400


def window_weights(corpus_sizes: Sequence[int], draws: int = DRAWS, seed: int = 0) -> FloatArray:
    """Weight of every window in every draw, `float64[B, N]`; each corpus's weights sum to its size.

    Args:
        corpus_sizes: number of windows of each corpus, in order. At least 2 windows in all.
    """
    sizes = list(corpus_sizes) if min(corpus_sizes) > 1 else [sum(corpus_sizes)]
    if sizes[0] < 2:
        raise ValueError("a single window says nothing about others")
    rng = np.random.default_rng(seed)
    parts = [rng.multinomial(n - 1, np.full(n, 1 / n), size=draws) * (n / (n - 1)) for n in sizes]
    return np.asarray(np.concatenate(parts, axis=1), dtype=np.float64)


def mean_nll(nll_MN: FloatArray, num_tokens_N: IntArray, weights: FloatArray) -> FloatArray:
    """Mean loss per token of every mask under every draw, `float64[M, B]`; of NLLs in nats."""
    return (nll_MN @ weights.T) / (weights @ num_tokens_N)
