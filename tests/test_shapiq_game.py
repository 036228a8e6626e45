"""The shapiq game's cases, in a process of their own.

shapiq loads llvmlite, and vLLM 0.32 cannot start in a process where that is loaded: it looks
through the attributes of every loaded module, and llvmlite's library answers to any name.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

CASES = Path(__file__).with_name("shapiq_game_cases.py")


def test_the_cases_pass_in_a_process_of_their_own():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=CASES.parents[1]
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
