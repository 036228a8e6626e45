"""Text to calibration windows: N token sequences with their scored positions, content-hashed.

What counts, by example (T = 5 tokens, nothing prepended)::

    tokens   The  old  man  sat  .
    scored    -    x    x    x   x      4 targets, each predicted from all tokens before it

With `bos=True` the first of the T tokens is the tokenizer's BOS. Right-padded windows are legal:
what follows a window's last scored position is never attended by a scored one, so it is zeroed
and left out of the hash.

Knows tokenizers and files, no model and no engine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.errors import InputError
from lpserve.types import BoolArray, IntArray

HELDOUT_SHARE = 0.2
SHARED_RUN = 32  # a verbatim run of this many tokens (or half a window, if longer) is an overlap
_HASH_BASE = 0x9E3779B97F4A7C15  # odd: has an inverse modulo 2**64


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
        return self.tokens_NT.shape[0]

    @property
    def length(self) -> int:
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
        """The windows of these rows, in that order, cut to `length` tokens (default: not cut)."""
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
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
                arrays = {key: data[key] for key in data.files}
        except FileNotFoundError:
            raise InputError(f"corpus {name!r}: {path} does not exist") from None
        except Exception as error:  # numpy, zipfile and zlib each raise kinds of their own
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"corpus {name!r}: {path} is not an .npz file: {line}") from None
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
    ids: NDArray[np.int32]
    bos_id: int | None

    @classmethod
    def read(cls, path: str | Path, tokenizer: Any, *, field: str, name: str) -> TokenStream:
        text = _read_text(Path(path), field=field, name=name)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return cls(name, np.asarray(ids, dtype=np.int32), tokenizer.bos_token_id)

    def split(self) -> tuple[TokenStream, TokenStream]:
        """The first 80% of the tokens and the last 20%."""
        at = len(self.ids) - int(len(self.ids) * HELDOUT_SHARE)
        return (
            TokenStream(self.name, self.ids[:at], self.bos_id),
            TokenStream(self.name, self.ids[at:], self.bos_id),
        )

    def cut(self, num_windows: int, length: int, *, seed: int, bos: bool) -> TokenWindows:
        """See `TokenWindows.from_file`."""
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
                f"{length}; {num_windows} are asked for"
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
                f"{length} tokens; {num_windows} are asked for"
            )
        tokens_NT = all_NT[rows]
        if bos_id is not None:
            tokens_NT = np.pad(tokens_NT, ((0, 0), (1, 0)), constant_values=bos_id)
        return TokenWindows.from_tokens(tokens_NT, name=self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRequest:
    """How a run's windows are cut."""

    calibration: Mapping[str, str]
    """Corpus name -> path (text, folder, jsonl or npz)."""
    heldout: Mapping[str, str]
    """The same; empty: the last 20% of the calibration texts."""
    num_windows: int | Mapping[str, int]
    """Calibration windows of each corpus, or of every one by name."""
    heldout_windows: int
    """Held-out windows of each corpus."""
    length: int
    seed: int
    bos: bool = False
    field: str = "text"


def cut_windows(request: WindowRequest, tokenizer: str | Path) -> tuple[TokenWindows, TokenWindows]:
    """A run's calibration and held-out windows; they never overlap.

    A text named on both sides, or on the calibration side when no held-out is given, is split:
    its first 80% of tokens calibrate, the last 20% are held out. `.npz` corpora are used whole.

    Raises:
        InputError: unreadable or too short input, or windows of the two sides that share text.
    """
    sides = [TokenWindows.concatenate(parts) for parts in cut_corpora(request, tokenizer)]
    check_no_overlap(*sides)
    return sides[0], sides[1]


