"""Masks per second: zeroing parameters, skipping layers one mask at a time, and lpserve.

    PYTHONPATH=. python scripts/bench/scoring.py --out scoring.md

A random-weight Llama is saved to a temporary folder. All methods score masks of the strata of
arXiv 2602.07804 (kept counts 30, 27, 24, 21, 18 of 32, drawn with replacement, as its code does)
on the same windows, in one process, with the same number of threads:

    zero   parameters of the dropped layers set to zero, then a full forward pass of all layers, all
           windows in one batch; put back from a copy made once and not timed
    skip   transformers' own forward pass over a ModuleList of the kept layers, one mask at a time,
           all windows in one batch
    ours   lpserve.open_engine(...).score(all masks) on the same checkpoint

zero and skip are timed on a random subset (`--baseline-masks`, the same number from every stratum,
so that the mean number of kept layers is that of the list), half of it before and half after ours,
alternating; their masks/s are an extrapolation. Ours scores every mask.

`counts allow` is what the work saved would give if nothing else took time: with h the time of a
head over that of a layer (plain torch), (layers a mask + h) M / (layer-forwards + h distinct).

Exits 1 when the scores of the three differ by more than the tolerance.
Takes most of an hour on one core; `--masks 500 --wide-masks 0 --baseline-masks 20 --no-flat` is a
short try.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from probes import (
    Flat,
    Inside,
    Memory,
    PeakMemory,
    Timing,
    flat_lines,
    machine_lines,
    memory_line,
    memory_now,
    profiled,
    publish,
    random_windows,
    return_free_memory,
    save_random_llama,
    time_state_copy,
    timed,
    timed_stack,
    verdict,
)
from torch.nn.functional import cross_entropy

from lpserve import TokenWindows, open_engine
from lpserve.engine.hf.engine import TransformersEngine
from lpserve.masks import StratifiedDesign, draw, paper_kept_counts, sort_distinct
from lpserve.types import BoolArray, FloatArray, Scores

FLAT_MASKS, FLAT_STEPS = 10_000, 5
WARM_UP_MASKS = 4
PROFILE_REPEATS = 8


@dataclass(kw_only=True)
class RowSet:
    """Everything measured for one number of windows and one list of masks."""

    num_windows: int
    length: int
    num_masks: int
    mean_kept: float
    num_players: int
    scores: Scores
    zero: Timing
    skip: Timing
    ours: Timing
    distinct_kept: int
    head_over_layer: float
    inside: Inside | None
    memory: Memory
    arithmetic: dict[str, tuple[float, float]]
    """zero, skip -> share of the wall time without and with the profiler's own."""
    difference: float
    tolerance: float
    spread: float
    """Smallest over largest mean NLL of the list, less 1: what a score can differ by."""

    def allowed(self, layers: float) -> float:
        """What the counts allow ours over a method that runs this many layers a mask."""
        work, h = self.scores.work, self.head_over_layer
        return (layers + h) * self.num_masks / (work.layer_forwards + h * work.distinct_masks)


