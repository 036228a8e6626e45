"""A pruned checkpoint, written shard by shard, then reloaded and compared.

Tensors are copied as bytes and only renamed, so any dtype or quantization passes through and memory
stays at one copy buffer. Layers are renumbered and every config field known to be per layer is cut.
The result is written beside its target and moved there once a fresh process has loaded it with
`AutoModelForCausalLM` and scored what the skip engine scores.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.analysis.record import read_record
from lpserve.data.windows import TokenWindows
from lpserve.errors import ExportError, InputError
from lpserve.masks import without
from lpserve.model.checkpoint import (
    INDEX_NAME,
    SINGLE_NAME,
    Checkpoint,
    TensorEntry,
    attention_needed,
    checkpoint_hash,
    find_layer_prefix,
    read_checkpoint,
)
from lpserve.plan.plan import load_plan
from lpserve.types import FloatArray

COPY_BYTES = 8 << 20
VERIFY_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Relative, summed NLL of a window. Half precision rounds with the batch shape, which differs."""
RANDOM_WINDOWS, RANDOM_LENGTH = 4, 64

PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "block_types",
    "no_rope_layers",
    "attention_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "per_layer_config",
)
"""Config lists with one entry a layer. Any other list of that length is left alone."""
LAYER_INDEX_LISTS = ("mlp_only_layers", "attn_layer_indices")
"""Config lists of layer indices."""
LEADING_LAYERS = ("max_window_layers", "first_k_dense_replace")
"""Config counts of the first layers that differ from the rest."""
_REPORT_NAME = "lpserve_export.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was exported and how it was checked; also written as lpserve_export.json."""

    source: str
    source_hash: str
    removed: list[int]
    kept: list[int]
    verified: bool
    dtype: str
    num_windows: int
    worst_relative_difference: float | None
    """Largest difference of a window's NLL from the skip engine's; None when not verified."""
    ppl: float | None
    """Perplexity of the reloaded checkpoint on these windows."""


