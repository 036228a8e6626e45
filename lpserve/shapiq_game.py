"""The layer game as a `shapiq.Game`: any shapiq approximator or index on lpserve's scores.

shapiq (Muschalik et al., NeurIPS 2024) asks for coalitions, its word for masks, True = kept; this
module knows what they are worth and what that took. It estimates nothing itself. Needs the extra
`shapiq`, and is the only module that imports it. With a vLLM engine open that first: shapiq loads
llvmlite, and vLLM 0.32 cannot start in a process where that is loaded.

shapiq's values are Shapley values over all sizes, (0, P-1); those of a run are truncated by default
(`lpserve run --sizes 0,P-1`: not truncated).

Notation: M masks, P players, N windows.
"""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.analysis.record import RunRecord, read_record
from lpserve.engine.base import Engine
from lpserve.errors import InputError
from lpserve.exhaustive.game import ExhaustiveGame, read_exhaustive
from lpserve.masks import keys
from lpserve.surrogate import KINDS, make_surrogate
from lpserve.types import BoolArray, FloatArray
from lpserve.utility import Utility, utility_named
from lpserve.values.shapley import check_game

try:
    from shapiq import Game
except ImportError as error:
    raise InputError(
        f'lpserve.shapiq_game needs shapiq ({error}): pip install "lpserve[shapiq]"'
    ) from None

MaskValue = Callable[[BoolArray], FloatArray]
"""masks_MP -> `float64[M]`, higher is better."""


