"""File calls that fail at every turn: one line, nothing half written, and the same command goes on.

`faults.c` is preloaded into a process of its own, in which commands run one after the other; the
n-th call that touches the command's folder fails as on a full disk, a device that fails, a folder
that became read-only or another's, or a quota that is used up. Whatever n is, the command ends with
exit code 1 or 2 and one line (or 0, where it can do without), no file under its final name is
another than that of a run without faults, and the same command without the fault then gives what
such a run gives.

The gate tries one n of two commands; with LPSERVE_FRESH_STATISTICS=1 many more.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]

ALL = os.environ.get("LPSERVE_FRESH_STATISTICS") == "1"
TRIES = int(os.environ.get("LPSERVE_FAULT_TRIES", 8 if ALL else 1))
"""Of each command and kind of fault."""
FAULTS = {
    "ENOSPC": 0,
    "EDQUOT": 0,
    "EROFS": 0,
    "EACCES": 0,
    "EIO": 1,
    "EIO, reading": 1,
    "EACCES, reading": 1,
}
"""Fault -> how often it happens from the n-th call on; 0: always."""
WHOLE = {
    "run": ["plan.json", "shapley.csv", "interactions.csv"],
    "resume": ["plan.json", "shapley.csv", "interactions.csv"],
    "plan": ["p.json"],
    "export": ["model.safetensors", "config.json"],
    "eval": ["results.csv"],
    "sweep": ["plan.json", "shapley.csv"],  # of its points; its tables tell failed ones too
    "baselines": ["results.csv"],
    "exhaustive": ["000000.parquet", "game.json"],
    "scores": ["s.csv"],
}
"""Command -> files that have the same content every time, or do not exist."""
QUICK = ("export", "scores")
"""Commands that the gate tries; the others take minutes."""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """`faults.c`, compiled."""
    target = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(target), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model with a tokenizer, texts, and a finished run."""
    import transformers

    from lpserve.cli.entry import main
    from lpserve.demo import FOLDER
    from lpserve.testing.checkpoints import TEXT

    folder = tmp_path_factory.mktemp("base")
    config = transformers.LlamaConfig(**{**TEXT, "vocab_size": 8192})
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    for path in (FOLDER / "model").glob("*token*"):
        shutil.copy(path, folder / "model")
    for name in ("calibration", "heldout"):
        text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
        (folder / f"{name}.txt").write_text(text[:20_000], encoding="utf-8")
    (folder / "work").mkdir()
    assert main(arguments("run", folder, folder / "work")) == 0
    (folder / "work" / "run").rename(folder / "run")
    return folder


def arguments(command: str, base: Path, work: Path) -> list[str]:
    """The command line that works in the folder `work`."""
    model = ["--model", f"{base}/model"]
    texts = ["--calibration", f"{base}/calibration.txt", "--heldout", f"{base}/heldout.txt"]
    windows = [*texts, "--num-windows", "3", "--heldout-windows", "3", "--length", "16"]
    small = ["--budget", "12", "--max-removed", "2"]
    held = ["--text", f"{base}/heldout.txt", "--length", "16"]
    rivals = ["--rivals", "greedy,random"]

    def out(name: str) -> list[str]:
        return ["--out", f"{work}/{name}"]

    if command in ("run", "resume"):
        return ["run", *model, *windows, *small, *out("run")]
    return {
        "plan": ["plan", f"{work}/run", *out("p.json")],
        "export": ["export", f"{work}/run", "--remove", "1", "--no-verify", *out("pruned")],
        "eval": ["eval", *model, *held, "--removed", "1", *out("eval")],
        "sweep": ["sweep", f"{work}/study.toml"],
        "baselines": ["baselines", *model, *windows, *small, *rivals, *out("baselines")],
        "exhaustive": ["exhaustive", *model, *windows, "--max-removed", "2", *out("game")],
        "scores": ["scores", f"{work}/run", *out("s.csv")],
    }[command]


def prepare(command: str, base: Path, work: Path) -> None:
    """The folder `work` as the command finds it."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    if command in ("resume", "plan", "export", "scores"):
        shutil.copytree(base / "run", work / "run")
    if command == "resume":
        (work / "run" / "plan.json").unlink()
    if command == "sweep":
        (work / "study.toml").write_text(
            f'model = "{base}/model"\ncalibration = "{base}/calibration.txt"\n'
            f'heldout = "{base}/heldout.txt"\nnum_windows = 3\nheldout_windows = 3\nlength = 16\n'
            f'budget = 12\nmax_removed = 2\nout = "{work}/study"\n[sweep]\nseed = [0, 1]\n'
        )


def contents(command: str, work: Path) -> dict[str, bytes]:
    """The files of `WHOLE` that exist."""
    found = {}
    for path in sorted(work.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(work).parts)
        if path.name in WHOLE[command] and not hidden:
            found[str(path.relative_to(work))] = path.read_bytes()
    return found


@pytest.mark.parametrize(
    "command",
    [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in WHOLE],
)
def test_whatever_fails_the_command_says_so_and_goes_on(command, library, base, tmp_path, request):
    child = subprocess.run(
        [sys.executable, __file__, command, str(base), str(tmp_path / "work"), str(library)],
        env={**os.environ, "LD_PRELOAD": str(library), "TRIES": str(TRIES)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    tried = json.loads(child.stdout.splitlines()[-1])
    assert tried["problems"] == []
    assert tried["failed"] > 0
    request.config.get_terminal_writer().line(
        f"{command}: {tried['tries']} faults, {tried['failed']} refused, the others done without"
    )


def tried_all(command: str, base: Path, work: Path, library: str) -> dict[str, Any]:
    """Runs the command with faults; what went wrong, and how many tries there were."""
    faults = ctypes.CDLL(library)
    problems: list[str] = []
    prepare(command, base, work)
    assert run(command, base, work)[0] == 0
    expected = contents(command, work)
    assert expected
    tries = failed = 0
    for fault, times in FAULTS.items():
        number, reads = getattr(errno, fault.partition(",")[0]), "reading" in fault
        below = str(work).encode()
        prepare(command, base, work)
        faults.fault_arm(0, number, times, reads, below)
        run(command, base, work)
        total = faults.fault_calls()
        for n in np.unique(np.linspace(1, total, int(os.environ["TRIES"])).astype(int)).tolist():
            prepare(command, base, work)
            faults.fault_arm(n, number, times, reads, below)
            code, text = run(command, base, work)
            faults.fault_disarm()
            tries, failed = tries + 1, failed + (code != 0)
            where = f"{command}, {fault} at {n} of {total}"
            lines = [line for line in text.splitlines() if line.startswith("lpserve:")]
            if code not in (0, 1, 2) or (code and len(lines) != 1) or "unexpected" in text:
                problems.append(f"{where}: exit code {code}: {text[-800:]}")
            other = [k for k, v in contents(command, work).items() if expected.get(k) != v]
            if other:
                problems.append(f"{where}: half written: {other}")
            if code:
                code, text = run(command, base, work)
            if code or contents(command, work) != expected:
                problems.append(f"{where}: afterwards exit code {code}: {text[-800:]}")
    return {"command": command, "tries": tries, "failed": failed, "problems": problems}


def run(command: str, base: Path, work: Path) -> tuple[int, str]:
    """A command line in this process: its exit code and what it says on standard error."""
    from lpserve.cli.entry import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments(command, base, work))
    return code, errors.getvalue()


if __name__ == "__main__":
    which, *folders, compiled = sys.argv[1:]
    result = tried_all(which, *map(Path, folders), library=compiled)  # pyright: ignore
    sys.stdout.write(json.dumps(result) + "\n")
