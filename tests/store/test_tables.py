"""Score tables against the store they were written from, row by row, and back into another."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.masks import full_mask
from lpserve.store.store import Store
from lpserve.store.tables import SCHEMA, export_scores, import_scores
from lpserve.testing.stores import (
    drawn_windows,
    make_game,
    put_all,
    random_masks,
    random_nll,
    same_bits,
)
from lpserve.types import Game, Player

SUFFIXES = ["parquet", "csv"]
GAMES = [make_game(), make_game("other", "bfloat16/x"), make_game(num_players=5)]


def fill(store: Store, rng) -> TokenWindows:
    """Three games on overlapping blocks, every kind of float32, two metrics; all the windows."""
    windows = drawn_windows(rng, 100)
    for game in GAMES:
        game_id, players = store.game_id(game), len(game.players)
        for some in (range(20), range(100), range(10, 30)):
            masks = random_masks(rng, 60)[:, :players]
            nll = random_nll(rng, 60, 100)
            odd = rng.random(nll.shape) < 0.1
            nll[odd] = rng.integers(1 << 32, size=odd.sum(), dtype=np.uint32).view(np.float32)
            nll[rng.random(nll.shape) < 0.05] = np.nan
            nll[rng.random(nll.shape) < 0.02] = np.inf
            for block in store.blocks_for(windows.select(some)):
                rows = np.array(some)[block.rows]
                store.put(game_id, block, masks, nll[:, rows])
                store.put(game_id, block, masks[:3], nll[3:6, rows], metric="other")
    return windows


def contents(store: Store, windows: TokenWindows) -> dict[tuple, tuple]:
    """(game, metric, mask, window) -> bits, one at a time, for every mask there is."""
    found = {}
    for game in store.games().values():
        players = len(game.players)
        masks = (np.arange(1 << players)[:, None] >> np.arange(players)[::-1]) & 1 == 1
        for metric in ("nll", "other"):
            nll, known = store.get(store.game_id(game), windows, masks, metric)
            for m, n in zip(*np.nonzero(known), strict=True):
                mask = "".join("01"[kept] for kept in masks[m].tolist())
                found[game.content_hash, metric, mask, windows.window_hashes[n]] = bits(nll[m, n])
    return found


def bits(value: Any) -> Any:
    return "nan" if np.isnan(value) else np.float32(value).tobytes()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The table's rows as a plain reader sees them."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_holds_every_score_once_and_says_what_it_is_of(suffix, tmp_path, rng):
    path = tmp_path / f"scores.{suffix}"
    with Store(tmp_path / "a") as store:
        windows = fill(store, rng)
        expected = contents(store, windows)
        assert export_scores(store, path) == len(expected)
    rows = read_rows(path)
    assert list(rows[0]) == SCHEMA.names
    found = {(r["game"], r["metric"], r["mask"], r["window"]): bits(float(r["nll"])) for r in rows}
    assert len(rows) == len(found)
    assert found == expected
    about = {
        (r["game"], r["model"], r["numerics"], r["players"], int(r["num_tokens"])) for r in rows
    }
    assert {(g, m, n, tuple(map(tuple, json.loads(p))), t) for g, m, n, p, t in about} == {
        (g.content_hash, g.model_hash, g.numerics, tuple((p.layer, p.part) for p in g.players), 15)
        for g in GAMES
    }


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_importing_gives_the_same_store_and_again_adds_nothing(suffix, tmp_path, rng):
    path = tmp_path / f"scores.{suffix}"
    with Store(tmp_path / "a") as store:
        windows = fill(store, rng)
        expected, count = contents(store, windows), store.count()
        export_scores(store, path)
        blocks = num_blocks(store)
        assert import_scores(store, path) == 0
        assert (store.count(), num_blocks(store)) == (count, blocks)
    with Store(tmp_path / "b") as store:
        added = import_scores(store, path)
        assert added == store.count() > 0
        assert import_scores(store, path) == 0
        assert store.count() == added
        assert contents(store, windows) == expected
        assert store.games() == {game.content_hash: game for game in GAMES}
        export_scores(store, tmp_path / f"again.{suffix}")
        assert import_scores(store, tmp_path / f"again.{suffix}") == 0
    again = {
        tuple(sorted(row.items())) for row in map(as_text, read_rows(tmp_path / f"again.{suffix}"))
    }
    assert again == {tuple(sorted(row.items())) for row in map(as_text, read_rows(path))}


def num_blocks(store: Store) -> int:
    return store._file.db.execute("SELECT COUNT(*) FROM blocks").fetchone()[0]


def as_text(row: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in row.items()}


def test_blocks_stay_as_they_were_so_that_more_windows_score_only_new_ones(tmp_path, rng):
    windows, masks = drawn_windows(rng, 150), random_masks(rng, 30)
    path = tmp_path / "scores.parquet"
    with Store(tmp_path / "a") as store:
        put_all(store, windows.select(range(20)), masks, random_nll(rng, 30, 20))
        put_all(store, windows, masks, random_nll(rng, 30, 150))
        blocks = store.blocks_for(windows)
        export_scores(store, path)
    with Store(tmp_path / "b") as store:
        assert import_scores(store, path) == 30 * len(blocks)
        again = store.blocks_for(windows)
    assert {tuple(b.rows.tolist()) for b in again} == {tuple(b.rows.tolist()) for b in blocks}


@pytest.mark.parametrize("order", ["shuffled", "by window"])
def test_rows_in_any_order_give_the_same_scores(order, tmp_path, rng):
    path = tmp_path / "scores.parquet"
    windows, masks, nll = drawn_windows(rng, 6), random_masks(rng, 40), random_nll(rng, 40, 6)
    with Store(tmp_path / "a") as store:
        put_all(store, windows, masks, nll)
        export_scores(store, path)
    table = pq.read_table(path)
    if order == "shuffled":
        table = table.take(rng.permutation(table.num_rows))
    else:
        table = table.sort_by("window")
    pq.write_table(table, path)
    with Store(tmp_path / "b") as store:
        assert import_scores(store, path) > 0
        got, known = store.get(store.game_id(GAMES[0]), windows, masks)
        assert known.all()
        assert same_bits(got, nll)
        assert import_scores(store, path) == 0


def test_what_the_store_holds_already_stays_and_only_the_rest_is_added(tmp_path, rng):
    windows, masks, nll = drawn_windows(rng, 8), random_masks(rng, 30), random_nll(rng, 30, 8)
    path = tmp_path / "scores.csv"
    with Store(tmp_path / "a") as store:
        put_all(store, windows, masks, nll)
        export_scores(store, path)
    with Store(tmp_path / "b") as store:
        put_all(store, windows.select(range(5)), masks[:10], -nll[:10, :5])
        # ten masks lack one of the two blocks, twenty lack both
        assert import_scores(store, path) == 10 + 20 * 2
        got, known = store.get(store.game_id(GAMES[0]), windows, masks)
        assert known.all()
    expected = nll.copy()
    expected[:10, :5] *= -1
    assert same_bits(got, expected)


def test_tables_of_other_tools_are_read(tmp_path, rng):
    """Other column order and types, columns of one's own, repeated rows: the first one counts."""
    windows, masks, nll = drawn_windows(rng, 6), random_masks(rng, 20), random_nll(rng, 20, 6)
    path, other = tmp_path / "scores.parquet", tmp_path / "other.parquet"
    with Store(tmp_path / "a") as store:
        put_all(store, windows, masks, nll)
        export_scores(store, path)
    table = pq.read_table(path)
    columns = {name: table[name] for name in reversed(SCHEMA.names)}
    columns["nll"] = columns["nll"].cast(pa.float64())
    columns["num_tokens"] = columns["num_tokens"].cast(pa.int16())
    columns["mask"] = columns["mask"].cast(pa.large_string())
    columns["players"] = columns["players"].dictionary_encode()
    columns["note"] = pa.array(["mine", None] * (table.num_rows // 2))
    twice = pa.table(columns).take(np.repeat(np.arange(table.num_rows), 2))
    changed = twice["nll"].to_numpy() + np.tile([0, 1], table.num_rows)
    twice = twice.set_column(twice.column_names.index("nll"), "nll", pa.array(changed))
    pq.write_table(twice, other)
    lines = path.with_suffix(".csv")
    rows = read_rows(path)
    with lines.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["note", *reversed(SCHEMA.names)])
        writer.writeheader()
        writer.writerows({"note": i if i < 9 else "x", **row} for i, row in enumerate(rows))
    for number, source in enumerate((other, lines)):
        with Store(tmp_path / f"b{number}") as store:
            assert import_scores(store, source) == 20
            got, known = store.get(store.game_id(GAMES[0]), windows, masks)
            assert known.all()
            assert same_bits(got, nll)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_empty_store_is_a_table_without_rows(suffix, tmp_path):
    path = tmp_path / f"scores.{suffix}"
    with Store(tmp_path / "a") as store:
        assert export_scores(store, path) == 0
        assert import_scores(store, path) == 0
    assert read_rows(path) == []


# -- refused ---------------------------------------------------------------------------------------


def set_cell(name: str, value: Any, row: int = 3) -> Callable[[list[dict]], None]:
    def change(rows: list[dict]) -> None:
        rows[row][name] = value

    return change


def without_columns(*names: str) -> Callable[[list[dict]], None]:
    def change(rows: list[dict]) -> None:
        for row in rows:
            for name in names:
                del row[name]

    return change


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_columns("nll"), "needs one column nll"),
        (without_columns("game", "mask"), "needs one column game, mask"),
        (set_cell("mask", "01"), "row 4: mask '01' is not a 0 or 1 for each of 12 players"),
        (set_cell("mask", "01" * 5 + "2x"), "row 4: mask '01010101012x'"),
        (set_cell("mask", "0 1" * 4), "row 4: mask"),
        (set_cell("mask", "", row=0), "row 1: mask ''"),
        (set_cell("game", "f" * 64), "row 4: game is not the hash"),
        (set_cell("numerics", "float64"), "row 4: game is not the hash"),
        (set_cell("players", "[[0]]"), "row 4: players are not"),
        (set_cell("players", "layers"), "row 4: players are not"),
        (set_cell("players", "3"), "row 4: players are not"),
        (set_cell("window", "abc"), "row 4: not a window"),
        (set_cell("num_tokens", 0), "row 4: not a window"),
        (set_cell("num_tokens", 16, row=-1), "not as in an earlier row"),
    ],
)
def test_a_table_that_is_not_of_scores_is_refused_and_adds_nothing(
    change, words, suffix, tmp_path, rng, monkeypatch
):
    monkeypatch.setattr("lpserve.store.tables._PUT_ROWS", 1)  # as in a long table
    rows = exported_rows(tmp_path, rng)
    change(rows)
    path = tmp_path / f"bad.{suffix}"
    write_rows(path, rows)
    assert_refused(path, words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("nll", "", "invalid value ''"),
        ("nll", "1,5", "invalid value '1,5'"),
        ("num_tokens", "many", "invalid value 'many'"),
    ],
)
def test_cells_that_are_no_numbers_are_refused(name, value, words, tmp_path, rng):
    rows = exported_rows(tmp_path, rng)
    rows[3][name] = value
    write_rows(tmp_path / "bad.csv", rows)
    assert_refused(tmp_path / "bad.csv", words)


