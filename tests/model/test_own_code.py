"""Code in a checkpoint's folder never runs, whatever standard input says."""

from __future__ import annotations

import ast
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import lpserve
from lpserve.cli.entry import main
from lpserve.data.tokenizer import load_tokenizer
from lpserve.errors import InputError
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.own_code import check_own_code

CODE = """
from pathlib import Path
Path({marker!r}).write_text("the code ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def agreeing(monkeypatch) -> None:
    """Whoever asks on standard input is told yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def own_model(tmp_path, model_dir, marker, agreeing) -> Path:
    """A Llama that only its own code can build."""
    folder = shutil.copytree(model_dir("llama"), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "auto_map": auto_map, "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder


@pytest.mark.parametrize("command", ["run", "eval", "baselines", "speed"])
def test_a_model_that_needs_its_own_code_is_refused_in_one_line(
    command, own_model, marker, tmp_path, capsys, rng
):
    windows = tmp_path / "windows.npz"
    np.savez(windows, tokens=rng.integers(0, 97, (4, 20)))
    text, out = ["--calibration", str(windows)], ["--out", str(tmp_path / "out")]
    model = ["--model", str(own_model)]
    arguments = {
        "run": [*model, *text, "--heldout", str(windows), *out],
        "eval": [*model, "--text", str(windows), *out],
        "baselines": [*model, *text, *out],
        "speed": [str(own_model)],
    }[command]
    assert main([command, *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert "needs Python code of its own (auto_map in config.json)" in told, told
    assert "'own'" in told
    assert "\n" not in told
    assert not marker.exists()


def test_python_users_are_refused_alike(own_model, marker, tmp_path):
    with pytest.raises(InputError, match="needs Python code of its own"):
        lpserve.export_checkpoint(own_model, removed=[1], out=tmp_path / "out")
    assert not marker.exists()


def test_a_model_that_transformers_knows_is_built_by_its_code(own_model, marker, rng):
    config = json.loads((own_model / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (own_model / "config.json").write_text(json.dumps(config))
    check_own_code(read_checkpoint(own_model))
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 97, (2, 20)))
    with lpserve.open_engine(own_model, windows) as engine:
        assert engine.info.num_players == 6
    assert not marker.exists()


def test_a_tokenizer_that_needs_its_own_code_is_refused(tmp_path, marker, agreeing):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    about = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    with pytest.raises(InputError, match="needs Python code of its own, which is never run"):
        load_tokenizer(folder)
    assert not marker.exists()


def test_every_from_pretrained_says_that_no_code_is_run():
    package = Path(lpserve.__file__).parent
    calls = [
        (path, node)
        for path in package.rglob("*.py")
        if path.parent.name != "testing"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
    ]
    assert len(calls) >= 7
    for path, node in calls:
        said = {keyword.arg or ast.unparse(keyword.value) for keyword in node.keywords}
        assert {"trust_remote_code", "local_files_only"} <= said or "FROM_FOLDER" in said, path