class Baselines:
    """Zeroing and skipping on transformers' own model."""

    def __init__(self, folder: Path, windows: TokenWindows, args: argparse.Namespace) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=getattr(torch, args.dtype), local_files_only=True
        )
        self.model.to(args.device).eval()
        self.tokens = torch.from_numpy(windows.tokens_NT.astype(np.int64)).to(args.device)
        self.layers: list[Any] = list(self.model.model.layers)
        self._copies = [[p.detach().clone() for p in layer.parameters()] for layer in self.layers]

    def zero(self, mask_P: BoolArray) -> torch.Tensor:
        """float64[N] nats, all layers run, the dropped ones on zero parameters."""
        dropped = np.flatnonzero(~mask_P)
        for index in dropped:
            for parameter in self.layers[index].parameters():
                parameter.zero_()
        nll_N = self.nll()
        for index in dropped:
            parameters = self.layers[index].parameters()
            for parameter, copy in zip(parameters, self._copies[index], strict=True):
                parameter.copy_(copy)
        return nll_N

    def skip(self, mask_P: BoolArray) -> torch.Tensor:
        """float64[N] nats, only the kept layers run."""
        kept = [layer for layer, keep in zip(self.layers, mask_P, strict=True) if keep]
        decoder, config = self.model.model, self.model.config
        everything, num_layers = decoder.layers, config.num_hidden_layers
        decoder.layers, config.num_hidden_layers = torch.nn.ModuleList(kept), len(kept)
        try:
            return self.nll()
        finally:
            decoder.layers, config.num_hidden_layers = everything, num_layers

    def nll(self) -> torch.Tensor:
        """float64[N] nats of the model as it stands."""
        return self.loss(self.model(input_ids=self.tokens, use_cache=False).logits)

    def loss(self, logits_NTV: torch.Tensor) -> torch.Tensor:
        targets = self.tokens[:, 1:]
        nll = cross_entropy(
            logits_NTV[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none"
        )
        return nll.view(targets.shape).double().sum(1)

    def head_over_layer(self, repeats: int = 31) -> float:
        """Time of norm, projection and loss over that of one layer, on all windows."""
        model, decoder = self.model, self.model.model
        hidden = decoder.embed_tokens(self.tokens)
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]
        rotary = decoder.rotary_emb(hidden, position_ids=positions)
        calls: dict[str, Callable[[], Any]] = {
            "layer": lambda: self.layers[0](
                hidden, attention_mask=None, position_embeddings=rotary, use_cache=False
            ),
            "head": lambda: self.loss(model.lm_head(decoder.norm(hidden))),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):  # alternating, so that a slow spell hits both
            for name, call in calls.items():
                seconds[name].append(timed(call, hidden.device, 1).wall)
        return statistics.median(seconds["head"]) / statistics.median(seconds["layer"])


# -- inputs ------------------------------------------------------------------------------------


