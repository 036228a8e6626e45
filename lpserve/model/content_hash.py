"""The identity of a checkpoint: a hash over its config and every byte of its tensors.

Scores are stored under it, so one changed weight must give another hash. Tensors are read in pieces
and hashed by SHA-256 on all cores, which keeps up with fast disks; where one tensor ends and what
its file is called does not matter. What a large shard hashed to is kept in the user's cache folder
and used again while the file's path, size, times of change and inode are the same.
Imports no torch.

The hash of samples, under which lpserve kept scores before, is still computed on request: to find
out whether an old store belongs to a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from lpserve.errors import InputError
from lpserve.inputs.documents import read_json
from lpserve.model.checkpoint import Checkpoint, TensorEntry
from lpserve.model.local import cache_folder

PIECE_BYTES = 32 << 20
"""Bytes hashed at a time: a tensor's digest depends on it."""
CACHED_BYTES = 1 << 30
"""Shards from this size on are cached: smaller ones are read in a second."""
SETTLED_S = 2.0
"""A file changed less than this ago is not cached: its next change might get the same time."""
SAMPLE_BYTES = 4096
_FORMAT = "2-"
_READ_BYTES = 1 << 20
_MAX_THREADS = 16
_known: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
"""What this process has hashed: path -> the file's state, and its digests."""
_NOT_LOADED = frozenset({"transformers_version", "_name_or_path"})


def checkpoint_hash(checkpoint: Checkpoint, *, tell: Callable[[str], None] | None = None) -> str:
    """The hash of a checkpoint's config and of all bytes of its tensors.

    Args:
        tell: takes a line for the user when a large checkpoint is read, and when digests come from
            the cache.

    Raises:
        InputError: a shard cannot be read, or changes while it is read.
    """
    tell = tell or (lambda _line: None)
    by_shard: dict[Path, list[TensorEntry]] = {}
    for entry in checkpoint.tensors:
        by_shard.setdefault(entry.shard, []).append(entry)
    digests: dict[str, str] = {}
    # two for every core: one waits for the disk while the other hashes
    with ThreadPoolExecutor(min(_MAX_THREADS, 2 * (os.cpu_count() or 1))) as threads:
        for shard, entries in by_shard.items():
            digests |= _shard_digests(shard, entries, threads, tell)
    whole = hashlib.sha256(_config_text(checkpoint))
    for entry in sorted(checkpoint.tensors, key=lambda entry: entry.name):
        whole.update(_heading(entry))
        whole.update(bytes.fromhex(digests[entry.name]))
    return _FORMAT + whole.hexdigest()


def is_sampled(model_hash: str) -> bool:
    """Whether a model's hash is one of samples, as lpserve made them before."""
    return re.fullmatch("[0-9a-f]{64}", model_hash) is not None


def sampled_hash(checkpoint: Checkpoint) -> str:
    """The hash that lpserve made before: of the config, and of 12 KiB of every tensor.

    Samples come from the start, the middle and the end; a tensor up to three samples long was read
    in full. Two checkpoints with other weights may have the same.
    """
    digest = hashlib.sha256(_config_text(checkpoint))
    for entry in sorted(checkpoint.tensors, key=lambda entry: entry.name):
        digest.update(_heading(entry))
        with entry.shard.open("rb") as file:
            for start, size in _samples(entry.num_bytes):
                file.seek(entry.offset + start)
                digest.update(file.read(size))
    return digest.hexdigest()


def _config_text(checkpoint: Checkpoint) -> bytes:
    loaded = {k: v for k, v in checkpoint.config.items() if k not in _NOT_LOADED}
    return json.dumps(loaded, sort_keys=True).encode()


def _heading(entry: TensorEntry) -> bytes:
    return json.dumps([entry.name, entry.dtype, list(entry.shape)]).encode()


def _samples(num_bytes: int) -> list[tuple[int, int]]:
    if num_bytes <= 3 * SAMPLE_BYTES:
        return [(0, num_bytes)]
    middle = (num_bytes - SAMPLE_BYTES) // 2
    return [(start, SAMPLE_BYTES) for start in (0, middle, num_bytes - SAMPLE_BYTES)]


