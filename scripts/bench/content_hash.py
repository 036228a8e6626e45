"""Hashing a checkpoint beside reading it: first, with the files in memory, and from the cache.

    PYTHONPATH=. python scripts/bench/content_hash.py --gib 10 --out content_hash.md

Shards of random bytes are written to a folder, and every measurement is a process of its own:

    read       every byte is read, on as many threads, and thrown away: the baseline
    hash       `checkpoint_hash` of a checkpoint that the cache does not know
    cached     the same again, in another process

`disk` is after the kernel was told to drop the files from its page cache (it need not obey on every
system), `memory` with the files in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
from probes import machine_lines, publish

from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.content_hash import PIECE_BYTES, SETTLED_S, checkpoint_hash

READ_BYTES = 1 << 20
SHARD_BYTES = 2 << 30
TENSOR_BYTES = 256 << 20


def write_checkpoint(folder: Path, total: int) -> None:
    """Shards of tensors of random bytes, synced to the disk."""
    rng, names = np.random.default_rng(0), {}
    for shard, start in enumerate(range(0, total, SHARD_BYTES)):
        count = min(SHARD_BYTES, total - start) // TENSOR_BYTES
        tensors = {
            f"layers.{start // TENSOR_BYTES + i}.w": {
                "dtype": "U8",
                "shape": [TENSOR_BYTES],
                "data_offsets": [i * TENSOR_BYTES, (i + 1) * TENSOR_BYTES],
            }
            for i in range(count)
        }
        header = json.dumps(tensors).encode()
        path = folder / f"part-{shard}.safetensors"
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _ in range(count):
                file.write(rng.bytes(TENSOR_BYTES))
            file.flush()
            os.fsync(file.fileno())
        names |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "config.json").write_text("{}")


def forget(folder: Path) -> None:
    """Tell the kernel to drop the shards from its page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    """Read every byte, as the hash does."""

    def read(piece: tuple[Path, int]) -> int:
        path, start = piece
        buffer, count = bytearray(READ_BYTES), 0
        with path.open("rb") as file:
            for at in range(start, start + PIECE_BYTES, READ_BYTES):
                count += os.preadv(file.fileno(), [buffer], at)
        return count

    pieces = [
        (path, start)
        for path in sorted(folder.glob("*.safetensors"))
        for start in range(0, path.stat().st_size, PIECE_BYTES)
    ]
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as threads:
        assert sum(threads.map(read, pieces)) > 0


def seconds(what: str, folder: Path, cache: Path) -> tuple[float, str]:
    """Seconds of one measurement in a process of its own, and what it printed."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", what, "--folder", str(folder)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    took, _, told = done.stdout.strip().partition(" ")
    return float(took), told


def measure(what: str, folder: Path) -> None:
    """Print the seconds that one measurement takes, and the hash."""
    started = time.perf_counter()
    if what == "read":
        read_all(folder)
        told = ""
    else:
        told = checkpoint_hash(read_checkpoint(folder))
    print(time.perf_counter() - started, told)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Hashing a checkpoint beside reading it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--gib", type=float, default=10, help="size of the checkpoint")
    add("--folder", type=Path, help="where its folder is made (the system's temporary folder)")
    add("--measure", choices=("read", "hash"), help=argparse.SUPPRESS)
    add("--out", type=Path, help="markdown file to write the table to")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.measure:
        measure(args.measure, args.folder)
        return 0
    rows, hashes = [], set()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, cache = Path(name) / "model", Path(name) / "cache"
        folder.mkdir()
        write_checkpoint(folder, int(args.gib * 2**30))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        time.sleep(SETTLED_S + 1)
        for number, place in enumerate(("disk", "disk", "memory")):
            took = {}
            for what in ("read", "hash"):
                if place == "disk":
                    forget(folder)
                took[what], told = seconds(what, folder, cache / str(number))
                hashes |= {told} - {""}
            took["cached"], told = seconds("hash", folder, cache / str(number))
            hashes.add(told)
            speeds = [
                f"{took[w]:.2f} s ({size / took[w] / 1e9:.2f} GB/s)" for w in ("read", "hash")
            ]
            ratio = took["hash"] / took["read"]
            rows.append(
                f"| {place} | {' | '.join(speeds)} | {ratio:.2f} | {took['cached']:.3f} s |"
            )
    head = [
        "# Hashing a checkpoint",
        "",
        f"- date: {date.today()}",
        *machine_lines(os.cpu_count() or 1),
    ]
    about = f"{size / 2**30:.1f} GiB in shards of 2 GiB and tensors of 256 MiB; turn after turn."
    table = ["| files on | read | hash | hash / read | cached |", "|---|---|---|---|---|", *rows]
    publish([*head, about, "", *table], args.out)
    return 0 if len(hashes) == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
