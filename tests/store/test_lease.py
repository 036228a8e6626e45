"""A store on a shared path: one writer by a lease, a rollback journal, and nothing lost by kills.

Real processes on real files. The writers beat faster than a run's do, and leases end sooner.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from lpserve.errors import InputError, StoreBusyError
from lpserve.store import lease
from lpserve.store.filesystem import filesystem_type, is_shared
from lpserve.store.lock import PathLock
from lpserve.store.store import Store
from lpserve.testing.stores import (
    GAME,
    drawn_windows,
    filled,
    known_nll,
    numbered_score,
    put_all,
    random_masks,
    random_nll,
    same_bits,
)

WRITER = """
import sys
import numpy as np
from lpserve.store import lease
from lpserve.errors import StoreBusyError
from lpserve.store.store import Store
from lpserve.testing.stores import GAME, numbered_score, drawn_windows
lease.LEASE_S, lease.BEAT_S = 5.0, 0.1
windows = drawn_windows(np.random.default_rng(5), 4)
with Store(sys.argv[1], holder="the night run", shared=True) as store:
    game, (block,) = store.game_id(GAME), store.blocks_for(windows)
    print("open", flush=True)
"""
# one score for each line that it is sent
ON_DEMAND = """
    for line in sys.stdin:
        mask, nll = numbered_score(int(line))
        try:
            print(store.put(game, block, mask, nll[:, block.rows]), flush=True)
        except StoreBusyError as error:
            print(error, flush=True)
"""
WITHOUT_END = """
    for number in range(int(sys.argv[2]), 1 << 12):
        mask, nll = numbered_score(number)
        store.put(game, block, mask, nll[:, block.rows])
        print(number, flush=True)
"""
# with so small a cache the transaction is on its way to the file before it is committed
DYING_IN_A_TRANSACTION = """
    import os, signal
    store._file.db.execute("PRAGMA cache_size = 1")
    with store._file.transaction():
        for number in range(2000):
            value = np.random.default_rng(number).bytes(400)
            row = (game, block.id, "torn", number.to_bytes(2, "little"), value, 0)
            store._file.db.execute("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?)", row)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 5.0)
    monkeypatch.setattr(lease, "BEAT_S", 0.1)