# -- reading -----------------------------------------------------------------------------------


def _shard_digests(
    shard: Path,
    entries: Sequence[TensorEntry],
    threads: ThreadPoolExecutor,
    tell: Callable[[str], None],
) -> dict[str, str]:
    """Tensor name -> digest of its bytes, from the cache or from the file."""
    try:
        before = _state(shard)
        if (known := _known.get(before["path"])) is not None and known[0] == before:
            return known[1]
        large = before["size"] >= CACHED_BYTES
        if large and (cached := _cached(before, entries)) is not None:
            tell(f"{shard.name} is unchanged since it was hashed: its digests come from the cache")
            _known[before["path"]] = before, cached
            return cached
        if large:
            tell(f"hashing {shard.name}, {before['size'] / 2**30:.1f} GiB")
        digests = _read_digests(shard, entries, threads)
        after = _state(shard)
    except OSError as error:
        raise InputError(f"shard {shard} cannot be read: {error.strerror or error}") from None
    if after != before:
        raise InputError(f"shard {shard} changes while it is read; wait until it is complete")
    if time.time_ns() - max(before["modified_ns"], before["changed_ns"]) > SETTLED_S * 1e9:
        _known[before["path"]] = before, digests
        if large:
            _keep(before, digests)
    return digests


def _read_digests(
    shard: Path, entries: Sequence[TensorEntry], threads: ThreadPoolExecutor
) -> dict[str, str]:
    with shard.open("rb") as file:
        descriptor = file.fileno()

        def piece_digest(piece: tuple[int, int]) -> bytes:
            start, size = piece
            digest = hashlib.sha256()
            # one small buffer, read into again and again: it stays in the core's cache, and fresh
            # memory for every read would cost the kernel as long as the hash itself
            buffer = memoryview(bytearray(min(size, _READ_BYTES)))
            while size:
                count = os.preadv(descriptor, [buffer[:size]], start)
                if not count:
                    raise InputError(f"shard {shard} is shorter than its header says")
                digest.update(buffer[:count])
                start, size = start + count, size - count
            return digest.digest()

        pieces = [_pieces(entry) for entry in entries]
        done = threads.map(piece_digest, [piece for parts in pieces for piece in parts])
        return {
            entry.name: hashlib.sha256(b"".join(next(done) for _ in parts)).hexdigest()
            for entry, parts in zip(entries, pieces, strict=True)
        }


def _pieces(entry: TensorEntry) -> list[tuple[int, int]]:
    """(offset, bytes) of the pieces of a tensor; none of an empty one."""
    end = entry.offset + entry.num_bytes
    return [
        (start, min(PIECE_BYTES, end - start)) for start in range(entry.offset, end, PIECE_BYTES)
    ]


# -- the cache ---------------------------------------------------------------------------------


def _state(shard: Path) -> dict[str, Any]:
    """What of a file changes whenever its bytes do. The path is the file's own, not a link's."""
    found = shard.stat()
    return {
        "path": str(shard.resolve()),
        "size": found.st_size,
        "modified_ns": found.st_mtime_ns,
        "changed_ns": found.st_ctime_ns,
        "inode": found.st_ino,
        "device": found.st_dev,
        "piece_bytes": PIECE_BYTES,
    }


def _cache_file(state: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(os.fsencode(state["path"])).hexdigest()
    return cache_folder("digests") / f"{name}.json"


def _cached(state: Mapping[str, Any], entries: Sequence[TensorEntry]) -> dict[str, str] | None:
    """What the cache holds for a file in this state; None where it holds nothing that fits."""
    try:
        held = read_json(_cache_file(state))
        digests = held["digests"]
        fits = held["state"] == state and digests.keys() == {entry.name for entry in entries}
        if not fits or any(len(bytes.fromhex(digest)) != 32 for digest in digests.values()):
            return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(digests)


def _keep(state: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write to the cache; a cache that cannot be written costs the next reader time alone."""
    target = _cache_file(state)
    with suppress(OSError):
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # a name of its own: a link that somebody laid at a known one is never followed
        descriptor, temporary = tempfile.mkstemp(dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"state": state, "digests": digests}, file)
            Path(temporary).replace(target)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
