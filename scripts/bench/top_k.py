"""What KL from the full model loses when only its K likeliest tokens are told apart.

    PYTHONPATH=. python scripts/bench/top_k.py --out top_k.md

The bundled model on its own calibration text: random masks of every size, scored for `kl` and for
`kl_topK` with several K in one pass. `kl_topK` takes all other tokens as one, so it is never above
`kl`; the table gives by how much it is below, and whether masks rank alike (all, and those of one
size, the mean over sizes).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from probes import demo_windows, machine_lines, publish
from scipy.stats import spearmanr

from lpserve import open_engine
from lpserve.masks import draw
from lpserve.types import FloatArray


def main() -> int:
    parser = argparse.ArgumentParser(description="What KL loses with few tokens told apart.")
    parser.add_argument("--masks", type=int, default=20, help="masks of every size (20)")
    parser.add_argument("--tops", default="1,4,16,64,256,1024", help="K, by comma")
    parser.add_argument("--out", type=Path, help="markdown file to write the table to")
    args = parser.parse_args()
    model, windows = demo_windows()
    rng, num_players = np.random.default_rng(0), 12
    masks_MP = np.concatenate(
        [draw(num_players, kept, args.masks, rng) for kept in range(num_players - 1, 3, -1)]
    )
    kept_M = masks_MP.sum(axis=1)
    tops = [int(k) for k in args.tops.split(",")]
    tokens = windows.num_tokens_N.sum()

    def mean(metric: str, extra_metrics: tuple[str, ...]) -> tuple[FloatArray, float]:
        started = time.perf_counter()
        sums_MN = engine.score(masks_MP, extra_metrics=extra_metrics).of(metric)
        return sums_MN.sum(axis=1) / tokens, time.perf_counter() - started

    with open_engine(model, windows, dtype="float32") as engine:
        engine.score(
            masks_MP[:4], extra_metrics=("kl", *(f"kl_top{k}" for k in tops))
        )  # warm up, tables
        _, alone = mean("nll", ())
        exact_M, exact_s = mean("kl", ("kl",))
        lines = [
            "# KL by the full model's likeliest tokens",
            "",
            *machine_lines(2),
            "",
            f"{len(masks_MP)} masks of the bundled model (vocabulary {engine.info.vocab_size:,}) "
            f"without 1 to 8 of 12 layers, {windows.num_windows} x {windows.length} tokens, "
            f"float32; mean KL {exact_M.mean():.3f} nats per token. Time is of one pass with the "
            "NLL, against the NLL's alone.",
            "",
            "| metric | below kl: mean | largest | rank correlation | of one size | time |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            f"| kl | 0 | 0 | 1 | 1 | {exact_s / alone:.2f} x |",
        ]
        for k in tops:
            name = f"kl_top{k}"
            got_M, seconds = mean(name, (name,))
            below_M = (exact_M - got_M) / exact_M
            alike = [
                rank(exact_M[kept_M == kept], got_M[kept_M == kept]) for kept in np.unique(kept_M)
            ]
            lines.append(
                f"| {name} | {below_M.mean():.1%} | {below_M.max():.1%} | "
                f"{rank(exact_M, got_M):.4f} | {np.mean(alike):.4f} | {seconds / alone:.2f} x |"
            )
    publish(lines, args.out)
    return 0


def rank(first_M: FloatArray, second_M: FloatArray) -> float:
    """Spearman's."""
    found: Any = spearmanr(first_M, second_M)
    return float(found.statistic)


if __name__ == "__main__":
    sys.exit(main())
