"""Writes the files of a pruned checkpoint: config, shards, index, and what needs no change.

Tensors are copied as bytes and only renamed, so any dtype or quantization passes through and memory
stays at one copy buffer.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

from lpserve.errors import ExportError
from lpserve.export.mergekit import RECIPE_NAME, mergekit_yaml
from lpserve.export.pruned_config import PrunedConfig
from lpserve.model.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, TensorEntry
from lpserve.store.files import space_checked, write_text, write_whole

COPY_BYTES = 8 << 20
"""Size of the copy buffer."""
_ADVICE = "free space and give the same command again"
REPORT_NAME = "lpserve_export.json"
"""The report of an export, in the folder of the checkpoint that it wrote."""
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


def write_checkpoint(checkpoint: Checkpoint, pruned: PrunedConfig, folder: Path) -> None:
    """Write the pruned checkpoint into an existing folder.

    Written are the config, the tokenizer's files, the shards (as many as keep a tensor), their
    index if there are several, and the mergekit recipe.

    Raises:
        ExportError: a source shard ended early, or cannot be read.
        DiskFullError, InputError: a file cannot be written.
    """
    with space_checked(folder, _ADVICE):
        _copy_small_files(checkpoint.path, folder)
    write_text(folder / "config.json", json.dumps(pruned.config, indent=2) + "\n")
    write_text(folder / RECIPE_NAME, mergekit_yaml(checkpoint, pruned))
    shards: list[tuple[list[TensorEntry], list[str]]] = []
    for shard in checkpoint.shards:
        entries = [entry for entry in checkpoint.tensors if entry.shard == shard]
        renamed = [new_tensor_name(entry.name, pruned) for entry in entries]
        pairs = [(e, n) for e, n in zip(entries, renamed, strict=True) if n is not None]
        if pairs:
            shards.append(([e for e, _ in pairs], [n for _, n in pairs]))
    weight_map: dict[str, str] = {}
    for number, (entries, names) in enumerate(shards, start=1):
        name = (
            SINGLE_NAME
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        _copy_shard(entries, names, folder / name)
        weight_map.update(dict.fromkeys(names, name))
    if len(shards) > 1:
        total = sum(entry.num_bytes for entries, _ in shards for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def new_tensor_name(name: str, pruned: PrunedConfig) -> str | None:
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
    start = struct.pack("<Q", len(text)) + text
    write_whole(path, lambda target: _copy_tensors(entries, start, target), advice=_ADVICE)


def _copy_tensors(entries: list[TensorEntry], start: bytes, target: BinaryIO) -> None:
    """Write `start`, then the bytes of tensors of one shard."""
    target.write(start)
    shard = entries[0].shard
    with _opened(shard) as source:
        for entry in entries:
            left, offset = entry.num_bytes, entry.offset
            while left:
                data = _read(source, offset, min(left, COPY_BYTES), shard)
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


def _copy_small_files(source: Path, folder: Path) -> None:
    """Everything but weights and config: tokenizer, generation config, licence, chat template."""
    for path in sorted(source.iterdir()):
        ours = path.name in ("config.json", REPORT_NAME, RECIPE_NAME)
        if path.is_file() and not ours and not path.name.endswith(_WEIGHT_FILES):
            shutil.copy2(path, folder / path.name)
