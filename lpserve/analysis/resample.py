"""Other windows of the same source: paired bootstrap over stored per-window NLLs.

Every draw weighs the windows; all masks share its weights, so that what two masks lose or gain
together cancels (a paired comparison). Per corpus n - 1 of n windows are drawn with replacement
and weigh n / (n - 1) each: for a mean that makes the variance over draws unbiased, which drawing n
of n understates (Rao & Wu 1988, rescaling bootstrap). Corpora keep their shares; one with a single
window says nothing of its spread, and then all windows are drawn as one corpus.

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


def mean_nll(nll_MN: FloatArray, num_tokens_N: IntArray, weights_BN: FloatArray) -> FloatArray:
    """Mean NLL in nats per token of every mask under every draw, `float64[M, B]`."""
    return (nll_MN @ weights_BN.T) / (weights_BN @ num_tokens_N)
