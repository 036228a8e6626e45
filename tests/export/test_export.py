"""Exported checkpoints: stock transformers loads them and they score what the skip engine scores.

Tolerance 1e-5 relative on a window's summed NLL in float32 (see test_hf_parity).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import lpserve
from lpserve.errors import ExportError, InputError
from lpserve.export.export import export_checkpoint
from lpserve.export.pruned_config import prune_config
from lpserve.export.quantization import Renumbering
from lpserve.export.verify import reload_checkpoint
from lpserve.model.checkpoint import read_checkpoint
from lpserve.testing.reference import (
    FAMILIES,
    reference_model,
    relative,
    save_model,
    slow_but,
    small_config,
    window_nll,
)


@pytest.mark.process
@pytest.mark.parametrize("family", slow_but(FAMILIES, "gpt2", "gemma2"))
def test_the_export_scores_what_the_skip_engine_scores(family, model_dir, rng, tmp_path):
    path = model_dir(family)
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 97, (3, 40)))
    removed = sorted(rng.choice(6, 2, replace=False).tolist())
    report = export_checkpoint(path, removed, tmp_path / "out", windows=windows)
    assert report.verified
    assert report.removed == removed
    assert report.worst_relative_difference is not None
    assert report.worst_relative_difference < 1e-5
    mask = np.ones((1, 6), dtype=bool)
    mask[0, removed] = False
    with lpserve.open_engine(path, windows) as engine:
        expected = engine.score(mask).nll_MN[0]
    model = reference_model(tmp_path / "out")
    assert model.config.num_hidden_layers == 4
    got = window_nll(model, windows.tokens_NT, windows.scored_NT)
    assert relative(got, expected) < 1e-5


@pytest.mark.process
def test_a_wrong_export_is_refused_and_leaves_nothing(model_dir, rng, tmp_path, monkeypatch):
    plain = Renumbering.new_name

    def swapped(self, name):  # the tensors of two layers change places
        renamed = plain(self, name)
        return renamed and renamed.replace(".0.", ".X.").replace(".1.", ".0.").replace(".X.", ".1.")

    monkeypatch.setattr(Renumbering, "new_name", swapped)
    with pytest.raises(ExportError, match="off the skip engine"):
        export_checkpoint(model_dir("llama"), [3], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_verification_the_report_says_so(model_dir, tmp_path):
    report = export_checkpoint(model_dir("llama"), [3], tmp_path / "out", verify=False)
    assert not report.verified
    assert json.loads((tmp_path / "out" / "lpserve_export.json").read_text())["verified"] is False


@pytest.mark.parametrize("removed", [[], [6], [-1], [2, 2], list(range(6))])
def test_layers_out_of_range_are_refused(model_dir, tmp_path, removed):
    with pytest.raises(InputError, match="layer"):
        export_checkpoint(model_dir("llama"), removed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_per_layer_config_fields_are_cut_and_others_left_alone(model_dir, tmp_path):
    checkpoint = read_checkpoint(model_dir("gemma2"))
    types = checkpoint.config["layer_types"]
    checkpoint.config["some_list"] = [1, 2, 3, 4, 5, 6]
    pruned = prune_config(checkpoint, [1, 4])
    assert pruned.config["num_hidden_layers"] == 4
    assert pruned.config["layer_types"] == [types[i] for i in (0, 2, 3, 5)]
    assert pruned.config["some_list"] == [1, 2, 3, 4, 5, 6]


def test_gpt2_names_its_depth_n_layer(model_dir):
    pruned = prune_config(read_checkpoint(model_dir("gpt2")), [0])
    assert pruned.config["n_layer"] == 5
    assert "num_hidden_layers" not in pruned.config or pruned.config["num_hidden_layers"] == 5


def test_layers_that_scale_by_position_are_refused(model_dir):
    checkpoint = read_checkpoint(model_dir("gpt2"))
    checkpoint.config["scale_attn_by_inverse_layer_idx"] = True
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx"):
        prune_config(checkpoint, [0])


def moe_model(path: Path, **changes: Any) -> Path:
    import transformers as tf

    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 97,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
    }
    return save_model(tf.Qwen3MoeConfig(**values, **changes), path, 0)


@pytest.mark.process
def test_leading_layers_and_index_lists_follow_the_kept_layers(tmp_path):
    path = moe_model(tmp_path / "moe", mlp_only_layers=[0, 4], decoder_sparse_step=1)
    pruned = prune_config(read_checkpoint(path), [0, 2])
    assert pruned.config["mlp_only_layers"] == [2]
    report = export_checkpoint(path, [0, 2], tmp_path / "out")
    assert report.verified


@pytest.mark.process
def test_experts_in_every_second_layer_are_written_out(tmp_path):
    path = moe_model(tmp_path / "moe", decoder_sparse_step=2)
    assert export_checkpoint(path, [0, 3], tmp_path / "out").verified
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [1, 2])


def test_mergekit_slices_hold_the_kept_layers(model_dir, tmp_path):
    path = model_dir("llama")
    export_checkpoint(path, [0, 3, 4], tmp_path / "out", verify=False)
    recipe = yaml.safe_load((tmp_path / "out" / "mergekit.yaml").read_text())
    ranges = [tuple(s["sources"][0]["layer_range"]) for s in recipe["slices"]]
    assert [i for low, high in ranges for i in range(low, high)] == [1, 2, 5]
    assert {s["sources"][0]["model"] for s in recipe["slices"]} == {str(path.resolve())}
    assert recipe["merge_method"] == "passthrough"


@pytest.mark.process
def test_tensors_pass_through_bit_by_bit_in_any_dtype(tmp_path, rng):
    path = save_model(small_config("llama"), tmp_path / "model", 0, max_shard_size="90KB")
    loaded: Any = AutoModelForCausalLM.from_pretrained(path)
    model = loaded.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half", max_shard_size="90KB")
    export_checkpoint(tmp_path / "half", [1], tmp_path / "out", dtype="bfloat16")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.dtype == torch.bfloat16
    new = dict(pruned.named_parameters())
    for name, old in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            layer = int(parts[2])
            if layer == 1:
                continue
            parts[2] = str(layer - (layer > 1))
        assert torch.equal(new[".".join(parts)], old), name


@pytest.mark.thorough
def test_reloading_reports_its_own_error(tmp_path, rng):
    windows = lpserve.TokenWindows.from_tokens(rng.integers(0, 97, (1, 8)))
    with pytest.raises(ExportError, match="does not load in a fresh process"):
        reload_checkpoint(tmp_path, windows, "float32", "cpu")


MEMORY_SCRIPT = """
import sys, threading, time, psutil
import torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import lpserve.export.export as export
from lpserve.model.checkpoint import read_checkpoint
process = psutil.Process()
base = process.memory_info().rss
peak, done = [base], []
def watch():
    while not done:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
export.export_checkpoint(sys.argv[1], [1, 5], sys.argv[2], verify=False)
done.append(1); thread.join()
print(peak[0] - base, read_checkpoint(sys.argv[1]).largest_tensor_bytes())
"""


@pytest.mark.process
def test_copying_holds_less_than_three_tensors(tmp_path):
    """A checkpoint of many shards, much larger than the allowance: RSS above RSS after imports
    stays below 3 x the largest tensor + 100 MB while copying."""
    config = small_config("llama", num_layers=12)
    config.hidden_size, config.intermediate_size, config.vocab_size = 768, 3072, 8000
    model = save_model(config, tmp_path / "model", 0, max_shard_size="30MB")
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert len(list(model.glob("*.safetensors"))) > 10
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(model), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    grown, largest = map(int, done.stdout.split())
    assert total > 2 * (3 * largest + 100e6)
    assert grown < 3 * largest + 100e6
