"""Token windows: N token sequences with their scored positions, content-hashed.

What counts, by example (T = 5 tokens, nothing prepended)::

    tokens   The  old  man  sat  .
    scored    -    x    x    x   x      4 targets, each predicted from all tokens before it

With `bos=True` the first of the T tokens is the tokenizer's BOS. Right-padded windows are legal:
what follows a window's last scored position is never attended by a scored one, so it is zeroed
and left out of the hash.

Knows tokenizers and files, no model and no engine.

Notation: N windows, T tokens of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.data.text_files import read_text
from lpserve.data.tokenizer import load_tokenizer
from lpserve.errors import InputError, LpserveError, typed_first_line
from lpserve.inputs.arrays import read_arrays
from lpserve.types import BoolArray, IntArray

HELDOUT_SHARE = 0.2
"""Share of a text's tokens, or of a task's questions, that is held out where nothing else is."""


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """N windows of T tokens with their scored positions, from one or more named corpora.

    Build with `from_tokens`, `from_file`, `from_npz` or `concatenate`.
    """

    tokens_NT: NDArray[np.int32]
    scored_NT: BoolArray
    """True where the token is a target; position 0 has nothing before it and is never scored."""
    corpora: tuple[tuple[str, int], ...]
    """(name, number of windows), in order."""

    @property
    def num_windows(self) -> int:
        """N."""
        return self.tokens_NT.shape[0]

    @property
    def length(self) -> int:
        """T, padding included."""
        return self.tokens_NT.shape[1]

    @cached_property
    def num_tokens_N(self) -> IntArray:
        """Scored positions of each window."""
        return self.scored_NT.sum(axis=1).astype(np.int64)

    @cached_property
    def lengths_N(self) -> IntArray:
        """Tokens up to and including the last scored one."""
        return self.length - self.scored_NT[:, ::-1].argmax(axis=1).astype(np.int64)

    @cached_property
    def window_hashes(self) -> tuple[str, ...]:
        """SHA-256 of each window's tokens and scored flags, padding left out."""
        return tuple(
            hashlib.sha256(
                np.int64(n).tobytes()
                + tokens_T[:n].astype("<i4").tobytes()
                + np.packbits(scored_T[:n]).tobytes()
            ).hexdigest()
            for tokens_T, scored_T, n in zip(
                self.tokens_NT, self.scored_NT, self.lengths_N, strict=True
            )
        )

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the window hashes, in order."""
        return hashlib.sha256("".join(self.window_hashes).encode()).hexdigest()

    def select(self, rows: Sequence[int] | IntArray, length: int | None = None) -> TokenWindows:
        """The windows of these rows, in that order.

        Args:
            length: cut every window to its first tokens; None: no cut.
        """
        rows = np.asarray(rows, dtype=np.int64)
        names = np.repeat([n for n, _ in self.corpora], [c for _, c in self.corpora])[rows]
        runs: list[tuple[str, int]] = []
        for name in names:
            count = runs.pop()[1] if runs and runs[-1][0] == name else 0
            runs.append((str(name), count + 1))
        return TokenWindows(
            self.tokens_NT[rows, :length], self.scored_NT[rows, :length], tuple(runs)
        )

    @classmethod
    def from_tokens(
        cls,
        tokens_NT: NDArray[Any],
        scored_NT: NDArray[Any] | None = None,
        *,
        name: str = "tokens",
    ) -> TokenWindows:
        """Windows from token ids.

        Args:
            tokens_NT: any integer array [N, T], T >= 2, ids >= 0.
            scored_NT: bool [N, T]; default: every position but the first. Position 0 must be
                False and every window needs a scored position.
            name: the corpus.

        Raises:
            InputError: the arrays are not of that form.
        """
        tokens = np.asarray(tokens_NT)
        if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
            raise InputError(
                f"corpus {name!r}: tokens must be [N, T], N >= 1, T >= 2: "
                f"got shape {list(tokens.shape)}"
            )
        if not np.issubdtype(tokens.dtype, np.integer):
            raise InputError(f"corpus {name!r}: tokens must be integers: got {tokens.dtype}")
        if scored_NT is None:
            scored = np.ones(tokens.shape, dtype=bool)
            scored[:, 0] = False
        else:
            scored = np.array(scored_NT)
            if scored.dtype != bool or scored.shape != tokens.shape:
                raise InputError(
                    f"corpus {name!r}: scored must be bool {list(tokens.shape)}: "
                    f"got {scored.dtype} {list(scored.shape)}"
                )
        if scored[:, 0].any():
            raise InputError(f"corpus {name!r}: position 0 of a window cannot be scored")
        if not scored.any(axis=1).all():
            row = int(np.flatnonzero(~scored.any(axis=1))[0])
            raise InputError(f"corpus {name!r}: window {row} has no scored position")
        # right padding: after the last scored position nothing is read
        used = np.logical_or.accumulate(scored[:, ::-1], axis=1)[:, ::-1]
        if (tokens[used] < 0).any() or (tokens[used] > np.iinfo(np.int32).max).any():
            raise InputError(f"corpus {name!r}: token ids must lie in 0..2**31-1")
        tokens = np.where(used, tokens, 0).astype(np.int32)
        return cls(tokens, scored, ((name, len(tokens)),))

    @classmethod
    def from_npz(cls, path: str | Path, *, name: str = "tokens") -> TokenWindows:
        """All windows of an `.npz` with `tokens` [N, T] and, if given, `scored` bool [N, T]."""
        try:
            arrays = read_arrays(Path(path))
        except InputError as error:
            raise InputError(f"corpus {name!r}: {error}") from None
        if "tokens" not in arrays:
            raise InputError(f"corpus {name!r}: {path} has no array named 'tokens'")
        return cls.from_tokens(arrays["tokens"], arrays.get("scored"), name=name)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        tokenizer: str | Path | Any,
        num_windows: int,
        length: int,
        seed: int = 0,
        bos: bool = False,
        field: str = "text",
        name: str | None = None,
    ) -> TokenWindows:
        """Cut windows from a text file, a folder of `.txt` files, or a `.jsonl` file.

        The text is tokenized as one stream (files in name order and jsonl records joined by a
        blank line), cut into disjoint windows end to end, and the first `num_windows` of one
        seeded permutation of them are taken: a larger number contains the smaller.

        Args:
            tokenizer: a checkpoint folder, or a transformers tokenizer.
            length: T, a BOS included when `bos`.
            field: the jsonl field that holds the text.

        Raises:
            InputError: unreadable input, or too few tokens for N x T.
        """
        name = name or Path(path).stem
        stream = TokenStream.read(path, load_tokenizer(tokenizer), field=field, name=name)
        return stream.cut(num_windows, length, seed=seed, bos=bos)

    @classmethod
    def concatenate(cls, parts: Sequence[TokenWindows]) -> TokenWindows:
        """Several corpora as one set, shorter windows right-padded to the longest."""
        length = max(part.length for part in parts)
        tokens = [np.pad(p.tokens_NT, ((0, 0), (0, length - p.length))) for p in parts]
        scored = [np.pad(p.scored_NT, ((0, 0), (0, length - p.length))) for p in parts]
        names = [name for part in parts for name, _ in part.corpora]
        if len(set(names)) != len(names):
            raise InputError(f"corpus names repeat: {', '.join(names)}; use name=path")
        merged = cls(
            np.concatenate(tokens),
            np.concatenate(scored),
            tuple(corpus for part in parts for corpus in part.corpora),
        )
        if len(set(merged.window_hashes)) != merged.num_windows:
            raise InputError("the same window comes twice in a set; drop the repeats")
        return merged


@dataclass(frozen=True, eq=False)
class TokenStream:
    """A tokenized text from which windows are cut."""

    name: str
    """The corpus."""
    ids: NDArray[np.int32]
    """Token ids of the text, without BOS."""
    bos_id: int | None
    """The tokenizer's BOS; None: it has none."""

    @classmethod
    def read(cls, path: str | Path, tokenizer: Any, *, field: str, name: str) -> TokenStream:
        """Read and tokenize a text; see `text_files.read_text`."""
        text = read_text(Path(path), field=field, name=name)
        try:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except LpserveError:  # a signal
            raise
        except Exception as error:  # whatever a tokenizer's settings or code raise at work
            raise InputError(
                f"corpus {name!r}: the model's tokenizer cannot read it: {typed_first_line(error)}"
            ) from None
        return cls(name, np.asarray(ids, dtype=np.int32), tokenizer.bos_token_id)

    def split(self) -> tuple[TokenStream, TokenStream]:
        """The first 80% of the tokens and the last 20%."""
        at = len(self.ids) - int(len(self.ids) * HELDOUT_SHARE)
        return (
            TokenStream(self.name, self.ids[:at], self.bos_id),
            TokenStream(self.name, self.ids[at:], self.bos_id),
        )

    def cut(
        self, num_windows: int, length: int, *, seed: int, bos: bool, key: str = ""
    ) -> TokenWindows:
        """Disjoint windows in a seeded random order; see `TokenWindows.from_file`.

        Args:
            key: of the config that `num_windows` comes from, for errors.
        """
        asked = f"{num_windows} are asked for{key and f' ({key})'}"
        if num_windows < 1 or length < 2:
            raise InputError(
                f"corpus {self.name!r}: need num_windows >= 1 and length >= 2: "
                f"got {num_windows} and {length}"
            )
        bos_id = self.bos_id if bos else None
        if bos and bos_id is None:
            raise InputError(f"corpus {self.name!r}: bos is set, but the tokenizer has no BOS")
        take = length - 1 if bos else length
        have = len(self.ids) // take
        if have < num_windows:
            raise InputError(
                f"corpus {self.name!r} is too short: {len(self.ids)} tokens make {have} windows of "
                f"{length}; {asked}"
            )
        order = np.random.default_rng(seed).permutation(have)
        all_NT = self.ids[: have * take].reshape(have, take)
        # repeated text (a refrain, a licence) can make two windows equal: the first one stays
        rows, seen = [], set()
        for row in order:
            content = all_NT[row].tobytes()
            if content not in seen:
                seen.add(content)
                rows.append(row)
            if len(rows) == num_windows:
                break
        else:
            raise InputError(
                f"corpus {self.name!r} is too short: only {len(rows)} different windows of "
                f"{length} tokens; {asked}"
            )
        tokens_NT = all_NT[rows]
        if bos_id is not None:
            tokens_NT = np.pad(tokens_NT, ((0, 0), (1, 0)), constant_values=bos_id)
        return TokenWindows.from_tokens(tokens_NT, name=self.name)