def cut_corpora(
    request: WindowRequest, tokenizer: str | Path
) -> tuple[list[TokenWindows], list[TokenWindows]]:
    """The same, corpus by corpus; overlaps are not looked for."""
    counts = request.num_windows
    loaded = None
    streams: dict[str, TokenStream] = {}

    def stream(name: str, path: str) -> TokenStream:
        nonlocal loaded
        loaded = loaded or load_tokenizer(tokenizer)
        key = str(Path(path).resolve())
        if key not in streams:
            streams[key] = TokenStream.read(path, loaded, field=request.field, name=name)
        return TokenStream(name, streams[key].ids, streams[key].bos_id)

    def cut(source: TokenStream, num: int) -> TokenWindows:
        return source.cut(num, request.length, seed=request.seed, bos=request.bos)

    texts = {n: stream(n, p) for n, p in request.calibration.items() if not _is_npz(p)}
    if request.heldout:
        others = {n: stream(n, p) for n, p in request.heldout.items() if not _is_npz(p)}
        held_npz = {n: p for n, p in request.heldout.items() if _is_npz(p)}
    elif len(texts) < len(request.calibration):
        raise InputError("calibration is an .npz: name a held-out text or .npz with --heldout")
    else:
        others, held_npz = texts, {}
    calibration, heldout = [], []
    for name, path in request.calibration.items():
        if _is_npz(path):
            calibration.append(TokenWindows.from_npz(path, name=name))
            continue
        shared = any(np.array_equal(texts[name].ids, other.ids) for other in others.values())
        source = texts[name].split()[0] if shared else texts[name]
        calibration.append(cut(source, counts if isinstance(counts, int) else counts[name]))
    for source in others.values():
        shared = any(np.array_equal(source.ids, text.ids) for text in texts.values())
        heldout.append(cut(source.split()[1] if shared else source, request.heldout_windows))
    heldout += [TokenWindows.from_npz(path, name=name) for name, path in held_npz.items()]
    return calibration, heldout


def check_no_overlap(calibration: TokenWindows, heldout: TokenWindows) -> None:
    """Raise InputError when a held-out window repeats a calibration window or a long run of one."""
    common = set(calibration.window_hashes) & set(heldout.window_hashes)
    if common:
        row = next(i for i, h in enumerate(heldout.window_hashes) if h in common)
        raise InputError(
            f"{len(common)} windows are in calibration and held-out alike, first held-out window "
            f"{row}; use different texts"
        )
    run = max(SHARED_RUN, min(calibration.length, heldout.length) // 2)
    if np.isin(_run_hashes(heldout, run), _run_hashes(calibration, run)).any():
        raise InputError(
            f"calibration and held-out share a verbatim run of {run} tokens; use different texts"
        )


def load_tokenizer(tokenizer: str | Path | Any) -> Any:
    """A transformers tokenizer from a local folder; anything else is returned as it is."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    if not Path(tokenizer).is_dir():
        raise InputError(f"tokenizer {str(tokenizer)!r} is not a folder")
    try:
        return AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a folder without a tokenizer
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no usable tokenizer in {tokenizer} ({line}); add tokenizer.json or give .npz windows"
        ) from None


def _is_npz(path: str) -> bool:
    return path.endswith(".npz")


def _run_hashes(windows: TokenWindows, run: int) -> NDArray[np.uint64]:
    """A polynomial hash, modulo 2**64, of every run of `run` tokens in a window."""
    starts = np.arange(max(windows.length - run + 1, 0))
    powers_T = np.cumprod(np.full(windows.length, _HASH_BASE, dtype=np.uint64))
    terms_NT = (windows.tokens_NT.astype(np.uint64) + np.uint64(1)) * powers_T
    sums_NT = np.pad(np.cumsum(terms_NT, axis=1), ((0, 0), (1, 0)))
    shift = np.full(len(starts), pow(_HASH_BASE, -1, 1 << 64), dtype=np.uint64)
    hashes = (sums_NT[:, starts + run] - sums_NT[:, starts]) * np.cumprod(shift)
    return hashes[starts <= windows.lengths_N[:, None] - run]


def _read_text(path: Path, *, field: str, name: str) -> str:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise InputError(f"corpus {name!r}: folder {path} holds no .txt files")
        return "\n\n".join(_read_text(file, field=field, name=name) for file in files)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"corpus {name!r}: {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"corpus {name!r}: {path} cannot be read as UTF-8: {error}") from None
    if path.suffix != ".jsonl":
        return text
    records = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError):
            value = None
        if not isinstance(value, str):
            raise InputError(f"corpus {name!r}: {path} line {number} has no text field {field!r}")
        records.append(value)
    return "\n\n".join(records)