def export_checkpoint(
    model: str | Path,
    removed: Sequence[int],
    out: str | Path,
    *,
    verify: bool = True,
    windows: TokenWindows | None = None,
    expected_nll_N: FloatArray | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> ExportReport:
    """Write `model` without the removed layers to the folder `out`.

    Args:
        model: checkpoint folder.
        removed: 0-based layer indices in the original model.
        out: a folder that does not exist or is empty.
        verify: reload in a fresh process and compare; off, the report says unverified.
        windows: what to compare on; default: 4 x 64 random tokens.
        expected_nll_N: the skip engine's NLL of every window; default: an engine is opened.
        dtype, device: of the comparison.

    Raises:
        InputError: the model, the layers or the folder cannot be used, or the pruned structure
            cannot be expressed in the model's config.
        ExportError: the reloaded checkpoint does not score what the skip engine scores; nothing
            is left at `out`.
    """
    checkpoint = read_checkpoint(model)
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"export target {target} is not empty: choose another folder")
    if dtype not in VERIFY_TOLERANCE:
        raise InputError(f"unknown dtype {dtype!r}: one of {', '.join(VERIFY_TOLERANCE)}")
    pruned = prune_config(checkpoint, removed)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    if partial.exists():  # left by an export that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        write_checkpoint(checkpoint, pruned, partial)
        worst = ppl = None
        if windows is None:
            windows = _random_windows(pruned.vocab_size)
        if verify:
            if expected_nll_N is None:
                expected_nll_N = _skip_engine_nll(checkpoint, pruned, windows, dtype, device)
            attention = attention_needed(checkpoint.config)
            got_N = reloaded_nll(partial, windows, dtype, device, attention)
            worst = float((np.abs(got_N - expected_nll_N) / np.abs(expected_nll_N)).max())
            ppl = float(np.exp(got_N.sum() / windows.num_tokens_N.sum()))
            if not worst <= VERIFY_TOLERANCE[dtype]:
                raise ExportError(
                    f"the exported checkpoint scores up to {worst:.1e} (relative) off the skip "
                    f"engine, tolerance {VERIFY_TOLERANCE[dtype]:.0e} in {dtype}: not exported"
                )
        report = ExportReport(
            source=str(checkpoint.path.resolve()),
            source_hash=checkpoint_hash(checkpoint),
            removed=sorted(removed),
            kept=pruned.kept,
            verified=verify,
            dtype=dtype,
            num_windows=windows.num_windows if verify else 0,
            worst_relative_difference=worst,
            ppl=ppl,
        )
        (partial / _REPORT_NAME).write_text(json.dumps(asdict(report), indent=1) + "\n")
        if target.exists():
            target.rmdir()
        partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def export_run(
    run: str | Path,
    num_removed: int,
    out: str | Path,
    *,
    plan_path: str | Path | None = None,
    model: str | Path | None = None,
    device: str = "auto",
    verify: bool = True,
) -> ExportReport:
    """Export what a run's plan removes for r, compared on the run's own windows and scores.

    Raises:
        InputError: no finished run, a plan or model that is not of this run, or as
            `export_checkpoint`.
    """
    folder = Path(run)
    plan = load_plan(plan_path or folder / "plan.json")
    removed = plan.entry(num_removed).removed
    source = Path(model or plan.model)
    found = checkpoint_hash(read_checkpoint(source))
    scored = read_record(folder)
    if not found == plan.model_hash == scored.model_hash:
        raise InputError(
            f"the plan is for another model: {source} has content {found[:16]}, the plan "
            f"{plan.model_hash[:16]}, the run {scored.model_hash[:16]}"
        )
    with np.load(folder / "windows.npz", allow_pickle=False) as data:
        windows = TokenWindows.from_tokens(data["tokens"], data["scored"], name="calibration")
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    row = np.flatnonzero((scored.masks_MP == without(scored.num_players, removed)).all(axis=1))
    return export_checkpoint(
        source,
        [plan.players[i]["layer"] for i in removed],
        out,
        verify=verify,
        windows=windows,
        dtype=stored["config"]["dtype"],
        device=device,
        expected_nll_N=scored.nll_MI[row[0]].astype(np.float64) if len(row) else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PrunedConfig:
    """The config of the pruned model and where its layers come from."""

    config: dict[str, Any]
    kept: list[int]
    num_layers: int
    prefix: str
    """Tensor-name prefix of the layers."""
    vocab_size: int


def prune_config(checkpoint: Checkpoint, removed: Sequence[int]) -> PrunedConfig:
    """The pruned config, checked for structure on meta models: no weight is loaded.

    Raises:
        InputError: layers out of range or repeated, or kept layers that the config can no longer
            describe at their new positions.
    """
    from transformers import AutoConfig

    original = AutoConfig.from_pretrained(str(checkpoint.path), local_files_only=True)
    text = original.get_text_config()
    num_layers = int(text.num_hidden_layers)
    unique = sorted(set(removed))
    if len(unique) != len(removed) or not unique or not 0 <= unique[0] <= unique[-1] < num_layers:
        raise InputError(
            f"removed layers must be different numbers in 0..{num_layers - 1}: got {list(removed)}"
        )
    if len(unique) == num_layers:
        raise InputError("at least one layer must stay")
    kept = [layer for layer in range(num_layers) if layer not in unique]
    config = json.loads(json.dumps(checkpoint.config))
    part = config["text_config"] if text is not original else config
    count_key = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    part[count_key] = len(kept)
    for key in PER_LAYER_LISTS:
        values = part.get(key, getattr(text, key, None))
        if isinstance(values, list | tuple) and len(values) == num_layers:
            part[key] = [values[layer] for layer in kept]
    for key in LAYER_INDEX_LISTS:
        if isinstance(part.get(key), list):
            part[key] = [kept.index(layer) for layer in part[key] if layer in kept]
    for key in LEADING_LAYERS:
        if isinstance(part.get(key), int):
            part[key] = sum(layer < part[key] for layer in kept)
    if part.get("scale_attn_by_inverse_layer_idx"):
        raise InputError(
            f"model {checkpoint.path} scales attention by the layer's position "
            "(scale_attn_by_inverse_layer_idx): removing layers would change the others"
        )
    list_names = _check_structure(checkpoint, config, kept)
    prefixes = {find_layer_prefix(checkpoint, num_layers, name) for name in list_names}
    if len(prefixes) != 1:
        raise InputError(f"model {checkpoint.path}: several lists of layers: {sorted(prefixes)}")
    return PrunedConfig(
        config=config,
        kept=kept,
        num_layers=num_layers,
        prefix=prefixes.pop(),
        vocab_size=int(text.vocab_size),
    )


def write_checkpoint(checkpoint: Checkpoint, pruned: PrunedConfig, folder: Path) -> None:
    """Config, tokenizer files, shards, index and mergekit recipe. Memory: one copy buffer."""
    _copy_small_files(checkpoint.path, folder)
    (folder / "config.json").write_text(json.dumps(pruned.config, indent=2) + "\n")
    (folder / "mergekit.yaml").write_text(mergekit_yaml(checkpoint, pruned))
    plan: list[tuple[list[TensorEntry], list[str]]] = []
    for shard in checkpoint.shards:
        entries = [entry for entry in checkpoint.tensors if entry.shard == shard]
        renamed = [_new_name(entry.name, pruned) for entry in entries]
        pairs = [(e, n) for e, n in zip(entries, renamed, strict=True) if n is not None]
        if pairs:
            plan.append(([e for e, _ in pairs], [n for _, n in pairs]))
    weight_map: dict[str, str] = {}
    for number, (entries, names) in enumerate(plan, start=1):
        name = (
            SINGLE_NAME if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        )
        _copy_shard(entries, names, folder / name)
        weight_map.update(dict.fromkeys(names, name))
    if len(plan) > 1:
        total = sum(entry.num_bytes for entries, _ in plan for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def mergekit_yaml(checkpoint: Checkpoint, pruned: PrunedConfig) -> str:
    """The same pruning as a mergekit passthrough recipe; layer ranges exclude their end."""
    ranges: list[list[int]] = []
    for layer in pruned.kept:
        if ranges and ranges[-1][1] == layer:
            ranges[-1][1] = layer + 1
        else:
            ranges.append([layer, layer + 1])
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16"
    lines = ["slices:"]
    for low, high in ranges:
        path = json.dumps(str(checkpoint.path.resolve()))
        lines += ["- sources:", f"  - model: {path}", f"    layer_range: [{low}, {high}]"]
    return "\n".join([*lines, "merge_method: passthrough", f"dtype: {dtype}"]) + "\n"


def reloaded_nll(
    folder: Path,
    windows: TokenWindows,
    dtype: str,
    device: str = "auto",
    attention: str | None = None,
) -> FloatArray:
    """NLL of every window from a fresh process that knows only transformers, `float64[N]`.

    Args:
        attention: attention implementation of transformers; None: its own choice.

    Raises:
        ExportError: that process fails.
    """
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    script = Path(__file__).with_name("reload.py")
    chosen = [attention] if attention else []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "windows.npz"
        np.savez(path, tokens=windows.tokens_NT, scored=windows.scored_NT)
        done = subprocess.run(
            [sys.executable, str(script), str(folder), str(path), dtype, device, *chosen],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExportError(f"the exported checkpoint does not load in a fresh process: {last}")
    return np.array(json.loads(done.stdout.strip().splitlines()[-1]))


def _check_structure(checkpoint: Checkpoint, config: dict[str, Any], kept: list[int]) -> set[str]:
    """Compare every kept layer with the layer at its new position; names of the layer lists."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    def layers(values: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "config.json").write_text(json.dumps(values))
            loaded = AutoConfig.from_pretrained(scratch, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded)
        count = int(loaded.get_text_config().num_hidden_layers)
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == count
        }

    old, new = layers(checkpoint.config), layers(config)
    common = {name for name in old if name in new}
    outer = {n for n in common if not any(n.startswith(f"{other}.") for other in common)}
    for name in outer:
        for position, layer in enumerate(kept):
            difference = _difference(old[name][layer], new[name][position])
            if difference:
                raise InputError(
                    f"model {checkpoint.path}: layer {layer} cannot stand at position {position}: "
                    f"{difference} differs there, and the config cannot say otherwise"
                )
    return {name.rsplit(".", 1)[-1] for name in outer}


def _difference(old: Any, new: Any) -> str | None:
    """The first way in which two layers' structures differ, their position left out."""
    for (name, a), (other, b) in zip(old.named_modules(), new.named_modules(), strict=False):
        if name != other or type(a) is not type(b):
            return name or "the layer's class"
        for key, value in vars(a).items():
            simple = isinstance(value, bool | int | float | str | None)
            if simple and key not in ("layer_idx", "layer_id") and vars(b).get(key) != value:
                return f"{name}.{key}".lstrip(".")
    shapes = [{n: tuple(p.shape) for n, p in layer.named_parameters()} for layer in (old, new)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            return name
    return None


def _new_name(name: str, pruned: PrunedConfig) -> str | None:
    """A tensor's name in the pruned model; None for a tensor of a removed layer."""
    if not name.startswith(pruned.prefix):
        return name
    index, dot, rest = name[len(pruned.prefix) :].partition(".")
    if not index.isdigit():
        return name
    if int(index) not in pruned.kept:
        return None
    return f"{pruned.prefix}{pruned.kept.index(int(index))}{dot}{rest}"


def _copy_shard(entries: list[TensorEntry], names: list[str], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry, name in zip(entries, names, strict=True):
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target, entries[0].shard.open("rb") as source:
        target.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            source.seek(entry.offset)
            left = entry.num_bytes
            while left:
                data = source.read(min(left, COPY_BYTES))
                if not data:
                    raise ExportError(f"shard {entry.shard} ended early while copying")
                target.write(data)
                left -= len(data)
        target.flush()
        os.fsync(target.fileno())


def _copy_small_files(source: Path, folder: Path) -> None:
    """Everything but weights and config: tokenizer, generation config, licence, chat template."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
    for path in sorted(source.iterdir()):
        ours = path.name in ("config.json", _REPORT_NAME, "mergekit.yaml")
        if path.is_file() and not ours and not path.name.endswith((*weights, ".index.json")):
            shutil.copy2(path, folder / path.name)


def _random_windows(vocab_size: int) -> TokenWindows:
    rng = np.random.default_rng(0)
    return TokenWindows.from_tokens(rng.integers(0, vocab_size, (RANDOM_WINDOWS, RANDOM_LENGTH)))


def _skip_engine_nll(
    checkpoint: Checkpoint, pruned: PrunedConfig, windows: TokenWindows, dtype: str, device: str
) -> FloatArray:
    from lpserve.engine import open_engine

    mask_P = np.zeros(pruned.num_layers, dtype=bool)
    mask_P[pruned.kept] = True
    with open_engine(str(checkpoint.path), windows, dtype=dtype, device=device) as engine:
        return engine.score(mask_P[None]).nll_MN[0]
