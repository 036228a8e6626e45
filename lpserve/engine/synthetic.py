"""A game with a known answer, for tests of everything that is not a model; may be slow or fail.

The mean NLL of a mask is a constant plus a main effect for every dropped player plus an effect for
every dropped pair, with a fixed factor for each window::

    nll[m, n] = num_tokens[n] * w[n] * (1 + sum_i d_i a_i + sum_{i<j} d_i d_j b_ij),  d = 1 - mask
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from lpserve.data.windows import TokenWindows
from lpserve.engine.base import Engine, check_extra_metrics, check_masks
from lpserve.engine.kind import EngineKind, EngineResources, check_known_options
from lpserve.errors import EngineError, InputError
from lpserve.masks import sort_distinct, trie_layer_forwards
from lpserve.model.players import FULL_LAYER, GROUPS, half_players, layer_players
from lpserve.types import BoolArray, EngineInfo, EngineSpec, FloatArray, Player, Scores, Work

_NUMBER = Annotated[int, Meta(ge=0, le=2**31, description="a whole number, at least 0")]
_SECONDS = Annotated[float, Meta(ge=0, le=1e6, description="seconds")]
_MASKS = Annotated[list[str], Meta(description="a list of masks")]
OPTIONS = {
    "num_players": Annotated[int, Meta(ge=1, le=2**20, description="a whole number, at least 1")],
    "game_seed": _NUMBER,
    "delay_s": _SECONDS,
    **dict.fromkeys(("poison", "nan", "kill", "hang", "break"), _MASKS),
    "slow_file": str,
    "slow_s": _SECONDS,
    "tally": str,
    "tensor_parallel_size": _NUMBER,
    "pipeline_parallel_size": _NUMBER,
}
"""Options and their types."""
DEFAULT_PLAYERS = 8


class SyntheticEngine:
    """See `lpserve.engine.base.Engine`. Options:

    * `num_players`, `game_seed`: which game.
    * `delay_s`: sleep for each distinct mask (all at once where no mask is special).
    * `poison`: masks (strings of 0 and 1) that raise when scored; `nan`: masks that score NaN;
      `kill`: masks that end the process with SIGKILL; `hang`: masks that never end; `break`:
      masks after which an engine raises whatever it is asked.
    * `tensor_parallel_size`, `pipeline_parallel_size`: ask a cluster for room for such an engine.
    * `tally`: a file that every engine of the game appends the masks of each scored unit to.
    * `slow_file`, `slow_s`: the one engine that makes this file sleeps so long for each mask.
    """

    def __init__(self, spec: EngineSpec, windows: TokenWindows) -> None:
        options = spec.options
        num_players = int(options.get("num_players", DEFAULT_PLAYERS))
        if num_players < 1:
            raise InputError(f"num_players must be at least 1: got {num_players}")
        rng = np.random.default_rng(int(options.get("game_seed", 0)))
        self.main_P: FloatArray = rng.uniform(0.01, 0.3, num_players)
        self.pairs_PP: FloatArray = np.triu(rng.normal(0, 0.03, (num_players, num_players)), 1)
        self._delay_s = float(options.get("delay_s", 0.0))
        kinds = ("poison", "nan", "kill", "hang", "break")
        self._special = {name: set(options.get(name, ())) for name in kinds}
        if options.get("slow_file") and _made_first(str(options["slow_file"])):
            self._delay_s = float(options.get("slow_s", 1.0))
        self._broken = False
        self._tally = options.get("tally")
        self._windows: dict[str, TokenWindows] = {}
        self._default = self.register(windows)
        self.masks_scored = 0
        self.info = EngineInfo(
            kind="synthetic",
            path="synthetic",
            model=f"synthetic-{num_players}-{options.get('game_seed', 0)}",
            model_hash=f"synthetic-{num_players}-{options.get('game_seed', 0)}",
            players=spec.players or layer_players(num_players),
            dtype="float32",
            device="cpu",
            vocab_size=int(np.iinfo(np.int32).max),
            versions={"numpy": np.__version__},
            settings={},
        )

    def register(self, windows: TokenWindows) -> str:
        self._windows[windows.content_hash] = windows
        return windows.content_hash

    def score(
        self, masks_MP: BoolArray, windows: str | None = None, extra_metrics: Sequence[str] = ()
    ) -> Scores:
        check_extra_metrics(self.info, extra_metrics)
        block = self._windows[self._default if windows is None else windows]
        masks_MP = check_masks(masks_MP, self.info.num_players)
        sorted_MP, inverse_M = sort_distinct(masks_MP)
        started = time.perf_counter()
        mean_M = self.mean_nll(sorted_MP)
        self._take_time(sorted_MP, mean_M)
        if self._tally:
            with open(self._tally, "a") as tally:
                tally.write(f"{len(sorted_MP)}\n")
        self.masks_scored += len(sorted_MP)
        factor_N = 1 + 0.1 * np.cos(np.array([int(h[:8], 16) for h in block.window_hashes]))
        work = Work(
            masks=len(masks_MP),
            distinct_masks=len(sorted_MP),
            layer_forwards=trie_layer_forwards(masks_MP),
            skip_layer_forwards=int(masks_MP.sum()),
            tokens=len(sorted_MP) * block.tokens_NT.size,
            seconds=time.perf_counter() - started,
        )
        return Scores(
            nll_MN=(mean_M[:, None] * factor_N * block.num_tokens_N)[inverse_M],
            num_tokens_N=block.num_tokens_N,
            work=work,
        )

    def _take_time(self, sorted_MP: BoolArray, mean_M: FloatArray) -> None:
        if not any(self._special.values()):
            time.sleep(self._delay_s * len(sorted_MP))
            return
        for row, mask_P in enumerate(sorted_MP):
            text = "".join("01"[int(bit)] for bit in mask_P)
            if text in self._special["kill"]:
                os.kill(os.getpid(), 9)
            while text in self._special["hang"]:
                time.sleep(1.0)
            self._broken |= text in self._special["break"]
            if self._broken:
                raise EngineError("nothing works any more")
            if text in self._special["poison"]:
                raise EngineError(f"mask {text} is poisoned")
            if text in self._special["nan"]:
                mean_M[row] = np.nan
            time.sleep(self._delay_s)

    def mean_nll(self, masks_MP: BoolArray) -> FloatArray:
        """The known answer before the window factor, `float64[M]`."""
        dropped_MP = 1.0 - masks_MP
        pair_M = np.einsum("mi,ij,mj->m", dropped_MP, self.pairs_PP, dropped_MP)
        return 1 + dropped_MP @ self.main_P + pair_M

    def close(self) -> None:
        pass

    def __enter__(self) -> SyntheticEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _made_first(path: str) -> bool:
    """Whether this call made the file: true for one engine of many."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def check_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for an option that the synthetic engine does not have."""
    check_known_options("synthetic", options, OPTIONS)


