"""Random scores for stores, and what must be read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.store.store import Store
from lpserve.types import Game, Player

NUM_PLAYERS = 12


def make_game(model: str = "m", numerics: str = "float32", num_players: int = NUM_PLAYERS) -> Game:
    """A game that needs no model."""
    players = tuple(Player(index=i, layer=i) for i in range(num_players))
    return Game(model_hash=model, players=players, numerics=numerics)


GAME = make_game()


def drawn_windows(rng: np.random.Generator, num: int) -> TokenWindows:
    """Windows of 16 random tokens."""
    return TokenWindows.from_tokens(rng.integers(4096, size=(num, 16)))


def random_masks(rng: np.random.Generator, num: int) -> np.ndarray:
    """Distinct masks in random order."""
    codes = rng.choice(1 << NUM_PLAYERS, num, replace=False)
    return (codes[:, None] >> np.arange(NUM_PLAYERS)) & 1 == 1


def random_nll(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """NLLs as they are stored, `float32[shape]`."""
    return rng.uniform(10, 2000, shape).astype(np.float32)


def put_all(store: Store, windows: TokenWindows, masks: np.ndarray, nll: np.ndarray) -> int:
    """Put scores `nll[M, N]` on every block of the windows; returns how many were new."""
    game = store.game_id(GAME)
    return sum(store.put(game, b, masks, nll[:, b.rows]) for b in store.blocks_for(windows))


def known_nll(store: Store, windows: TokenWindows, masks: np.ndarray) -> np.ndarray:
    """Scores of masks that must all be known."""
    nll, known = store.get(store.game_id(GAME), windows, masks)
    assert known.all()
    return nll


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two float32 arrays are equal bit for bit, NaNs too."""
    return a.dtype == b.dtype == np.float32 and a.tobytes() == b.tobytes()


def numbered_score(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Mask `bool[1, P]` and scores `float32[1, 4]` that a number stands for, in any process."""
    mask = (number >> np.arange(NUM_PLAYERS)) & 1 == 1
    return mask[None], np.random.default_rng(number).random((1, 4)).astype(np.float32)


def filled(
    path: Path,
    rng: np.random.Generator,
    num_masks: int = 200,
    num_windows: int = 12,
    *,
    shared: bool | None = None,
) -> tuple[TokenWindows, np.ndarray, np.ndarray]:
    """Write a store of random scores; its windows, masks and `nll[M, N]`."""
    windows, masks = drawn_windows(rng, num_windows), random_masks(rng, num_masks)
    nll = random_nll(rng, num_masks, num_windows)
    with Store(path, shared=shared) as store:
        put_all(store, windows, masks, nll)
    return windows, masks, nll
