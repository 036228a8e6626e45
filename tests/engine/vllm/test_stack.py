"""`LayerTap` and `VllmStack` over a small model of our own with a known answer.

Its layers return (hidden, residual) in three ways; a wrong kind of state changes the scores. Two
stacks joined by a queue must score as one (a pipeline). vLLM's own layers: test_vllm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lpserve
from lpserve.engine.head import LocalVocabulary
from lpserve.engine.scorer import StackScorer, prefix_bounds
from lpserve.engine.trie import TrieSettings
from lpserve.engine.vllm.calls import LayerCalls
from lpserve.engine.vllm.stack import VllmStack
from lpserve.engine.vllm.tap import LayerTap
from lpserve.errors import EngineError

WIDTH, VOCABULARY, PLAYERS = 6, 11, 5


class Layer(nn.Module):
    """`sum`: hidden + residual matters; `hidden`: the residual is unread; `pair`: each matters."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 2
        self.kind = kind

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.kind == "hidden":
            return hidden_states + torch.tanh(hidden_states @ self.weight), hidden_states
        before = hidden_states if residual is None else hidden_states + residual
        if self.kind == "pair" and residual is not None:
            before = 0.5 * residual + hidden_states  # the sum alone would not do
        out = torch.tanh(before @ self.weight + 0.1 * positions[:, None].double().sin())
        if self.kind == "pair" and residual is None:
            return out, before
        return out, before.clone() if residual is None else before


class Link:
    def __init__(self, sent: deque, *, is_first: bool = True, is_last: bool = True) -> None:
        self.is_first, self.is_last, self._sent = is_first, is_last, sent

    def send(self, tensor: torch.Tensor) -> None:
        self._sent.append(tensor.clone())

    def receive(self, shape: torch.Size) -> torch.Tensor:
        tensor = self._sent.popleft()
        assert tensor.shape == shape
        return tensor


