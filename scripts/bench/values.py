"""Values stage: surrogate evaluations, closed form and mask sampling on one core.

    PYTHONPATH=. python scripts/bench/values.py --out values.md

The headline is stage 2 of arXiv 2602.07804: 80,000 masks x 32 players x 2 = 5.12 million surrogate
values on one thread, target below 2 s. lpserve asks its surrogate for 33 values a mask instead of
64, since of m + i and m - i one is m itself. Beside it the reference's way, one row at a time with
`.item()` in torch on the same network: timed on a few masks and extrapolated.

Every time is the median of `--repeats`. Exits 1 when the two ways differ by more than 1e-6.
Takes about a minute.
"""

from __future__ import annotations

import os

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # read once, when numpy and torch are loaded

import argparse  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from probes import machine_lines, publish  # noqa: E402
from scoring import paper_masks  # noqa: E402

from lpserve.masks import StratifiedDesign, draw, paper_kept_counts  # noqa: E402
from lpserve.surrogate import KernelSurrogate, PaperSurrogate  # noqa: E402
from lpserve.types import BoolArray, FloatArray  # noqa: E402
from lpserve.values.closed_form import kernel_values  # noqa: E402
from lpserve.values.sampling import monte_carlo_values, paper_values, toggle_differences  # noqa: E402

TARGET_S = 2.0
TARGET_TAKE = 1e6
TOLERANCE = 1e-6
PLAYER_COUNTS = (12, 32, 80)
HEADER = [
    "| what | size | seconds | a second | target | met |",
    "| --- | --- | ---: | ---: | --- | --- |",
]


