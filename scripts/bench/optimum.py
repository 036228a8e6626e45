"""How far is a plan from the best possible one? Every mask scored on the run's own windows.

    python scripts/bench/optimum.py --budget 200 --seeds 0,1,2 --window-seeds 0,1

Runs the main job on a small model (default: the bundled one), then scores all 2^P masks on the very
calibration windows of the run and prints, for every number of removed layers, the plan's set beside
the best set: perplexities and regret in percent; and the values' error against exact enumeration.
Some minutes for 12 layers on 2 cores: 4,096 heads for each window seed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np

import lpserve
from lpserve.config import config_from
from lpserve.demo import demo_values
from lpserve.masks import all_masks
from lpserve.scoring.progress import Progress
from lpserve.types import Z90
from lpserve.values.exact import exact_values


def main() -> None:
    parser = argparse.ArgumentParser(description="Regret of plans over the exact optimum")
    parser.add_argument("--model", help="checkpoint folder of at most 14 layers (bundled)")
    parser.add_argument("--budget", type=int, default=200, help="masks of the run (200)")
    parser.add_argument("--seeds", default="0", help="seeds of the sampled masks (0)")
    parser.add_argument("--window-seeds", default="0", help="seeds of the windows (0)")
    parser.add_argument("--out", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    lines = [
        f"budget {arguments.budget}; regret in % of perplexity over the best set of each size",
        "",
        "| windows | seed | masks | " + " | ".join(f"r={r}" for r in range(1, 7)) + " | values: "
        "relative error | inside 90% |",
        "|---" * 11 + "|",
    ]
    for window_seed in _numbers(arguments.window_seeds):
        exact: tuple[np.ndarray, np.ndarray] | None = None
        for seed in _numbers(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                values = demo_values() | {
                    "budget": arguments.budget,
                    "seed": seed,
                    "window_seed": window_seed,
                    "heldout_windows": 4,
                    "out": f"{folder}/run",
                }
                if arguments.model:
                    values["model"] = arguments.model
                config = config_from(values, "bench")
                result = lpserve.run(config, Progress(interval_s=1e9))
                if exact is None:
                    exact = _exact_table(str(config.model), Path(folder) / "run" / "windows.npz")
            lines.append(_row(window_seed, seed, result.outcome, *exact))
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print("\n" + text)
    if arguments.out:
        arguments.out.write_text(text)


def _exact_table(model: str, windows_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every mask and its mean NLL in nats per token."""
    with np.load(windows_path) as data:
        windows = lpserve.TokenWindows.from_tokens(data["tokens"], data["scored"])
    with lpserve.open_engine(model, windows) as engine:
        masks = all_masks(engine.info.num_players)
        return masks, engine.score(masks).mean_nll_M()


def _row(window_seed: int, seed: int, outcome: object, masks: np.ndarray, mean: np.ndarray) -> str:
    plan, analysis = outcome.plan, outcome.analysis  # pyright: ignore[reportAttributeAccessIssue]
    removed = (~masks).sum(axis=1)
    regrets = []
    for entry in plan.plans:
        best = float(mean[removed == entry.num_removed].min())
        regret = 100 * (entry.calibration_ppl / math.exp(best) - 1)
        regrets.append(f"{max(regret, 0.0):.2f}")
    values = analysis.values
    exact = exact_values(masks, -mean[:, None], values.sizes)[:, 0]
    error = ((values.values_P - exact) ** 2).mean() / (exact**2).mean()
    inside = (np.abs(values.values_P - exact) <= Z90 * values.stderr_P).mean()
    cells = [window_seed, seed, plan.masks_scored, *regrets, f"{error:.1e}", f"{inside:.0%}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
