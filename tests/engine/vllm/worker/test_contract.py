"""The names of vLLM that lpserve relies on are there, and a change of one is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lpserve.engine.vllm.worker import contract
from lpserve.engine.vllm.worker.contract import CONTRACT, Touched, check_contract
from lpserve.errors import EngineError

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
SCRIPT = Path(__file__).parents[4] / "scripts" / "vllm_contract.py"


def test_the_installed_version_keeps_the_contract():
    check_contract()


@pytest.mark.parametrize("touched", CONTRACT, ids=lambda t: t.name)
def test_a_version_that_changed_a_name_is_refused_with_the_name(touched, monkeypatch):
    other = Touched(touched.module, f"{touched.name}Renamed")
    monkeypatch.setattr(contract, "CONTRACT", (other,))
    with pytest.raises(EngineError, match=rf"has no {touched.module}.{touched.name}Renamed"):
        check_contract()


def test_a_changed_parameter_is_named(monkeypatch):
    changed = Touched("vllm.forward_context", "set_forward_context", ("mask",))
    monkeypatch.setattr(contract, "CONTRACT", (changed,))
    with pytest.raises(EngineError, match="set_forward_context takes no 'mask'"):
        check_contract()


def read_release(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False
    )


def test_a_release_can_be_checked_by_reading_it(tmp_path):
    import vllm

    installed = Path(vllm.__file__).parent
    done = read_release(installed.parent)
    assert done.returncode == 0, done.stdout
    copied = tmp_path / "vllm"
    shutil.copytree(installed, copied, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name, old, new in (
        ("model_executor/layers/logits_processor.py", "def _gather_logits", "def _collect_logits"),
        ("forward_context.py", "skip_compiled: bool = False,\n    is_padding", "is_padding"),
        ("model_executor/layers/attention/attention.py", "self.sliding_window", "self.window"),
    ):
        path = copied / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    done = read_release(tmp_path)
    assert done.returncode == 1
    assert "LogitsProcessor has no _gather_logits" in done.stdout
    assert "set_forward_context: takes no 'skip_compiled'" in done.stdout
    assert "Attention: has no attribute 'sliding_window'" in done.stdout
