"""A game of many masks as Parquet segments in a folder: a quarter of what SQLite takes for it.

Segment i holds the masks number `i * SEGMENT_MASKS` and on of a family (`family.SmallRemovals`), in
its order, one row each::

    mask            nll                            reason
    b'\\xff\\xff..'   [387.2, 401.5, 377.9, 390.0]   null

`mask` is the key (`lpserve.masks.keys`), `nll` the stored float32 sums over each window in nats,
further metrics have a column each, and `reason` says why a mask could not be scored; its values are
then NaN. Pages have checksums, and a segment is written completely or not at all. `game.json`
beside them says of which model and windows they are.

Notation: M masks, N windows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from lpserve.errors import InputError, first_line
from lpserve.exhaustive.family import SmallRemovals
from lpserve.inputs.documents import read_json_object
from lpserve.inputs.shapes import check_names, converted
from lpserve.masks import pack
from lpserve.store.files import sync_folder, write_text, write_whole
from lpserve.types import BoolArray
from lpserve.utility import utility_named

FORMAT = 1
SEGMENT_MASKS = 1 << 14
"""Masks of a segment; the last one of a game may hold fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What game.json says: of which game the segments are."""

    model: str
    model_hash: str
    game: str
    """The game's hash: model, players and numerics."""
    players: list[tuple[int, str]]
    """Layer and part of each player."""
    max_removed: int
    metrics: list[str]
    """Columns of the segments; `nll` first."""
    utility: str
    windows: str
    """The hash of the windows in windows.npz."""
    corpora: list[tuple[str, int]]
    engine: dict[str, Any]
    versions: dict[str, str]
    format: int = FORMAT

    @property
    def family(self) -> SmallRemovals:
        """The masks of the game."""
        return SmallRemovals(len(self.players), self.max_removed)

    @property
    def num_windows(self) -> int:
        """Windows of all corpora."""
        return sum(count for _, count in self.corpora)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Scores of consecutive masks of the family."""

    values: dict[str, NDArray[np.float32]]
    """Metric -> sums over each window, `float32[M, N]`."""
    reasons: dict[int, str]
    """Row -> why its mask could not be scored."""


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write game.json; raises DiskFullError, InputError."""
    write_text(folder / "game.json", json.dumps(asdict(manifest), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read game.json; raises InputError where it is missing or of another kind."""
    path = folder / "game.json"
    data = read_json_object(path, missing="`lpserve exhaustive` writes it")
    source = f"{path} is no exhaustive game"
    if data.get("format") != FORMAT:
        raise InputError(f"{source}: its format is {data.get('format')!r}, not {FORMAT}")
    check_names(data, Manifest, str(path))
    manifest = converted(data, Manifest, source)
    utility_named(manifest.utility)
    if not manifest.players or manifest.metrics[:1] != ["nll"] or manifest.num_windows < 1:
        raise InputError(f"{source}: it names no players, no nll or no windows")
    _ = manifest.family  # refused where its size is out of range
    return manifest


def segment_path(folder: Path, number: int) -> Path:
    """Where a segment lies."""
    return folder / "segments" / f"{number:06d}.parquet"


def segment_range(family: SmallRemovals, number: int) -> tuple[int, int]:
    """The first mask of a segment, and the first after it."""
    return number * SEGMENT_MASKS, min(family.count, (number + 1) * SEGMENT_MASKS)


def num_segments(family: SmallRemovals) -> int:
    """How many segments hold a family."""
    return -(-family.count // SEGMENT_MASKS)


def write_segment(folder: Path, number: int, masks_MP: BoolArray, segment: Segment) -> None:
    """Write a segment so that it outlives a crash of the machine.

    Raises:
        DiskFullError, InputError: it cannot be written; nothing of it is left.
    """
    packed = np.ascontiguousarray(pack(masks_MP))
    count, width = packed.shape
    keys = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), count, [None, pa.py_buffer(packed.tobytes())]
    )
    columns: dict[str, Any] = {"mask": keys}
    # sums of neighbouring masks share their first bytes, neighbouring keys their beginnings
    encoding = {"mask": "DELTA_BYTE_ARRAY"}
    for metric, values_MN in segment.values.items():
        flat = pa.array(np.ascontiguousarray(values_MN, dtype=np.float32).ravel())
        columns[metric] = pa.FixedSizeListArray.from_arrays(flat, values_MN.shape[1])
        encoding[f"{metric}.list.element"] = "BYTE_STREAM_SPLIT"
    reasons = [segment.reasons.get(row) for row in range(count)] if segment.reasons else None
    columns["reason"] = pa.nulls(count, pa.string()) if reasons is None else pa.array(reasons)
    table = pa.table(columns)
    path = segment_path(folder, number)
    write_whole(
        path,
        lambda file: parquet.write_table(
            table,
            file,
            compression="zstd",
            use_dictionary=False,
            column_encoding=encoding,
            write_page_checksum=True,
        ),
    )
    sync_folder(path.parent)


def read_segment(
    folder: Path, number: int, family: SmallRemovals, metrics: Sequence[str], num_windows: int
) -> Segment:
    """Read a segment of a family.

    Raises:
        InputError: it is missing, damaged, or of another game.
    """
    path = segment_path(folder, number)
    start, stop = segment_range(family, number)
    wrong = f"{path} is not this game's segment, or damaged"
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing: give the same `lpserve exhaustive` again")
        columns = ["mask", *metrics, "reason"]
        table = parquet.read_table(path, columns=columns, page_checksum_verification=True)
        found = [key.as_py() for key in table["mask"]]
        values = {metric: _values(table[metric], num_windows) for metric in metrics}
        reasons = table["reason"].to_pylist()
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{wrong}: {first_line(error)}") from None
    wanted = [bytes(row) for row in pack(family.masks(start, stop))]
    if found != wanted or any(len(v) != len(found) for v in values.values()):
        raise InputError(f"{wrong}: its masks are others")
    told = {row: str(reason) for row, reason in enumerate(reasons) if reason is not None}
    return Segment(values=values, reasons=told)


def _values(column: pa.ChunkedArray, num_windows: int) -> NDArray[np.float32]:
    """A column of lists as an array `float32[M, N]`; raises ValueError where its shape differs."""
    if not pa.types.is_fixed_size_list(column.type) or column.type.list_size != num_windows:
        raise ValueError(f"a column of {column.type}, not of {num_windows} floats")
    if column.type.value_type != pa.float32() or column.null_count:
        raise ValueError(f"a column of {column.type}, not of {num_windows} floats")
    flat = column.combine_chunks().flatten()
    return np.asarray(flat, dtype=np.float32).reshape(-1, num_windows)


def describe_difference(mine: Manifest, found: Manifest) -> str:
    """What differs between two games' manifests, in words; empty: they are of one game."""
    told: Mapping[str, str] = {
        "game": "the model, or the engine's numerics,",
        "windows": "the calibration windows",
        "max_removed": "max_removed",
        "metrics": "the utility",
    }
    for name, what in told.items():
        if getattr(mine, name) != getattr(found, name):
            return what
    return ""
