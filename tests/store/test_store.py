"""The store: what is committed stays, is found from any subset of windows, and is never guessed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest

from lpserve.data.windows import TokenWindows
from lpserve.errors import DiskFullError, InputError, StoreBusyError, StoreCorruptError
from lpserve.masks import full_mask, keys
from lpserve.store import lease
from lpserve.store.blocks import MAX_BLOCK_TOKENS, MAX_BLOCK_WINDOWS
from lpserve.store.store import Store
from lpserve.testing.stores import (
    GAME,
    NUM_PLAYERS,
    drawn_windows,
    filled,
    known_nll,
    make_game,
    numbered_score,
    put_all,
    random_masks,
    random_nll,
    same_bits,
)


@pytest.fixture(params=[False, True], ids=["local", "shared"])
def shared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Either way of keeping a store; a lease is soon seen to be alive, or given up."""
    monkeypatch.setattr(lease, "LEASE_S", 5.0)
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    return request.param


# -- reading back ----------------------------------------------------------------------------------


def test_scores_are_there_after_reopening(tmp_path, rng, shared):
    windows, masks, nll = drawn_windows(rng, 9), random_masks(rng, 40), random_nll(rng, 40, 9)
    with Store(tmp_path / "a", shared=shared) as store:
        assert put_all(store, windows, masks, nll) == 40
    for _ in range(2):
        with Store(tmp_path / "a", shared=shared) as store:
            assert store.count() == 40
            order = rng.permutation(40)
            assert same_bits(known_nll(store, windows, masks[order]), nll[order])
            assert store.games() == {GAME.content_hash: GAME}


def test_every_float32_comes_back_as_it_was(tmp_path, rng, shared):
    windows, masks = drawn_windows(rng, 64), random_masks(rng, 30)
    nll = rng.integers(1 << 32, size=(30, 64), dtype=np.uint32).view(np.float32)
    nll[0, :6] = [np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4028235e38]
    with Store(tmp_path / "a", shared=shared) as store:
        put_all(store, windows, masks, nll)
    with Store(tmp_path / "a", shared=shared) as store:
        got = known_nll(store, windows, masks)
    assert np.array_equal(np.isnan(got), np.isnan(nll))
    assert same_bits(got[~np.isnan(got)], nll[~np.isnan(nll)])


def test_float64_scores_are_rounded_and_beyond_float32_is_inf(tmp_path, rng):
    windows, masks = drawn_windows(rng, 2), random_masks(rng, 1)
    with Store(tmp_path / "a") as store:
        put_all(store, windows, masks, np.array([[0.1, 1e39]]))
        got = known_nll(store, windows, masks)
    assert same_bits(got, np.array([[0.1, np.inf]], dtype=np.float32))


def test_writing_a_score_twice_keeps_the_first(tmp_path, rng, shared):
    windows, masks, nll = drawn_windows(rng, 5), random_masks(rng, 30), random_nll(rng, 30, 5)
    with Store(tmp_path / "a", shared=shared) as store:
        assert put_all(store, windows, masks[:20], nll[:20]) == 20
        assert put_all(store, windows, masks[:20], -nll[:20]) == 0
        assert put_all(store, windows, masks, np.concatenate([-nll[:20], nll[20:]])) == 10
        assert same_bits(known_nll(store, windows, masks), nll)
        assert store.count() == 30


def test_unknown_masks_and_windows_are_told_apart_from_nan(tmp_path, rng):
    windows, other = drawn_windows(rng, 4), drawn_windows(rng, 3)
    masks, nll = random_masks(rng, 10), random_nll(rng, 6, 4)
    nll[2, 1] = np.nan
    both = TokenWindows.concatenate(
        [windows, TokenWindows(other.tokens_NT, other.scored_NT, (("other", 3),))]
    )
    with Store(tmp_path / "a") as store:
        put_all(store, windows, masks[:6], nll)
        got, known = store.get(store.game_id(GAME), both, masks)
        assert known.tolist() == [[m < 6 and n < 4 for n in range(7)] for m in range(10)]
        assert same_bits(got[:6, :4].copy(), nll)
        assert np.isnan(got[~known]).all()


