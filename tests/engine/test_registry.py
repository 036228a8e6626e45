"""Kinds of engine: each says what its engines can do, and none loads a library to be listed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from lpserve import TokenWindows
from lpserve.config import EngineConfig
from lpserve.engine import base, build_engine
from lpserve.engine.registry import ENGINE_KINDS, check_engine_kind, engine_kind, shown_kinds
from lpserve.errors import InputError
from lpserve.runner.setup import num_players_of
from lpserve.testing.parity import NUM_LAYERS, some_windows
from lpserve.types import EngineSpec

UNKNOWN = f"engine must be one of {', '.join(ENGINE_KINDS)}: got 'unknown'"


def test_listing_the_kinds_loads_no_heavy_library():
    code = (
        "import sys, lpserve.engine.registry; "
        "print([m for m in ('torch', 'transformers', 'vllm', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_kind_is_refused_by_name_before_anything_loads():
    for refuse in (
        lambda: check_engine_kind("unknown"),
        lambda: num_players_of(EngineConfig(model="nowhere", engine="unknown")),
        lambda: build_engine(
            EngineSpec(kind="unknown", model=""), TokenWindows.from_tokens(np.array([[0, 1]]))
        ),
    ):
        with pytest.raises(InputError) as caught:
            refuse()
        assert str(caught.value) == UNKNOWN


@pytest.mark.parametrize("name", ["transformers", "synthetic"])
def test_an_unknown_option_is_refused_before_anything_loads(name):
    with pytest.raises(InputError, match=f"engine '{name}' has no option 'colour': it knows "):
        num_players_of(EngineConfig(model="nowhere", engine=name, engine_options={"colour": 1}))


@pytest.mark.parametrize("name", ["transformers", "synthetic"])
def test_a_kind_says_what_its_engines_can_do(name, model_dir, rng):
    kind = engine_kind(name)
    model = str(model_dir("llama"))
    spec = EngineSpec(kind=name, model=model)
    with build_engine(spec, some_windows(rng)) as engine:
        assert engine.info.num_players == len(kind.players(model, {}, "layer"))
        for protocol in (base.Generates, base.HasHiddenStates, base.HasTaylorImportance):
            assert isinstance(engine, protocol) == (protocol in kind.capabilities)


@pytest.mark.vllm
def test_vllm_generates():
    pytest.importorskip("vllm")
    from lpserve.engine.vllm.engine import VllmEngine

    assert issubclass(VllmEngine, base.Generates)
    assert ENGINE_KINDS["vllm"].capabilities == (base.Generates,)


def test_resolved_settings_become_options_again():
    settings = {
        "state_budget_bytes": 3 << 20,
        "pack_states": True,
        "micro_batch_tokens": 64,
        "path": "scoring",
    }
    memory = {"state_budget_mb": 3.0, "micro_batch_tokens": 64}
    for name, expected in (("transformers", memory), ("vllm", {**memory, "path": "scoring"})):
        spec = EngineSpec(kind=name, model="m", options={"micro_batch_tokens": 1})
        assert engine_kind(name).pinned(spec, settings).options == expected
    vllm = engine_kind("vllm")
    assert vllm.for_length(EngineSpec(kind="vllm", model="m"), 9).options == {"max_model_len": 10}


def test_resources_follow_ranks_and_weights(model_dir):
    options = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}
    spec = EngineSpec(kind="vllm", model=str(model_dir("llama")), options=options)
    wants = engine_kind("vllm").resources(spec)
    assert (wants.ranks, wants.stages, wants.may_use_gpu) == (2, 3, True)
    assert wants.weight_bytes > 0
    assert engine_kind("synthetic").resources(EngineSpec(kind="synthetic", model="")).ranks == 1
    assert [kind.name for kind in ENGINE_KINDS.values() if kind not in shown_kinds()] == [
        "synthetic"
    ]
    assert len(engine_kind("vllm").players(str(model_dir("llama")), {}, "layer")) == NUM_LAYERS
