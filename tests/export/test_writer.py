"""What is written of a checkpoint, where it goes, and what stands in its way.

A full disk is one line of error, and nothing is left. RLIMIT_FSIZE makes it, in a process of its
own: the system itself refuses the write.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lpserve.errors import InputError
from lpserve.export.export import export_checkpoint

EXPORT_WITH_LIMIT = """
import resource, sys
from lpserve.errors import DiskFullError
from lpserve.export.export import export_checkpoint
limit = int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    export_checkpoint(sys.argv[1], [1, 4], sys.argv[2], verify=False)
except DiskFullError as error:
    print(error)
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("limit", "name"), [(5_000, ".pruned.partial"), (100_000, "model.safetensors")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(limit, name, model_dir, tmp_path):
    """At a tokenizer of 10 kB, and in the middle of a shard of some 700 kB."""
    model = shutil.copytree(model_dir("llama"), tmp_path / "model")
    (model / "tokenizer.json").write_text("x" * 10_000)
    target = tmp_path / "pruned"
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_WITH_LIMIT, model, target, str(limit)],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith("no space to write ")
    assert line.endswith("free space and give the same command again")
    assert name in line.partition(";")[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_in_the_way_of_the_partial_folder_is_refused(kind, model_dir, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    partial = tmp_path / ".out.partial"
    partial.symlink_to(elsewhere) if kind == "link" else partial.touch()
    with pytest.raises(InputError, match=r"\.out\.partial is in the way: remove it"):
        export_checkpoint(model_dir("llama"), [1], tmp_path / "out", verify=False)
    assert (elsewhere / "kept").exists()


def test_the_current_folder_is_a_target_like_any_other(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".lpserve-partial").mkdir()  # left by an export that was killed
    removed: Any = np.array([1, 4])
    report = export_checkpoint(model_dir("llama"), removed, ".", verify=False)
    assert report.removed == [1, 4]
    assert not (tmp_path / ".lpserve-partial").exists()
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["file/out", "x" * 300])
def test_targets_that_cannot_be_made_are_one_line(name, model_dir, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        export_checkpoint(model_dir("llama"), [1], tmp_path / name, verify=False)
    assert "\n" not in str(caught.value)


def test_layers_that_predict_further_tokens_stay_behind_and_that_is_told(model_dir, tmp_path):
    model = shutil.copytree(model_dir("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors |= {k.replace(".5.", ".6."): v for k, v in tensors.items() if ".layers.5." in k}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    report = export_checkpoint(model, [0], tmp_path / "out", verify=False)
    assert report.left_behind == ["9 tensors of layers that predict further tokens"]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0
    assert not any(".layers.5." in name for name in load_file(tmp_path / "out/model.safetensors"))


def test_only_what_is_about_the_pruned_model_goes_along(model_dir, tmp_path):
    model = shutil.copytree(model_dir("llama"), tmp_path / "model")
    for name in ("tokenizer.json", "LICENSE", "generation_config.json", "chat_template.jinja"):
        (model / name).write_text("{}")
    (model / "README.md").write_text("the dense model's figures")
    (model / "trainer_state.json").write_text("{}")
    (model / "model.onnx").write_text("")
    (model / "quantize_config.json").write_text('{"dynamic": {"-:.*layers\\\\.2\\\\..*": {}}}')
    report = export_checkpoint(model, [0], tmp_path / "out", verify=False)
    assert report.left_behind == ["model.onnx", "trainer_state.json"]
    assert "NOT" not in (card := (tmp_path / "out" / "README.md").read_text())
    assert "without 1 of 6 layers" in card
    assert "**Not verified**" in card
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert all("layers\\.1\\." in pattern for pattern in settings["dynamic"])
    assert {"tokenizer.json", "LICENSE", "generation_config.json", "chat_template.jinja"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