class OneRowAtATime:
    """The reference's way: a torch network called for one mask at a time, then `.item()`."""

    def __init__(self, surrogate: PaperSurrogate) -> None:
        (first, first_bias), (last, last_bias) = surrogate._first, surrogate._last
        one, two = torch.nn.Linear(*first.shape), torch.nn.Linear(len(last), 1)
        with torch.no_grad():
            one.weight.copy_(torch.from_numpy(first.T.copy()))
            one.bias.copy_(torch.from_numpy(first_bias))
            two.weight.copy_(torch.from_numpy(last[None]))
            two.bias.fill_(last_bias)
        self._network = torch.nn.Sequential(one, torch.nn.CELU(), two, torch.nn.Sigmoid())

    @torch.no_grad()
    def differences(self, queried_MP: BoolArray) -> FloatArray:
        """f(m + i) - f(m - i), `float64[Q, P]`, two values for each entry."""
        gain_QP = np.empty(queried_MP.shape)
        for row, mask_P in enumerate(queried_MP):
            for player in range(len(mask_P)):
                bits = torch.from_numpy(mask_P.astype(np.float32))
                bits[player] = 1.0
                joined = self._network(bits).item()
                bits[player] = 0.0
                gain_QP[row, player] = joined - self._network(bits).item()
        return gain_QP


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time."""
    laps = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        laps.append(time.perf_counter() - started)
    return statistics.median(laps)


def random_game(num_players: int, num_masks: int, seed: int) -> tuple[BoolArray, FloatArray]:
    """Distinct masks and utilities in (0, 1]: main effects and a little noise."""
    design = StratifiedDesign(num_players, paper_kept_counts(num_players), seed)
    masks_MP = design.take(num_masks)
    rng = np.random.default_rng(seed)
    loss_M = (~masks_MP) @ rng.exponential(0.1, num_players) + rng.uniform(0, 0.05, len(masks_MP))
    return masks_MP, np.exp(-loss_M)


def row(what: str, size: str, time_s: float, count: int, unit: str, target: str = "") -> str:
    met = ""
    if target == "time":
        target, met = f"< {TARGET_S:.0f} s", "yes" if time_s < TARGET_S else "**NO**"
    elif target == "rate":
        target, met = f"> {TARGET_TAKE:,.0f}", "yes" if count / time_s > TARGET_TAKE else "**NO**"
    return f"| {what} | {size} | {time_s:.4g} | {count / time_s:,.0f} {unit} | {target} | {met} |"


def surrogate_rows(args: argparse.Namespace) -> tuple[list[str], float]:
    """The paper's stage, both ways, and Monte Carlo values; and how far the two ways differ."""
    surrogate = PaperSurrogate(args.seed)
    # the time to evaluate does not depend on the fit: one batch an epoch will do
    surrogate.fit(*random_game(args.players, surrogate.BATCH, args.seed))
    queried_MP = paper_masks(args.players, args.masks, args.seed)
    few_QP = queried_MP[:: -(-len(queried_MP) // args.reference_masks)]
    reference = OneRowAtATime(surrogate)
    difference = np.abs(
        reference.differences(few_QP) - toggle_differences(surrogate.mean, few_QP)
    ).max()
    needed = 2 * queried_MP.size
    ours = seconds(lambda: paper_values(surrogate.mean, queried_MP), args.repeats)
    sample = seconds(lambda: reference.differences(few_QP), args.repeats)
    theirs = sample * len(queried_MP) / len(few_QP)
    size = f"{len(queried_MP):,} masks x {args.players} players x 2"
    sizes = (0, args.players - 1)
    sampled = seconds(
        lambda: monte_carlo_values(surrogate.mean, args.players, sizes, args.masks, args.seed),
        args.repeats,
    )
    lines = [
        row("paper_values, PaperSurrogate", size, ours, needed, "values", "time"),
        row(
            "the reference's way, one row at a time",
            f"{size}, extrapolated from {len(few_QP)} masks",
            theirs,
            needed,
            "values",
        ),
        row(
            "monte_carlo_values, PaperSurrogate",
            f"{args.masks:,} coalitions x {args.players} players",
            sampled,
            args.masks,
            "coalitions",
        ),
    ]
    return lines, float(difference)


def kernel_rows(args: argparse.Namespace) -> list[str]:
    """Closed form of both kernel surrogates, and their fits with tuning."""
    masks_MP, utilities_M = random_game(args.players, args.training_masks, args.seed)
    size, lines = f"{len(masks_MP):,} scored masks, {args.players} players", []
    for kind in ("ridge", "gp"):
        surrogate = KernelSurrogate(kind)

        def fit(kind: str = kind) -> None:
            KernelSurrogate(kind).fit(masks_MP, utilities_M)

        def values(surrogate: KernelSurrogate = surrogate) -> None:
            kernel_values(surrogate, (0, args.players - 1))

        surrogate.fit(masks_MP, utilities_M)
        time_s = seconds(values, args.repeats)
        lines.append(row(f"kernel_values, {kind}", size, time_s, args.players, "players"))
        time_s = seconds(fit, 1)
        lines.append(row(f"KernelSurrogate.fit, {kind}", size, time_s, len(masks_MP), "masks"))
    return lines


def sampling_rows(args: argparse.Namespace) -> list[str]:
    """Masks with and without repeats."""
    lines = []
    for num_players in PLAYER_COUNTS:
        strata = paper_kept_counts(num_players)
        each = args.samples // len(strata)
        rng = np.random.default_rng(args.seed)

        def with_repeats(
            num_players: int = num_players, strata: tuple[int, ...] = strata
        ) -> list[BoolArray]:
            return [draw(num_players, kept, each, rng) for kept in strata]  # noqa: B023

        def without_repeats(
            num_players: int = num_players, strata: tuple[int, ...] = strata
        ) -> BoolArray:
            return StratifiedDesign(num_players, strata, args.seed).take(args.samples)

        place, count = f"P = {num_players}", each * len(strata)
        time_s = seconds(with_repeats, args.repeats)
        lines.append(row("masks.draw", f"{place}, {count:,} masks", time_s, count, "masks"))
        count = len(without_repeats())
        size = f"{place}, {count:,} masks" + (" (all there are)" if count < args.samples else "")
        target = "rate" if num_players == 32 else ""
        time_s = seconds(without_repeats, args.repeats)
        lines.append(row("StratifiedDesign.take", size, time_s, count, "masks", target))
    return lines


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Times of the values stage and of mask sampling on one core.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--players", type=int, default=32, help="players of the values rows")
    add("--masks", type=int, default=80_000, help="masks of the paper's stage; coalitions sampled")
    add(
        "--reference-masks", type=int, default=20, help="masks that the reference's way is timed on"
    )
    add("--training-masks", type=int, default=1000, help="scored masks of the kernel surrogates")
    add("--samples", type=int, default=1_000_000, help="masks of the sampling rows")
    add("--repeats", type=int, default=3, help="times each thing is timed; the median counts")
    add("--seed", type=int, default=0, help="of masks, games and weights")
    add("--out", type=Path, help="markdown file to write the table to")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    torch.set_num_threads(1)
    head = ["# Values and masks on one core", "", *machine_lines(1)]
    rows, difference = surrogate_rows(args)
    close = difference <= TOLERANCE
    note = (
        f"Largest difference of a toggle between the two ways: {difference:.1e}, at most "
        f"{TOLERANCE:.0e}: {'yes' if close else '**NO**'}. A `value` is one of the 2 a mask and "
        "player that the method is defined by."
    )
    publish([*head, *HEADER, *rows, *kernel_rows(args), *sampling_rows(args), "", note], args.out)
    return 0 if close else 1


if __name__ == "__main__":
    raise SystemExit(main())