class Model:
    """A full model, or its layers `first..last` behind a link."""

    device, dtype, vocab_size = torch.device("cpu"), torch.float64, VOCABULARY
    tensor_parallel_size, name = 1, "Model"

    def __init__(self, kind: str, link: Link | None = None, part: slice = slice(None)) -> None:
        self.link = link or Link(deque())
        self.layers = [Layer(kind, seed) for seed in range(PLAYERS)][part]
        self.tap = LayerTap(list(self.layers), part.start or 0, lambda: None)
        self.length = 0
        self.between: Any = None
        generator = torch.Generator().manual_seed(99)
        self.embedding = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
        self.text_reaches_layers = False
        self.largest_rows = 0

    def session(self):
        return nullcontext()

    def run(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding[ids]
        residual = None if self.link.is_first else torch.zeros_like(hidden)
        if self.text_reaches_layers:
            positions = positions + ids
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
            if self.between is not None:
                hidden = self.between(hidden)
        kept = hidden
        if residual is not None and self.layers[0].kind != "hidden":
            kept = hidden + residual
        return kept / kept.norm(dim=-1, keepdim=True)

    def vocabulary(self) -> LocalVocabulary:
        return LocalVocabulary(self.logits)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        self.largest_rows = max(self.largest_rows, len(rows))
        return rows @ self.embedding.T


def kept(mask_P: Iterable[Any]) -> list[list[str]]:
    """What runs of each layer."""
    return [["layer"] if one else [] for one in mask_P]


def settings(**changes) -> TrieSettings:
    values = {"state_budget_bytes": 1 << 20, "micro_batch_tokens": 64, "pack_states": True}
    return TrieSettings(**(values | changes))


def slow_nll(kind: str, mask_P: np.ndarray, windows: lpserve.TokenWindows) -> np.ndarray:
    """Each window alone through the kept layers, residual None until one ran."""
    model = Model(kind)
    model.tap.kept[:] = kept(mask_P)
    sums = []
    for tokens_T, scored_T in zip(windows.tokens_NT, windows.scored_NT, strict=True):
        ids = torch.from_numpy(tokens_T.astype(np.int64))
        final = model.run(ids, torch.arange(len(ids)))
        logits = model.logits(final[:-1])
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        sums.append(float(nll[torch.from_numpy(scored_T[1:])].sum()))
    return np.array(sums)


def some_windows(rng: np.random.Generator) -> lpserve.TokenWindows:
    return lpserve.TokenWindows.from_tokens(rng.integers(0, VOCABULARY, (3, 7)))


@pytest.mark.parametrize("kind", ["hidden", "sum"])
def test_the_probe_finds_what_a_state_carries_and_scores_are_right(kind, rng):
    windows, stack = some_windows(rng), VllmStack(Model(kind), head_chunk_bytes=1 << 12)
    scorer = StackScorer(stack, settings())
    key = scorer.register(windows)
    with torch.inference_mode():
        kinds = stack.probe()
    assert kinds[0] == kind
    stack.state_kind = kinds[0]
    masks = rng.random((20, PLAYERS)) < 0.6
    got = scorer.score(masks, key)[0][..., 0]
    expected = np.array([slow_nll(kind, mask, windows) for mask in masks])
    assert np.abs(got - expected).max() < 1e-5  # losses are summed in float64, computed in float32


class LayerWithoutResidual(Layer):
    """Takes a residual, does not read it, and leaves none, as Gemma-4's do in vLLM."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: Any
    ) -> tuple[torch.Tensor, None]:
        return super().forward(positions, hidden_states, None)[0], None


def test_layers_that_take_a_residual_and_leave_none(rng):
    windows, model = some_windows(rng), Model("hidden")
    model.layers = list[Layer](LayerWithoutResidual("hidden", seed) for seed in range(PLAYERS))
    model.tap = LayerTap(list(model.layers), 0, lambda: None)
    stack = VllmStack(model, head_chunk_bytes=1 << 12)
    scorer = StackScorer(stack, settings())
    key = scorer.register(windows)
    with torch.inference_mode():
        assert stack.probe()[0] == "hidden"
    stack.state_kind = "hidden"
    masks = rng.random((20, PLAYERS)) < 0.6
    expected = np.array([slow_nll("hidden", mask, windows) for mask in masks])
    assert np.abs(scorer.score(masks, key)[0][..., 0] - expected).max() < 1e-5


class LayerWithMore(Layer):
    """Returns what it was given beside its state, as StableLM's do in vLLM: nobody reads it."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, positions: torch.Tensor, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(positions, hidden_states, None)


class ModelWithMore(Model):
    """Of such layers; `reads` what the last one returned beside its state, or does not."""

    def __init__(self, *, reads: bool = False) -> None:
        super().__init__("hidden")
        self.reads = reads
        self.layers = [LayerWithMore("hidden", seed) for seed in range(PLAYERS)]
        self.tap = LayerTap(list(self.layers), 0, lambda: None)

    def run(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = more = self.embedding[ids]
        for layer in self.layers:
            hidden, more = layer(positions, hidden)
        hidden = hidden + more if self.reads else hidden
        return hidden / hidden.norm(dim=-1, keepdim=True)


def test_layers_that_take_one_state_and_return_two(rng):
    windows, model = some_windows(rng), ModelWithMore()
    stack = VllmStack(model, head_chunk_bytes=1 << 12)
    scorer = StackScorer(stack, settings())
    key = scorer.register(windows)
    with torch.inference_mode():
        assert stack.probe() == ["hidden"]
    stack.state_kind = "hidden"
    masks = rng.random((20, PLAYERS)) < 0.6
    expected = np.array([slow_nll("hidden", mask, windows) for mask in masks])
    assert np.abs(scorer.score(masks, key)[0][..., 0] - expected).max() < 1e-5
    # by requests: the patches skip, in any order of masks
    by_requests = ModelWithMore()
    whole = Model("hidden")
    for mask_P in (np.zeros(PLAYERS, dtype=bool), *masks):
        whole.tap.kept[:] = by_requests.tap.kept[:] = kept(mask_P)
        ids = torch.arange(7)
        assert torch.equal(by_requests.run(ids, ids), whole.run(ids, ids))


def test_a_model_that_reads_what_its_layers_return_beside_their_state_is_refused(rng):
    stack = VllmStack(ModelWithMore(reads=True), head_chunk_bytes=1 << 12)
    with pytest.raises(EngineError, match="reads what its layers return beside their state"):
        StackScorer(stack, settings()).register(some_windows(rng))


def test_pairs_carry_what_a_sum_cannot(rng):
    windows, stack = some_windows(rng), VllmStack(Model("pair"), head_chunk_bytes=1 << 12)
    scorer = StackScorer(stack, settings())
    key = scorer.register(windows)
    with torch.inference_mode():
        assert stack.probe() == ["pair"]
    stack.state_kind = "pair"
    full = np.ones((1, PLAYERS), dtype=bool)
    assert (
        np.abs(scorer.score(full, key)[0][..., 0] - slow_nll("pair", full[0], windows)).max() < 1e-5
    )
    stack.state_kind = "sum"
    assert (
        np.abs(scorer.score(full, key)[0][..., 0] - slow_nll("pair", full[0], windows)).max() > 1e-4
    )


@pytest.mark.parametrize("kind", ["hidden", "sum", "pair"])
@pytest.mark.parametrize("cut", [1, 2, 4])
@pytest.mark.parametrize("budget", [1 << 20, 6 * 2 * 32 * WIDTH * 8 * 2])
def test_two_stages_joined_score_as_one(kind, cut, budget, rng):
    windows = some_windows(rng)
    masks = rng.random((30, PLAYERS)) < 0.6
    whole = VllmStack(Model(kind), head_chunk_bytes=1 << 12)
    alone = StackScorer(whole, settings())
    key = alone.register(windows)
    whole.state_kind = kind
    expected, total = alone.score(masks, key)

    sent: deque = deque()
    scorers, layer_forwards = [], 0
    for part, ends in ((slice(0, cut), (True, False)), (slice(cut, PLAYERS), (False, True))):
        link = Link(sent, is_first=ends[0], is_last=ends[1])
        stack = VllmStack(Model(kind, link, part), head_chunk_bytes=1 << 12)
        scorer = StackScorer(
            stack, settings(state_budget_bytes=budget), stage=(part.start, range(PLAYERS))
        )
        scorer.register(windows)
        with torch.inference_mode():
            assert kind in stack.probe()
        stack.state_kind = kind
        scorers.append(scorer)
    got = np.empty(0)
    for scorer in scorers:
        got, work = scorer.score(masks, key)
        layer_forwards += work.layer_forwards
    assert not sent
    assert np.abs(got - expected).max() < 1e-9
    assert layer_forwards == total.layer_forwards


def test_prefix_bounds_cut_where_the_prefix_changes(rng):
    masks = np.unique(rng.random((60, 6)) < 0.5, axis=0)
    for before in range(7):
        bounds = prefix_bounds(masks, before)
        groups = [{tuple(m[:before]) for m in masks[a:b]} for a, b in zip(bounds, bounds[1:])]  # noqa: B905, RUF007
        assert all(len(group) == 1 for group in groups)
        assert len(groups) == len({tuple(m[:before]) for m in masks})


@pytest.mark.thorough
def test_the_head_takes_no_more_rows_than_its_memory_allows(rng):
    model = Model("sum")
    model.vocab_size = 150_000
    model.embedding = torch.randn(150_000, WIDTH, dtype=torch.float64)
    stack = VllmStack(model, head_chunk_bytes=256 << 20)
    scorer = StackScorer(stack, settings(micro_batch_tokens=1 << 16))
    key = scorer.register(lpserve.TokenWindows.from_tokens(rng.integers(0, VOCABULARY, (3, 128))))
    stack.state_kind = "sum"
    scorer.score(np.unique(rng.random((8, PLAYERS)) < 0.5, axis=0), key)
    # logits, their float32 copy or exponentials: at most 10 bytes each
    assert 0 < model.largest_rows < 8 * 3 * 127  # it was shared out
    assert model.largest_rows * 150_000 * 10 < 0.5 * 2**30


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda m: setattr(m, "text_reaches_layers", True), "'positions', which depends on the"),
        (
            lambda m: setattr(m, "between", lambda h: h + 1),
            "something happens between layers 0 and",
        ),
        (lambda m: m.layers.pop(), "ran 4 of its 5 layers"),
    ],
)
def test_layers_that_cannot_be_skipped_one_by_one_are_refused(break_it, words, rng):
    model = Model("sum")
    break_it(model)
    with pytest.raises(EngineError, match=words):
        StackScorer(VllmStack(model, head_chunk_bytes=1 << 12), settings()).register(
            some_windows(rng)
        )


