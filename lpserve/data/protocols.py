"""How a text becomes one perplexity: a named window length, stride and BOS.

Published perplexities of one model differ by these alone, so every figure carries its protocol::

    length L, stride L    disjoint windows; an incomplete window at the end is dropped
    length L, stride S    windows that advance by S; tokens that an earlier window has scored are
                          context only (as in transformers' documentation); the last window ends
                          with the text

The text is tokenized as one stream. BOS: `none`; `once` before the stream (what a tokenizer that
adds BOS does to a text); or `each` window begins with it, within its length.

Knows tokenizers and files, no model and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpserve.data.windows import TokenStream, TokenWindows
from lpserve.errors import InputError

BOS = ("none", "once", "each")
OF_ROWS = ("gptq-2048",)
"""Protocols whose published figures are of a data set's rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One way to cut a text into windows; see the module's description."""

    length: int = 2048
    """Tokens of a window, its BOS included."""
    stride: int | None = None
    """None: the length."""
    bos: str = "once"
    """One of `BOS`."""

    def __post_init__(self) -> None:
        if self.bos not in BOS:
            raise InputError(f"bos must be one of {', '.join(BOS)}: got {self.bos!r}")
        if self.length < 2:
            raise InputError(f"length must be at least 2: got {self.length}")
        min_context = 2 if self.bos == "each" else 1
        if self.stride is not None and not 1 <= self.stride <= self.length:
            raise InputError(f"stride must be 1..length: got {self.stride} of {self.length}")
        if self.bos == "each" and self.length < min_context + 1:
            raise InputError("length must be at least 3 where each window begins with BOS")

    @property
    def step(self) -> int:
        """Tokens by which windows advance."""
        return self.stride or self.length

    def __str__(self) -> str:
        stride = "disjoint" if self.step == self.length else f"stride {self.step}"
        bos = {"none": "no BOS", "once": "BOS once", "each": "BOS before each window"}[self.bos]
        return f"windows of {self.length} tokens, {stride}, {bos}"


PROTOCOLS = {
    "gptq-2048": Protocol(length=2048, bos="once"),
    "llm-pruner-128": Protocol(length=128, bos="once"),
    "sliding-1024-512": Protocol(length=1024, stride=512, bos="none"),
}
"""Protocols by the work that made them common: GPTQ (Frantar et al., arXiv 2210.17323; also
SparseGPT, SLEB, EvoPress), LLM-Pruner (Ma et al., arXiv 2305.11627; also Shortened-LLaMA and the
paper of 2602.07804), and the example of transformers' documentation."""


@dataclass(frozen=True, slots=True)
class ProtocolWindows:
    """A text cut by a protocol."""

    windows: TokenWindows
    protocol: Protocol
    num_tokens: int
    """Tokens of the text's stream, BOS included."""

    def __str__(self) -> str:
        scored = int(self.windows.num_tokens_N.sum())
        return f"{self.protocol}: {scored} of {self.num_tokens} tokens scored"


def protocol_windows(
    path: str, tokenizer: Any, protocol: Protocol, *, name: str, field: str = "text"
) -> ProtocolWindows:
    """Cut a text by a protocol.

    Args:
        path: text, folder of .txt files, or .jsonl.
        tokenizer: a transformers tokenizer.
        name: the corpus.
        field: the jsonl field that holds the text.

    Raises:
        InputError: unreadable, too short, or BOS asked of a tokenizer that has none.
    """
    stream = TokenStream.read(path, tokenizer, field=field, name=name)
    if protocol.bos != "none" and stream.bos_id is None:
        raise InputError(
            f"corpus {name!r}: bos is {protocol.bos!r}, but the tokenizer has no BOS; use none"
        )
    ids = stream.ids
    if protocol.bos == "once" and stream.bos_id is not None:
        ids = np.pad(ids, (1, 0), constant_values=stream.bos_id)
    room = protocol.length - (protocol.bos == "each")
    disjoint = protocol.step == protocol.length
    step = room if disjoint else protocol.step
    tokens, scored = _cut(ids, room, step, name, full_windows_only=disjoint)
    if protocol.bos == "each":
        assert stream.bos_id is not None
        tokens = np.pad(tokens, ((0, 0), (1, 0)), constant_values=stream.bos_id)
        scored = np.pad(scored, ((0, 0), (1, 0)))
        scored[0, 1] = True  # BOS stands before the text's first token
        if step == room:
            scored[:, 1] = True
    windows = TokenWindows.from_tokens(tokens, scored, name=name)
    return ProtocolWindows(windows, protocol, len(ids))


def _cut(
    ids: Any, length: int, step: int, name: str, *, full_windows_only: bool
) -> tuple[Any, Any]:
    """Tokens and scored flags, `[N, length]` each; the last window is right-padded where the text
    ends within it, or left out if `full_windows_only`."""
    if len(ids) < length and full_windows_only:
        raise InputError(
            f"corpus {name!r} is too short: {len(ids)} tokens, one window has {length}"
        )
    if len(ids) < 2:
        raise InputError(f"corpus {name!r} is too short: {len(ids)} tokens")
    rows, flags, done, start = [], [], 0, 0
    while True:
        end = min(start + length, len(ids))
        if full_windows_only and end - start < length:
            break
        row, flag = np.zeros(length, dtype=np.int32), np.zeros(length, dtype=bool)
        row[: end - start] = ids[start:end]
        flag[max(done - start, 1) : end - start] = True
        rows.append(row)
        flags.append(flag)
        done, start = end, start + step
        if done == len(ids):
            break
    return np.array(rows), np.array(flags)


def other_texts(protocol: str, texts: Mapping[str, str]) -> list[str]:
    """Names of texts of which a named protocol's published figures are not.

    GPTQ's, SparseGPT's, SLEB's and EvoPress' figures are of a data set's rows, joined by blank
    lines: a file of rows gives that text, a plain text file of the same set is another one.

    Args:
        texts: name -> path.
    """
    if protocol not in OF_ROWS:
        return []
    return [name for name, path in texts.items() if path.endswith((".txt", ".txt.gz", ".txt.zst"))]
