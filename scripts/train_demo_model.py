"""Train a small language model from plain text: a checkpoint folder like the bundled one.

    python scripts/train_demo_model.py --text novel.txt --text more.txt --out model
    python scripts/train_demo_model.py --text novel.txt --out tiny \\
        --layers 2 --width 32 --vocab 512 --context 32 --steps 50

A byte-level BPE tokenizer and the model are trained on the first 95% of each text. The loss printed
last is on the other 5%, which neither has seen. Matrices inside the layers are trained by Muon,
all else (embeddings, norms, biases) by AdamW; the learning rate rises, then falls to zero. The
same seed, device, thread count and versions give the same files, bit for bit.

Exits 2 with one line where the input cannot be used, before a step is made.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from lpserve.errors import InputError, LpserveError

ARCHITECTURES = ("gpt2", "llama", "qwen3")
HEAD_SIZE = 32  # the smallest that vLLM's attention on CPU takes
HELDOUT_SHARE = 0.05
WARMUP_SHARE = 0.05
WEIGHT_DECAY = 0.1  # of the matrices inside layers
SEPARATOR = "<|endoftext|>"  # between texts; also the model's BOS and EOS
BYTES = pre_tokenizers.ByteLevel.alphabet()
LEAST = {
    "layers": 1,
    "width": 1,
    "vocab": len(BYTES) + 1,
    "context": 2,
    "batch": 1,
    "steps": 1,
    "seed": 0,
    "threads": 1,
}


class Muon(torch.optim.Optimizer):
    """Muon: momentum, made orthogonal (Jordan et al. 2024), in float32 and for all layers at once.

    torch.optim.Muon rounds to bfloat16 and takes one matrix at a time: 10 times slower than this
    on a CPU without bfloat16 arithmetic. An update has an RMS of 0.2 times the learning rate,
    whatever the shape (Liu et al. 2025, arXiv 2502.16982, eq. 4), so one rate serves AdamW too.
    """

    MOMENTUM = 0.95
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    STEPS = 5

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": same} for same in by_shape.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            matrices = group["params"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            momentum = group.setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - self.MOMENTUM)
            update = self.orthogonal(gradient.lerp(momentum, self.MOMENTUM))
            update *= 0.2 * math.sqrt(max(update.shape[1:]))
            for matrix, change in zip(matrices, update, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(change, alpha=group["lr"])

    @classmethod
    def orthogonal(cls, stack: torch.Tensor) -> torch.Tensor:
        """Matrices [K, R, C] with all singular values moved close to 1 (about 0.7 to 1.2)."""
        a, b, c = cls.COEFFICIENTS
        tall = stack.shape[1] > stack.shape[2]
        x = stack.mT if tall else stack
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
        for _ in range(cls.STEPS):
            square = x @ x.mT
            x = a * x + (b * square + c * square @ square) @ x
        return x.mT if tall else x


class Parser(argparse.ArgumentParser):
    """Refuses in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked as far as it can be without reading a text."""
    parser = Parser(description="Train a small language model from plain text")
    add = parser.add_argument
    add("--text", type=Path, action="append", required=True, help="UTF-8 text; may be repeated")
    add("--out", type=Path, required=True, help="checkpoint folder to write, new or empty")
    add("--architecture", choices=ARCHITECTURES, default="gpt2", help="of transformers (gpt2)")
    add("--layers", type=int, default=16, help="decoder layers (16)")
    add("--width", type=int, default=96, help=f"hidden size, a multiple of {HEAD_SIZE} (96)")
    add("--vocab", type=int, default=2048, help="tokens of the tokenizer (2048)")
    add("--context", type=int, default=128, help="tokens of a sequence (128)")
    add("--batch", type=int, default=8, help="sequences of a step (8)")
    add("--steps", type=int, default=1800, help="steps of training (1800)")
    add("--lr", type=float, default=8e-3, help="highest learning rate (8e-3)")
    add("--seed", type=int, default=0, help="of weights and batches (0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: cuda if any)")
    add("--threads", type=int, default=1, help="CPU threads (1)")
    options = parser.parse_args(argv)
    for name, least in LEAST.items():
        if not least <= (value := getattr(options, name)) < 2**31:
            raise InputError(f"--{name} {value} is not in {least} .. 2**31-1")
    if options.width % HEAD_SIZE:
        raise InputError(f"--width {options.width} is not a multiple of {HEAD_SIZE}")
    if not 0 < options.lr < math.inf:
        raise InputError(f"--lr {options.lr} is not a positive number")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here; use --device cpu")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise InputError(f"--out {options.out} is not an empty folder; name a new one")
    return options


def read_texts(paths: list[Path]) -> tuple[list[str], list[str]]:
    """The first 95% and the last 5% of every text."""
    train, heldout = [], []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--text {path} cannot be read: {error}") from None
        cut = round(len(text) * (1 - HELDOUT_SHARE))
        train.append(text[:cut])
        heldout.append(text[cut:])
    return train, heldout


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer of exactly `vocab` tokens; SEPARATOR is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[SEPARATOR], initial_alphabet=BYTES, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab:
        raise InputError(
            f"the texts are too short: they yield {tokenizer.get_vocab_size()} tokens "
            f"of vocabulary, --vocab is {vocab}"
        )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], context: int, name: str) -> torch.Tensor:
    """Token ids of all texts, int64 [L], SEPARATOR before each."""
    ids = [i for text in texts for i in (0, *tokenizer.encode(text, add_special_tokens=False).ids)]
    if len(ids) < context:
        raise InputError(
            f"the texts are too short: their {name} share has {len(ids)} tokens, "
            f"--context is {context}"
        )
    return torch.tensor(ids)


def build_model(options: argparse.Namespace) -> Any:
    """A fresh model with tied embeddings, weights drawn from torch's seed."""
    width, heads = options.width, options.width // HEAD_SIZE
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gated = {"intermediate_size": 8 * width // 3, "num_key_value_heads": heads}
    own: dict[str, dict[str, Any]] = {
        "gpt2": {"n_inner": 4 * width, "activation_function": "gelu_pytorch_tanh", **no_dropout},
        "llama": gated,
        "qwen3": {**gated, "head_dim": HEAD_SIZE},
    }
    config = AutoConfig.for_model(
        options.architecture,
        vocab_size=options.vocab,
        hidden_size=width,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        **own[options.architecture],
    )
    return AutoModelForCausalLM.from_config(config).to(options.device)


def optimizers(model: nn.Module, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for the rest."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    inside, rest = [], []
    for parameter in model.parameters():  # a tied head comes once, as the embedding
        is_inside = parameter.ndim == 2 and id(parameter) not in embeddings
        (inside if is_inside else rest).append(parameter)
    return [
        Muon(inside, lr=options.lr, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(rest, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: up in a line to 1, then down in a line to almost 0."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def nll(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Nats per token, mean over every token but the first of a sequence."""
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    return nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())


def fit(model: Any, ids: torch.Tensor, options: argparse.Namespace) -> None:
    """Train in place on sequences from anywhere in the text; prints the loss about 20 times."""
    model.train()
    parts = optimizers(model, options)
    every = max(1, options.steps // 20)
    losses: list[torch.Tensor] = []
    started = time.monotonic()
    for step in range(options.steps):
        starts_B1 = torch.randint(len(ids) - options.context + 1, (options.batch, 1))
        tokens_BT = ids[starts_B1 + torch.arange(options.context)].to(options.device)
        for optimizer in parts:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * rate(step, options.steps)
        loss = nll(model, tokens_BT)
        loss.backward()
        for optimizer in parts:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == options.steps:
            mean = torch.stack(losses).mean().item()
            print(
                f"step {step + 1}/{options.steps}: loss {mean:.3f} nats per token, "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
            if not math.isfinite(mean):
                raise LpserveError(f"training diverged by step {step + 1}; lower --lr")
            losses.clear()


@torch.no_grad()
def mean_nll(model: Any, ids: torch.Tensor, options: argparse.Namespace) -> float:
    """Nats per predicted token over disjoint sequences of `context` tokens, dropout off."""
    model.eval()
    sequences_NT = ids[: len(ids) // options.context * options.context].view(-1, options.context)
    total = 0.0
    for tokens_BT in sequences_NT.split(options.batch):
        total += nll(model, tokens_BT.to(options.device)).item() * len(tokens_BT)
    return total / len(sequences_NT)


def unigram_nll(train_ids: torch.Tensor, ids: torch.Tensor, vocab: int) -> float:
    """Nats per token of `ids` under the training text's token frequencies, plus one each."""
    counts = torch.bincount(train_ids, minlength=vocab).double() + 1
    return -(counts / counts.sum()).log()[ids].mean().item()


def train(options: argparse.Namespace) -> None:
    """From texts to the checkpoint folder."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only so
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    train_texts, heldout_texts = read_texts(options.text)
    tokenizer = train_tokenizer(train_texts, options.vocab)
    ids = encode(tokenizer, train_texts, options.context, "training")
    heldout_ids = encode(tokenizer, heldout_texts, options.context, "held-out")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {options.out} cannot be made: {error}") from None
    model = build_model(options)
    print(
        f"{options.architecture}, {model.num_parameters():,} parameters, {len(ids):,} tokens of "
        f"text, {options.steps * options.batch * options.context / len(ids):.1f} passes over it",
        flush=True,
    )
    fit(model, ids, options)
    hf_logging.disable_progress_bar()
    model.save_pretrained(options.out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        model_max_length=options.context,
    ).save_pretrained(options.out)
    loss = mean_nll(model, heldout_ids, options)
    unigrams = unigram_nll(ids, heldout_ids, options.vocab)
    print(
        f"held-out loss {loss:.3f} nats per token, perplexity {math.exp(loss):.1f} "
        f"(token frequencies alone: {unigrams:.3f} nats)"
    )


def main(argv: list[str] | None = None) -> int:
    try:
        train(parse(argv))
    except LpserveError as error:
        print(f"train_demo_model: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
