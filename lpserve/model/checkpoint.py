"""A checkpoint folder on disk: its config, shards and tensor headers.

Reads the safetensors format directly (an 8-byte little-endian header length, a JSON header, raw
data), so that a checkpoint is checked and copied without loading a tensor. A shard's header is read
once for each state of its file: reading the same checkpoint again costs its config.json alone.
Imports no torch.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from lpserve.errors import InputError
from lpserve.inputs.documents import json_value, read_json_object, shown
from lpserve.inputs.files import decoded, is_there, reason_of
from lpserve.inputs.shapes import converted
from lpserve.model.gguf import readable_folder

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""PEFT's names: transformers applies such an adapter where peft is installed, vLLM never."""
MAX_HEADER_BYTES = 512 << 20
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""dtype of the safetensors format -> bits of an element."""
_CACHED_SHARDS = 1024
_NO_CONFIG = "a model's folder holds its config there"


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


Size = Annotated[int, Meta(ge=0, le=1 << 62)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _TensorInfo:
    """A tensor in a shard's header."""

    dtype: str
    shape: tuple[Size, ...]
    data_offsets: tuple[Size, Size]


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
    """Check a checkpoint folder and read its headers; of a GGUF file, the folder that it is
    converted to.

    Raises:
        InputError: the folder, its config.json or a shard is missing, unreadable or truncated; or
            transformers and vLLM would load other files of the folder than each other.
    """
    path = readable_folder(model)
    if not is_there(path) or not path.is_dir():
        raise InputError(
            f"model {str(model)!r} is not a folder: give the path of a checkpoint folder "
            "(config.json and *.safetensors), or of a .gguf file"
        )
    config = read_json_object(path / "config.json", missing=_NO_CONFIG, repeats=True)
    shards = _shards(path)
    _check_loaded_alike(path, config, shards)
    tensors: list[TensorEntry] = []
    for shard in shards:
        state = _shard_state(shard)
        tensors.extend(_read_header(shard, state.st_size, state.st_mtime_ns))
    if not tensors:
        raise InputError(f"model {path}: its safetensors files hold no tensors")
    return Checkpoint(path=path, config=config, shards=shards, tensors=tuple(tensors))


def _shards(path: Path) -> tuple[Path, ...]:
    index = path / INDEX_NAME
    if not is_there(index):
        single = path / SINGLE_NAME
        if not is_there(single):
            raise InputError(
                f"model {path}: neither {SINGLE_NAME} nor {INDEX_NAME} is there; "
                "convert pickled weights to safetensors first"
            )
        return (single,)
    weight_map = read_json_object(index, repeats=True).get("weight_map")
    found = converted(weight_map, dict[str, str], f"{index}: weight_map")
    if not found:
        raise InputError(f"{index}: its weight_map is empty")
    names = sorted(set(found.values()))
    if strange := [name for name in names if Path(name).name != name or name == ".."]:
        raise InputError(f"{index} names {shown(strange[0])}, which is no file of its folder")
    missing = [name for name in names if not is_there(path / name)]
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
    problem = f"shard {shard} is corrupt"
    try:
        with shard.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise InputError(f"{problem}: its header is longer than the file")
            data = file.read(length)
    except struct.error:
        raise InputError(f"{problem}: it has {size} bytes") from None
    except OSError as error:
        raise InputError(f"shard {shard} cannot be read: {reason_of(error)}") from None
    header = json_value(decoded(data, shard), f"{problem}: its header")
    if not isinstance(header, dict):
        raise InputError(f"{problem}: its header is no JSON object")
    header.pop("__metadata__", None)
    entries = [
        TensorEntry(
            name=name,
            dtype=info.dtype,
            shape=info.shape,
            shard=shard,
            offset=8 + length + info.data_offsets[0],
            num_bytes=info.data_offsets[1] - info.data_offsets[0],
        )
        for name, info in _tensor_infos(header, problem).items()
    ]
    entries.sort(key=lambda entry: (entry.offset, entry.num_bytes))
    _check_layout(entries, 8 + length, size, problem)
    return tuple(entries)


def _tensor_infos(header: dict[str, Any], problem: str) -> dict[str, _TensorInfo]:
    """What a header says of each tensor; the error names the tensor that is wrong."""
    try:
        return converted(header, dict[str, _TensorInfo], problem)
    except InputError:
        for name, info in header.items():
            converted(info, _TensorInfo, f"{problem}: tensor {shown(name)}")
        raise


def _check_layout(entries: Sequence[TensorEntry], start: int, size: int, problem: str) -> None:
    """Raise InputError unless tensors follow each other from `start` to the file's end, each of as
    many bytes as its dtype and shape need."""
    end = start
    for entry in entries:
        bits = DTYPE_BITS.get(entry.dtype)
        if bits is None:
            raise InputError(
                f"{problem}: tensor {shown(entry.name)} has dtype {shown(entry.dtype)}"
            )
        if entry.offset != end or entry.num_bytes * 8 != math.prod(entry.shape) * bits:
            raise InputError(
                f"{problem}: the bytes of tensor {shown(entry.name)} are not where they belong; "
                "copy the checkpoint again"
            )
        end += entry.num_bytes
    if end != size:
        raise InputError(
            f"{problem}: {size} bytes where its header says {end}; copy the checkpoint again"
        )


def _shard_state(shard: Path) -> os.stat_result:
    try:
        found = shard.stat()
    except OSError as error:
        raise InputError(f"shard {shard} cannot be read: {reason_of(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"shard {shard} is no regular file")
    return found