def test_repeated_masks_and_windows_are_each_answered(tmp_path, rng):
    windows, masks, nll = drawn_windows(rng, 5), random_masks(rng, 8), random_nll(rng, 8, 5)
    rows, columns = rng.integers(8, size=30), rng.integers(5, size=9)
    with Store(tmp_path / "a") as store:
        put_all(store, windows, masks, nll)
        got = known_nll(store, windows.select(columns), masks[rows])
        assert same_bits(got, nll[rows][:, columns])


def test_more_masks_than_one_query_takes_are_all_found(tmp_path, rng):
    windows, masks, nll = drawn_windows(rng, 3), random_masks(rng, 1700), random_nll(rng, 1700, 3)
    with Store(tmp_path / "a") as store:
        put_all(store, windows, masks, nll)
        assert same_bits(known_nll(store, windows, masks), nll)


def test_games_and_metrics_do_not_mix(tmp_path, rng):
    games = [GAME, make_game("other"), make_game(numerics="bfloat16/x"), make_game(num_players=11)]
    windows, mask, nll = drawn_windows(rng, 3), full_mask(NUM_PLAYERS)[None], random_nll(rng, 5, 3)
    with Store(tmp_path / "a") as store:
        ids = [store.game_id(game) for game in games]
        assert len(set(ids)) == 4
        assert [store.game_id(game) for game in games] == ids
        block = store.blocks_for(windows)[0]
        for game, value in zip(ids, nll, strict=False):
            store.put(game, block, mask, value[None, block.rows])
        store.put(ids[0], block, mask, nll[4][None, block.rows], metric="other")
        for game, value in zip(ids, nll, strict=False):
            assert same_bits(store.get(game, windows, mask)[0], value[None])
        assert same_bits(store.get(ids[0], windows, mask, "other")[0], nll[4:])
        assert not store.get(ids[1], windows, mask, "other")[1].any()
        assert store.games() == {game.content_hash: game for game in games}


def test_scores_of_another_shape_are_refused(tmp_path, rng):
    with Store(tmp_path / "a") as store:
        block = store.blocks_for(drawn_windows(rng, 3))[0]
        with pytest.raises(ValueError, match="masks of"):
            store.put(1, block, random_masks(rng, 2), random_nll(rng, 2, 4))
        assert store.count() == 0


# -- overlaps --------------------------------------------------------------------------------------


def test_overlaps_are_kept_as_they_are_and_the_first_counts(tmp_path, rng):
    first_PP, second_PP = rng.normal(size=(2, 5, 5))
    with Store(tmp_path / "a") as store:
        block, other = store.blocks_for(drawn_windows(rng, 70))
        assert store.get_overlap(1, block.id) is None
        store.put_overlap(1, block.id, first_PP)
        store.put_overlap(1, block.id, second_PP)
        store.put_overlap(2, block.id, second_PP)
    with Store(tmp_path / "a") as store:
        for game, expected_PP in ((1, first_PP), (2, second_PP)):
            found_PP = store.get_overlap(game, block.id)
            assert found_PP is not None
            assert (found_PP == expected_PP).all()
        assert store.get_overlap(1, other.id) is None
    with closing(sqlite3.connect(tmp_path / "a")) as db, db:
        db.execute("UPDATE overlaps SET value = zeroblob(200) WHERE game = 2")
    with pytest.raises(StoreCorruptError, match="an overlap does not match its checksum"):
        Store(tmp_path / "a")


# -- blocks ----------------------------------------------------------------------------------------


def test_blocks_cover_the_windows_once_and_stay_small(tmp_path, rng):
    windows = drawn_windows(rng, 150)
    with Store(tmp_path / "a") as store:
        blocks = store.blocks_for(windows)
        assert [len(b.rows) for b in blocks] == [MAX_BLOCK_WINDOWS, MAX_BLOCK_WINDOWS, 22]
        assert sorted(np.concatenate([b.rows for b in blocks]).tolist()) == list(range(150))
    with Store(tmp_path / "a") as store:
        for again, block in zip(store.blocks_for(windows), blocks, strict=True):
            assert again.id == block.id
            assert np.array_equal(again.rows, block.rows)


