"""From scores to answers: surrogate, values and plan, as pure functions of what was scored.

Decisions read NLLs as stored (float32). Held-out scores report and warn, they never choose.
Notation: M masks, P players, N windows, r = number removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lpserve.analysis.record import RunRecord, heldout_losses
from lpserve.analysis.stability import Stability, set_stability
from lpserve.config import STOP_GAIN
from lpserve.errors import InputError
from lpserve.masks import full_mask, keys
from lpserve.plan import search
from lpserve.plan.candidates import choose_candidates
from lpserve.plan.greedy import greedy_path
from lpserve.plan.plan import Candidate, Plan, PlanEntry, Unseen
from lpserve.plan.sets import ranking_mask, removed_list
from lpserve.rounds.screening import estimated
from lpserve.surrogate import HeldOutError, Surrogate, acquisition_model, make_surrogate
from lpserve.types import (
    Z90,
    BoolArray,
    FloatArray,
    IntArray,
    perplexity,
)
from lpserve.utility import SEARCH_UTILITY, Utility, UtilityView
from lpserve.values.closed_form import kernel_values, value_calibration
from lpserve.values.exact import is_enumerated
from lpserve.values.interactions import exact_interactions, kernel_interactions
from lpserve.values.residual_correction import corrected
from lpserve.values.result import ShapleyValues
from lpserve.values.sampling import monte_carlo_values
from lpserve.values.shapley import shapley_values

_MONTE_CARLO_COALITIONS = 80_000  # as many as the paper draws


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """Surrogate and values of a run."""

    utilities_M: FloatArray
    surrogate_name: str
    heldout: HeldOutError
    predicted_M: FloatArray
    """Each mask's utility as predicted from the other masks; NaN where unknown."""
    searcher: Surrogate
    """Of the utility that sets are searched on (`UtilityView.search`)."""
    guess_M: FloatArray
    """That utility of every mask; estimated where a mask was scored on the screen alone."""
    values: ShapleyValues
    interactions_PP: FloatArray | None
    """Pairwise interaction index (`lpserve.values.interactions`); None: a single size, or a
    surrogate without a closed form."""
    lowest_probability_P: FloatArray
    """Probability that a player is among the `max_removed` lowest values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The answers of a run."""

    scored: RunRecord
    analysis: Analysis
    plan: Plan
    quarantined: dict[str, str] = field(default_factory=dict)
    """Mask (0 and 1) -> why it could not be scored."""


def analyse(scored: RunRecord) -> Analysis:
    """Fit the surrogate to all finite scores and estimate the values."""
    view = scored.view
    utilities_M = view.of(scored.loss_MI)
    rows = np.flatnonzero(np.isfinite(utilities_M))
    if len(rows) < 3:
        raise InputError(f"only {len(rows)} masks have finite scores: nothing can be estimated")
    masks_MP, finite_M = scored.masks_MP[rows], utilities_M[rows]
    surrogate = make_surrogate(scored.surrogate, scored.seed)
    surrogate.fit(masks_MP, finite_M, scored.objective.noise_variance(finite_M, scored.noise_nll))
    searcher, guess_M = surrogate, view.search(scored.loss_MI)
    noise_M = None
    if scored.screen:
        few_M = view.search(scored.loss_MI, scored.screen)
        guess_M, noise_M = estimated(scored.masks_MP, guess_M, few_M)
    if scored.objective != SEARCH_UTILITY or noise_M is not None:
        known = np.flatnonzero(np.isfinite(guess_M))
        noise_K = None if noise_M is None else noise_M[known]
        searcher = make_surrogate(scored.surrogate, scored.seed)
        searcher.fit(scored.masks_MP[known], guess_M[known], noise_K)
    values = _values(scored, surrogate, rows, finite_M)
    predicted_M = np.full(len(utilities_M), np.nan)
    predicted_M[rows[surrogate.rows]] = surrogate.left_out_M
    return Analysis(
        utilities_M=utilities_M,
        surrogate_name=surrogate.name,
        heldout=surrogate.heldout_error,
        predicted_M=predicted_M,
        searcher=searcher,
        guess_M=guess_M,
        values=values,
        interactions_PP=_interactions(scored, surrogate, rows, finite_M),
        lowest_probability_P=lowest_probability(values, scored.max_removed, scored.seed),
    )


