"""`lpserve cost`: what a run will do, counted before anything is scored."""

from __future__ import annotations

import argparse
from typing import Any


def add_cost(commands: Any) -> None:
    """Define `lpserve cost`."""
    cost = commands.add_parser(
        "cost",
        help="what a run will do, and the time that implies, before a GPU is rented",
        description="Count a run's masks, layer-forwards, FLOP and memory from config.json and "
        "safetensors headers. A time is estimated from a rate that you assume. Nothing is scored.",
    )
    cost.set_defaults(run=_cost)
    add = cost.add_argument
    add("--model", required=True, metavar="DIR", help="checkpoint folder")
    add("--budget", type=int, help="most masks scored on calibration windows (400)")
    add("--max-removed", type=int, help="plan for 1..N removed layers (3/8 of the layers)")
    add("--num-windows", type=int, help="calibration windows in all (10)")
    add("--heldout-windows", type=int, help="held-out windows in all (64)")
    add("--length", type=int, help="tokens of a window (128)")
    add("--goal", help="what masks are chosen for: both (default), plan, or values alone")
    add("--round-size", type=int, help="masks of a search round, at least (number of layers)")
    add("--seed", type=int, help="seed of the sampled masks (0)")
    add("--dtype", help="float32 (default), bfloat16, float16")
    add("--engines", type=int, help="number of engines (1)")
    add("--gpus-per-engine", type=int, help="tensor x pipeline parallel size (1)")
    add(
        "--tflops-per-gpu",
        type=float,
        metavar="F",
        help="TFLOP/s that you assume a GPU keeps up; without it no time is estimated",
    )
    add("--gpu-memory-gb", type=float, metavar="GIB", help="warn when a GPU of this memory is full")


def _cost(arguments: argparse.Namespace) -> int:
    from lpserve.runner.cost import CostSettings, cost, describe

    given = {k: v for k, v in vars(arguments).items() if k != "run" and v is not None}
    print(describe(cost(CostSettings(**given))))
    return 0