@contextmanager
def writer(path: Path, task: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A writer in a process of its own that has opened the store; killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER + task, str(path), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert out(process).readline() == "open\n"
            yield process
        finally:
            process.kill()


def out(process: subprocess.Popen[str]) -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def ask(process: subprocess.Popen[str], number: int) -> str:
    assert process.stdin is not None
    process.stdin.write(f"{number}\n")
    process.stdin.flush()
    return out(process).readline().strip()


def sql(path: Path, statement: str) -> list[tuple]:
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as db:
        return db.execute(statement).fetchall()


def check_numbered(store: Store, numbers: list[int]) -> None:
    scores = [numbered_score(number) for number in numbers]
    windows = drawn_windows(np.random.default_rng(5), 4)
    got = known_nll(store, windows, np.concatenate([mask for mask, _ in scores]))
    assert same_bits(got, np.concatenate([nll for _, nll in scores]))


# -- one writer ------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_second_writer_is_refused_in_one_line_while_the_first_lives(tmp_path):
    with writer(tmp_path / "a", ON_DEMAND) as first:
        for number in range(3):
            with pytest.raises(StoreBusyError) as error:
                Store(tmp_path / "a", shared=True)
            assert len(str(error.value).splitlines()) == 1
            assert f"in use by the night run (pid {first.pid} on " in str(error.value)
            assert "wait for it to end, or stop it" in str(error.value)
            assert ask(first, number) == "1"


@pytest.mark.process
def test_a_writer_that_sees_the_disk_as_its_own_respects_the_lease(tmp_path):
    """The host that serves a shared path sees a local filesystem there."""
    with writer(tmp_path / "a", ON_DEMAND) as first:
        with pytest.raises(StoreBusyError, match="in use by the night run"):
            Store(tmp_path / "a", shared=False)
        assert ask(first, 7) == "1"
    with Store(tmp_path / "a", shared=False) as store:
        check_numbered(store, [7])


def watched(_: float) -> None:
    pytest.fail("a dead holder's lease was watched")


@pytest.mark.process
def test_a_holder_of_this_host_that_was_killed_is_followed_at_once(tmp_path, monkeypatch):
    with writer(tmp_path / "a", ON_DEMAND) as first:
        numbers = list(range(10))
        assert [ask(first, number) for number in numbers] == ["1"] * 10
        first.send_signal(signal.SIGKILL)
        first.wait()
        monkeypatch.setattr(time, "sleep", watched)
        with Store(tmp_path / "a", shared=True) as store:
            check_numbered(store, numbers)
            assert store.count() == 10


@pytest.mark.process
def test_another_process_with_the_number_of_a_dead_holder_is_not_taken_for_it(
    tmp_path, monkeypatch
):
    with writer(tmp_path / "a", ON_DEMAND) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
    sql(tmp_path / "a", f"UPDATE lease SET pid = {os.getpid()}")
    monkeypatch.setattr(time, "sleep", watched)
    Store(tmp_path / "a", shared=True).close()


def stop_outside_a_transaction(process: subprocess.Popen[str], path: Path) -> None:
    """SIGSTOP where the process holds no lock of SQLite's, as none of another host's would last."""
    while True:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as db:
            try:
                db.execute("BEGIN EXCLUSIVE")
                return
            except sqlite3.OperationalError:
                process.send_signal(signal.SIGCONT)
                time.sleep(0.01)


@pytest.mark.process
@pytest.mark.parametrize("shared", [True, False])
def test_a_holder_elsewhere_that_stands_still_is_followed_and_then_writes_nothing(shared, tmp_path):
    path = tmp_path / "a"
    with writer(path, ON_DEMAND) as first:
        assert ask(first, 1) == "1"
        sql(path, "UPDATE lease SET host = 'elsewhere', kernel = 'another'")
        with pytest.raises(StoreBusyError, match="on elsewhere"):
            Store(path, shared=shared)
        stop_outside_a_transaction(first, path)
        with Store(path, shared=shared) as store:
            check_numbered(store, [1])
            first.send_signal(signal.SIGCONT)
            for number in (2, 3):
                words = ask(first, number)
                assert "taken over by another writer" in words
                assert "what was committed is kept: give the same command again" in words
            put_all(store, drawn_windows(np.random.default_rng(5), 4), *numbered_score(9))
            assert store.count() == 2
        assert "taken over" in ask(first, 4)  # given back is not given back to it
        with Store(path, shared=shared) as store:
            assert store.count() == 2
            check_numbered(store, [1, 9])


def test_of_two_that_found_the_lease_free_one_gets_it(tmp_path, rng):
    filled(tmp_path / "a", rng)
    leases = [lease.Lease(tmp_path / "a", holder=name) for name in ("the first", "the second")]
    with closing(sqlite3.connect(tmp_path / "a", isolation_level=None)) as db:
        for one in leases:
            one.await_free(db)
        leases[0].take(db)
        with pytest.raises(StoreBusyError, match="in use by the first"):
            leases[1].take(db)
        leases[1].release(db)
        leases[0].renew(db)
        leases[0].release(db)
        leases[1].take(db)


@pytest.mark.process
def test_of_many_that_open_a_new_store_one_gets_it(tmp_path):
    code = WRITER + "    sys.stdin.read()\n"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "a")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    opened = [out(process).readline() for process in started]
    assert sorted(opened) == ["", "", "open\n"]
    for process, line in zip(started, opened, strict=True):
        _, errors = process.communicate()
        assert process.returncode == (0 if line else 1)
        assert line or "StoreBusyError" in errors.splitlines()[-1]


