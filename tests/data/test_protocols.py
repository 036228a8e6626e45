"""Perplexity protocols against their published algorithms, written out, on the bundled model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lpserve
from lpserve.data.protocols import PROTOCOLS, Protocol, other_texts, protocol_windows
from lpserve.demo import FOLDER
from lpserve.errors import InputError

TOLERANCE = 1e-5  # float32 sums over some hundred tokens; a token scored twice is worth 1e-3


class Bytes:
    """A tokenizer of printable characters, `!` is 1; BOS 256."""

    bos_token_id: int | None = 256

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 32 for letter in text]}


@pytest.fixture
def text(tmp_path, rng):
    """Characters in order, so that a token tells its place."""
    count = int(rng.integers(30, 90))
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(i) for i in range(33, 33 + count)))
    return str(path), count


@pytest.mark.parametrize("bos", ["none", "once", "each"])
@pytest.mark.parametrize(("length", "stride"), [(8, None), (9, 4), (10, 1), (7, 7), (16, 15)])
def test_every_token_is_scored_once_at_most_and_after_what_stands_before_it(
    bos, length, stride, text
):
    path, count = text
    protocol = Protocol(length=length, stride=stride, bos=bos)
    cut = protocol_windows(path, Bytes(), protocol, name="t")
    windows = cut.windows
    scored = windows.tokens_NT[windows.scored_NT].tolist()
    assert windows.length == length
    assert sorted(scored) == sorted(set(scored))  # tokens are places: none twice
    rows = zip(windows.tokens_NT, windows.scored_NT, windows.lengths_N, strict=True)
    for row, (tokens, flags, end) in enumerate(rows):
        run = tokens[1:end] if tokens[0] == 256 else tokens[:end]
        assert (np.diff(run) == 1).all()  # consecutive text, nothing else
        assert (tokens[0] == 256) == (bos == "each" or (bos == "once" and not row))
        assert not flags[0]
    first = {"none": 2, "once": 1, "each": 1}[bos]
    disjoint = stride in (None, length)
    if disjoint and bos != "each":
        stream = count + (bos == "once")
        assert len(scored) == stream // length * (length - 1)
    elif disjoint:
        assert scored == list(range(1, count // (length - 1) * (length - 1) + 1))
    else:
        assert scored == list(range(first, count + 1))


def perplexity_by_hand(model, ids, protocol):
    """The published loops, one window at a time."""
    nll, count = 0.0, 0
    if protocol.step == protocol.length:  # GPTQ: reshape, shift inside each window
        for start in range(0, len(ids) - protocol.length + 1, protocol.length):
            part = torch.tensor(ids[start : start + protocol.length])[None]
            logits = model(part).logits[0, :-1].double().log_softmax(-1)
            nll -= float(logits.gather(-1, part[0, 1:, None]).sum())
            count += protocol.length - 1
        return np.exp(nll / count)
    before = 0  # transformers' documentation: labels of what was scored are -100
    for begin in range(0, len(ids), protocol.step):
        end = min(begin + protocol.length, len(ids))
        part = torch.tensor(ids[begin:end])[None]
        labels = part.clone()
        labels[:, : -(end - before)] = -100
        logits = model(part).logits[0, :-1].double().log_softmax(-1)
        for position, label in enumerate(labels[0, 1:].tolist()):
            if label != -100:
                nll -= float(logits[position, label])
                count += 1
        before = end
        if end == len(ids):
            break
    return np.exp(nll / count)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "protocol", [Protocol(length=64, bos="once"), Protocol(length=64, stride=24, bos="none")]
)
@torch.inference_mode()
def test_perplexity_is_that_of_the_published_loops(protocol, tmp_path, rng):
    words = (FOLDER / "heldout.txt").read_text().split()
    start = int(rng.integers(1000, len(words) - 500))
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words[start : start + 300]))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    cut = protocol_windows(str(path), tokenizer, protocol, name="t")
    with lpserve.open_engine(str(FOLDER / "model"), cut.windows) as engine:
        full = np.ones((1, engine.info.num_players), dtype=bool)
        got = engine.score(full).perplexity_M()[0]
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype="float32").eval()
    ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    if protocol.bos == "once":
        ids = [tokenizer.bos_token_id, *ids]
    assert got == pytest.approx(perplexity_by_hand(model, ids, protocol), rel=TOLERANCE)


def test_a_protocol_says_what_it_is(text):
    path, count = text
    cut = protocol_windows(path, Bytes(), Protocol(length=8, stride=4, bos="once"), name="t")
    assert str(cut) == (
        f"windows of 8 tokens, stride 4, BOS once: {count} of {count + 1} tokens scored"
    )
    assert str(PROTOCOLS["gptq-2048"]) == "windows of 2048 tokens, disjoint, BOS once"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"bos": "twice"}, "bos must be one of none, once, each"),
        ({"length": 1}, "length must be at least 2"),
        ({"length": 8, "stride": 9}, "stride must be 1..length"),
        ({"length": 8, "stride": 0}, "stride must be 1..length"),
        ({"length": 2, "bos": "each"}, "at least 3"),
    ],
)
def test_impossible_protocols_are_refused(values, reason):
    with pytest.raises(InputError, match=reason):
        Protocol(**values)


def test_texts_and_tokenizers_that_do_not_fit_are_refused(text, tmp_path):
    path, count = text
    with pytest.raises(InputError, match=f"{count + 1} tokens, one window has 400"):
        protocol_windows(path, Bytes(), Protocol(length=400), name="t")
    without = Bytes()
    without.bos_token_id = None
    with pytest.raises(InputError, match="the tokenizer has no BOS"):
        protocol_windows(path, without, Protocol(length=8), name="t")
    assert protocol_windows(path, without, Protocol(length=8, bos="none"), name="t")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="too short"):
        protocol_windows(
            str(tmp_path / "empty.txt"), Bytes(), Protocol(length=8, stride=2, bos="none"), name="t"
        )


def test_texts_that_published_figures_are_not_of_are_told():
    texts = {"lines": "wiki.test.txt", "rows": "wiki.test.jsonl", "packed": "a/b.txt.gz"}
    assert other_texts("gptq-2048", texts) == ["lines", "packed"]
    assert other_texts("llm-pruner-128", texts) == []