def test_blocks_of_long_windows_hold_few_of_them(tmp_path, rng):
    """What is scored at once stays small: 489 windows of 2,048 tokens take minutes on a CPU."""
    windows = TokenWindows.from_tokens(rng.integers(0, 50, (40, 2049)))
    with Store(tmp_path / "a") as store:
        blocks = store.blocks_for(windows)
        assert [len(b.rows) for b in blocks] == [16, 16, 8]
        assert MAX_BLOCK_TOKENS == 16 * 2048
        longer = TokenWindows.from_tokens(rng.integers(0, 50, (2, MAX_BLOCK_TOKENS + 9)))
        assert [len(b.rows) for b in store.blocks_for(longer)] == [1, 1]


def test_more_windows_score_only_the_new_ones(tmp_path, rng, shared):
    windows, masks, nll = drawn_windows(rng, 25), random_masks(rng, 20), random_nll(rng, 20, 25)
    order = rng.permutation(25)
    few, many = windows.select(order[:10]), windows.select(rng.permutation(25))
    with Store(tmp_path / "a", shared=shared) as store:
        put_all(store, few, masks, nll[:, order[:10]])
        _, known = store.get(store.game_id(GAME), many, masks)
        held = {many.window_hashes.index(h) for h in few.window_hashes}
        assert known.tolist() == [[n in held for n in range(25)]] * 20
        old, new = store.blocks_for(many)
        assert set(old.rows.tolist()) == held
        assert set(new.rows.tolist()) == set(range(25)) - held


def test_a_block_is_read_in_the_order_it_was_stored(tmp_path, rng):
    """Rows of a block refer to the windows asked for, in whatever order those come."""
    windows, masks, nll = drawn_windows(rng, 12), random_masks(rng, 15), random_nll(rng, 15, 12)
    with Store(tmp_path / "a") as store:
        put_all(store, windows, masks[:5], nll[:5])
        for part in (masks[5:10], masks[10:]):
            order = rng.permutation(12)
            rows = [masks.tolist().index(m) for m in part.tolist()]
            put_all(store, windows.select(order), part, nll[rows][:, order])
        assert len(store.blocks_for(windows)) == 1
        assert same_bits(known_nll(store, windows, masks), nll)


@pytest.mark.parametrize("first", [10, 100])
def test_any_subset_or_mixture_of_windows_is_read_back(first, tmp_path, rng):
    """Stored as few windows and then more, or the other way round."""
    windows, masks, nll = drawn_windows(rng, 100), random_masks(rng, 12), random_nll(rng, 12, 100)
    with Store(tmp_path / "a") as store:
        for size in (first, 100, 10):
            put_all(store, windows.select(range(size)), masks, nll[:, :size])
        for _ in range(5):
            some = rng.permutation(100)[: rng.integers(1, 101)]
            assert same_bits(known_nll(store, windows.select(some), masks), nll[:, some])


def test_where_blocks_overlap_the_oldest_is_answered_and_read_once(tmp_path, rng):
    windows, masks = drawn_windows(rng, 9), random_masks(rng, 4)
    first, second = random_nll(rng, 3, 6), random_nll(rng, 4, 6)
    with Store(tmp_path / "a") as store:
        put_all(store, windows.select(range(6)), masks[:3], first)
        put_all(store, windows.select(range(3, 9)), masks, second)
        expected = np.full((4, 9), np.nan, dtype=np.float32)
        expected[:, 3:], expected[:3, :6] = second, first
        got, known = store.get(store.game_id(GAME), windows, masks)
        assert np.array_equal(got, expected, equal_nan=True)
        assert np.array_equal(known, ~np.isnan(expected))
        found: dict[tuple[bytes, str], float] = {}
        for scores in store.read_all(masks=2):
            assert len(scores.mask_keys) <= 2
            assert scores.windows.num_tokens_N.tolist() == [15] * 6
            for m, n in zip(*np.nonzero(scores.first_MN), strict=True):
                place = scores.mask_keys[m], scores.windows.window_hashes[n]
                assert place not in found
                found[place] = float(scores.nll_MN[m, n])
    assert found == {
        (key, window): float(expected[m, n])
        for m, key in enumerate(keys(masks))
        for n, window in enumerate(windows.window_hashes)
        if known[m, n]
    }