@pytest.mark.parametrize("name", ["nll", "mask", "num_tokens", "players"])
def test_empty_cells_are_refused(name, tmp_path, rng):
    rows = exported_rows(tmp_path, rng)
    rows[3][name] = None
    write_rows(tmp_path / "bad.parquet", rows)
    assert_refused(tmp_path / "bad.parquet", f"empty cells in column {name}")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [None, b"", b"\x00\xff" * 500, b"game,mask\n"])
def test_files_that_are_no_tables_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"bad.{suffix}"
    if content is not None:
        path.write_bytes(content)
    assert_refused(path, str(path))


def exported_rows(tmp_path: Path, rng) -> list[dict[str, Any]]:
    with Store(tmp_path / "a") as store:
        masks = random_masks(rng, 5)
        put_all(store, drawn_windows(rng, 4), masks, random_nll(rng, 5, 4))
        export_scores(store, tmp_path / "scores.parquet")
    return read_rows(tmp_path / "scores.parquet")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def assert_refused(path: Path, words: str) -> None:
    with Store(path.with_name("b")) as store:
        with pytest.raises(InputError) as error:
            import_scores(store, path)
        assert words in str(error.value)
        assert str(path) in str(error.value)
        assert len(str(error.value).splitlines()) == 1
        assert store.count() == 0
        assert store.games() == {}