def _build(spec: EngineSpec, windows: TokenWindows) -> Engine:
    return SyntheticEngine(spec, windows)


def _players(_: str, options: Mapping[str, Any], kind: str) -> tuple[Player, ...]:
    """As many layers as there are players, or halves of half as many."""
    num_players = int(options.get("num_players", DEFAULT_PLAYERS))
    if kind == FULL_LAYER:
        return layer_players(num_players)
    if kind.startswith(GROUPS):
        raise InputError("the synthetic engine has layers and halves: players cannot be groups")
    if num_players % 2:
        raise InputError(f"num_players must be even for halves of layers: got {num_players}")
    return half_players([False] * (num_players // 2))


def _resources(spec: EngineSpec) -> EngineResources:
    """A GPU only where the options ask for ranks, as an engine of a model would have them."""
    return EngineResources(
        ranks=int(spec.options.get("tensor_parallel_size", 1)),
        stages=int(spec.options.get("pipeline_parallel_size", 1)),
        may_use_gpu=spec.device != "cpu" and "tensor_parallel_size" in spec.options,
    )


SYNTHETIC = EngineKind(
    name="synthetic",
    build=_build,
    check_options=check_options,
    players=_players,
    resources=_resources,
    reads_checkpoint=False,
    is_game=True,
)
