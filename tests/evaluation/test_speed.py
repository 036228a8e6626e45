"""Checkpoints measured in use: what is told is what ran. Timings are not asserted."""

from __future__ import annotations

import pytest

import lpserve
from lpserve.cli.entry import main
from lpserve.demo import FOLDER
from lpserve.errors import EngineError, InputError
from lpserve.evaluation.speed import SpeedConfig, measure, table
from lpserve.model.checkpoint import read_checkpoint
from lpserve.testing.parity import NUM_LAYERS

SHORT = {"dtype": "float32", "prompt_tokens": 8, "new_tokens": 3, "batch": 2, "repeats": 1}


@pytest.mark.process
@pytest.mark.parametrize(
    "engines",
    [
        ("transformers",),
        pytest.param(("transformers", "vllm"), marks=[pytest.mark.slow, pytest.mark.vllm]),
    ],
)
def test_dense_and_pruned_side_by_side(engines, model_dir, tmp_path):
    dense, pruned = model_dir("llama"), tmp_path / "pruned"
    lpserve.export_checkpoint(dense, removed=[1, 4], out=pruned)
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 4 << 20}
    config = SpeedConfig(
        models=(str(dense), str(pruned)),
        engines=engines,
        vllm_options=options,
        **SHORT,
    )
    speeds = measure(config)
    told = [(s.engine, s.model, s.num_layers) for s in speeds]
    models = [(str(dense), NUM_LAYERS), (str(pruned), NUM_LAYERS - 2)]
    assert told == [(engine, model, layers) for engine in engines for model, layers in models]
    for s in speeds:
        entries = read_checkpoint(s.model).tensors
        assert s.weight_bytes == sum(entry.num_bytes for entry in entries)
        assert s.first_token_s > 0
        low, high = s.batch_tokens_per_s_range
        assert 0 < low <= s.batch_tokens_per_s <= high
        assert s.peak_bytes > s.weight_bytes / 2  # the process holds them
    assert speeds[1].weight_bytes < speeds[0].weight_bytes
    lines = table(speeds)
    assert len(lines) == 2 + 2 * len(engines)
    assert lines[2].endswith("| 1.00 x / 1.00 x / 1.00 x |")


@pytest.mark.vllm
@pytest.mark.process
@pytest.mark.slow
def test_memory_is_that_of_all_ranks(model_dir, monkeypatch):
    """Every rank is a process that holds torch and vLLM: two ranks and who asks them take at least
    half as much again as one process."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"enforce_eager": True, "kv_cache_memory_bytes": 4 << 20}
    held = []
    for more in ({}, {"tensor_parallel_size": 2}):
        config = SpeedConfig(
            models=(str(model_dir("llama")),),
            engines=("vllm",),
            vllm_options=options | more,
            **SHORT,
        )
        held.append(measure(config)[0].peak_bytes)
    alone, ranks = held
    assert ranks > 1.5 * alone


@pytest.mark.vllm
@pytest.mark.process
@pytest.mark.slow  # a start of vLLM
def test_an_engine_that_fails_is_told_in_one_line(model_dir):
    config = SpeedConfig(
        models=(str(model_dir("llama")),), engines=("vllm",), vllm_options={"no_such": 1}, **SHORT
    )
    with pytest.raises(EngineError, match=r"cannot be measured with vllm: .*no_such") as caught:
        measure(config)
    assert "\n" not in str(caught.value)


def test_vllm_is_not_told_to_leave_a_gpu_alone(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = SpeedConfig(models=(str(FOLDER / "model"),), engines=("vllm",), device="cpu")
    with pytest.raises(InputError, match="leave --device out"):
        measure(config)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--engines", "tgi"], "engines must be of transformers, vllm"),
        (["--dtype", "int8"], "dtype must be of float32"),
        (["--device", "tpu"], "device must be of auto, cpu"),
        (["--batch", "0"], "batch must be a whole number above 0"),
        (["--new-tokens", "500"], "has 512 positions (max_position_embeddings)"),
        (["/no/model"], "'/no/model' "),
    ],
)
def test_bad_input_is_one_line_before_anything_loads(flags, reason, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr("lpserve.evaluation.speed.subprocess.run", refuse)
    assert main(["speed", str(FOLDER / "model"), *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert reason in lines[0]