class LayerGame(Game):
    """Utilities of masks as a shapiq game: every coalition is scored once and remembered.

    All coalitions of one call that are new go to the utility together, so an engine shares their
    prefixes; an approximator that asks for one at a time shares nothing. `verbose` calls do that.

    `normalize` is shapiq's word for centring: a coalition's value is its utility minus that of the
    empty coalition (no layer at all: embedding, final norm, head), which is then worth 0. Neither
    `ppl_ratio` nor `neg_nll` is rescaled, and values and interactions of layers are the same either
    way; only the baseline, the interaction of order 0, moves. `normalization_value` is the utility
    of the empty coalition, or 0.

    `game_values`, shapiq's own memory, holds the utilities that were really scored, not centred, so
    that `game[(0, 1)]`, `n_values_stored` and `save` mean what they say.

    Args:
        num_players: P.
        utility: what coalitions are worth, NaN where it has no score. The first call is for the
            full model and the empty coalition, in this order; later calls are for new, distinct
            masks.
        predict: what stands in where `utility` gives NaN; None: such coalitions are refused. Never
            asked for the full model or the empty coalition.
        normalize: see above.

    Raises:
        InputError: (on opening and on calls) a coalition has no score and nothing predicts it, or
            its value is not finite.
    """

    masks_scored: int
    """Distinct masks whose score was asked for so far, the full model and the empty one included:
    what this game has taken from a budget."""

    def __init__(
        self,
        num_players: int,
        utility: MaskValue,
        *,
        predict: MaskValue | None = None,
        normalize: bool = True,
    ) -> None:
        super().__init__(num_players, normalize=False)
        self._utility = utility
        self._predict = predict
        self._predicted: dict[tuple[int, ...], float] = {}
        self.masks_scored = 0
        ends_MP = np.stack([self.grand_coalition, self.empty_coalition])
        ends_M = _checked(utility, ends_MP)
        if np.isnan(ends_M).any():
            # the empty coalition is like no other: a predicted one would shift every value
            raise InputError(
                "the full model and the empty coalition must have been scored, no surrogate knows "
                f"a model without layers: `lpserve run --sizes 0,{num_players - 1}` scores both"
            )
        self._store(ends_MP, ends_M)
        self.normalization_value = float(ends_M[1]) if normalize else 0.0

    @classmethod
    def from_engine(
        cls, engine: Engine, utility: str = "neg_nll", *, normalize: bool = True
    ) -> LayerGame:
        """New coalitions are scored by an open engine on the windows it was opened with.

        Non-finite scores: `ppl_ratio` is 0; `neg_nll` is the lowest finite utility seen so far,
        with a warning. A coalition keeps the value it was first given. Such a game cannot be
        pickled, as its engine cannot; `game.save("game.json")` keeps its values, and a new game
        takes them up with `load_values`.

        Raises:
            InputError: the utility is unknown, or the full model has no finite score.
        """
        chosen = utility_named(utility)
        if chosen.item == "question":
            raise InputError(
                f"an engine scores windows, not the questions of {utility}: take a finished run's "
                "scores (LayerGame.from_run)"
            )
        scorer = _EngineUtility(engine, chosen)
        return cls(engine.info.num_players, scorer, normalize=normalize)

    @classmethod
    def from_table(
        cls,
        masks_MP: BoolArray,
        utilities_M: FloatArray,
        *,
        surrogate: str | None = None,
        normalize: bool = True,
    ) -> LayerGame:
        """Scored masks alone, or with a surrogate for all others.

        Args:
            masks_MP: distinct masks, bool [M, P]; the full model and the empty one among them.
            utilities_M: float [M], finite, higher is better.
            surrogate: one of `lpserve.surrogate.KINDS`, fitted to the table; None: a coalition that
                was never scored is refused.

        Raises:
            InputError: the table or the surrogate cannot be used.
        """
        masks_MP, utilities_M, _ = check_game(masks_MP, utilities_M, None)
        predict = _fitted(surrogate, 0, masks_MP, utilities_M, None) if surrogate else None
        table = _Table(dict(zip(keys(masks_MP), utilities_M.tolist(), strict=True)))
        return cls(masks_MP.shape[1], table, predict=predict, normalize=normalize)

    @classmethod
    def from_run(
        cls,
        run: str | Path | RunRecord,
        *,
        surrogate: str | None = None,
        normalize: bool = True,
    ) -> LayerGame:
        """What a finished run scored, under the run's own utility.

        `masks_scored` then counts those of the run's masks that were asked for. Non-finite scores:
        `ppl_ratio` is 0; `neg_nll` is the lowest finite utility of the run, with a warning; neither
        trains the surrogate. Masks that the run gave up, or scored on a screen of a few windows
        alone, have no score.

        Args:
            run: a run folder, or what `lpserve.analysis.record.read_record` gives.
            surrogate: as in `from_table`; `scored.surrogate` is the run's own choice.

        Raises:
            InputError: the folder holds no finished run, or the empty coalition was not scored
                (a run scores it when its sizes begin at 0).
        """
        scored = run if isinstance(run, RunRecord) else read_record(run)
        _check_full_model(scored.loss_MI[0])
        has_score_M = scored.scored_M() & ~scored.screened_M()
        masks_MP, loss_MN = scored.masks_MP[has_score_M], scored.loss_MI[has_score_M]
        predict = None
        if surrogate:
            finite_M = np.isfinite(loss_MN).all(axis=1)
            train_M = scored.view.of(loss_MN[finite_M])
            noise_M = scored.objective.noise_variance(train_M, scored.noise_nll)
            predict = _fitted(surrogate, scored.seed, masks_MP[finite_M], train_M, noise_M)
        value_M = _finite(scored.view.of(loss_MN), scored.objective, np.inf)
        table = _Table(dict(zip(keys(masks_MP), value_M.tolist(), strict=True)))
        return cls(scored.num_players, table, predict=predict, normalize=normalize)

    @classmethod
    def from_exhaustive(
        cls,
        game: str | Path | ExhaustiveGame,
        utility: str | None = None,
        *,
        surrogate: str | None = None,
        normalize: bool = True,
    ) -> LayerGame:
        """Every set of a few removed layers, and the empty coalition, as `lpserve exhaustive`
        scored them.

        Coalitions that remove more were never scored: they are refused, or a surrogate answers.
        A game that was scored up to all layers is exact everywhere. Non-finite scores are treated
        as in `from_run`.

        Args:
            game: the folder, or what `lpserve.read_exhaustive` gives.
            utility: another than the one it was scored for.
            surrogate: as in `from_table`.

        Raises:
            InputError: the folder holds no complete game, or the utility's metric was not scored.
        """
        found = game if isinstance(game, ExhaustiveGame) else read_exhaustive(game)
        chosen = utility_named(utility or found.manifest.utility)
        given_up_M = np.zeros(len(found.masks_MP), dtype=bool)
        given_up_M[list(found.reasons)] = True
        value_M = found.utilities_M(chosen.name)
        predict = None
        if surrogate:
            fits_M = np.isfinite(value_M) & found.masks_MP.any(axis=1)
            predict = _fitted(surrogate, 0, found.masks_MP[fits_M], value_M[fits_M], None)
        masks_MP = found.masks_MP[~given_up_M]
        value_M = _finite(value_M[~given_up_M], chosen, np.inf)
        table = _Table(dict(zip(keys(masks_MP), value_M.tolist(), strict=True)))
        return cls(found.masks_MP.shape[1], table, predict=predict, normalize=normalize)

    @property
    def masks_predicted(self) -> int:
        """Distinct masks asked for so far that a surrogate answered for."""
        return len(self._predicted)

    def scored(self) -> tuple[BoolArray, FloatArray]:
        """The masks really scored so far, bool [M, P], and their utilities, float64 [M], not
        centred: what `lpserve.shapley_values` takes."""
        names = [name for name in self.game_values if name not in self._predicted]
        masks_MP = np.zeros((len(names), self.n_players), dtype=bool)
        for row, name in enumerate(names):
            masks_MP[row, list(name)] = True
        return masks_MP, np.array([self.game_values[name] for name in names], dtype=np.float64)

    def value_function(self, coalitions: BoolArray) -> FloatArray:
        """Utilities of coalitions, bool [M, P] -> float64 [M], not centred; shapiq calls this."""
        masks_MP = np.asarray(coalitions, dtype=bool)
        names = _names(masks_MP)
        known = ChainMap(self.game_values, self._predicted)
        new = {name: row for row, name in enumerate(names) if name not in known}
        if new:
            self._learn(masks_MP[list(new.values())])
        return np.array([known[name] for name in names], dtype=np.float64)

    def _learn(self, masks_MP: BoolArray) -> None:
        value_M = _checked(self._utility, masks_MP)
        missing_M = np.isnan(value_M)
        if missing_M.any():
            if self._predict is None:
                raise InputError(
                    f"{missing_M.sum()} of {len(masks_MP)} new coalitions were never scored: score "
                    'them, or let a surrogate answer for them (surrogate="auto")'
                )
            predicted_M = _checked(self._predict, masks_MP[missing_M])
            if np.isnan(predicted_M).any():
                raise InputError("the predicted value of a coalition is not a number")
            names = _names(masks_MP[missing_M])
            self._predicted.update(zip(names, predicted_M.tolist(), strict=True))
        self._store(masks_MP[~missing_M], value_M[~missing_M])

    def _store(self, masks_MP: BoolArray, value_M: FloatArray) -> None:
        self.game_values.update(zip(_names(masks_MP), value_M.tolist(), strict=True))
        self.masks_scored += len(masks_MP)


