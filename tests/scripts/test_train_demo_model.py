"""scripts/train_demo_model.py: from text to a checkpoint, on CPU.

Not covered: that a GPU repeats itself bit for bit (needs one), and how good a long training gets.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lpserve
from lpserve.demo import FOLDER
from scripts import train_demo_model
from scripts.train_demo_model import ARCHITECTURES, SEPARATOR, Muon, main, rate
from tests.conftest import SEED

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHARACTERS = (40_000, 30_000)  # of the two texts; the last 5% of each is held out
CONTEXT, LAYERS, VOCAB = 32, 3, 384


class Trained(NamedTuple):
    flags: list[str]
    seen: list[str]
    heldout: list[str]
    out: Path
    printed: str


def flags(texts: list[Path], **changes: object) -> list[str]:
    values = {
        "layers": LAYERS,
        "width": 32,
        "vocab": VOCAB,
        "context": CONTEXT,
        "steps": 120,
        "lr": 0.01,
        "seed": SEED,
        "device": "cpu",
    } | changes
    argv = [word for text in texts for word in ("--text", str(text))]
    return argv + [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(autouse=True)
def torch_as_before():
    """The script sets torch up for its own process; here it shares one with other tests."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two pieces of real prose from places drawn anew each time."""
    rng = np.random.default_rng(SEED)
    folder = tmp_path_factory.mktemp("texts")
    for name, length in zip(("calibration", "heldout"), CHARACTERS, strict=True):
        text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
        start = int(rng.integers(len(text) - length))
        (folder / f"{name}.txt").write_text(text[start : start + length], encoding="utf-8")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def trained(texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model trained by the command itself, in a process of its own."""
    argv = flags(texts)
    out = tmp_path_factory.mktemp("trained") / "new" / "model"
    done = subprocess.run(
        [sys.executable, "scripts/train_demo_model.py", *argv, "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    contents = [path.read_text(encoding="utf-8") for path in texts]
    seen = [text[: len(text) * 95 // 100] for text in contents]
    heldout = [text[len(text) * 95 // 100 :] for text in contents]
    return Trained(argv, seen, heldout, out, done.stdout)


def token_ids(path: Path, texts: list[str]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return tokenizer("".join(SEPARATOR + text for text in texts), verbose=False)["input_ids"]


def loss_by_hand(path: Path, ids: list[int]) -> float:
    """Nats per token over windows end to end, one token at a time, from the files alone."""
    model = AutoModelForCausalLM.from_pretrained(path)
    losses = []
    for start in range(0, len(ids) - CONTEXT + 1, CONTEXT):
        window = torch.tensor(ids[start : start + CONTEXT])
        with torch.no_grad():
            log_probs = model(window[None]).logits[0].log_softmax(-1)
        losses += [-log_probs[i - 1, window[i]].item() for i in range(1, CONTEXT)]
    return math.fsum(losses) / len(losses)


def test_loss_falls_and_the_last_line_is_that_of_text_never_seen(trained: Trained):
    losses = [float(x) for x in re.findall(r"step \d+/120: loss (\S+) nats", trained.printed)]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.5)  # where fresh weights start
    assert losses[-1] < losses[0] - 1.0
    printed, perplexity, unigrams = map(
        float,
        re.findall(r"loss (\S+) .*perplexity (\S+) .*alone: (\S+) nats", trained.printed)[-1],
    )
    seen, heldout = (token_ids(trained.out, part) for part in (trained.seen, trained.heldout))
    counts = Counter(seen)
    by_frequency = [-math.log((counts[i] + 1) / (len(seen) + VOCAB)) for i in heldout]
    assert printed < unigrams - 0.2  # so it reads the context
    # three decimals are printed; float32 in other batches differs by less
    assert printed == pytest.approx(loss_by_hand(trained.out, heldout), abs=6e-4)
    assert perplexity == pytest.approx(math.exp(printed), rel=2e-3)
    assert unigrams == pytest.approx(math.fsum(by_frequency) / len(heldout), abs=6e-4)


def test_the_checkpoint_is_complete_and_loads_with_transformers_alone(trained: Trained):
    assert {path.name for path in trained.out.iterdir()} == FILES
    model: Any = AutoModelForCausalLM.from_pretrained(trained.out)
    tokenizer = AutoTokenizer.from_pretrained(trained.out)
    assert (model.config.model_type, model.config.num_hidden_layers) == ("gpt2", LAYERS)
    assert model.config.vocab_size == len(tokenizer) == VOCAB
    assert tokenizer.convert_tokens_to_ids(SEPARATOR) == model.config.eos_token_id
    for text in ("Crème brûlée\n\n  at 5 o'clock \U0001f40d", *trained.heldout):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt = tokenizer("The old man", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > 4


def test_the_same_command_writes_the_same_bytes_and_another_seed_does_not(
    trained: Trained, tmp_path: Path
):
    again, other = tmp_path / "again", tmp_path / "other"
    again.mkdir()  # an empty folder is as good as none
    assert main([*trained.flags, "--out", str(again)]) == 0
    for name in FILES:
        assert (again / name).read_bytes() == (trained.out / name).read_bytes(), name
    assert main([*trained.flags, "--steps", "1", "--out", str(again / "one")]) == 0
    assert main([*trained.flags, "--steps", "1", "--seed", str(SEED + 1), "--out", str(other)]) == 0
    one, two = (load_file(path / "model.safetensors") for path in (again / "one", other))
    assert not any(torch.equal(one[name], two[name]) for name in one if one[name].ndim == 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_repeats_itself_bit_for_bit(texts: list[Path], tmp_path: Path):
    for name in ("a", "b"):
        assert main([*flags(texts, device="cuda"), "--out", str(tmp_path / name)]) == 0
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lpserve_scores_what_transformers_scores(texts: list[Path], tmp_path: Path, architecture):
    out = tmp_path / "model"
    assert main([*flags(texts, steps=2, architecture=architecture), "--out", str(out)]) == 0
    windows = lpserve.TokenWindows.from_file(
        texts[0], tokenizer=out, num_windows=3, length=CONTEXT, seed=SEED
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == architecture
    tokens_NT = torch.from_numpy(windows.tokens_NT).long()
    with torch.no_grad():
        log_probs = model(tokens_NT).logits[:, :-1].log_softmax(-1)
    expected_N = -log_probs.gather(2, tokens_NT[:, 1:, None]).sum((1, 2)).double().numpy()
    masks_MP = np.array([[True] * LAYERS, [True] * (LAYERS - 1) + [False]])
    with lpserve.open_engine(str(out), windows, device="cpu") as engine:
        nll_MN = engine.score(masks_MP).nll_MN
    np.testing.assert_allclose(nll_MN[0], expected_N, rtol=1e-5)  # the engine's promise
    assert np.abs(nll_MN[1] / nll_MN[0] - 1).max() > 1e-5  # a layer does something


def test_muon_moves_matrices_as_torch_does(rng: np.random.Generator):
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    ours = [
        nn.Parameter(torch.randn(shape, generator=generator))
        for shape in ((48, 16), (16, 48), (48, 16), (32, 32))
    ]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon(ours, lr=0.3, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = [p.detach().clone() for p in ours]
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
        for p, q, old in zip(ours, theirs, before, strict=True):
            # torch rounds to bfloat16 (8 bits): measured 1.5% to 2% a step of what a step moves
            assert (p - q).norm() < 0.06 * (q - old).norm()
            with torch.no_grad():
                q.copy_(p)


def test_the_rate_rises_to_one_and_falls_to_almost_zero():
    for steps in (1, 2, 7, 100, 1001):
        rates = np.array([rate(step, steps) for step in range(steps)])
        assert 0 < rates.min() <= 1 / max(1, steps * 0.05 - 1) + 1 / steps
        assert rates.max() == 1
        peak = int(rates.argmax())
        assert (np.diff(rates[: peak + 1]) > 0).all()
        assert (np.diff(rates[peak:]) <= 0).all()
    assert rate(999, 1000) == pytest.approx(1 / 950)


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 2) -> str:
    capsys.readouterr()
    assert main(argv) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("train_demo_model: ")


@pytest.fixture
def no_model_is_built(monkeypatch: pytest.MonkeyPatch):
    """Bad input must be seen before."""

    def refuse(options: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(train_demo_model, "build_model", refuse)


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "mamba"}, "invalid choice: 'mamba'"),
        ({"device": "tpu"}, "invalid choice: 'tpu'"),
        ({"layers": 0}, "--layers 0 is not in 1 .. "),
        ({"steps": 0}, "--steps 0 is not in 1 .. "),
        ({"steps": "many"}, "invalid int value: 'many'"),
        ({"batch": -1}, "--batch -1 is not in 1 .. "),
        ({"threads": 0}, "--threads 0 is not in 1 .. "),
        ({"seed": 2**31}, f"--seed {2**31} is not in 0 .. "),
        ({"context": 1}, "--context 1 is not in 2 .. "),
        ({"vocab": 256}, "--vocab 256 is not in 257 .. "),
        ({"width": 48}, "--width 48 is not a multiple of 32"),
        ({"lr": 0}, "--lr 0.0 is not a positive number"),
        ({"lr": "nan"}, "--lr nan is not a positive number"),
        ({"vocab": 100_000}, "the texts are too short: they yield"),
        ({"context": 4096}, "the texts are too short: their held-out share has"),
    ],
)
def test_bad_values_are_refused_in_one_line(capsys, texts, tmp_path, changes, says):
    out = tmp_path / "model"
    assert says in refused(capsys, [*flags(texts, **changes), "--out", str(out)])
    assert not out.exists()


@pytest.mark.usefixtures("no_model_is_built")
def test_texts_that_cannot_be_used_are_refused(capsys, texts, tmp_path):
    out = ["--out", str(tmp_path / "model")]
    missing, binary, short = (tmp_path / name for name in ("missing", "binary", "short"))
    binary.write_bytes(b"\xff\xfe\x00")
    short.write_text("It was a dark night. " * 5)
    assert str(missing) in refused(capsys, [*flags([texts[0], missing]), *out])
    assert str(binary) in refused(capsys, [*flags([binary]), *out])
    assert str(tmp_path) in refused(capsys, [*flags([tmp_path]), *out])
    assert "too short" in refused(capsys, [*flags([short]), *out])
    assert "too short" in refused(capsys, [*flags([short], vocab=257, context=64), *out])
    assert "--text" in refused(capsys, [*flags([]), *out])
    assert "--out" in refused(capsys, flags(texts))


@pytest.mark.usefixtures("no_model_is_built")
def test_an_output_folder_in_use_is_refused_and_left_as_it_is(capsys, texts, tmp_path):
    note = tmp_path / "full" / "note"
    note.parent.mkdir()
    note.write_text("mine")
    for out in (note.parent, note):
        assert "not an empty folder" in refused(capsys, [*flags(texts), "--out", str(out)])
    assert "cannot be made" in refused(capsys, [*flags(texts), "--out", str(note / "model")])
    assert [path.name for path in note.parent.iterdir()] == ["note"]
    assert note.read_text() == "mine"


@pytest.mark.usefixtures("no_model_is_built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys, texts, tmp_path):
    argv = [*flags(texts, device="cuda"), "--out", str(tmp_path / "model")]
    assert "no GPU here" in refused(capsys, argv)


def test_a_training_that_diverges_writes_no_checkpoint(capsys, texts, tmp_path):
    argv = [*flags(texts, lr=1e30), "--out", str(tmp_path / "model")]
    assert "diverged by step" in refused(capsys, argv, code=1)
    assert not list((tmp_path / "model").iterdir())
