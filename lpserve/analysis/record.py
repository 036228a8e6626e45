"""What a finished run scored, as one value and one file: everything that a decision reads.

Notation: M masks, P players, N windows (or questions of tasks, `lpserve.data.items`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.analysis.resample import mean_nll, window_weights
from lpserve.errors import InputError
from lpserve.store.files import write_npz
from lpserve.types import (
    BoolArray,
    FloatArray,
    IntArray,
    Player,
    has_perplexity,
    is_share,
    known_utilities,
    loss_scale,
    loss_weights,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """Everything that a decision reads."""

    model: str
    model_hash: str
    players: tuple[Player, ...]
    utility: str
    surrogate: str
    sizes: tuple[int, int]
    max_removed: int
    seed: int
    masks_MP: BoolArray
    """Masks in the order in which they were asked for; the first keeps all."""
    nll_MN: NDArray[np.float32]
    """NaN rows: given up. What perplexities are told from; of questions, the right answers'."""
    num_tokens_N: IntArray
    """Tokens that the NLLs are summed over."""
    corpora: tuple[tuple[str, int], ...]
    """Name and number of calibration windows (questions) of each corpus, in order."""
    sources: tuple[str, ...]
    """How each mask was found."""
    heldout_masks_MP: BoolArray
    heldout_nll_MN: NDArray[np.float32]
    heldout_num_tokens_N: IntArray
    passed_by_MP: BoolArray
    """Masks of greedy steps that were not scored, since they had no chance to be the best."""
    stopped: str
    """Why no more masks were asked for."""
    screen: tuple[int, ...] = ()
    """Windows that every mask was scored on; some masks on them alone, NaN elsewhere. Empty: no
    mask was screened."""
    noise_nll: float = 0.0
    """Noise of a mask's mean loss, root mean square; of texts `EngineInfo.noise_nll`, also for
    other losses (in bfloat16 on a GPU they strayed from float32 0.8 to 0.9 times as far:
    scripts/bench/results/gpu.md)."""
    other_loss_MN: NDArray[np.float32] | None = None
    """What else than NLLs the utility is made of; see `loss_MN`."""
    heldout_loss_MN: NDArray[np.float32] | None = None
    """The same on held-out windows; None: NLLs, or the utility is not defined there."""

    @property
    def weight_N(self) -> IntArray:
        """What losses are weighed by: tokens, or 1 for each question."""
        return loss_weights(self.utility, self.num_tokens_N)

    @property
    def loss_scale(self) -> float:
        """See `types.loss_scale`."""
        return loss_scale(self.utility, self.num_tokens_N)

    def heldout(self) -> tuple[NDArray[np.float32], IntArray] | None:
        """Losses `[H, N]` of `heldout_masks_MP` on held-out windows, and their weights; None where
        the utility is not defined there."""
        loss_MN = self.heldout_loss_MN
        if loss_MN is None and has_perplexity(self.utility):
            loss_MN = self.heldout_nll_MN
        if loss_MN is None:
            return None
        return loss_MN, loss_weights(self.utility, self.heldout_num_tokens_N)

    @property
    def loss_MN(self) -> NDArray[np.float32]:
        """What the utility is made of, and every decision reads: NLLs, or another metric's sums."""
        return self.nll_MN if self.other_loss_MN is None else self.other_loss_MN

    @property
    def num_players(self) -> int:
        return len(self.players)

    def scored_M(self) -> BoolArray:
        """Masks with a score, finite or not (a mask that was given up has NaN alone)."""
        return ~np.asarray(np.isnan(self.nll_MN).all(axis=1))

    def screened_M(self) -> BoolArray:
        """Masks with scores on the screen alone."""
        finite_MN = np.isfinite(self.nll_MN)
        if not self.screen:
            return np.zeros(len(finite_MN), dtype=bool)
        beyond = np.setdiff1d(np.arange(finite_MN.shape[1]), self.screen)
        on_screen_M = finite_MN[:, list(self.screen)].all(axis=1)
        return np.asarray(on_screen_M & np.isnan(self.nll_MN[:, beyond]).all(axis=1))

    def utility_of(
        self,
        loss_MN: NDArray[np.float32],
        name: str | None = None,
        windows: Sequence[int] | None = None,
    ) -> FloatArray:
        """The run's utility, or a named one, on all windows or some; NaN where a score is not
        finite: never a training point, never chosen."""
        name = name or self.utility
        scale = 1.0 if name == self.utility else self.loss_scale
        weight_N = (self.weight_N * scale).astype(np.float64)
        return known_utilities(name, loss_MN, weight_N, self.loss_MN[0], windows)

    def noise_of(self, utilities_M: FloatArray) -> FloatArray | None:
        """Variance of each utility from the engine's rounding; None where it has none."""
        if not self.noise_nll:
            return None
        slope_M = utilities_M if self.utility == "ppl_ratio" else np.ones(len(utilities_M))
        return (slope_M * self.noise_nll) ** 2

    @property
    def corpus_sizes(self) -> list[int]:
        """Calibration windows of each corpus, in order."""
        return [count for _, count in self.corpora]

    def resampled(self, loss_MN: NDArray[np.float32]) -> FloatArray | None:
        """The utility under draws of the windows, `float64[M, B]` (`lpserve.analysis.resample`).

        None for a single window.
        """
        if len(self.num_tokens_N) < 2:
            return None
        weights_BN = window_weights(self.corpus_sizes, seed=self.seed)
        masks_MB = mean_nll(loss_MN.astype(np.float64), self.weight_N, weights_BN)
        if self.utility != "ppl_ratio":
            return 1.0 - masks_MB if is_share(self.utility) else -masks_MB
        full_1B = mean_nll(self.loss_MN[:1].astype(np.float64), self.weight_N, weights_BN)
        with np.errstate(under="ignore"):
            return np.asarray(np.exp(full_1B - masks_MB), dtype=np.float64)


