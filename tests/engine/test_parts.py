"""Halves of layers in the transformers engine, against the model with those modules zeroed by hand.

The reference hooks modules that are named here for each family; what the engine finds by itself is
not used. Tolerance: 1e-5 relative on every window's summed NLL, as for whole layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import lpserve
from lpserve.engine.base import HasOverlap
from lpserve.engine.hf.stack import RecordedStack
from lpserve.engine.parts import ParallelHalves, SequentialHalves, find_halves
from lpserve.errors import EngineError, InputError
from lpserve.masks import without
from lpserve.model.players import ATTENTION, MLP
from lpserve.testing.checkpoints import PLAYERS, TEXT, VOCABULARY, save_random
from lpserve.testing.parity import NUM_LAYERS, some_windows
from lpserve.testing.reference import (
    VLLM_FAMILIES,
    reference_model,
    relative,
    slow_but,
    window_nll,
    with_layers_deleted,
    with_parts_zeroed,
)
from tests.conftest import SEED

TOLERANCE = 1e-5
HALVES = 2 * NUM_LAYERS
ALL = (*VLLM_FAMILIES, "falcon")
# one of each kind: norms before, norms behind too, two modules, side by side, residual inside
KINDS = ("llama", "gemma2", "opt", "gpt-neox", "bloom")


def layers_as_halves(masks_ML: np.ndarray) -> np.ndarray:
    return np.repeat(masks_ML, 2, axis=1)


@pytest.mark.parametrize("family", slow_but(ALL, *KINDS))
def test_halves_score_as_the_model_with_those_modules_zeroed(family, model_dir, rng):
    path = model_dir(family)
    windows = some_windows(rng)
    masks = rng.random((10, HALVES)) < 0.6
    masks[:2] = [[True], [False]]
    masks[2] = np.arange(HALVES) % 2 == 0  # attention alone
    masks[3] = ~masks[2]
    # Falcon's two implementations of ALiBi differ in transformers itself; the reference is eager
    options = {"attn_implementation": "eager"} if family == "falcon" else {}
    with lpserve.open_engine(path, windows, players="half", **options) as engine:
        players = engine.info.players
        got = engine.score(masks).nll_MN
    assert [(p.layer, p.part) for p in players[:3]] == [(0, ATTENTION), (0, MLP), (1, ATTENTION)]
    model = reference_model(path)
    expected = []
    for mask in masks:
        with with_parts_zeroed(model, family, players, mask) as zeroed:
            expected.append(window_nll(zeroed, windows.tokens_NT, windows.scored_NT))
    assert relative(got, np.array(expected)) < TOLERANCE
    assert np.ptp(np.array(expected)[:, 0]) > 0.01 * expected[0][0]


@pytest.mark.parametrize("family", slow_but(ALL, "qwen3", "cohere", mark="thorough"))
def test_both_halves_are_the_layer(family, model_dir, rng):
    """Masks of whole layers score alike either way, with every metric and overlap."""
    path = model_dir(family)
    windows = some_windows(rng)
    masks = rng.random((6, NUM_LAYERS)) < 0.7
    masks = np.unique(np.concatenate([np.ones((1, NUM_LAYERS), bool), masks]), axis=0)[::-1]
    metrics = ("misses", "kl", "kl_top5")
    with lpserve.open_engine(path, windows) as engine:
        assert isinstance(engine, HasOverlap)
        whole = engine.score_overlap(masks, extra_metrics=metrics)
    with lpserve.open_engine(path, windows, players="half") as engine:
        assert isinstance(engine, HasOverlap)
        halves = engine.score_overlap(layers_as_halves(masks), extra_metrics=metrics)
    assert relative(halves.nll_MN, whole.nll_MN) < TOLERANCE
    for name in metrics:
        difference = np.abs(halves.others[name] - whole.others[name]).max()
        assert difference <= (1 if name == "misses" else 1e-3), name
    assert whole.overlap_MM is not None
    assert halves.overlap_MM is not None
    scale = np.abs(whole.overlap_MM).max()
    np.testing.assert_allclose(halves.overlap_MM, whole.overlap_MM, atol=1e-3 * scale)
    steps = halves.work.layer_forwards, halves.work.skip_layer_forwards
    assert steps == (2 * whole.work.layer_forwards, 2 * whole.work.skip_layer_forwards)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_budget_and_micro_batch_do_not_matter(family, model_dir, rng):
    """Pairs of a parallel model's states take twice the memory."""
    windows = some_windows(rng, num=5)
    masks = rng.random((24, HALVES)) < 0.6
    with lpserve.open_engine(model_dir(family), windows, players="half") as engine:
        together = engine.score(masks).nll_MN
    steps = HALVES + NUM_LAYERS if family == "gpt-neox" else HALVES
    state = 40 * 64 * 4 * (2 if family == "gpt-neox" else 1)
    for budget, tokens in [((steps + 1) * state, None), ((steps + 4) * state * 5, 600), (None, 40)]:
        options: dict[str, Any] = {"micro_batch_tokens": tokens} if tokens else {}
        if budget:
            options["state_budget_mb"] = budget / 2**20
        with lpserve.open_engine(model_dir(family), windows, players="half", **options) as engine:
            assert relative(engine.score(masks).nll_MN, together) < TOLERANCE
    small = (steps + 1) * state / 2**20 * 0.99
    with pytest.raises(InputError, match="state_budget_mb is too small"):
        lpserve.open_engine(model_dir(family), windows, players="half", state_budget_mb=small)


