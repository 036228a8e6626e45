"""Masks of players: keys, strata, random designs, neighbours, rankings. Pure numpy, seeded.

A mask is `bool[P]`, True = kept; several masks are `bool[M, P]`. A stratum is the set of all masks
that keep the same number of players. The masks of a stratum are numbered by rank in lexicographic
order, so that sampling without replacement draws distinct integers, and a stratum that is drawn to
its end is enumerated exactly.

Notation: M masks, P players, D distinct masks, C masks of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from lpserve.types import BoolArray, FloatArray, IntArray

PAPER_DEPTH = 32
PAPER_KEPT = (30, 27, 24, 21, 18)
_MAX_RANK = 1 << 62
_PERMUTED = 1 << 22  # larger strata are drawn in chunks instead of being permuted
_CHUNK = 4096
_MAX_CHUNK = 1 << 20
_UNRANK_CHUNK = 1 << 14  # masks unranked at once: keeps the working set in the cache


def full_mask(num_players: int) -> BoolArray:
    """The mask that keeps every player, `bool[P]`."""
    return np.ones(num_players, dtype=bool)


def without(num_players: int, removed: Sequence[int]) -> BoolArray:
    """The mask that keeps all but `removed`, `bool[P]`."""
    mask_P = full_mask(num_players)
    mask_P[list(removed)] = False
    return mask_P


def removed_players(mask_P: BoolArray) -> tuple[int, ...]:
    """Sorted indices of the dropped players."""
    return tuple(int(i) for i in np.flatnonzero(~mask_P))


def removed_list(mask_P: BoolArray) -> list[int]:
    """Sorted indices of the removed players, as plain integers for JSON."""
    return list(removed_players(mask_P))


def pack(masks_MP: BoolArray) -> np.ndarray:
    """Mask keys as `uint8[M, ceil(P/8)]`, player 0 in the highest bit of the first byte, so that
    the order of bytes is that of masks."""
    return np.packbits(np.asarray(masks_MP, dtype=bool), axis=1)


def keys(masks_MP: BoolArray) -> list[bytes]:
    """One `bytes` key for each mask. Keys sort as masks do: player 0 first, dropped before kept."""
    packed = pack(masks_MP)
    width = packed.shape[1]
    data = packed.tobytes()
    return [data[i * width : (i + 1) * width] for i in range(len(packed))]


def from_keys(mask_keys: Sequence[bytes], num_players: int) -> BoolArray:
    """The masks of some keys, `bool[M, P]`; inverse of `keys`."""
    width = (num_players + 7) // 8
    packed = np.frombuffer(b"".join(mask_keys), dtype=np.uint8).reshape(len(mask_keys), width)
    return np.unpackbits(packed, axis=1, count=num_players).astype(bool)


def key_text(key: bytes, num_players: int) -> str:
    """A mask key written as digits 0 and 1, player 0 first, 1 = kept."""
    return "".join("01"[int(bit)] for bit in from_keys([key], num_players)[0])


def sort_distinct(masks_MP: BoolArray) -> tuple[BoolArray, IntArray]:
    """Distinct masks in key order, `bool[D, P]`, and the row of each input mask, `int64[M]`."""
    masks_MP = np.asarray(masks_MP, dtype=bool)
    packed = np.ascontiguousarray(pack(masks_MP))
    void_M = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first_M, inverse_M = np.unique(void_M, return_index=True, return_inverse=True)
    return masks_MP[first_M], inverse_M.reshape(-1).astype(np.int64)


def paper_kept_counts(num_players: int) -> tuple[int, ...]:
    """Kept counts of the strata of arXiv 2602.07804, for any number of players, largest first.

    The paper's 30, 27, 24, 21, 18 of 32 are scaled, rounded half up and clipped to 1..P-1; repeats
    are dropped.
    """
    scaled = [(2 * kept * num_players + PAPER_DEPTH) // (2 * PAPER_DEPTH) for kept in PAPER_KEPT]
    return tuple(dict.fromkeys(min(max(kept, 1), num_players - 1) for kept in scaled))


def unrank(ranks_M: IntArray, num_players: int, kept: int) -> BoolArray:
    """Masks of the stratum `kept` by lexicographic rank, `bool[M, P]`; kept sorts before dropped.

    Raises:
        ValueError: a rank is not in 0..C(P, kept)-1, or C(P, kept) is 2**62 or more.
    """
    total = math.comb(num_players, kept)
    if total >= _MAX_RANK:
        raise ValueError(f"stratum {kept} of {num_players} is too large to rank")
    ranks_M = np.asarray(ranks_M, dtype=np.int64)
    if ranks_M.size and (ranks_M.min() < 0 or ranks_M.max() >= total):
        raise ValueError(f"ranks must lie in 0..{total - 1}")
    table = _with_next_kept(num_players, kept)
    masks_MP = np.empty((len(ranks_M), num_players), dtype=bool)
    for start in range(0, len(ranks_M), _UNRANK_CHUNK):
        left = ranks_M[start : start + _UNRANK_CHUNK].copy()
        rows = slice(start, start + len(left))
        need = np.full(len(left), kept, dtype=np.intp)
        with_player, keep = np.empty_like(left), np.empty(len(left), dtype=bool)
        for player in range(num_players):
            # masks that keep this player come first; "clip" spares numpy a buffer
            np.take(table[num_players - 1 - player], need, out=with_player, mode="clip")
            np.less(left, with_player, out=keep)
            masks_MP[rows, player] = keep
            need -= keep
            with_player *= np.logical_not(keep, out=keep)
            left -= with_player
    return masks_MP


@lru_cache(maxsize=64)
def _with_next_kept(num_players: int, kept: int) -> IntArray:
    """`int64[P, kept+1]`: entry [n, k] is the number of masks that keep k players, the next one
    among them, when n players follow it: C(n, k-1), 0 at k = 0."""
    table = np.array(
        [[0] + [min(math.comb(n, k), _MAX_RANK) for k in range(kept)] for n in range(num_players)],
        dtype=np.int64,
    ).reshape(num_players, kept + 1)
    table.flags.writeable = False
    return table


def draw(num_players: int, kept: int, count: int, rng: np.random.Generator) -> BoolArray:
    """Random masks of one stratum, uniform, with replacement, `bool[count, P]`."""
    total = math.comb(num_players, kept)
    if total < _MAX_RANK:
        return unrank(rng.integers(total, size=count), num_players, kept)
    return _select(num_players, kept, count, rng)


def _select(num_players: int, kept: int, count: int, rng: np.random.Generator) -> BoolArray:
    """Selection sampling: player i is kept with probability (still needed) / (still to come)."""
    masks_MP = np.empty((count, num_players), dtype=bool)
    for start in range(0, count, _UNRANK_CHUNK):
        need = np.full(min(_UNRANK_CHUNK, count - start), kept, dtype=np.int64)
        for player in range(num_players):
            keep = rng.random(len(need)) * (num_players - player) < need
            masks_MP[start : start + len(need), player] = keep
            need -= keep
    return masks_MP


def stratum_stream(num_players: int, kept: int, seed: int) -> Iterator[BoolArray]:
    """All masks of one stratum in a seeded random order without repeats, in chunks `bool[C, P]`.

    The first n masks do not depend on how many are taken. Chunks double in size, so that finding
    out which drawn masks are new takes n log n time over all chunks.
    """
    rng = np.random.default_rng([seed, num_players, kept])
    total = math.comb(num_players, kept)
    if total <= _PERMUTED:
        ranks = rng.permutation(total)
        for start in range(0, total, _CHUNK):
            yield unrank(ranks[start : start + _CHUNK], num_players, kept)
        return
    rankable = total < _MAX_RANK
    width = (num_players + 7) // 8
    seen = np.empty(0, dtype=np.int64 if rankable else np.dtype((np.void, width)))
    chunk = _CHUNK
    while len(seen) < total:
        if rankable:
            labels_M = rng.integers(total, size=chunk)
            fresh, seen = _unseen(labels_M, seen)
            yield unrank(labels_M[fresh], num_players, kept)
        else:
            masks_MP = _select(num_players, kept, chunk, rng)
            fresh, seen = _unseen(pack(masks_MP).view(seen.dtype).ravel(), seen)
            yield masks_MP[fresh]
        chunk = min(2 * chunk, _MAX_CHUNK)


def _unseen(labels_M: np.ndarray, seen: np.ndarray) -> tuple[IntArray, np.ndarray]:
    """Positions of the first occurrence of labels not in the sorted `seen`, ascending, and `seen`
    merged with these labels."""
    order = np.argsort(labels_M, kind="stable")
    sorted_M = labels_M[order]
    new_M = np.ones(len(sorted_M), dtype=bool)
    new_M[1:] = sorted_M[1:] != sorted_M[:-1]
    if len(seen):  # sorted queries make for a search that stays in the cache
        place = np.minimum(np.searchsorted(seen, sorted_M), len(seen) - 1)
        new_M &= seen[place] != sorted_M
    # a stable sort of two sorted runs merges them
    seen = np.sort(np.concatenate([seen, sorted_M[new_M]]), kind="stable")
    return np.sort(order[new_M]), seen


class StratifiedDesign:
    """Distinct random masks dealt round-robin from several strata, reproducible by seed.

    Mask j of stratum s comes in the order of (j, s); a stratum is skipped once all its masks have
    been dealt.

    Raises:
        ValueError: kept counts repeat, are none, or are not in 0..P.
    """

    def __init__(self, num_players: int, kept_counts: Sequence[int], seed: int) -> None:
        if not kept_counts or any(not 0 <= kept <= num_players for kept in kept_counts):
            raise ValueError(f"kept counts must lie in 0..{num_players}: got {list(kept_counts)}")
        if len(set(kept_counts)) != len(kept_counts):
            raise ValueError(f"kept counts repeat: {list(kept_counts)}")
        self._num_players = num_players
        self._sizes = [math.comb(num_players, kept) for kept in kept_counts]
        self._streams = [stratum_stream(num_players, kept, seed) for kept in kept_counts]
        self._ready = [np.empty((0, num_players), dtype=bool) for _ in kept_counts]
        self._dealt = 0

    def take(self, count: int) -> BoolArray:
        """The next masks, `bool[<=count, P]`; fewer only when every stratum is exhausted."""
        before = self._taken(self._dealt)
        after = self._taken(min(self._dealt + count, sum(self._sizes)))
        self._dealt = sum(after)
        masks = [self._pull(s, after[s] - before[s]) for s in range(len(self._sizes))]
        place = np.concatenate([np.arange(b, a) for b, a in zip(before, after, strict=True)])
        stratum = np.repeat(np.arange(len(masks)), [len(part) for part in masks])
        return np.concatenate(masks)[np.lexsort((stratum, place))]

    def _taken(self, dealt: int) -> list[int]:
        """How many masks of each stratum are among the first `dealt`."""
        low, high = 0, max(self._sizes)
        while low < high:  # the number of complete laps
            lap = (low + high + 1) // 2
            low, high = (
                (lap, high)
                if sum(min(size, lap) for size in self._sizes) <= dealt
                else (low, lap - 1)
            )
        taken = [min(size, low) for size in self._sizes]
        rest = dealt - sum(taken)
        for s, size in enumerate(self._sizes):
            if rest and size > low:
                taken[s] += 1
                rest -= 1
        return taken

    def _pull(self, stratum: int, count: int) -> BoolArray:
        """The next `count` masks of one stratum."""
        parts, have = [self._ready[stratum]], len(self._ready[stratum])
        while have < count:
            parts.append(next(self._streams[stratum]))
            have += len(parts[-1])
        ready = np.concatenate(parts) if len(parts) > 1 else parts[0]
        self._ready[stratum] = ready[count:]
        return ready[:count]


def drop_one(mask_P: BoolArray) -> BoolArray:
    """Every mask that drops one more player, `bool[kept, P]`."""
    kept = np.flatnonzero(mask_P)
    masks_MP = np.repeat(mask_P[None], len(kept), axis=0)
    masks_MP[np.arange(len(kept)), kept] = False
    return masks_MP


def add_one(mask_P: BoolArray) -> BoolArray:
    """Every mask that keeps one more player, `bool[dropped, P]`."""
    dropped = np.flatnonzero(~mask_P)
    masks_MP = np.repeat(mask_P[None], len(dropped), axis=0)
    masks_MP[np.arange(len(dropped)), dropped] = True
    return masks_MP


def swap_one(mask_P: BoolArray) -> BoolArray:
    """Every mask with one kept player exchanged for a dropped one, `bool[kept * dropped, P]`."""
    kept, dropped = np.flatnonzero(mask_P), np.flatnonzero(~mask_P)
    out, back = np.repeat(kept, len(dropped)), np.tile(dropped, len(kept))
    masks_MP = np.repeat(mask_P[None], len(out), axis=0)
    rows = np.arange(len(out))
    masks_MP[rows, out] = False
    masks_MP[rows, back] = True
    return masks_MP


def best_row(masks_MP: BoolArray, utilities_M: FloatArray) -> int | None:
    """Row of the highest finite utility (ties: the smaller mask key); None when none is finite."""
    rows = np.flatnonzero(np.isfinite(utilities_M))
    if not len(rows):
        return None
    best = utilities_M[rows].max()
    tied = rows[utilities_M[rows] == best]
    tied_keys = keys(masks_MP[tied])
    return int(tied[tied_keys.index(min(tied_keys))])


def ranking_mask(values_P: FloatArray, num_removed: int) -> BoolArray:
    """The mask that drops the `num_removed` players of the lowest values, `bool[P]`.

    Ties drop the earlier player.
    """
    order = np.argsort(values_P, kind="stable")
    return without(len(values_P), [int(i) for i in order[:num_removed]])


def all_masks(num_players: int, kept: int | None = None) -> BoolArray:
    """Every mask of a stratum by rank, or of all strata in key order, `bool[M, P]`; for small P."""
    if kept is not None:
        return unrank(np.arange(math.comb(num_players, kept)), num_players, kept)
    codes = np.arange(1 << num_players)[:, None]
    return (codes >> np.arange(num_players - 1, -1, -1)) & 1 == 1


def trie_player_forwards(masks_MP: BoolArray) -> IntArray:
    """Forwards of each player in the trie of some masks: its distinct prefixes, `int64[P]`.

    In key order a mask shares the kept players of its common prefix with the mask before it and
    adds the others.
    """
    if not len(masks_MP):
        return np.zeros(np.asarray(masks_MP).shape[1], dtype=np.int64)
    sorted_MP, _ = sort_distinct(masks_MP)
    differs_MP = sorted_MP[1:] != sorted_MP[:-1]
    first_M = differs_MP.argmax(axis=1)
    fresh_MP = np.arange(sorted_MP.shape[1]) >= first_M[:, None]
    return sorted_MP[0] + (sorted_MP[1:] & fresh_MP).sum(axis=0, dtype=np.int64)


def trie_layer_forwards(masks_MP: BoolArray) -> int:
    """Layer-forwards of the trie of some masks, the sum over players."""
    return int(trie_player_forwards(masks_MP).sum())
