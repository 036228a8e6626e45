"""A disk that fills while a checkpoint is written: one line of error, and nothing is left.

The disk is full by RLIMIT_FSIZE in a process of its own: the system itself refuses the write.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

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