def paper_masks(num_players: int, count: int, seed: int) -> BoolArray:
    """M / strata masks of each stratum, with replacement, `bool[M, P]`."""
    strata = paper_kept_counts(num_players)
    rng = np.random.default_rng([seed, count])
    per_stratum = -(-count // len(strata))
    return np.concatenate([draw(num_players, kept, per_stratum, rng) for kept in strata])


def baseline_chunks(masks_MP: BoolArray, wanted: int, seed: int) -> list[np.ndarray]:
    """Rows of the list in chunks that hold one random mask of every stratum each."""
    rng = np.random.default_rng([seed, 1])
    kept_M = masks_MP.sum(axis=1)
    strata = [rng.permutation(np.flatnonzero(kept_M == kept)) for kept in np.unique(kept_M)]
    num_chunks = min(-(-wanted // len(strata)), *(len(rows) for rows in strata))
    return [np.array([rows[i] for rows in strata]) for i in range(num_chunks)]


# -- one row set -------------------------------------------------------------------------------


@torch.inference_mode()
def measure(
    folder: Path, windows: TokenWindows, num_masks: int, args: argparse.Namespace
) -> RowSet:
    device = torch.device(args.device)
    masks_MP = paper_masks(args.layers, num_masks, args.seed)
    chunks = baseline_chunks(masks_MP, args.baseline_masks, args.seed)
    baselines = Baselines(folder, windows, args)
    times, nll_RN = {"zero": Timing(), "skip": Timing()}, {"zero": {}, "skip": {}}
    profile = arithmetic_shares(baselines, masks_MP[chunks[0]], device)  # also warms them up
    half = len(chunks) // 2
    run_baselines(baselines, masks_MP, chunks[:half], times, nll_RN, device)
    scores, ours, inside, memory = run_ours(folder, windows, masks_MP, args)
    run_baselines(baselines, masks_MP, chunks[half:], times, nll_RN, device)
    return RowSet(
        num_windows=windows.num_windows,
        length=windows.length,
        num_masks=len(masks_MP),
        mean_kept=float(masks_MP.sum(axis=1).mean()),
        num_players=args.layers,
        scores=scores,
        ours=ours,
        distinct_kept=int(sort_distinct(masks_MP)[0].sum()),
        head_over_layer=baselines.head_over_layer(),
        inside=inside,
        memory=memory,
        arithmetic=profile,
        difference=worst_difference(scores.nll_MN, nll_RN),
        tolerance=args.tolerance,
        spread=float(np.ptp(scores.mean_nll_M()) / scores.mean_nll_M().min()),
        **times,
    )


def run_baselines(
    baselines: Baselines,
    masks_MP: BoolArray,
    chunks: list[np.ndarray],
    times: dict[str, Timing],
    nll_RN: dict[str, dict[int, FloatArray]],
    device: torch.device,
) -> None:
    """Time zero and skip on every chunk, adding to `times` and keeping the scores by row."""
    for number, rows in enumerate(chunks):
        for name in ("zero", "skip") if number % 2 else ("skip", "zero"):
            method, results = getattr(baselines, name), {}

            def call(
                method: Callable[[BoolArray], torch.Tensor] = method,
                rows: np.ndarray = rows,
                results: dict[int, torch.Tensor] = results,
            ) -> None:
                for row in rows:
                    results[int(row)] = method(masks_MP[row])

            times[name].add(timed(call, device, len(rows)))
            nll_RN[name].update({row: nll.cpu().numpy() for row, nll in results.items()})


def worst_difference(nll_MN: FloatArray, nll_RN: dict[str, dict[int, FloatArray]]) -> float:
    """Largest relative difference of a window's score between ours and either baseline."""
    worst = [
        (np.abs(nll_MN[row] - nll_N) / np.abs(nll_N)).max()
        for by_row in nll_RN.values()
        for row, nll_N in by_row.items()
    ]
    return float(np.max(worst))  # NaN, should there be one, is not within any tolerance


def open_ours(folder: Path, windows: TokenWindows, args: argparse.Namespace) -> TransformersEngine:
    """The engine, its memory touched once."""
    return_free_memory()
    engine = open_engine(
        str(folder),
        windows,
        dtype=args.dtype,
        device=args.device,
        state_budget_mb=args.state_budget_mb,
    )
    assert isinstance(engine, TransformersEngine)  # its stack is timed below
    engine.score(paper_masks(args.layers, WARM_UP_MASKS, args.seed + 1))
    return engine


def run_ours(
    folder: Path, windows: TokenWindows, masks_MP: BoolArray, args: argparse.Namespace
) -> tuple[Scores, Timing, Inside | None, Memory]:
    device = torch.device(args.device)
    results: list[Scores] = []
    with open_ours(folder, windows, args) as engine:
        settings = engine.info.settings
        start = memory_now(device)
        with timed_stack(engine, device) as inside, PeakMemory(device) as memory:
            timing = timed(lambda: results.append(engine.score(masks_MP)), device, len(masks_MP))
        if inside is not None:
            inside.sorting = timed(lambda: sort_distinct(masks_MP), device, 1).wall
            inside.state_copy = time_state_copy(engine, windows, args)
    return (
        results[0],
        timing,
        inside,
        Memory(
            start=start,
            peak=memory.peak,
            state_budget=settings["state_budget_bytes"],
            head_chunk=settings["head_chunk_bytes"],
        ),
    )


# -- memory over many masks ----------------------------------------------------------------------


def arithmetic_shares(
    baselines: Baselines, part_MP: BoolArray, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Share of the baselines' wall time spent in arithmetic, by torch.profiler.

    The profiler slows what is between ops more than the ops, so its own wall time gives too small
    a share; the wall time of the same masks without it is the fairer base. Both are given. Each
    time is the least of a few repeats of one mask, with and without the profiler in turn.
    """
    shares = {}
    for name in ("zero", "skip"):
        method = getattr(baselines, name)
        method(part_MP[0])
        plain = arithmetic = wall = 0.0
        for mask_P in part_MP:
            call = partial(method, mask_P)
            laps = []
            for _ in range(PROFILE_REPEATS):
                laps.append((timed(call, device, 1).wall, *profiled(call, device)))
            best = [min(column) for column in zip(*laps, strict=True)]
            plain, arithmetic, wall = plain + best[0], arithmetic + best[1], wall + best[2]
        shares[name] = arithmetic / plain, arithmetic / wall
    return shares


@torch.inference_mode()
def measure_flat(folder: Path, windows: TokenWindows, args: argparse.Namespace) -> Flat:
    """Memory at every fifth of one score call."""
    device = torch.device(args.device)
    design = StratifiedDesign(args.layers, paper_kept_counts(args.layers), args.seed)
    masks_MP = design.take(FLAT_MASKS)
    with open_ours(folder, windows, args) as engine:
        flat = Flat(num_masks=len(masks_MP), start=memory_now(device))
        reduce, done = engine._scorer.stack.reduce, 0
        part = len(masks_MP) * windows.num_windows / FLAT_STEPS

        def counted(
            batch: torch.Tensor,
            block: TokenWindows,
            extra_metrics: Sequence[str] = (),
            full_NTd: torch.Tensor | None = None,
        ) -> torch.Tensor:
            nonlocal done
            result = reduce(batch, block, extra_metrics, full_NTd)
            done += batch.shape[0]
            while done >= part * (len(flat.points) + 1):
                flat.points.append(memory_now(device))
            return result

        engine._scorer.stack.reduce = counted
        engine.score(masks_MP)
    return flat


# -- the table ---------------------------------------------------------------------------------


def table(row_sets: list[RowSet]) -> list[str]:
    lines = [
        "| windows x tokens | masks M | method | masks/s | layer-forwards | ours is faster by "
        "| counts allow | measured / allowed | CPU / wall |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for s in row_sets:
        place = f"{s.num_windows} x {s.length} | {s.num_masks:,}"
        baselines = ("zero", s.zero, s.num_players), ("skip", s.skip, s.mean_kept)
        for name, timing, layers in baselines:
            ratio, allowed = s.ours.rate / timing.rate, s.allowed(layers)
            lines.append(
                f"| {place} | {name}, extrapolated from {timing.masks} masks | {timing.rate:.2f} "
                f"| {layers * s.num_masks:,.0f} | {ratio:.2f} x | {allowed:.2f} x "
                f"| {ratio / allowed:.0%} | {timing.cpu / timing.wall:.2f} |"
            )
        work = s.scores.work
        lines.append(
            f"| {place} | ours, all masks | {s.ours.rate:.2f} | {work.layer_forwards:,} "
            f"| 1 x | | | {s.ours.cpu / s.ours.wall:.2f} |"
        )
    return lines


def notes(s: RowSet) -> list[str]:
    """What stands behind the three rows of one row set."""
    work, h = s.scores.work, s.head_over_layer
    deduplicated = s.distinct_kept + h * work.distinct_masks
    by_repeats = (s.mean_kept + h) * s.num_masks / deduplicated
    by_sharing = deduplicated / (work.layer_forwards + h * work.distinct_masks)
    lines = [
        f"**{s.num_windows} x {s.length} tokens, {s.num_masks:,} masks**",
        "",
        f"- {work.distinct_masks:,} distinct masks, M / distinct "
        f"{s.num_masks / work.distinct_masks:.3f}; mean kept {s.mean_kept:.2f} of {s.num_players}; "
        f"h = head / layer = {h:.3f}",
        f"- of the {s.allowed(s.mean_kept):.2f} x that the counts allow over skip, running each "
        f"distinct mask once is {by_repeats:.2f} x and sharing prefixes a further "
        f"{by_sharing:.2f} x",
        f"- worst relative difference of a window's score {s.difference:.1e}, tolerance "
        f"{s.tolerance:.0e}: {verdict(s.difference <= s.tolerance)} (scores of different masks "
        f"spread over {s.spread:.1%})",
    ]
    for name, (share, lower) in s.arithmetic.items():
        rates = getattr(s, name).rates
        lines.append(
            f"- {name}: chunks of {s.zero.masks // len(rates)} masks ran at {min(rates):.2f} to "
            f"{max(rates):.2f} masks/s; {share:.1%} of its time is arithmetic in layers and head "
            f"(with the profiler's own time: {lower:.1%}), at least 90%: {verdict(share >= 0.9)}"
        )
    return [*lines, *overhead_lines(s), memory_line(s.memory), ""]


def overhead_lines(s: RowSet) -> list[str]:
    if s.inside is None:
        return ["- time of ours outside layers and heads: not measured on a GPU"]
    wall, inside, work = s.ours.wall, s.inside, s.scores.work
    outside = wall - inside.layers - inside.heads
    copies = inside.state_copy * work.layer_forwards
    layer_ms = inside.layers / work.layer_forwards * 1e3
    head_ms = inside.heads / work.distinct_masks * 1e3
    return [
        f"- ours: layers {inside.layers / wall:.1%} ({layer_ms:.2f} ms each), heads "
        f"{inside.heads / wall:.1%} ({head_ms:.2f} ms each), outside both {outside / wall:.1%}, "
        f"below 10%: {verdict(outside < 0.1 * wall)}",
        f"- outside both: copies of states about {copies / wall:.2%} "
        f"({inside.state_copy * 1e6:.0f} us a layer-forward, timed apart), sorting masks "
        f"{inside.sorting / wall:.2%}, embedding, trie nodes and buffers "
        f"{(outside - copies - inside.sorting) / wall:.2%}",
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Masks per second of zeroing, skipping and lpserve.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", type=int, default=32, help="decoder layers = players")
    add("--width", type=int, default=128, help="hidden size")
    add("--ffn", type=int, default=344, help="intermediate size")
    add("--heads", type=int, default=4, help="attention heads")
    add("--vocabulary", type=int, default=512, help="tokens in the vocabulary")
    add("--length", type=int, default=128, help="tokens a window")
    add("--windows", type=int, default=4, help="windows")
    add("--masks", default="2000,8000", help="numbers of masks, one row set each")
    add("--wide-windows", type=int, default=10, help="windows of the extra row set")
    add("--wide-masks", type=int, default=2000, help="masks of the extra row set; 0: leave it out")
    add("--baseline-masks", type=int, default=60, help="masks that zero and skip are timed on")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--device", default="cpu", help="cpu or cuda[:n]")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of weights")
    add("--state-budget-mb", type=float, default=64, help="MiB of hidden states that ours may keep")
    add("--tolerance", type=float, help="relative, of scores; 1e-5, or 2e-2 below float32")
    add("--seed", type=int, default=0, help="of weights, windows and masks")
    add("--no-flat", action="store_true", help=f"leave out the {FLAT_MASKS:,}-mask memory check")
    add("--out", type=Path, help="markdown file to write the table to")
    args = parser.parse_args()
    if args.tolerance is None:
        args.tolerance = 1e-5 if args.dtype == "float32" else 2e-2
    return args


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler's start and stop lines
    head = ["# Masks per second", "", *machine_lines(args.threads, args.device)]
    wanted = [(args.windows, int(masks)) for masks in args.masks.split(",") if int(masks)]
    if args.wide_masks:
        wanted.append((args.wide_windows, args.wide_masks))
    row_sets, flat = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random_llama(args, folder)
        for num_windows, num_masks in wanted:
            print(f"{num_windows} windows, {num_masks:,} masks ...", file=sys.stderr, flush=True)
            row_sets.append(measure(folder, random_windows(args, num_windows), num_masks, args))
        if not args.no_flat:
            print(f"memory over {FLAT_MASKS:,} masks ...", file=sys.stderr, flush=True)
            flat = flat_lines(measure_flat(folder, random_windows(args, args.windows), args))
    model = (
        f"Llama of random weights: {args.layers} layers, width {args.width}, FFN {args.ffn}, "
        f"{args.heads} heads, vocabulary {args.vocabulary}, {args.dtype}; kept counts "
        f"{', '.join(map(str, paper_kept_counts(args.layers)))}, equal shares, with replacement."
    )
    details = [line for row_set in row_sets for line in notes(row_set)]
    publish([*head, model, "", *table(row_sets), "", *details, *flat], args.out)
    return 0 if all(s.difference <= s.tolerance for s in row_sets) else 1


if __name__ == "__main__":
    raise SystemExit(main())