def lowest_probability(values: ShapleyValues, num_removed: int, seed: int) -> FloatArray:
    """Share of normal draws of all values in which a player is among the lowest."""
    errors_P = np.nan_to_num(values.total_stderr_P)
    draws = np.random.default_rng(seed).normal(
        values.values_P, errors_P, (4000, len(values.values_P))
    )
    lowest = np.argsort(draws, axis=1, kind="stable")[:, :num_removed]
    return np.bincount(lowest.ravel(), minlength=draws.shape[1]) / len(draws)


def make_plan(
    scored: RunRecord,
    analysis: Analysis,
    *,
    max_removed: int | None = None,
    protected: Sequence[int] = (),
) -> Plan:
    """The best scored set for every r, with its rivals.

    Raises:
        InputError: `max_removed` or a protected player is out of range, or no scored set of some
            size keeps the protected players.
    """
    most = scored.max_removed if max_removed is None else max_removed
    if not 1 <= most <= scored.max_removed:
        raise InputError(
            f"max_removed must be 1..{scored.max_removed}, what the run scored: got {most}"
        )
    for player in protected:
        if not 0 <= player < scored.num_players:
            raise InputError(f"protected player {player} is not one of 0..{scored.num_players - 1}")
    greedy = _greedy(scored, analysis, most)
    entries = []
    for r, rows in enumerate(_candidates(scored, analysis, greedy, most, protected), start=1):
        warnings = []
        if len(greedy) < r:
            warnings.append("the scored masks hold no greedy path to this size")
        unseen = _unseen(scored, analysis, r, rows[0][0], protected)
        stability = _stability(scored, rows[0][0], protected)
        if stability is not None and not stability.settled and stability.rival is not None:
            drawn = f"{len(scored.num_tokens_I)} {scored.objective.items}"
            warnings.append(stability.warning(drawn, scored.objective.loss_unit))
        entry = _entry(scored, analysis, r, rows, warnings)
        details = asdict(stability) if stability is not None else None
        entries.append(replace(entry, unseen=unseen, stability=details))
    full = full_mask(scored.num_players)
    return Plan(
        model=scored.model,
        model_hash=scored.model_hash,
        num_players=scored.num_players,
        players=[{"index": p.index, "layer": p.layer, "part": p.part} for p in scored.players],
        utility=scored.utility,
        masks_scored=int(scored.scored_M().sum()),
        masks_screened=int(scored.screened_M().sum()),
        heldout_masks=len(scored.heldout_masks_MP),
        full_calibration_ppl=_ppl(scored.nll_MI[0], scored.num_tokens_I),
        full_heldout_ppl=_heldout_ppl(scored, full),
        full_calibration_utility=_known(analysis.utilities_M[0]),
        full_heldout_utility=_heldout_utility(scored, full),
        heldout_drawn=_judge(scored).items,
        plans=entries,
        stopped=scored.stopped,
        protected=sorted(protected),
    )


def candidate_masks(scored: RunRecord, analysis: Analysis) -> BoolArray:
    """All kept, and every candidate of the plan, each once: what held-out windows check."""
    most = scored.max_removed
    rows = _candidates(scored, analysis, _greedy(scored, analysis, most), most)
    masks = [full_mask(scored.num_players)]
    masks += [scored.masks_MP[row] for candidates in rows for row, _ in candidates]
    _, first = np.unique(np.array(masks), axis=0, return_index=True)
    return np.array(masks)[np.sort(first)]


def _greedy(scored: RunRecord, analysis: Analysis, most: int) -> list[BoolArray]:
    """The path that the run walked."""
    passed_by = set(keys(scored.pruned_MP))
    path_M = analysis.guess_M if scored.screen else analysis.utilities_M
    return greedy_path(scored.masks_MP, path_M, most, passed_by)


def _candidates(
    scored: RunRecord,
    analysis: Analysis,
    greedy: Sequence[BoolArray],
    most: int,
    protected: Sequence[int] = (),
) -> list[list[tuple[int, str]]]:
    """For r = 1..most the rows of the candidates, the best first, with how each was found."""
    order_P = analysis.values.values_P.copy()
    order_P[list(protected)] = np.inf
    sources = dict(zip(keys(scored.masks_MP), scored.sources, strict=True))
    found = []
    for r in range(1, most + 1):
        rows = choose_candidates(
            scored.masks_MP,
            analysis.utilities_M,
            r,
            greedy=greedy,
            ranking=ranking_mask(order_P, r),
            sources=sources,
            protected=protected,
        )
        if not rows:
            raise InputError(
                f"no scored set removes {r} players and keeps {list(protected)}: "
                "protect fewer, lower --max-removed, or run with a larger budget"
            )
        found.append(rows)
    return found