def write_record_file(path: Path, scored: RunRecord) -> None:
    """scores.npz: what `lpserve plan` decides from, without the store."""
    about = {
        "model": scored.model,
        "model_hash": scored.model_hash,
        "utility": scored.utility,
        "surrogate": scored.surrogate,
        "sizes": list(scored.sizes),
        "seed": scored.seed,
        "max_removed": scored.max_removed,
        "noise_nll": scored.noise_nll,
        "stopped": scored.stopped,
        "corpora": [list(c) for c in scored.corpora],
        "players": [[p.index, p.layer, p.part] for p in scored.players],
    }
    other: dict[str, Any] = {}
    if scored.other_loss_MN is not None:
        other["loss"] = scored.other_loss_MN
    if scored.heldout_loss_MN is not None:
        other["heldout_loss"] = scored.heldout_loss_MN
    arrays = {
        "about": np.array(json.dumps(about)),
        "masks": scored.masks_MP,
        "nll": scored.nll_MN,
        "num_tokens": scored.num_tokens_N,
        "sources": np.array(scored.sources),
        "passed_by": scored.passed_by_MP,
        "screen": np.array(scored.screen, dtype=np.int64),
        "heldout_masks": scored.heldout_masks_MP,
        "heldout_nll": scored.heldout_nll_MN,
        "heldout_num_tokens": scored.heldout_num_tokens_N,
        **other,
    }
    write_npz(path, arrays)


def read_record(run: str | Path) -> RunRecord:
    """The scores of a finished run; raises InputError when the folder holds none."""
    path = Path(run) / "scores.npz"
    try:
        with np.load(path, allow_pickle=False) as data:
            about = json.loads(str(data["about"]))
            return RunRecord(
                model=about["model"],
                model_hash=about["model_hash"],
                utility=about["utility"],
                surrogate=about["surrogate"],
                sizes=tuple(about["sizes"]),
                seed=about["seed"],
                max_removed=about["max_removed"],
                noise_nll=about.get("noise_nll", 0.0),
                players=tuple(Player(index=i, layer=n, part=p) for i, n, p in about["players"]),
                masks_MP=data["masks"],
                nll_MN=data["nll"],
                num_tokens_N=data["num_tokens"],
                sources=tuple(str(s) for s in data["sources"]),
                passed_by_MP=data["passed_by"],
                stopped=about["stopped"],
                screen=tuple(data["screen"].tolist()) if "screen" in data else (),
                corpora=tuple((str(name), int(count)) for name, count in about["corpora"]),
                heldout_masks_MP=data["heldout_masks"],
                heldout_nll_MN=data["heldout_nll"],
                heldout_num_tokens_N=data["heldout_num_tokens"],
                other_loss_MN=data.get("loss"),
                heldout_loss_MN=data.get("heldout_loss"),
            )
    except FileNotFoundError:
        raise InputError(
            f"{run} holds no finished run (no scores.npz): finish `lpserve run` first"
        ) from None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); run `lpserve run` again") from None
