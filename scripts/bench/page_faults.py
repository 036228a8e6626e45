"""Page faults and system time on a CPU, with and without the memory that engines keep.

    PYTHONPATH=. python scripts/bench/page_faults.py --out page_faults.md

A random-weight Llama is saved to a temporary folder. Every method has a process of its own, since
what an allocator has learned stays with its process; the processes take turns call by call, so that
a slow spell of the machine hits all of them:

    given back   lpserve with keep_freed_memory=False: the allocator as it comes
    kept         lpserve as it comes
    skip         transformers' own forward pass over the kept layers, one mask at a time, on a
                 subset of the masks with as many from every stratum
    skip, kept   the same, with memory kept as lpserve keeps it

The first call is the first that scores in its process, the second scores the same masks again.
Faults and seconds are the process's own (getrusage). `counts allow` is what the layer-forwards
saved would give over skip if nothing else took time (see scoring.py), and the share of it that was
measured is given against skip with the same allocator.

Exits 1 when the scores of the methods differ by more than 1e-5, relative.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from probes import machine_lines, publish, random_windows, save_random_llama, verdict
from scoring import Baselines, baseline_chunks, paper_masks

from lpserve import open_engine
from lpserve.engine.hf.allocator import keep_for
from lpserve.types import BoolArray, FloatArray

TOLERANCE = 1e-5
CALLS = ("first", "second")
METHODS = ("given back", "kept", "skip", "skip, kept")
RIVAL = {"given back": "skip", "kept": "skip, kept"}
"""Ours and skip with the same allocator."""


@dataclass(kw_only=True, slots=True)
class Call:
    """What one call of one method took."""

    masks: int
    faults: int
    user: float
    system: float
    wall: float

    @property
    def rate(self) -> float:
        return self.masks / self.wall

    @property
    def system_share(self) -> float:
        return self.system / (self.user + self.system)


@dataclass(kw_only=True, slots=True)
class Found:
    """What one method's process found."""

    allocator: str
    layers: float
    """Layer-forwards a mask."""
    heads: float
    """Heads a mask."""
    head_over_layer: float
    nll_by_row: dict[int, FloatArray]
    peak: int
    """KiB resident at most."""
    calls: list[Call] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Masks/s of all calls."""
        return sum(c.masks for c in self.calls) / sum(c.wall for c in self.calls)


# -- in a process of its own -----------------------------------------------------------------------


def work(
    pipe: Connection, method: str, threads: int, folder: Path, args: argparse.Namespace
) -> None:
    """Get ready, make one call for every order, then send what was found."""
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    run = run_skip if method.startswith("skip") else run_ours
    with torch.inference_mode():
        pipe.send(run(pipe, method, folder, paper_masks(args.layers, args.masks, args.seed), args))


def run_ours(
    pipe: Connection, method: str, folder: Path, masks_MP: BoolArray, args: argparse.Namespace
) -> Found:
    options = {"state_budget_mb": args.state_budget_mb, "keep_freed_memory": method == "kept"}
    windows = random_windows(args, args.windows)
    with open_engine(str(folder), windows, device="cpu", **options) as engine:
        calls, scores = make_calls(pipe, lambda: engine.score(masks_MP), len(masks_MP))
        return Found(
            allocator=engine.info.settings["allocator"],
            layers=scores.work.layer_forwards / len(masks_MP),
            heads=scores.work.distinct_masks / len(masks_MP),
            head_over_layer=0.0,
            nll_by_row=dict(enumerate(scores.nll_MN)),
            peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            calls=calls,
        )


def run_skip(
    pipe: Connection, method: str, folder: Path, masks_MP: BoolArray, args: argparse.Namespace
) -> Found:
    rows = np.concatenate(baseline_chunks(masks_MP, args.baseline_masks, args.seed))
    baselines = Baselines(folder, random_windows(args, args.windows), args)
    allocator = keep_for(baselines)[0] if method == "skip, kept" else "as it comes"
    calls, nll = make_calls(
        pipe, lambda: [baselines.skip(mask_P) for mask_P in masks_MP[rows]], len(rows)
    )
    return Found(
        allocator=allocator,
        layers=float(masks_MP[rows].sum(axis=1).mean()),
        heads=1.0,
        head_over_layer=baselines.head_over_layer(),
        nll_by_row={int(row): nll_N.numpy() for row, nll_N in zip(rows, nll, strict=True)},
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        calls=calls,
    )


def make_calls(pipe: Connection, call: Callable[[], Any], masks: int) -> tuple[list[Call], Any]:
    """One call for every order that comes; the last result."""
    results, calls = [], []
    pipe.send("ready")
    for _ in CALLS:
        pipe.recv()
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        results = [call()]
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        calls.append(
            Call(
                masks=masks,
                faults=after.ru_minflt - before.ru_minflt,
                user=after.ru_utime - before.ru_utime,
                system=after.ru_stime - before.ru_stime,
                wall=wall,
            )
        )
        pipe.send("done")
    return calls, results[0]


# -- all of them, in turn --------------------------------------------------------------------------


def measure(threads: int, folder: Path, args: argparse.Namespace) -> dict[str, Found]:
    """Every method with this many threads."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for method in METHODS:
        pipes[method], theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, method, threads, folder, args))
        process.start()
        theirs.close()  # so that a process that dies is an end of file
        processes.append(process)
        pipes[method].recv()
    for number, call in enumerate(CALLS):
        for method in METHODS if number % 2 else reversed(METHODS):
            print(f"threads {threads}, {call} call, {method} ...", file=sys.stderr, flush=True)
            pipes[method].send("call")
            pipes[method].recv()
    found = {}
    for method, process in zip(METHODS, processes, strict=True):
        found[method] = pipes[method].recv()
        process.join()
    return found