def test_quarantine_is_kept_for_its_block_mask_game_and_metric(tmp_path, rng, shared):
    windows, masks = drawn_windows(rng, 80), random_masks(rng, 3)
    with Store(tmp_path / "a", shared=shared) as store:
        game, other = store.game_id(GAME), store.game_id(make_game("other"))
        first, second = store.blocks_for(windows)
        store.quarantine(game, first, masks[0], "worker died 3 times")
        store.quarantine(game, first, masks[0], "again")
        store.quarantine(game, second, masks[1], "out of memory")
        store.quarantine(other, first, masks[2], "other game")
        store.quarantine(game, first, masks[2], "other metric", metric="other")
    with Store(tmp_path / "a", shared=shared) as store:
        key = keys(masks)
        assert store.quarantined(game) == {
            (first.id, key[0]): "worker died 3 times",
            (second.id, key[1]): "out of memory",
        }
        assert store.quarantined(other) == {(first.id, key[2]): "other game"}
        assert store.quarantined(game, "other") == {(first.id, key[2]): "other metric"}
        assert store.count() == 0


# -- one writer ------------------------------------------------------------------------------------

HOLD = """
import sys
from lpserve.store import lease
from lpserve.store.store import Store
lease.BEAT_S = 0.1
with Store(sys.argv[1], holder="the night run", shared=sys.argv[2] == "True"):
    print("open", flush=True)
    sys.stdin.read()
"""


def python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.process
def test_a_second_process_is_refused_until_the_holder_is_killed(tmp_path, shared):
    path = tmp_path / "a"
    with python(HOLD, path, shared) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        for _ in range(2):
            with pytest.raises(StoreBusyError) as error:
                Store(path, shared=shared)
            assert len(str(error.value).splitlines()) == 1
            assert f"in use by the night run (pid {holder.pid} on " in str(error.value)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with Store(path, shared=shared) as store:
        assert store.count() == 0


def test_a_store_is_free_again_once_closed(tmp_path, shared):
    for _ in range(2):
        with (
            Store(tmp_path / "a", shared=shared),
            pytest.raises(StoreBusyError, match="in use by an lpserve"),
        ):
            Store(tmp_path / "a", shared=shared)


@pytest.mark.parametrize(
    ("name", "words"), [("no/such/a", "does not exist"), ("folder", "is a folder")]
)
def test_a_path_that_can_hold_no_store_is_refused(name, words, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError) as error:
        Store(tmp_path / name)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# -- a full disk -----------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing_and_the_store_goes_on_once_there_is_space(tmp_path, rng, shared):
    """SQLite's own SQLITE_FULL, by a page limit."""
    windows, masks = drawn_windows(rng, 20), random_masks(rng, 2000)
    nll = random_nll(rng, 2000, 20)
    with Store(tmp_path / "a", shared=shared) as store:
        game, (block,) = store.game_id(GAME), store.blocks_for(windows)
        pages = store._file.db.execute("PRAGMA page_count").fetchone()[0]
        store._file.db.execute(f"PRAGMA max_page_count = {pages + 10}")
        committed = 0

        def put_by_and_by() -> None:
            nonlocal committed
            for start in range(0, 2000, 50):
                store.put(game, block, masks[start : start + 50], nll[start : start + 50])
                committed = start + 50

        with pytest.raises(DiskFullError, match="what was committed is kept") as error:
            put_by_and_by()
        assert len(str(error.value).splitlines()) == 1
        assert 0 < committed < 2000
        assert store.count() == committed
        assert same_bits(known_nll(store, windows, masks[:committed]), nll[:committed])
        with pytest.raises(DiskFullError):
            store.put(game, block, masks[committed:], nll[committed:])
        store._file.db.execute("PRAGMA max_page_count = 1000000")
        assert store.put(game, block, masks, nll) == 2000 - committed
    with Store(tmp_path / "a", shared=shared) as store:
        assert same_bits(known_nll(store, windows, masks), nll)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_file_system_is_told_as_such_when_opening_and_when_writing(tmp_path, rng, shared):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        windows, masks, nll = filled(small / "a", rng, shared=shared)
        fill = small / "fill"
        fill.write_bytes(bytes(400_000 - sum(f.stat().st_size for f in small.iterdir())))
        with pytest.raises(DiskFullError, match="no space"):
            Store(small / "a", shared=shared)
        os.truncate(fill, fill.stat().st_size - 64_000)
        with Store(small / "a", shared=shared) as store:
            with pytest.raises(DiskFullError, match="no space"):
                put_all(store, windows, random_masks(rng, 3000), random_nll(rng, 3000, 12))
            fill.unlink()
            assert put_all(store, windows, masks, -nll) == 0
            assert same_bits(known_nll(store, windows, masks), nll)
    finally:
        subprocess.run(["umount", str(small)], check=True)


