"""How far scores of half precision are apart: paths, batch compositions, engines.

    PYTHONPATH=. python scripts/bench/precision.py --out precision.md

The bundled model on its own calibration text, the same masks (all kept, none kept, random ones of
every size) for every engine. Figures are differences of a mask's mean NLL in nats per token: root
mean square and largest over the masks, and the rank correlation of the masks' scores.

    scoring, packed   micro-batches filled with states of several masks, as on a GPU
    noise_nll         what the engine measures at start, on fewer masks, and adds to the intervals
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from probes import demo_windows, machine_lines, publish
from scipy.stats import rankdata

from lpserve import open_engine
from lpserve.masks import draw
from lpserve.types import FloatArray

ENGINES: dict[str, dict[str, Any]] = {
    "transformers": {"kind": "transformers"},
    "vLLM scoring": {"kind": "vllm", "path": "scoring"},
    "vLLM scoring, packed": {"kind": "vllm", "path": "scoring", "micro_batch_tokens": 1 << 14},
    "vLLM requests": {"kind": "vllm", "path": "requests"},
}


def main() -> int:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description="How far scores of half precision are apart.")
    parser.add_argument("--masks", type=int, default=60, help="random masks (60)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="float32,bfloat16")
    parser.add_argument("--out", type=Path, help="markdown file to write the table to")
    args = parser.parse_args()
    model, windows = demo_windows()
    rng, num_players = np.random.default_rng(0), 12
    masks_MP = np.concatenate(
        [
            np.ones((1, num_players), bool),
            np.zeros((1, num_players), bool),
            *(draw(num_players, kept, -(-args.masks // 11), rng) for kept in range(1, 12)),
        ]
    )
    lines = ["# Precision", "", *machine_lines(2), ""]
    exact: FloatArray | None = None
    for dtype in args.dtypes.split(","):
        mean: dict[str, FloatArray] = {}
        noise: dict[str, float] = {}
        for name, options in ENGINES.items():
            with open_engine(model, windows, dtype=dtype, **options) as engine:
                scores = engine.score(masks_MP)
                mean[name] = scores.mean_nll_M()
                noise[name] = engine.info.noise_nll
        exact = mean["transformers"] if exact is None else exact
        lines += [
            f"## {dtype}: {len(masks_MP)} masks, {windows.num_windows} x {windows.length} tokens",
            "",
            "| engine | to vLLM requests: rms | largest | to transformers: rms | largest "
            "| to float32: rms | largest | rank correlation | noise_nll |",
            "| --- " + "| ---: " * 8 + "|",
        ]
        for name, own in mean.items():
            cells = []
            for other in (mean["vLLM requests"], mean["transformers"], exact):
                gap = own - other
                cells += [f"{np.sqrt(np.mean(gap**2)):.1e}", f"{np.abs(gap).max():.1e}"]
            rank = np.corrcoef(rankdata(own), rankdata(exact))[0, 1]
            lines.append(f"| {name} | {' | '.join(cells)} | {rank:.5f} | {noise[name]:.1e} |")
        lines.append("")
    publish(lines, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