def allowed(ours: Found, skip: Found) -> float:
    """What the counts allow ours over skip."""
    h = skip.head_over_layer
    return (skip.layers + h * skip.heads) / (ours.layers + h * ours.heads)


def table(found: Mapping[int, dict[str, Found]]) -> list[str]:
    lines = [
        "| threads | method | call | masks | minor faults | user s | system s | system share "
        "| masks/s | over skip | counts allow | over skip with the same allocator / allowed |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for threads, by_method in found.items():
        skip = by_method["skip"]
        for method, of in by_method.items():
            for name, call in zip(CALLS, of.calls, strict=True):
                ratios = "| |"
                if method in RIVAL:
                    rival = by_method[RIVAL[method]]
                    allow = allowed(of, rival)
                    ratios = (
                        f"{call.rate / skip.rate:.2f} x | {allow:.2f} x "
                        f"| {call.rate / rival.rate / allow:.0%}"
                    )
                lines.append(
                    f"| {threads} | {method} | {name} | {call.masks} | {call.faults:,} "
                    f"| {call.user:.1f} | {call.system:.1f} | {call.system_share:.1%} "
                    f"| {call.rate:.2f} | {ratios} |"
                )
    return lines


def notes(found: Mapping[int, dict[str, Found]]) -> list[str]:
    kept = {threads: by_method["kept"] for threads, by_method in found.items()}
    share = max(call.system_share for of in kept.values() for call in of.calls)
    reached = min(
        call.rate / by_method["skip, kept"].rate / allowed(of, by_method["skip, kept"])
        for of, by_method in zip(kept.values(), found.values(), strict=True)
        for call in of.calls
    )
    worst = max(worst_difference(by_method) for by_method in found.values())
    lines = [
        "",
        f"- allocator of `kept`: {next(iter(kept.values())).allocator}",
        f"- system time of `kept` at most {share:.1%}, below 5%: {verdict(share < 0.05)}",
        f"- `kept` reaches at least {reached:.0%} of what the counts allow, at least 90%: "
        f"{verdict(reached >= 0.9)}",
        f"- worst relative difference of a window's score between methods {worst:.1e}, tolerance "
        f"{TOLERANCE:.0e}: {verdict(worst <= TOLERANCE)}",
    ]
    for threads, by_method in found.items():
        peaks = ", ".join(f"{name} {of.peak / 1024:.0f}" for name, of in by_method.items())
        h = by_method["skip, kept"].head_over_layer
        lines.append(f"- threads {threads}: peak resident MiB {peaks}; h = head / layer = {h:.3f}")
    return lines


def worst_difference(by_method: Mapping[str, Found]) -> float:
    """Largest relative difference of a window's score from that of `kept`."""
    known = by_method["kept"].nll_by_row
    return max(
        float((np.abs(nll_N - known[row]) / np.abs(known[row])).max())
        for of in by_method.values()
        for row, nll_N in of.nll_by_row.items()
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Page faults and system time of lpserve and of skipping.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", type=int, default=32, help="decoder layers = players")
    add("--width", type=int, default=256, help="hidden size")
    add("--ffn", type=int, default=688, help="intermediate size")
    add("--heads", type=int, default=4, help="attention heads")
    add("--vocabulary", type=int, default=512, help="tokens in the vocabulary")
    add("--length", type=int, default=128, help="tokens a window")
    add("--windows", type=int, default=10, help="windows")
    add("--masks", type=int, default=400, help="masks that ours scores in a call")
    add("--baseline-masks", type=int, default=30, help="masks that skip scores in a call")
    add("--threads", default="1,2", help="numbers of CPU threads")
    add("--state-budget-mb", type=float, default=64, help="MiB of hidden states that ours may keep")
    add("--seed", type=int, default=0, help="of weights, windows and masks")
    add("--out", type=Path, help="markdown file to write the table to")
    args = parser.parse_args()
    args.device, args.dtype = "cpu", "float32"
    return args


def main() -> int:
    args = parse_args()
    threads = [int(number) for number in args.threads.split(",")]
    head = ["# Page faults", "", f"- date: {date.today()}", *machine_lines(max(threads))]
    with tempfile.TemporaryDirectory() as name:
        save_random_llama(args, Path(name))
        found = {number: measure(number, Path(name), args) for number in threads}
    model = (
        f"Llama of random weights: {args.layers} layers, width {args.width}, FFN {args.ffn}, "
        f"{args.heads} heads, vocabulary {args.vocabulary}, float32; {args.windows} x "
        f"{args.length} tokens; load of the machine after (1 minute): {os.getloadavg()[0]:.2f}."
    )
    publish([*head, model, "", *table(found), *notes(found)], args.out)
    return 0 if all(worst_difference(m) <= TOLERANCE for m in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