# -- damaged files ---------------------------------------------------------------------------------


def assert_refused_untouched(path: Path, words: str, *, shared: bool | None = None) -> None:
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(StoreCorruptError) as error:
            Store(path, shared=shared)
        assert words in str(error.value)
        assert "left as it is" in str(error.value)
        assert str(path) in str(error.value)
        assert len(str(error.value).splitlines()) == 1
    assert path.read_bytes() == before


Damage = Callable[[Path, np.random.Generator], object]


def foreign(path: Path, _: np.random.Generator) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE scores (game INTEGER)")
    db.close()


def pragma(statement: str) -> Damage:
    def change(path: Path, _: np.random.Generator) -> None:
        db = sqlite3.connect(path)
        db.execute(statement)
        db.commit()
        db.close()

    return change


def cut(share: float) -> Damage:
    return lambda path, _: os.truncate(path, int(path.stat().st_size * share))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path, rng: path.write_bytes(rng.bytes(20_000)), "is corrupt"),
        (lambda path, rng: path.write_bytes(rng.bytes(7)), "is corrupt"),
        (lambda path, _: path.write_text("a text, not a store\n" * 40), "is corrupt"),
        (lambda path, _: path.write_bytes(bytes(8192)), "is corrupt"),
        (foreign, "is not an lpserve store"),
        (pragma("PRAGMA application_id = 7"), "is not an lpserve store"),
        (pragma("PRAGMA user_version = 99"), "has format 99"),
        (pragma("DROP TABLE quarantine"), "tables are not those of a store"),
        (pragma("UPDATE scores SET value = zeroblob(8) WHERE game = 1"), "checksum"),
        (pragma("UPDATE scores SET game = 2"), "checksum"),
        (pragma("UPDATE games SET hash = 'x'"), "a game does not match"),
        (pragma("UPDATE games SET description = '{'"), "cannot be read"),
        (cut(0.0001), "is corrupt"),
        (cut(0.02), "is corrupt"),
        (cut(0.5), "is corrupt"),
        (cut(0.99), "is corrupt"),
    ],
)
def test_a_file_that_is_no_whole_store_is_refused_and_not_touched(
    damage, words, tmp_path, rng, shared
):
    filled(tmp_path / "a", rng, shared=shared)
    damage(tmp_path / "a", rng)
    assert_refused_untouched(tmp_path / "a", words, shared=shared)


def test_a_flipped_byte_in_any_score_is_refused(tmp_path, rng, shared):
    path = tmp_path / "a"
    *_, masks, nll = filled(path, rng, shared=shared)
    whole = path.read_bytes()
    for row in rng.choice(len(masks), 15, replace=False):
        key, value = keys(masks[row : row + 1])[0], nll[row].tobytes()
        assert whole.count(key + value) == 1
        # the last byte is the checksum's
        place = whole.index(key + value) + int(rng.integers(len(key + value) + 1))
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        assert_refused_untouched(path, "corrupt", shared=shared)