def _values(
    scored: RunRecord, surrogate: Surrogate, rows: IntArray, finite_M: FloatArray
) -> ShapleyValues:
    masks_MP = scored.masks_MP[rows]
    resampled_MB = scored.resampled(scored.loss_MI[rows])
    if is_enumerated(masks_MP, scored.sizes):
        return shapley_values(
            masks_MP,
            finite_M,
            scored.sizes,
            noise_M=scored.objective.noise_variance(finite_M, scored.noise_nll),
            resampled_MB=resampled_MB,
        )
    kernel = acquisition_model(surrogate)
    if kernel is not None:
        calibration = value_calibration(kernel, scored.sizes)
        return kernel_values(kernel, scored.sizes, resampled_MB, calibration=calibration)
    values = monte_carlo_values(
        surrogate.mean, scored.num_players, scored.sizes, _MONTE_CARLO_COALITIONS, scored.seed
    )
    drawn_M = np.array([scored.sources[row] == "design" for row in rows[surrogate.rows]])
    residual_M = finite_M[surrogate.rows] - surrogate.left_out_M
    drawn_MP = masks_MP[surrogate.rows][drawn_M]
    return corrected(values, drawn_MP, residual_M[drawn_M], scored.seed)


def _interactions(
    scored: RunRecord, surrogate: Surrogate, rows: IntArray, finite_M: FloatArray
) -> FloatArray | None:
    if scored.sizes[0] == scored.sizes[1]:
        return None
    if is_enumerated(scored.masks_MP[rows], scored.sizes):
        return exact_interactions(scored.masks_MP[rows], finite_M, scored.sizes)
    kernel = acquisition_model(surrogate)
    return kernel_interactions(kernel, scored.sizes) if kernel is not None else None


def _unseen(
    scored: RunRecord,
    analysis: Analysis,
    num_removed: int,
    best_row: int,
    protected: Sequence[int],
) -> Unseen | None:
    """The set that was not scored, or on the screen alone, and is likeliest to beat the best."""
    search_M = scored.view.search(scored.loss_MI)
    begin_QP = search.starts(scored.masks_MP, search_M, num_removed)
    likely = search.best_predicted_sets(
        analysis.searcher, scored.num_players, num_removed, begin_QP
    )
    seen = set(keys(scored.masks_MP[np.isfinite(search_M)]))
    fresh = [
        row
        for row, key in enumerate(keys(likely))
        if key not in seen and likely[row, list(protected)].all()
    ]
    if not fresh:
        return None
    best = float(search_M[best_row])
    chance_Q = search.probability_of_improvement(analysis.searcher, likely[fresh], best, STOP_GAIN)
    place = int(np.argmax(chance_Q))
    predicted = float(analysis.searcher.mean(likely[fresh[place]][None])[0])
    full_ppl = _ppl(scored.nll_MI[0], scored.num_tokens_I)
    perplexing = scored.objective.reports_perplexity
    return Unseen(
        removed=removed_list(likely[fresh[place]]),
        predicted_ppl=full_ppl / predicted if predicted > 0 and perplexing else None,
        chance=float(chance_Q[place]),
        gain=STOP_GAIN,
    )


def _stability(scored: RunRecord, chosen: int, protected: Sequence[int]) -> Stability | None:
    """Of the best set among those of its size that keep the protected players."""
    removed_M = (~scored.masks_MP).sum(axis=1)
    same_M = (removed_M == removed_M[chosen]) & np.isfinite(scored.loss_MI).all(axis=1)
    rows = np.flatnonzero(same_M & scored.masks_MP[:, list(protected)].all(axis=1))
    return set_stability(
        masks_MP=scored.masks_MP[rows],
        loss_MN=scored.loss_MI[rows].astype(np.float64),
        num_tokens_N=scored.view.weight_I,
        corpora=scored.corpora,
        chosen=int(np.flatnonzero(rows == chosen)[0]),
        seed=scored.seed,
        scale=scored.objective.search_scale(scored.num_tokens_I),
    )