class _EngineUtility:
    """Masks -> a named utility of an open engine's scores."""

    def __init__(self, engine: Engine, utility: Utility) -> None:
        self._engine = engine
        self._utility = utility
        self._full_loss_N: FloatArray | None = None
        self._lowest = np.inf

    def __call__(self, masks_MP: BoolArray) -> FloatArray:
        metric = self._utility.metric
        scores = self._engine.score(masks_MP, extra_metrics=() if metric == "nll" else (metric,))
        loss_MN = scores.of(metric)
        if self._full_loss_N is None:
            assert masks_MP[0].all()  # a LayerGame asks for the full model first
            _check_full_model(loss_MN[0])
            self._full_loss_N = loss_MN[0]
        assert self._full_loss_N is not None
        value_M = self._utility.of(loss_MN, scores.num_tokens_N, self._full_loss_N)
        value_M = _finite(value_M, self._utility, self._lowest)
        self._lowest = min(self._lowest, float(value_M.min()))
        return value_M

    def __reduce__(self) -> str:
        raise InputError(
            "a game on an open engine cannot be pickled: keep its values with game.save(PATH)"
        )


@dataclass(frozen=True, slots=True)
class _Table:
    """Masks -> their utility in a table, NaN where it has none."""

    utility_of: dict[bytes, float]

    def __call__(self, masks_MP: BoolArray) -> FloatArray:
        found = [self.utility_of.get(key, np.nan) for key in keys(masks_MP)]
        return np.array(found, dtype=np.float64)


def _fitted(
    kind: str, seed: int, masks_MP: BoolArray, utilities_M: FloatArray, noise_M: FloatArray | None
) -> MaskValue:
    if kind not in KINDS:
        raise InputError(f"unknown surrogate {kind!r}: one of {', '.join(KINDS)}")
    if len(masks_MP) < 3:
        raise InputError(f"{len(masks_MP)} masks with finite scores are too few for a surrogate")
    surrogate = make_surrogate(kind, seed)
    surrogate.fit(masks_MP, utilities_M, noise_M)
    return surrogate.mean


def _check_full_model(loss_N: NDArray[Any]) -> None:
    """Raise InputError unless the full model's losses, which ratios compare with, are finite."""
    if not np.isfinite(loss_N).all():
        raise InputError("the full model has no finite score on these windows")


def _finite(utilities_M: FloatArray, utility: Utility, lowest: float) -> FloatArray:
    """NaNs replaced by the utility's floor; where it has none by the lowest finite utility, of
    these or `lowest`, with a warning."""
    bad_M = np.isnan(utilities_M)
    if not bad_M.any():
        return utilities_M
    if utility.floor is not None:
        return np.where(bad_M, utility.floor, utilities_M)
    lowest = float(np.min(utilities_M[~bad_M], initial=lowest))
    warnings.warn(
        f"{bad_M.sum()} masks have no finite score: shapiq sees the lowest finite utility, "
        f"{lowest:.6g}",
        RuntimeWarning,
        stacklevel=2,
    )
    return np.where(bad_M, lowest, utilities_M)


def _checked(utility: MaskValue, masks_MP: BoolArray) -> FloatArray:
    """What a utility gives: float64 [M], finite or NaN."""
    value_M = np.asarray(utility(masks_MP), dtype=np.float64)
    if value_M.shape != (len(masks_MP),):
        raise InputError(
            f"the utility of {len(masks_MP)} masks must be float [{len(masks_MP)}]: got "
            f"{list(value_M.shape)}"
        )
    if np.isinf(value_M).any():
        mask_P = masks_MP[int(np.flatnonzero(np.isinf(value_M))[0])]
        raise InputError(
            f"the value of the mask that keeps {np.flatnonzero(mask_P).tolist()} is infinite: "
            "shapiq needs finite values"
        )
    return value_M


def _names(masks_MP: BoolArray) -> list[tuple[int, ...]]:
    """shapiq's names of coalitions: their players in order."""
    return [tuple(np.flatnonzero(mask_P).tolist()) for mask_P in masks_MP]
