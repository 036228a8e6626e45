"""Result files on a disk that fills: one line of error, the old file kept, no temporary left.

The disk is full by RLIMIT_FSIZE in a process of its own: the system itself refuses the write
(EFBIG), at a byte of our choice. A tmpfs that fills is tested with the store.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from lpserve.errors import DiskFullError, InputError
from lpserve.store.files import make_folder, write_npz, write_text, write_whole
from lpserve.store.run_folder import RunFolder

WRITE_WITH_LIMIT = """
import resource, sys
from pathlib import Path
import numpy as np
from lpserve.errors import DiskFullError
from lpserve.store.files import write_npz, write_text
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    if path.suffix == ".npz":
        write_npz(path, {"a": np.random.default_rng(0).random(4000), "b": np.zeros(3)})
    else:
        write_text(path, "set,removed\\n" * 1000)
except DiskFullError as error:
    print(error)
"""

COMMAND_WITH_LIMIT = """
import resource, sys
import numpy as np
from lpserve.cli import main

save, calls = np.savez_compressed, []

def save_on_a_full_disk(file, **arrays):
    calls.append(file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if len(calls) == int(sys.argv[1]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        save(file, **arrays)
        file.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

np.savez_compressed = save_on_a_full_disk
sys.exit(main(sys.argv[2:]))
"""

PLAN_WITH_LIMIT = """
import resource, sys
from lpserve.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
sys.exit(main(sys.argv[1:]))
"""


def python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
    )


@pytest.fixture
def run_command(tmp_path, rng) -> list[str]:
    """`lpserve run` over a known game of eight players."""
    for name in ("calibration", "heldout"):
        np.savez(tmp_path / f"{name}.npz", tokens=rng.integers(0, 50_000, (4, 40)))
    (tmp_path / "run.toml").write_text(
        f'model = "synthetic"\nengine = "synthetic"\ncalibration = "{tmp_path}/calibration.npz"\n'
        f'heldout = "{tmp_path}/heldout.npz"\nbudget = 60\nmax_removed = 4\nprogress_s = 100.0\n'
        f'out = "{tmp_path}/run"\n[engine_options]\nnum_players = 8\n'
    )
    return ["run", "--config", str(tmp_path / "run.toml")]


@pytest.mark.parametrize("name", ["results.csv", "windows.npz"])
def test_a_full_disk_leaves_the_old_file_and_no_temporary(name, tmp_path):
    path = tmp_path / name
    path.write_text("an earlier one")
    done = python(WRITE_WITH_LIMIT, path)
    assert done.stderr == ""
    assert done.stdout == (
        f"no space to write {path}; scores are kept: free space and give the same command again\n"
    )
    assert path.read_text() == "an earlier one"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.thorough
@pytest.mark.parametrize(("call", "name"), [(1, "windows.npz"), (2, "scores.npz")])
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_later(call, name, run_command, tmp_path):
    done = python(COMMAND_WITH_LIMIT, call, *run_command)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"lpserve: no space to write {tmp_path / 'run' / name}; ")
    assert not [p.name for p in (tmp_path / "run").iterdir() if p.name.endswith(".tmp")]
    assert not (tmp_path / "run" / name).exists()
    assert python("from lpserve.cli import main; import sys; main(sys.argv[1:])", *run_command)
    assert (tmp_path / "run" / "plan.json").exists()

    path = tmp_path / "plan.json"
    done = python(PLAN_WITH_LIMIT, "plan", tmp_path / "run", "--out", path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"lpserve: no space to write {path}; ")
    assert len(done.stderr.splitlines()) == 1
    assert not path.exists()


def test_files_are_written_as_they_are_and_read_back(tmp_path):
    write_text(tmp_path / "a.txt", "café\r\n")
    assert (tmp_path / "a.txt").read_bytes() == b"caf\xc3\xa9\r\n"
    write_npz(tmp_path / "a.npz", {"x": np.arange(3), "s": np.array("text")})
    with np.load(tmp_path / "a.npz") as data:
        assert data["x"].tolist() == [0, 1, 2]
        assert str(data["s"]) == "text"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.txt"]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    def fails(file):
        file.write(b"half of it")
        raise KeyError("a defect of the writer")

    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyError):
        write_whole(tmp_path / "a", fails)
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing" / "a.txt"):
        with pytest.raises(InputError, match="cannot be written") as error:
            write_text(path, "text")
        assert not isinstance(error.value, DiskFullError)
        assert str(path) in str(error.value)


def test_a_link_and_a_pipe_are_written_in_place(tmp_path):
    """`--out /dev/stdout` must not replace the device."""
    write_text(tmp_path / "real", "old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    write_text(pipe, "through the pipe")
    assert reader.communicate(timeout=30)[0] == "through the pipe"
    assert pipe.is_fifo()


def test_links_at_the_names_of_our_files_are_not_followed(tmp_path):
    """In a folder that others can write, a link could lead what we write to any place."""
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".plan.json.tmp").symlink_to(outside)
    write_text(folder / "plan.json", "ours")
    assert (folder / "plan.json").read_text() == "ours"
    assert not (folder / "plan.json").is_symlink()
    for name in ("events.jsonl", "run.lock"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside)
        with (
            pytest.raises(InputError, match=rf"{name}.*a link, which is not followed"),
            closing(RunFolder(folder)) as run,
        ):
            run.event("begun")
        (folder / name).unlink()
    assert outside.read_text() == "theirs"


@pytest.mark.parametrize("name", ["f" * 300, "file/below", "nul/../file/below"])
def test_folders_that_cannot_be_made_are_one_line(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^results folder .* cannot be made: [^\n]*$"):
        make_folder(tmp_path / name, "results folder")
    with pytest.raises(InputError, match="cannot be made: "):
        make_folder(tmp_path / "file", "results folder")
