"""Writes the files of a pruned checkpoint: config, shards, index, and what needs no change.

Tensors are copied as bytes and only renamed, so any dtype or quantization passes through and memory
stays at one copy buffer.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Set
from pathlib import Path
from typing import Any, BinaryIO

from lpserve.errors import ExportError
from lpserve.export.mergekit import RECIPE_NAME, mergekit_yaml
from lpserve.export.pruned_config import PrunedConfig
from lpserve.export.quantization import FILES, renumbered
from lpserve.inputs.documents import read_json
from lpserve.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, TensorEntry
from lpserve.store.files import space_checked, write_text, write_whole

COPY_BYTES = 8 << 20
"""Size of the copy buffer."""
ADVICE = "free space and give the same command again"
"""Ends the message where the disk is full."""
CARD_NAME = "README.md"
"""The model card. The original's is about another model, and is not copied."""
REPORT_NAME = "lpserve_export.json"
"""The report of an export, in the folder of the checkpoint that it wrote."""
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
_COPIED = re.compile(
    r"(tokenizer.*|.*token.*\.json|vocab.*|merges\.txt|.*\.(model|tiktoken|spm|jinja|py)"
    r"|generation_config\.json|.*processor.*\.json|chat_template.*"
    r"|(licen[cs]e|notice|copying|use_policy|acceptable).*)",
    re.IGNORECASE,
)
"""Files that are about the pruned model as much as about the original: tokenizer, chat template,
settings of generation and of pictures, code, licence."""


def write_checkpoint(
    checkpoint: Checkpoint,
    pruned: PrunedConfig,
    folder: Path,
    absent: Set[str] = frozenset(),
    *,
    left_out: bool = False,
) -> list[str]:
    """Write the pruned checkpoint into an existing folder; returns what was left behind beside the
    removed layers: names of files, and what layers that predict several tokens ahead hold.

    Written are the config, the tokenizer's files, the shards (as many as keep a tensor), their
    index if there are several, and the mergekit recipe, which knows whole layers alone.

    Args:
        absent: names of tensors that are written as zeros.
        left_out: these are not written at all.

    Raises:
        ExportError: a source shard ended early, or cannot be read.
        DiskFullError, InputError: a file cannot be written.
    """
    with space_checked(folder, ADVICE):
        left_behind = _copy_small_files(checkpoint.path, folder, pruned)
    write_text(folder / "config.json", json.dumps(pruned.config, indent=2) + "\n")
    if not absent:
        write_text(folder / RECIPE_NAME, mergekit_yaml(checkpoint, pruned))
    shards: list[tuple[list[TensorEntry], list[str]]] = []
    for shard in checkpoint.shards:
        pairs = [
            (entry, name)
            for entry in checkpoint.tensors
            if entry.shard == shard and not (left_out and entry.name in absent)
            for name in _new_names(entry.name, pruned)
        ]
        if pairs:
            shards.append(([e for e, _ in pairs], [n for _, n in pairs]))
    # layers behind the decoder's predict several tokens ahead
    layers = [pruned.numbers.layer_of(entry.name) or 0 for entry in checkpoint.tensors]
    ahead = sum(layer >= pruned.num_layers for layer in layers)
    if ahead:
        left_behind.append(f"{ahead} tensors of layers that predict further tokens")
    weight_map: dict[str, str] = {}
    for number, (entries, names) in enumerate(shards, start=1):
        name = (
            SINGLE_NAME
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        _copy_shard(entries, names, folder / name, absent)
        weight_map.update(dict.fromkeys(names, name))
    if len(shards) > 1:
        total = sum(entry.num_bytes for entries, _ in shards for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return left_behind


def _new_names(name: str, pruned: PrunedConfig) -> list[str]:
    """Under which names a tensor of the original is written: none if it goes with its layer."""
    own = pruned.numbers.new_name(name)
    return [*([] if own is None else [own]), *(n for n, old in pruned.moved.items() if old == name)]


def _copy_shard(entries: list[TensorEntry], names: list[str], path: Path, zeroed: Set[str]) -> None:
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
    start = struct.pack("<Q", len(text)) + text
    write_whole(path, lambda target: _copy_tensors(entries, start, target, zeroed), advice=ADVICE)


def _copy_tensors(
    entries: list[TensorEntry], start: bytes, target: BinaryIO, zeroed: Set[str]
) -> None:
    """Write `start`, then the bytes of tensors of one shard."""
    target.write(start)
    shard = entries[0].shard
    with _opened(shard) as source:
        for entry in entries:
            left, offset = entry.num_bytes, entry.offset
            while left:
                size = min(left, COPY_BYTES)
                data = bytes(size) if entry.name in zeroed else _read(source, offset, size, shard)
                target.write(data)
                left, offset = left - len(data), offset + len(data)


def _opened(shard: Path) -> BinaryIO:
    try:
        return shard.open("rb")
    except OSError as error:
        raise ExportError(f"shard {shard} cannot be read: {error.strerror or error}") from None


def _read(source: BinaryIO, offset: int, size: int, shard: Path) -> bytes:
    """Bytes of a shard, at least one; what fails is the source's fault, not the target's."""
    try:
        source.seek(offset)
        data = source.read(size)
    except OSError as error:
        raise ExportError(f"shard {shard} cannot be read: {error.strerror or error}") from None
    if not data:
        raise ExportError(f"shard {shard} ended early while copying")
    return data


def _copy_small_files(source: Path, folder: Path, pruned: PrunedConfig) -> list[str]:
    """Copy what is about the pruned model too, quantizers' files with the layers' new numbers;
    returns the names of the others."""
    left_behind: list[str] = []
    for path in sorted(source.iterdir()):
        ours = path.name in ("config.json", CARD_NAME, REPORT_NAME, RECIPE_NAME)
        if ours or path.name.startswith(".") or path.name.endswith(_WEIGHT_FILES):
            continue
        if path.name in FILES and path.is_file():
            settings = renumbered(_read_settings(path), pruned.numbers, str(path))
            (folder / path.name).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        elif path.is_file() and _COPIED.fullmatch(path.name):
            shutil.copy2(path, folder / path.name)
        else:
            left_behind.append(path.name)
    return left_behind


def _read_settings(path: Path) -> Any:
    return read_json(path, repeats=True)