@pytest.mark.parametrize(
    "name", ["scores.txt", "scores", "scores.parquet.gz", "no/such/scores.csv"]
)
def test_other_suffixes_and_missing_folders_are_refused_both_ways(name, tmp_path):
    with Store(tmp_path / "a") as store:
        before = sorted(tmp_path.iterdir())
        for way in (export_scores, import_scores):
            with pytest.raises(InputError) as error:
                way(store, tmp_path / name)
            assert len(str(error.value).splitlines()) == 1
        assert sorted(tmp_path.iterdir()) == before


EXPORT_WITH_LIMIT = """
import resource, sys
from lpserve.errors import DiskFullError
from lpserve.store.tables import export_scores
from lpserve.store.store import Store
with Store(sys.argv[1]) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    try:
        export_scores(store, sys.argv[2])
    except DiskFullError as error:
        print(error)
"""


@pytest.mark.process
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_export_without_space_leaves_the_earlier_file_and_nothing_else(suffix, tmp_path, rng):
    path = tmp_path / f"scores.{suffix}"
    path.write_text("an earlier one")
    with Store(tmp_path / "a") as store:
        put_all(store, drawn_windows(rng, 20), random_masks(rng, 50), random_nll(rng, 50, 20))
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_WITH_LIMIT, str(tmp_path / "a"), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"no space to write {path}; free space and export again\n"
    assert path.read_text() == "an earlier one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.lock", path.name]


def test_players_of_parts_and_a_single_player_go_there_and_back(tmp_path):
    parts = tuple(
        Player(index=i, layer=i // 2, part=p)
        for i, p in enumerate(["attention", 'the "mlp", 2'] * 2)
    )
    games = [Game(model_hash="m", players=parts[:n], numerics="float32") for n in (1, 4)]
    windows = TokenWindows.from_tokens(np.arange(8).reshape(1, 8))
    for suffix in SUFFIXES:
        path = tmp_path / f"scores.{suffix}"
        with Store(tmp_path / f"a-{suffix}") as store:
            for game in games:
                block = store.blocks_for(windows)[0]
                mask = full_mask(len(game.players))[None]
                store.put(store.game_id(game), block, mask, np.ones((1, 1)))
            export_scores(store, path)
        with Store(tmp_path / f"b-{suffix}") as store:
            assert import_scores(store, path) == 2
            assert store.games() == {game.content_hash: game for game in games}