@pytest.mark.parametrize("family", slow_but(("llama", "gpt-neox", "mixtral"), "gpt-neox"))
def test_groups_score_as_their_members_do_together(family, model_dir, rng, tmp_path):
    """Scattered over the layers; what is in no group always runs. The same arithmetic."""
    file = tmp_path / "groups.toml"
    file.write_text('a = [1, "3.mlp"]\nb = ["0.attention", "3.attention", 5]\nc = ["4.mlp"]\n')
    windows = some_windows(rng)
    masks = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], dtype=bool)
    halves = np.ones((8, HALVES), dtype=bool)
    # players are in the order of their first members
    for player, members in enumerate([(0, 6, 10, 11), (2, 3, 7), (9,)]):
        halves[:, members] = masks[:, player : player + 1]
    with lpserve.open_engine(model_dir(family), windows, players=f"groups:{file}") as engine:
        assert [p.part.partition("=")[0] for p in engine.info.players] == ["b", "a", "c"]
        scores = engine.score(masks)
    with lpserve.open_engine(model_dir(family), windows, players="half") as engine:
        assert relative(scores.nll_MN, engine.score(halves).nll_MN) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own modules
@pytest.mark.parametrize("family", ["llama", "opt", "gpt-neox"])
def test_compiled_halves_score_alike(family, model_dir, rng):
    windows = some_windows(rng)
    masks = rng.random((6, HALVES)) < 0.6
    with lpserve.open_engine(model_dir(family), windows, players="half") as engine:
        expected = engine.score(masks).nll_MN
    with lpserve.open_engine(
        model_dir(family), windows, players="half", compile_layers=True
    ) as engine:
        assert relative(engine.score(masks).nll_MN, expected) < TOLERANCE


