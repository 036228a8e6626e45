"""What nobody expected ends in one line too: what it was, and where its traceback is."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import lpserve
from lpserve.cli import entry


def told(monkeypatch, capsys, error: BaseException) -> tuple[int, str]:
    """Exit code and standard error of a command that fails with `error`."""

    def fail(_: argparse.Namespace) -> int:
        raise error

    def add_command(commands: Any) -> None:
        commands.add_parser("fail").set_defaults(run=fail)

    monkeypatch.setattr(entry, "COMMANDS", (add_command,))
    code = entry.main(["fail"])
    return code, capsys.readouterr().err


def test_an_unexpected_exception_is_a_line_and_a_file_of_its_traceback(monkeypatch, capsys):
    error = ZeroDivisionError("of http://anna:hunter2@host/x\nand more")
    code, line = told(monkeypatch, capsys, error)
    assert code == 1
    assert line.count("\n") == 1
    assert "unexpected ZeroDivisionError: of http://***@host/x; " in line
    assert "please report it" in line
    (name,) = re.findall(r"in (\S+\.log)$", line.strip())
    log = Path(name)
    text = log.read_text()
    assert "Traceback" in text
    assert "and more" in text
    assert "hunter2" not in text
    assert log.stat().st_mode & 0o077 == 0
    log.unlink()


def test_where_no_file_can_be_written_the_traceback_follows(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    code, text = told(monkeypatch, capsys, KeyError("players"))
    assert code == 1
    assert text.startswith("lpserve: unexpected KeyError: 'players'; ")
    assert "Traceback" in text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "lpserve: /x/y: Permission denied\n"),
        (OSError(5, "Input/output error"), "lpserve: Input/output error\n"),
        (OSError("nothing more is known"), "lpserve: nothing more is known\n"),
        (BrokenPipeError(32, "Broken pipe"), "lpserve: Broken pipe\n"),  # another than stdout
    ],
)
def test_what_the_machine_refuses_is_one_line(error, line, monkeypatch, capsys):
    assert told(monkeypatch, capsys, error) == (1, line)


@pytest.mark.process
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_the_command_quietly(unbuffered, tmp_path, texts):
    """`lpserve plan RUN | head -1`"""
    from lpserve.testing.runs import make_config

    folder = lpserve.run(make_config(tmp_path, texts)).folder
    with subprocess.Popen(
        [sys.executable, "-m", "lpserve", "plan", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_public_names_are_offered_by_completion():
    assert {"run", "TokenWindows", "shapley_values", "__version__"} <= set(dir(lpserve))


@pytest.mark.process
def test_a_signal_while_the_engine_cannot_be_stopped_ends_with_its_code(tmp_path):
    """The grace time is over before the unit at work: its thread is inside torch when Python would
    take it down."""
    heavy = ["--num-windows", "200", "--length", "256", "--heldout-windows", "1"]
    quick = ["--grace-s", "0.1", "--progress-s", "0.1", "--out", str(tmp_path / "run")]
    child = subprocess.Popen(
        [sys.executable, "-m", "lpserve", "run", "--demo", *heavy, *quick],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("scoring"):
            break
    time.sleep(0.5)  # into the unit, which takes many seconds
    child.send_signal(signal.SIGINT)
    _, told_last = child.communicate()
    assert child.returncode == 130, told_last
    assert told_last.splitlines()[-1].startswith("lpserve: interrupted; ")