def opens(path: Path, *, shared: bool | None = None) -> bool:
    """Whether a file is taken for a store; one that is refused must stay as it is."""
    before = path.read_bytes()
    try:
        Store(path, shared=shared).close()
    except InputError:
        unchanged = path.read_bytes() == before
        assert unchanged
        return False
    return True


@pytest.mark.thorough
def test_no_flipped_byte_anywhere_makes_a_wrong_score(tmp_path, rng, shared):
    """Either the file is refused as it is, or the byte carries nothing and every score is right."""
    path = tmp_path / "a"
    windows, masks, nll = filled(path, rng, num_masks=60, shared=shared)
    whole = path.read_bytes()
    refused = 0
    for area in [(0, 4096)] * 60 + [(4096, len(whole))] * 100:
        damaged = bytearray(whole)
        damaged[rng.integers(*area)] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with Store(path, shared=shared) if opens(path, shared=shared) else nullcontext() as store:
            if store is None:
                refused += 1
                continue
            assert store.games() == {GAME.content_hash: GAME}
            if damaged[18] > 2:  # SQLite's write version: it opens such a file for reading alone
                with pytest.raises(InputError, match="cannot be written"):
                    known_nll(store, windows, masks)
                refused += 1
                continue
            assert same_bits(known_nll(store, windows, masks), nll)
            for scores in store.read_all():
                assert scores.windows.num_tokens_N.tolist() == [15] * 12
    assert refused > 10


PUT_AND_DIE = """
import os, signal, sys
import numpy as np
from lpserve.store.store import Store
from lpserve.testing.stores import GAME, drawn_windows
store = Store(sys.argv[1])
block = store.blocks_for(drawn_windows(np.random.default_rng(5), 4))[0]
store.put(store.game_id(GAME), block, np.ones((1, 12), dtype=bool), np.ones((1, 4)))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_what_a_killed_process_left_in_the_log_is_not_written_to_a_damaged_file(tmp_path, rng):
    path = tmp_path / "a"
    *_, masks, nll = filled(path, rng)
    with python(PUT_AND_DIE, path) as process:
        assert process.wait() == -signal.SIGKILL
    log = tmp_path / "a-wal"
    left = log.read_bytes()
    assert left
    row = min(range(len(masks)), key=lambda i: keys(masks)[i])  # far from what the log replaces
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(nll[row].tobytes())] ^= 1
    path.write_bytes(damaged)
    assert_refused_untouched(path, "checksum")
    assert log.read_bytes() == left
    damaged[damaged.index(nll[row].tobytes()[1:]) - 1] ^= 1
    path.write_bytes(damaged)
    with Store(path) as store:
        assert store.count() == len(masks) + 1


# -- killed writers --------------------------------------------------------------------------------

PUT_IN_A_LOOP = """
import sys
import numpy as np
from lpserve.store.store import Store
from lpserve.testing.stores import GAME, numbered_score, drawn_windows
windows = drawn_windows(np.random.default_rng(5), 4)
with Store(sys.argv[1], shared=sys.argv[2] == "True") as store:
    game, (block,) = store.game_id(GAME), store.blocks_for(windows)
    for number in range(int(sys.argv[3]), 1 << 12):
        mask, nll = numbered_score(number)
        store.put(game, block, mask, nll[:, block.rows])
        print(number, flush=True)
"""


@pytest.mark.process
def test_every_put_that_returned_survives_sigkill(tmp_path, rng, shared):
    path, done = tmp_path / "a", 0
    windows = drawn_windows(np.random.default_rng(5), 4)
    for _ in range(4):
        with python(PUT_IN_A_LOOP, path, shared, done) as process:
            assert process.stdout is not None
            for _ in range(rng.integers(1, 60)):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            lines = process.stdout.read().split("\n")
            process.wait()
        with Store(path, shared=shared) as store:
            count = store.count()
            if len(lines) > 1:
                assert count - 1 <= int(lines[-2]) + 1 <= count
            assert count > done
            done = count
            scores = [numbered_score(number) for number in range(done)]
            masks = np.concatenate([mask for mask, _ in scores])
            expected = np.concatenate([nll for _, nll in scores])
            assert same_bits(known_nll(store, windows, masks), expected)
