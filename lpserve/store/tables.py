"""Scores as a table, exported from a store or imported into one: Parquet or CSV, by suffix.

One row for each (game, mask, window), complete in itself, so that any table tool can read it::

    game    model   numerics  players            mask  window  num_tokens  metric  nll
    9f3a..  1c07..  float32   [[0, "layer"], ..  1011  77b0..  511         nll     1843.2206

`mask` has player 0 first, 1 = kept; `nll` is the stored float32, NaN and infinity included. Export
and import both stream. Where blocks overlap, the score that the store answers with is exported;
masks in quarantine are left out.

Knows pyarrow and the store, no run and no engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from lpserve.errors import InputError, first_line
from lpserve.inputs.documents import json_value
from lpserve.inputs.shapes import converted
from lpserve.masks import from_keys
from lpserve.store.blocks import StoredWindows
from lpserve.store.files import write_whole
from lpserve.store.store import Store, StoredScores
from lpserve.types import Game, Player

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("game", "model", "numerics", "players", "mask", "window")]
    + [("num_tokens", pa.int64()), ("metric", pa.string()), ("nll", pa.float32())]
)
_PUT_ROWS = 1 << 16  # rows gathered before they are committed
_Group = tuple[Game, str, tuple[tuple[str, int], ...]]  # game, metric, (window, tokens) in order


def export_scores(store: Store, path: str | Path) -> int:
    """Write every score of a store, completely or not at all; returns the number of rows.

    Raises:
        InputError: a suffix other than .parquet and .csv, or the file cannot be written.
        DiskFullError: no space.
    """
    path = _checked(path)
    games, rows = store.games(), 0

    def write(file: BinaryIO) -> None:
        nonlocal rows
        make = csv.CSVWriter if path.suffix == ".csv" else parquet.ParquetWriter
        with make(file, SCHEMA) as writer:
            for scores in store.read_all():
                batch = _table_rows(games[scores.game], scores)
                writer.write_batch(batch)
                rows += batch.num_rows

    write_whole(path, write, advice="free space and export again")
    return rows


def import_scores(store: Store, path: str | Path) -> int:
    """Add a table's scores to a store; returns how many (block, mask) rows were new.

    Scores that the store holds already stay as they are. Consecutive rows of a mask become a block;
    in a table that was sorted by window each block is a single window: correct but slow.

    Raises:
        InputError: not such a table; nothing of it is added.
    """
    path = _checked(path)
    for _ in _rows(path):  # nothing is written before all of it has been checked
        pass
    added, waiting = 0, 0
    scores: dict[_Group, dict[str, list[float]]] = {}
    for (game, metric, mask), rows in groupby(_rows(path), key=lambda row: row[:3]):
        nll_of: dict[tuple[str, int], float] = {}
        for *_, window, num_tokens, nll in rows:
            nll_of.setdefault((window, num_tokens), nll)
        scores.setdefault((game, metric, tuple(nll_of)), {}).setdefault(mask, [*nll_of.values()])
        waiting += len(nll_of)
        if waiting >= _PUT_ROWS:
            added += _put(store, scores)
            scores, waiting = {}, 0
    return added + _put(store, scores)


def _put(store: Store, scores: dict[_Group, dict[str, list[float]]]) -> int:
    added = 0
    for (game, metric, pairs), nll_of in scores.items():
        hashes, num_tokens = zip(*pairs, strict=True)
        windows = StoredWindows(hashes, np.array(num_tokens, dtype=np.int64))
        masks_MP = np.array([[kept == "1" for kept in mask] for mask in nll_of])
        nll_MN = np.array(list(nll_of.values()))
        game_id = store.game_id(game)
        _, known_MN = store.get(game_id, windows, masks_MP, metric)
        if known_MN.all():  # in whatever blocks: new ones would only repeat them
            continue
        for block in store.blocks_for(windows):
            fresh = ~known_MN[:, block.rows].all(axis=1)
            nll = nll_MN[fresh][:, block.rows]
            added += store.put(game_id, block, masks_MP[fresh], nll, metric)
    return added


def _table_rows(game: Game, scores: StoredScores) -> pa.RecordBatch:
    masks_MP = from_keys(scores.mask_keys, len(game.players))
    mask_texts = ["".join("01"[kept] for kept in mask_P) for mask_P in masks_MP.tolist()]
    row, column = np.nonzero(scores.first_MN)
    about = (
        game.content_hash,
        game.model_hash,
        game.numerics,
        json.dumps([[p.layer, p.part] for p in game.players]),
    )
    columns = [
        *(pa.repeat(text, len(row)) for text in about),
        pa.array(mask_texts).take(pa.array(row)),
        pa.array(scores.windows.window_hashes).take(pa.array(column)),
        pa.array(scores.windows.num_tokens_N[column]),
        pa.repeat(scores.metric, len(row)),
        pa.array(scores.nll_MN[row, column]),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _rows(path: Path) -> Iterator[tuple[Game, str, str, str, int, float]]:
    """(game, metric, mask, window, num_tokens, nll) of every row, checked."""
    games: dict[tuple[str, ...], Game] = {}
    tokens_of: dict[str, int] = {}
    number = 0
    for batch in _batches(path):
        for row in zip(*(column.to_pylist() for column in batch), strict=True):
            number += 1
            key, (mask, window, num_tokens, metric, nll) = row[:4], row[4:]
            if key not in games:
                games[key] = _game(*key, where=f"{path}, row {number}")
            game = games[key]
            if len(mask) != len(game.players) or mask.strip("01"):
                raise InputError(
                    f"{path}, row {number}: mask {mask[:200]!r} is not a 0 or 1 for "
                    f"each of {len(game.players)} players"
                )
            window_fits = re.fullmatch("[0-9a-f]{64}", window) and num_tokens > 0
            if not window_fits or tokens_of.setdefault(window, num_tokens) != num_tokens:
                raise InputError(
                    f"{path}, row {number}: not a window, or not as in an earlier "
                    f"row: {window[:200]!r} of {num_tokens} tokens"
                )
            yield game, metric, mask, window, num_tokens, nll


def _game(game: str, model: str, numerics: str, players: str, *, where: str) -> Game:
    source = f"{where}: players are not [[layer, part], ..]"
    listed = enumerate(converted(json_value(players, source), list[tuple[int, str]], source))
    parts = tuple(Player(index=i, layer=layer, part=part) for i, (layer, part) in listed)
    found = Game(model_hash=model, players=parts, numerics=numerics)
    if found.content_hash != game:
        raise InputError(f"{where}: game is not the hash of its model, players and numerics")
    return found


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        names, batches = _open_csv(path) if path.suffix == ".csv" else _open_parquet(path)
        if missing := [name for name in SCHEMA.names if names.count(name) != 1]:
            raise InputError(f"{path} is not a score table: needs one column {', '.join(missing)}")
        for batch in batches:
            batch.validate(full=True)  # its texts are UTF-8
            batch = batch.select(SCHEMA.names).cast(SCHEMA)
            if empty := [name for name in SCHEMA.names if batch[name].null_count]:
                raise InputError(f"{path} has empty cells in column {', '.join(empty)}")
            yield batch
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from None


def _open_csv(path: Path) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    with csv.open_csv(path) as reader:
        names = reader.schema.names
    wanted = [name for name in SCHEMA.names if name in names]
    options = csv.ConvertOptions(include_columns=wanted, column_types=SCHEMA, null_values=[])
    return names, iter(csv.open_csv(path, convert_options=options))  # no null: NaN is a score


def _open_parquet(path: Path) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    file = parquet.ParquetFile(path)
    return file.schema_arrow.names, file.iter_batches(1 << 13, columns=SCHEMA.names)


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".parquet", ".csv"):
        raise InputError(f"{path}: a score table is .parquet or .csv: name the file so")
    if not path.parent.is_dir():
        raise InputError(f"{path}: folder {path.parent} does not exist")
    return path