def test_a_half_does_not_run_what_serves_the_other_alone(model_dir):
    """The norm before an absent part is left out: what it gives is not used."""
    stack = stack_of(reference_model(model_dir("llama")))
    layer = stack.layers[0]

    def run(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        position = torch.arange(hidden.shape[1])[None]
        rotary = stack.model.model.rotary_emb(hidden, position)
        return module(hidden, position_embeddings=rotary)

    with torch.inference_mode():
        found = find_halves("layer 0", layer, run, torch.randn(1, 8, 64), 1)
    assert isinstance(found, SequentialHalves)
    assert isinstance(found.mixer.post_attention_layernorm, torch.nn.Identity)
    assert isinstance(found.feed_forward.input_layernorm, torch.nn.Identity)
    assert found.mixer.self_attn is layer.self_attn
    assert found.feed_forward.mlp is layer.mlp
    assert isinstance(layer.post_attention_layernorm, type(layer.input_layernorm))


def stack_of(model: Any) -> RecordedStack:
    return RecordedStack(model, dtype=torch.float32, num_layers=None, head_chunk_bytes=1 << 20)


class Attend(torch.nn.Linear):
    """A running mean, projected."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.cumsum(1) / torch.arange(1, input.shape[1] + 1)[:, None])


class Block(torch.nn.Module):
    def __init__(self, combine: Any, **modules: torch.nn.Module) -> None:
        super().__init__()
        self._combine = combine
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._combine(self, x)


def halves_of(block: Block) -> Any:
    with torch.inference_mode():
        return find_halves("layer 3", block, lambda m, x: m(x), torch.randn(1, 6, 4), 1)


def parts(**more: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {"attend": Attend(4, 4), "feed": torch.nn.Linear(4, 4), **more}


def test_a_feed_forward_part_may_come_first():
    def combine(block: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + block.feed(x).tanh()
        return x + block.attend(x)

    found = halves_of(Block(combine, **parts()))
    assert isinstance(found, SequentialHalves)
    assert not found.mixer_first


def test_two_mixers_go_together():
    def combine(block: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + block.attend(x) + block.scan(x)
        return x + block.feed(x)

    found = halves_of(Block(combine, **parts(scan=Attend(4, 4))))
    assert isinstance(found, SequentialHalves)
    assert isinstance(found.feed_forward, Block)


def test_parts_side_by_side_are_told_from_parts_in_a_row():
    block = Block(lambda b, x: x + b.attend(x) + b.feed(x), **parts())
    assert isinstance(halves_of(block), ParallelHalves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_huge_states_hide_nothing(dtype):
    """Beside a token whose state is ten thousand times as large, parts in a row and side by side
    are still told apart, in half precision too."""
    hidden = torch.randn(1, 12, 16)
    hidden[:, 0] *= 1e4

    def in_a_row(block: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + block.attend(block.norm(x))
        return x + block.feed(block.norm(x))

    def side_by_side(block: Any, x: torch.Tensor) -> torch.Tensor:
        return x + block.attend(block.norm(x)) + block.feed(block.norm(x))

    for combine, kind in ((in_a_row, SequentialHalves), (side_by_side, ParallelHalves)):
        norm = torch.nn.RMSNorm(16)
        block = Block(combine, attend=Attend(16, 16), feed=torch.nn.Linear(16, 16), norm=norm)
        block = block.to(dtype)
        with torch.inference_mode():
            found = find_halves("it", block, lambda m, x: m(x), hidden.to(dtype), 1)
        assert isinstance(found, kind)


@pytest.mark.parametrize(
    ("combine", "more", "message"),
    [
        (
            lambda b, x: b.norm(x + b.feed(b.norm(x + b.attend(x)))),
            {"norm": torch.nn.LayerNorm(4)},
            "changes its state even when attend, feed give zero",
        ),
        (
            lambda b, x: x + b.feed(x) + b.attend(x + 2 * b.feed(x)),
            {},
            "neither follow one another nor stand side by side",
        ),
        (
            lambda b, x: x + b.feed(b.attend(x)),
            {},
            r"\(attend, feed\) has no part that by itself lets a token see others",
        ),
        (lambda b, x: x + b.attend(x), {}, "consists of attend alone"),
        (
            lambda b, x: x + b.attend(x) + b.other(x + b.attend(x)),
            {"other": Attend(4, 4)},
            r"\(attend, other\) has no feed-forward part",
        ),
        (lambda b, x: x + b.feed(x), {}, "consists of feed alone"),
        (
            lambda b, x: x + b.feed(x) + b.other(x),
            {"other": torch.nn.Linear(4, 4)},
            r"\(feed, other\) has no part that by itself lets a token see others",
        ),
        (lambda b, x: (x + b.attend(x) + b.feed(x)) / 0, {}, "gives NaN or infinity"),
        (lambda b, x: x + 1, {}, "consists of no module with matrices"),
    ],
)
def test_layers_without_halves_are_refused_with_the_reason(combine, more, message):
    with pytest.raises(EngineError, match=f"layer 3.*{message}"):
        halves_of(Block(combine, **parts(**more)))


def test_a_model_without_feed_forward_parts_is_refused_before_it_is_loaded(tmp_path, rng):
    config = tf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4
    )
    save_random(config, tmp_path / "model", SEED)
    windows = lpserve.TokenWindows.from_tokens(rng.integers(3, VOCABULARY, (1, 8)))
    with pytest.raises(InputError, match="no layer has attention and a feed-forward part"):
        lpserve.open_engine(tmp_path / "model", windows, players="half")


def test_layers_of_several_kinds_have_a_player_for_each_part(tmp_path, rng):
    """A layer of one module is one player beside the halves of the others."""
    save_random(tf.LlamaConfig(**TEXT), tmp_path / "plain", SEED)
    windows = lpserve.TokenWindows.from_tokens(rng.integers(3, VOCABULARY, (2, 16)))
    with lpserve.open_engine(tmp_path / "plain", windows, players="half") as engine:
        assert engine.info.num_players == 2 * PLAYERS
        full = engine.score(np.ones((1, 2 * PLAYERS), dtype=bool)).nll_MN
        one = engine.score(without(2 * PLAYERS, [2, 3])[None]).nll_MN
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    deleted = with_layers_deleted(model, without(PLAYERS, [1]))
    expected = window_nll(deleted, windows.tokens_NT, windows.scored_NT)
    assert relative(one[0], expected) < TOLERANCE
    assert not np.allclose(one, full)