def _entry(
    scored: RunRecord,
    analysis: Analysis,
    num_removed: int,
    rows: list[tuple[int, str]],
    warnings: list[str],
) -> PlanEntry:
    candidates = []
    for row, source in rows:
        mask_P = scored.masks_MP[row]
        delta, error = (None, None)
        if row != rows[0][0]:
            delta, error = _heldout_gap(scored, mask_P, scored.masks_MP[rows[0][0]])
        candidates.append(
            Candidate(
                removed=removed_list(mask_P),
                source=source,
                calibration_ppl=_ppl(scored.nll_MI[row], scored.num_tokens_I),
                predicted_ppl=_predicted_ppl(scored, analysis.predicted_M[row]),
                heldout_ppl=_heldout_ppl(scored, mask_P),
                heldout_delta=delta,
                heldout_delta_stderr=error,
                calibration_utility=_known(analysis.utilities_M[row]),
                predicted_utility=_known(analysis.predicted_M[row]),
                heldout_utility=_heldout_utility(scored, mask_P),
            )
        )
    drawn, unit = _judge(scored).items, _judge(scored).loss_unit
    for other in candidates[1:]:
        if (
            other.heldout_delta is not None
            and other.heldout_delta_stderr is not None
            and other.heldout_delta < -Z90 * other.heldout_delta_stderr
        ):
            warnings.append(
                f"held-out {drawn} prefer {other.removed} by {-other.heldout_delta:.4f} "
                f"+- {Z90 * other.heldout_delta_stderr:.4f} {unit}"
            )
    best = candidates[0]
    return PlanEntry(
        num_removed=num_removed,
        removed=best.removed,
        source=best.source,
        calibration_ppl=best.calibration_ppl,
        predicted_ppl=best.predicted_ppl,
        heldout_ppl=best.heldout_ppl,
        candidates=candidates,
        warnings=warnings,
        calibration_utility=best.calibration_utility,
        predicted_utility=best.predicted_utility,
        heldout_utility=best.heldout_utility,
    )


def _heldout_gap(
    scored: RunRecord, mask_P: BoolArray, chosen_P: BoolArray
) -> tuple[float | None, float | None]:
    """Mean held-out loss minus the chosen set's, and its standard error paired over windows."""
    loss_HN, judge = heldout_losses(scored)
    weight_N = judge.weights(scored.heldout_num_tokens_I)
    here, there = _heldout_row(scored, mask_P), _heldout_row(scored, chosen_P)
    if here is None or there is None:
        return None, None
    gap_N = loss_HN[here].astype(np.float64) - loss_HN[there].astype(np.float64)
    total = weight_N.sum()
    error = float(gap_N.std(ddof=1) * np.sqrt(len(gap_N)) / total) if len(gap_N) > 1 else None
    return float(gap_N.sum() / total), error


def _judge(scored: RunRecord) -> Utility:
    """The utility that held-out losses are of: where the run's is not defined, a text's NLLs."""
    return heldout_losses(scored)[1]


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _ppl(nll_N: NDArray[np.float32], num_tokens_N: IntArray) -> float:
    return float(perplexity(nll_N.astype(np.float64).sum() / num_tokens_N.sum()))


def _predicted_ppl(scored: RunRecord, predicted: float) -> float | None:
    if not np.isfinite(predicted) or not scored.objective.reports_perplexity:
        return None
    if scored.utility == "neg_nll":
        return float(perplexity(np.float64(-predicted)))
    return _ppl(scored.nll_MI[0], scored.num_tokens_I) / predicted if predicted > 0 else None


def _heldout_row(scored: RunRecord, mask_P: BoolArray) -> int | None:
    found = np.flatnonzero((scored.heldout_masks_MP == mask_P).all(axis=1))
    return int(found[0]) if len(found) else None


def _heldout_utility(scored: RunRecord, mask_P: BoolArray) -> float | None:
    loss_HI, row = scored.heldout_loss_MI, _heldout_row(scored, mask_P)
    full = _heldout_row(scored, full_mask(scored.num_players))
    if loss_HI is None or row is None or full is None:
        return None
    view = UtilityView(scored.objective, scored.heldout_num_tokens_I, loss_HI[full])
    value_1 = view.of(loss_HI[[row]])
    return _known(value_1[0])


def _heldout_ppl(scored: RunRecord, mask_P: BoolArray) -> float | None:
    row = _heldout_row(scored, mask_P)
    if row is None or not np.isfinite(scored.heldout_nll_MI[row]).all():
        return None
    return _ppl(scored.heldout_nll_MI[row], scored.heldout_num_tokens_I)