# -- killed writers --------------------------------------------------------------------------------


@pytest.mark.process
def test_no_committed_score_is_lost_by_kills_at_random_moments(tmp_path, rng):
    path, done = tmp_path / "a", 0
    for _ in range(8):
        with writer(path, WITHOUT_END, done) as process:
            for _ in range(rng.integers(1, 30)):
                out(process).readline()
            time.sleep(rng.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
            lines = out(process).read().splitlines()
            process.wait()
        with Store(path, shared=True) as store:
            count = store.count()
            assert count > done
            if lines:
                assert count - 1 <= int(lines[-1]) + 1 <= count
            done = count
            check_numbered(store, list(range(done)))
        assert sql(path, "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.process
@pytest.mark.parametrize("shared", [True, False])
def test_what_a_killed_writer_had_not_committed_is_rolled_back(shared, tmp_path, rng):
    windows, masks, nll = filled(tmp_path / "a", rng, shared=True)
    with writer(tmp_path / "a", DYING_IN_A_TRANSACTION) as process:
        assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "a-journal").stat().st_size
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with Store(tmp_path / "link", shared=shared) as store:
        assert store.count() == len(masks)
        assert same_bits(known_nll(store, windows, masks), nll)


# -- beside other programs -------------------------------------------------------------------------


@pytest.mark.process
def test_a_reader_delays_a_commit_and_does_not_fail_it(tmp_path, rng):
    path = tmp_path / "a"
    _, masks, _ = filled(path, rng, shared=True)
    with writer(path, ON_DEMAND) as process:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            db.execute("BEGIN")
            assert db.execute("SELECT COUNT(*) FROM scores").fetchone() == (len(masks),)
            assert process.stdin is not None
            process.stdin.write("1\n")
            process.stdin.flush()
            time.sleep(0.5)
            assert db.execute("SELECT COUNT(*) FROM scores").fetchone() == (len(masks),)
        assert out(process).readline() == "1\n"


def test_a_reader_that_stays_is_told_of_in_one_line_and_nothing_is_lost(tmp_path, rng):
    path = tmp_path / "a"
    windows, masks, nll = filled(path, rng, shared=True)
    with Store(path, shared=True) as store:
        store._file.db.execute("PRAGMA busy_timeout = 200")
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            db.execute("BEGIN")
            db.execute("SELECT COUNT(*) FROM scores").fetchone()
            with pytest.raises(StoreBusyError, match="locked by another program") as error:
                put_all(store, windows, random_masks(rng, 9), random_nll(rng, 9, 12))
            assert len(str(error.value).splitlines()) == 1
        assert store.count() == len(masks)
        assert put_all(store, windows, masks, -nll) == 0
        assert same_bits(known_nll(store, windows, masks), nll)


# -- both ways of keeping a store ------------------------------------------------------------------


def test_a_store_changes_its_journal_with_the_place_it_is_opened_at(tmp_path, rng):
    path = tmp_path / "a"
    windows, masks, nll = filled(path, rng)
    order = [bool(shared) for shared in rng.permutation([True, True, False, False])]
    for shared in [True, *order]:
        with Store(path, shared=shared) as store:
            journal = store._file.db.execute("PRAGMA journal_mode").fetchone()
            synchronous = store._file.db.execute("PRAGMA synchronous").fetchone()
            assert (journal, synchronous) == ((("delete",), (3,)) if shared else (("wal",), (2,)))
            assert (tmp_path / "a-wal").exists() is not shared
            assert same_bits(known_nll(store, windows, masks), nll)
    assert sql(path, "SELECT token FROM lease") == [(None,)]


def test_a_store_copied_with_its_log_is_whole_on_a_shared_path(tmp_path, rng):
    windows, masks, nll = drawn_windows(rng, 6), random_masks(rng, 30), random_nll(rng, 30, 6)
    with Store(tmp_path / "a", shared=False) as store:
        put_all(store, windows, masks, nll)
        for end in ("", "-wal"):
            shutil.copyfile(tmp_path / f"a{end}", tmp_path / f"b{end}")
    with Store(tmp_path / "b", shared=True) as store:
        assert not (tmp_path / "b-wal").exists()
        assert store.count() == 30
        assert same_bits(known_nll(store, windows, masks), nll)


def test_a_store_of_another_way_that_is_in_use_stays_as_it_is(tmp_path, rng):
    path = tmp_path / "a"
    windows, masks, nll = filled(path, rng)
    with Store(path, shared=False) as store:
        with pytest.raises(StoreBusyError, match="locked by another program") as error:
            Store(path, shared=True)
        assert len(str(error.value).splitlines()) == 1
        assert put_all(store, windows, masks, -nll) == 0
        assert same_bits(known_nll(store, windows, masks), nll)


# -- filesystems -----------------------------------------------------------------------------------

MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 27 0:40 / /home rw - autofs auto.home rw
31 30 0:41 / /home/ann rw shared:7 - nfs4 server:/ann rw,vers=4.2
32 31 0:42 / /home/ann/scratch rw - lustre 10.0.0.1@tcp:/scratch rw
33 27 0:43 / /mnt/two\040words rw - fuse.sshfs host:/ rw
34 27 0:44 / /mnt/old rw - ext4 /dev/vdb rw
35 34 0:45 / /mnt/old/deep rw - nfs server:/deep rw
36 34 0:46 / /mnt/old rw - tmpfs tmpfs rw
37 27 0:47 /sub/dir /data rw master:1 propagate_from:2 - xfs /dev/vdc rw
38 37 0:48 / /data/back\134slash rw - beegfs beegfs_nodev rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/etc/a", "ext4"),
        ("/proc/self", "proc"),
        ("/home", "autofs"),
        ("/home/ann", "nfs4"),
        ("/home/ann/a", "nfs4"),
        ("/home/anna/a", "autofs"),
        ("/home/ann/scratch/run/a", "lustre"),
        ("/mnt/two words/a", "fuse.sshfs"),
        ("/mnt/two", "ext4"),
        ("/mnt/old/a", "tmpfs"),
        ("/mnt/old/deep/a", "tmpfs"),  # the later mount on /mnt/old has covered it
        ("/data/a", "xfs"),
        ("/data/back\\slash/a", "beegfs"),
    ],
)
def test_a_path_is_on_the_mount_that_holds_it(path, kind, rng):
    lines = MOUNTINFO.splitlines()
    assert filesystem_type(MOUNTINFO, path) == kind
    assert filesystem_type("\n".join(rng.permutation(lines)), path) == kind


def test_no_mount_no_type():
    assert filesystem_type("", "/a") is None


def test_a_path_that_this_host_alone_has_is_local_and_a_kernel_interface_is_not(tmp_path):
    with Path("/proc/self/mountinfo").open() as file:
        kind = filesystem_type(file.read(), os.path.realpath(tmp_path))
    if kind not in ("ext4", "xfs", "btrfs", "tmpfs", "overlay"):
        pytest.skip(f"temporary files lie on {kind} here")
    assert not is_shared(tmp_path / "a")
    assert is_shared(Path("/proc/self/a"))
    with Store(tmp_path / "a") as store:
        assert store._file.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_the_lease_guards_the_store(number, tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = PathLock(tmp_path / "run", holder="a run")
    assert not lock.held
    lock.release()
    with Store(tmp_path / "a", shared=False) as store:
        assert store.game_id(GAME)
        with pytest.raises(StoreBusyError, match="in use by an lpserve process"):
            Store(tmp_path / "a", shared=False)


def test_a_lock_that_fails_otherwise_is_an_error_of_one_line(tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(InputError, match="cannot be locked") as error:
        PathLock(tmp_path / "run", holder="a run")
    assert len(str(error.value).splitlines()) == 1
