"""A checkpoint folder on disk: its config, shards and tensor headers.

Reads the safetensors format directly (an 8-byte little-endian header length, a JSON header, raw
data), so that a checkpoint is checked and copied without loading a tensor. A shard's header is read
once for each state of its file: reading the same checkpoint again costs its config.json alone.
Imports no torch.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lpserve.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""PEFT's names: transformers applies such an adapter where peft is installed, vLLM never."""
MAX_HEADER_BYTES = 512 << 20
_CACHED_SHARDS = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor of a shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int
    """First byte in the shard file."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A validated checkpoint folder."""

    path: Path
    config: dict[str, Any]
    shards: tuple[Path, ...]
    tensors: tuple[TensorEntry, ...]
    """In shard order, then by offset."""

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors (of packed weights: as they are packed)."""
        return sum(math.prod(entry.shape) for entry in self.tensors)

    def largest_tensor_bytes(self) -> int:
        """Bytes of the largest tensor, as stored."""
        return max(entry.num_bytes for entry in self.tensors)


def read_checkpoint(model: str | Path) -> Checkpoint:
    """Check a checkpoint folder and read its headers.

    Raises:
        InputError: the folder, its config.json or a shard is missing, unreadable or truncated; or
            transformers and vLLM would load other files of the folder than each other.
    """
    path = Path(model)
    if not path.is_dir():
        raise InputError(
            f"model {str(model)!r} is not a folder: give the path of a checkpoint folder "
            "(config.json and *.safetensors)"
        )
    config = _read_json(path / "config.json", "the model's config")
    shards = _shards(path)
    _check_loaded_alike(path, config, shards)
    tensors: list[TensorEntry] = []
    for shard in shards:
        state = shard.stat()
        tensors.extend(_read_header(shard, state.st_size, state.st_mtime_ns))
    if not tensors:
        raise InputError(f"model {path}: its safetensors files hold no tensors")
    return Checkpoint(path=path, config=config, shards=shards, tensors=tuple(tensors))


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {what} must be there") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as {what}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} cannot be read as {what}: not a JSON object")
    return value


def _shards(path: Path) -> tuple[Path, ...]:
    index = path / INDEX_NAME
    if not index.exists():
        single = path / SINGLE_NAME
        if not single.exists():
            raise InputError(
                f"model {path}: neither {SINGLE_NAME} nor {INDEX_NAME} is there; "
                "convert pickled weights to safetensors first"
            )
        return (single,)
    weight_map = _read_json(index, "the shard index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map")
    names = sorted(set(weight_map.values()))
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise InputError(f"{index} names a shard outside the model's folder")
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise InputError(
            f"model {path}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}; "
            "copy the checkpoint again"
        )
    return tuple(path / name for name in names)


def _check_loaded_alike(path: Path, config: Mapping[str, Any], shards: Sequence[Path]) -> None:
    """Raise InputError where loaders differ in what they take for the model's weights."""
    for name in ADAPTER_NAMES:
        if (path / name).exists():
            raise InputError(
                f"model {path} holds an adapter ({name}) beside its weights, which transformers "
                "applies where peft is installed and vLLM does not; merge it into the weights, or "
                "move it to another folder"
            )
    explicit = config.get("transformers_weights")
    if explicit is not None and [path / str(explicit)] != list(shards):
        raise InputError(
            f"model {path}: its config names {explicit!r} as the weights (transformers_weights), "
            f"where vLLM loads {shards[0].name}; keep one of them and leave the key out"
        )
    if (path / INDEX_NAME).exists():
        # vLLM takes what the index names, transformers this file before the index
        known, candidates = INDEX_NAME, path.glob(SINGLE_NAME)
    else:
        # vLLM takes all of these, but those of Mistral's own format
        known, candidates = SINGLE_NAME, path.glob("*.safetensors")
    for other in sorted(candidates):
        if other not in shards and not other.name.startswith("consolidated"):
            raise InputError(
                f"model {path} holds both {other.name} and {known}, and transformers and vLLM do "
                "not load the same of them; keep one and move the other to another folder"
            )


@lru_cache(maxsize=_CACHED_SHARDS)
def _read_header(shard: Path, size: int, modified_ns: int) -> tuple[TensorEntry, ...]:
    """The tensors of a shard file of this size and time of change, by offset."""
    try:
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
        entries = [
            TensorEntry(
                name=name,
                dtype=str(info["dtype"]),
                shape=tuple(int(n) for n in info["shape"]),
                shard=shard,
                offset=8 + length + int(info["data_offsets"][0]),
                num_bytes=int(info["data_offsets"][1]) - int(info["data_offsets"][0]),
            )
            for name, info in header.items()
            if name != "__metadata__"
        ]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"shard {shard} is corrupt ({error}); copy the checkpoint again") from None
    entries.sort(key=lambda entry: entry.offset)
    end = entries[-1].offset + entries[-1].num_bytes if entries else 8 + length
    if end != size:
        raise InputError(
            f"shard {shard} is corrupt: {size} bytes where its header says {end}; "
            "copy the checkpoint again"
        )
    return tuple(entries)
