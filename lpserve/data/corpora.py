"""A run's corpora cut into calibration and held-out windows that do not overlap.

Notation: N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lpserve.data.tokenizer import load_tokenizer
from lpserve.data.windows import TokenStream, TokenWindows
from lpserve.errors import InputError

SHARED_RUN = 32
"""A verbatim run of this many tokens (or half a window, if longer) is an overlap."""
_HASH_BASE = 0x9E3779B97F4A7C15  # odd: has an inverse modulo 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRequest:
    """How a run's windows are cut from its corpora."""

    calibration: Mapping[str, str]
    """Corpus name -> path (text, folder, jsonl or npz)."""
    heldout: Mapping[str, str]
    """Held-out corpora, as above; empty: the last 20% of the calibration texts are held out."""
    num_windows: int | Mapping[str, int]
    """Calibration windows of each corpus; a mapping gives each corpus, by name, its own number."""
    heldout_windows: int
    """Held-out windows of each corpus."""
    length: int
    """Tokens of a window, a BOS included when `bos`."""
    seed: int
    """Of the permutation that windows are drawn from."""
    bos: bool = False
    """Whether every window begins with the tokenizer's BOS."""
    field: str = "text"
    """The jsonl field that holds the text."""


def cut_windows(request: WindowRequest, tokenizer: str | Path) -> tuple[TokenWindows, TokenWindows]:
    """A run's calibration and held-out windows; they never overlap.

    A text named on both sides, or on the calibration side when no held-out is given, is split:
    its first 80% of tokens calibrate, the last 20% are held out. `.npz` corpora are used in full.

    Raises:
        InputError: unreadable or too short input, or windows of the two sides that share text.
    """
    sides = [TokenWindows.concatenate(parts) for parts in cut_corpora(request, tokenizer)]
    check_no_overlap(*sides)
    return sides[0], sides[1]


def cut_corpora(
    request: WindowRequest, tokenizer: str | Path
) -> tuple[list[TokenWindows], list[TokenWindows]]:
    """Calibration and held-out windows corpus by corpus; does not check for overlaps.

    See `cut_windows`.

    Raises:
        InputError: unreadable or too short input.
    """
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

    def cut(source: TokenStream, num: int, key: str) -> TokenWindows:
        return source.cut(num, request.length, seed=request.seed, bos=request.bos, key=key)

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
        wanted = counts if isinstance(counts, int) else counts[name]
        calibration.append(cut(source, wanted, "num_windows"))
    for source in others.values():
        shared = any(np.array_equal(source.ids, text.ids) for text in texts.values())
        part, what = source, "heldout_windows"
        if shared:
            part, what = source.split()[1], "heldout_windows, of the last fifth of the text"
        heldout.append(cut(part, request.heldout_windows, what))
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