def test_a_mask_is_read_back_from_the_patches():
    model = Model("sum")
    model.tap.kept[:] = kept([True, False, True, True, False])
    assert model.tap.read_mask() == kept([True, False, True, True, False])
    model.layers[3].forward = Layer("sum", 3).forward
    with pytest.raises(EngineError, match="layer 3 lost its patch"):
        model.tap.read_mask()
    with pytest.raises(EngineError, match="patched already"):
        LayerTap(list(model.layers), 0, lambda: None)


def test_a_layer_without_named_hidden_states_is_refused():
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    layer = Odd()
    tap = LayerTap([layer], 0, lambda: None)
    tap.kept[0] = []
    with pytest.raises(EngineError, match="no tensor named hidden_states"):
        layer(torch.zeros(2, 3))


def test_arguments_are_recorded_once_for_a_shape_and_a_few_shapes_are_kept():
    calls = LayerCalls(Model("sum"))
    with torch.inference_mode():
        first = calls.recorded(4, 1)
        assert calls.recorded(4, 1) is first
        assert len(first.arguments) == calls.num_layers
        assert first.length == 4
        for rows in range(2, 40):
            assert calls.recorded(4, rows).hidden.shape[0] == 4 * rows
        assert calls.recorded(4, 1) is not first  # others took its place


def test_a_layer_is_called_with_a_state_of_its_own():
    calls = LayerCalls(Model("pair"))
    with torch.inference_mode():
        record = calls.recorded(4, 2)
        hidden = record.hidden.clone()
        out, left = calls.layer(record, 1, hidden.clone(), torch.zeros_like(hidden))
        again, left_again = calls.next(record, 1, hidden, torch.zeros_like(hidden))
    torch.testing.assert_close(out, again)
    torch.testing.assert_close(left, left_again)
