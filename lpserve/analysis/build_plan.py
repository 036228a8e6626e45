"""The plan of a run: for every target the best scored set, and its runners-up.

Decisions read losses as stored (float32). Notation: M masks, P players, r = number removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from lpserve.analysis.analyse import Analysis
from lpserve.analysis.heldout import (
    finite_or_none,
    heldout_gap,
    heldout_objective,
    heldout_ppl,
    heldout_utility,
    ppl_of,
)
from lpserve.analysis.record import RunRecord
from lpserve.analysis.stability import Stability, set_stability
from lpserve.config import STOP_GAIN
from lpserve.errors import InputError
from lpserve.masks import full_mask, keys, removed_list, without
from lpserve.model.players import player_label
from lpserve.plan import search
from lpserve.plan.candidates import choose_alternatives, choose_candidates
from lpserve.plan.constraint import Constraint, constraint_text
from lpserve.plan.expansion import EXPANSION
from lpserve.plan.greedy import greedy_path
from lpserve.plan.plan import Candidate, Plan, PlanEntry, Settlement, Unseen
from lpserve.plan.targets import Target, read_targets
from lpserve.types import Z90, BoolArray, perplexity


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The answers of a run."""

    scored: RunRecord
    analysis: Analysis
    plan: Plan
    quarantined: dict[str, str] = field(default_factory=dict)
    """Mask (0 and 1) -> why it could not be scored."""


def make_plan(
    scored: RunRecord,
    analysis: Analysis,
    *,
    max_removed: int | None = None,
    within: Constraint | None = None,
    target: str | None = None,
) -> Plan:
    """The best scored set for every target, with its runners-up.

    Args:
        max_removed: entries for numbers of removed players up to it.
        within: what sets may be in the plan; None: those that the run searched.
        target: entries for shares of a cost, such as `params=0.9,0.8`; None: for what the run
            searched.

    Raises:
        InputError: an argument is out of range or contradicts another, the run knows no costs, or
            no scored set meets some target.
    """
    within = within or scored.within
    scored = _retargeted(scored, target, max_removed)
    up_to = scored.max_removed if max_removed is None else max_removed
    if not 1 <= up_to <= scored.max_removed:
        raise InputError(
            f"max_removed must be 1..{scored.max_removed}, what the run scored: got {up_to}"
        )
    if not scored.target_cost:
        within.check(up_to)
    greedy = _greedy(scored, analysis, up_to)
    targets = scored.targets_within(within, up_to)
    entries = [
        _entry(scored, analysis, rows, of, greedy)
        for of, rows in _candidates(scored, analysis, greedy, targets).items()
    ]
    full = full_mask(scored.num_players)
    return Plan(
        model=scored.model,
        model_hash=scored.model_hash,
        num_players=scored.num_players,
        players=[{"index": p.index, "layer": p.layer, "part": p.part} for p in scored.players],
        costs=scored.costs,
        target_cost=scored.target_cost,
        utility=scored.utility,
        masks_scored=int(scored.scored_M().sum()),
        masks_screened=int(scored.screened_M().sum()),
        heldout_masks=len(scored.heldout_masks_MP),
        full_calibration_ppl=ppl_of(scored.nll_MI[0], scored.num_tokens_I),
        full_heldout_ppl=heldout_ppl(scored, full),
        full_calibration_utility=finite_or_none(analysis.utilities_M[0]),
        full_heldout_utility=heldout_utility(scored, full),
        heldout_drawn=heldout_objective(scored).items,
        plans=entries,
        stopped=scored.stopped,
        protected=list(within.protected),
        forced=list(within.forced),
        alternatives=scored.alternatives,
        min_distance=scored.min_distance if scored.alternatives else None,
    )


def _retargeted(scored: RunRecord, target: str | None, max_removed: int | None) -> RunRecord:
    """The record as if its run had searched for these shares of a cost."""
    if target is None:
        if scored.target_cost and max_removed is not None:
            raise InputError(
                f"the run searched for shares of {scored.target_cost}: give target, not max_removed"
            )
        return scored
    if max_removed is not None:
        raise InputError("max_removed counts players, target a cost: give one of the two")
    cost, shares = read_targets(target)
    if cost not in scored.costs:
        raise InputError(
            f"target {target}: the run has not recorded what its players cost; `lpserve run "
            "--target` does, and --players half"
        )
    races = scored.settlements if cost == scored.target_cost else ()
    return replace(scored, target_cost=cost, target_shares=shares, settlements=races)


def candidate_masks(scored: RunRecord, analysis: Analysis) -> BoolArray:
    """All kept, and every candidate and alternative of the plan, each once: what held-out windows
    check."""
    up_to = scored.max_removed
    greedy = _greedy(scored, analysis, up_to)
    masks = [full_mask(scored.num_players)]
    for target, rows in _candidates(scored, analysis, greedy, scored.targets).items():
        others = _alternatives(scored, analysis, rows[0][0], target)
        masks += [scored.masks_MP[row] for row in [*(row for row, _ in rows), *others]]
    _, first = np.unique(np.array(masks), axis=0, return_index=True)
    return np.array(masks)[np.sort(first)]


def _greedy(scored: RunRecord, analysis: Analysis, up_to: int) -> list[BoolArray]:
    """The path that the run walked."""
    pruned = set(keys(scored.pruned_MP))
    path_M = analysis.guess_M if scored.screen else analysis.utilities_M
    steps = len(scored.within.sizes(up_to))
    return greedy_path(scored.masks_MP, path_M, steps, pruned, scored.within)


def _candidates(
    scored: RunRecord,
    analysis: Analysis,
    greedy: Sequence[BoolArray],
    targets: Sequence[Target],
) -> dict[Target, list[tuple[int, str]]]:
    """For every target the rows of the candidates, the best first, with how each was found."""
    sources = dict(zip(keys(scored.masks_MP), scored.sources, strict=True))
    found = {}
    for target in targets:
        rows = choose_candidates(
            scored.masks_MP,
            analysis.utilities_M,
            target,
            greedy=greedy,
            ranking=target.ranking(analysis.values.values_P),
            sources=sources,
        )
        if not rows:
            raise InputError(_nothing_scored(scored, target))
        found[target] = _settled_first(scored, rows, sources, target)
    return found


def _nothing_scored(scored: RunRecord, target: Target) -> str:
    within = target.within
    kept = constraint_text(*(_labels(scored, s) for s in (within.protected, within.forced)))
    if target.share is not None:
        condition = f" and would {kept}" if kept else ""
        return (
            f"no scored set keeps at most {target.share:g} of {scored.target_cost}{condition}: run "
            f"with --target {scored.target_cost}={target.share:g}, which searches such sets"
        )
    return (
        f"no scored set of {target.sizes[0]} removed players would {kept}: lower --max-removed, or "
        "run with --protect or --force, which search such sets"
    )


def _alternatives(scored: RunRecord, analysis: Analysis, chosen: int, target: Target) -> list[int]:
    return choose_alternatives(
        scored.masks_MP,
        analysis.utilities_M,
        chosen,
        target,
        count=scored.alternatives,
        min_distance=scored.min_distance,
    )


def _settlement(scored: RunRecord, target: Target) -> Settlement | None:
    """How the race for a target ended; None where there was none, or a constraint leaves others to
    choose from."""
    for one in scored.settlements if target.within == scored.within else ():
        if one.target == target.share and (one.target or len(one.removed) == target.sizes[0]):
            return one
    return None


def _settled_first(
    scored: RunRecord, rows: list[tuple[int, str]], sources: dict[bytes, str], target: Target
) -> list[tuple[int, str]]:
    """Candidates of a target with those first that its race left, the chosen one before all."""
    race = _settlement(scored, target)
    if race is None:
        return rows
    mask_keys = keys(scored.masks_MP)
    row_of = {key: row for row, key in enumerate(mask_keys)}
    left_MP = np.array([without(scored.num_players, s) for s in (race.removed, *race.ties)])
    left = [(row_of[key], sources[key]) for key in keys(left_MP)]
    found_as = dict(rows)
    first = [(row, found_as.get(row, source)) for row, source in left]
    return first + [one for one in rows if one[0] not in {row for row, _ in left}]


def _unseen(
    scored: RunRecord,
    analysis: Analysis,
    best_row: int,
    target: Target,
) -> Unseen | None:
    """The set that was not scored, or on the screen alone, and is likeliest to beat the best."""
    search_M = scored.view.search(scored.loss_MI)
    begin_MP = search.starts(scored.masks_MP, search_M, target)
    likely = search.best_predicted_sets(analysis.searcher, target, begin_MP)
    seen = set(keys(scored.masks_MP[np.isfinite(search_M)]))
    fresh = [row for row, key in enumerate(keys(likely)) if key not in seen]
    if not fresh:
        return None
    best = float(search_M[best_row])
    chances = search.probability_of_improvement(analysis.searcher, likely[fresh], best, STOP_GAIN)
    place = int(np.argmax(chances))
    predicted = float(analysis.searcher.mean(likely[fresh[place]][None])[0])
    full_ppl = ppl_of(scored.nll_MI[0], scored.num_tokens_I)
    perplexing = scored.objective.reports_perplexity
    return Unseen(
        removed=removed_list(likely[fresh[place]]),
        predicted_ppl=full_ppl / predicted if predicted > 0 and perplexing else None,
        chance=float(chances[place]),
        gain=STOP_GAIN,
    )


def _stability(scored: RunRecord, chosen: int, target: Target) -> Stability | None:
    """Of the best set among those that meet its target."""
    finite_M = np.isfinite(scored.loss_MI).all(axis=1)
    rows = np.flatnonzero(finite_M & target.holds(scored.masks_MP))
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
    rows: list[tuple[int, str]],
    target: Target,
    greedy: Sequence[BoolArray],
) -> PlanEntry:
    """The plan's entry for one target, from its candidates' rows."""
    chosen = rows[0][0]
    candidates = [_candidate(scored, analysis, row, source, chosen) for row, source in rows]
    best = candidates[0]
    stability = _stability(scored, chosen, target)
    settlement = _settlement(scored, target)
    warnings = []
    searched = replace(target, within=scored.within)
    on_path = any(searched.holds(mask_P[None])[0] for mask_P in greedy)
    if not on_path and EXPANSION not in scored.sources:  # whose short lists stand in for it
        warnings.append("the scored masks hold no greedy path to this size")
    doubtful = settlement is None and stability is not None and not stability.settled
    if doubtful and stability is not None and stability.rival is not None:
        drawn = f"{len(scored.num_tokens_I)} {scored.objective.items}"
        warnings.append(stability.warning(drawn, scored.objective.loss_unit))
    return PlanEntry(
        num_removed=len(best.removed),
        removed=best.removed,
        source=best.source,
        calibration_ppl=best.calibration_ppl,
        predicted_ppl=best.predicted_ppl,
        heldout_ppl=best.heldout_ppl,
        candidates=candidates,
        warnings=warnings + _heldout_warnings(scored, candidates),
        unseen=_unseen(scored, analysis, chosen, target),
        stability=asdict(stability) if stability is not None else None,
        calibration_utility=best.calibration_utility,
        predicted_utility=best.predicted_utility,
        heldout_utility=best.heldout_utility,
        target=target.share,
        settlement=settlement,
        alternatives=[
            _candidate(scored, analysis, row, scored.sources[row], chosen)
            for row in _alternatives(scored, analysis, chosen, target)
        ],
    )


def _heldout_warnings(scored: RunRecord, candidates: list[Candidate]) -> list[str]:
    """Which of the candidates held-out items prefer to the first."""
    drawn, unit = heldout_objective(scored).items, heldout_objective(scored).loss_unit
    return [
        f"held-out {drawn} prefer [{', '.join(_labels(scored, other.removed))}] by "
        f"{-other.heldout_delta:.4f} +- {Z90 * other.heldout_delta_stderr:.4f} {unit}"
        for other in candidates[1:]
        if other.heldout_delta is not None
        and other.heldout_delta_stderr is not None
        and other.heldout_delta < -Z90 * other.heldout_delta_stderr
    ]


def _labels(scored: RunRecord, some: Iterable[int]) -> list[str]:
    return [player_label(scored.players[player]) for player in some]


def _candidate(
    scored: RunRecord, analysis: Analysis, row: int, source: str, chosen: int
) -> Candidate:
    """What is known of a scored set, held against the row of the plan's set."""
    mask_P = scored.masks_MP[row]
    delta, error = (None, None)
    if row != chosen:
        delta, error = heldout_gap(scored, mask_P, scored.masks_MP[chosen])
    return Candidate(
        removed=removed_list(mask_P),
        source=source,
        calibration_ppl=ppl_of(scored.nll_MI[row], scored.num_tokens_I),
        predicted_ppl=_predicted_ppl(scored, analysis.predicted_M[row]),
        heldout_ppl=heldout_ppl(scored, mask_P),
        heldout_delta=delta,
        heldout_delta_stderr=error,
        calibration_utility=finite_or_none(analysis.utilities_M[row]),
        predicted_utility=finite_or_none(analysis.predicted_M[row]),
        heldout_utility=heldout_utility(scored, mask_P),
    )


def _predicted_ppl(scored: RunRecord, predicted: float) -> float | None:
    if not np.isfinite(predicted) or not scored.objective.reports_perplexity:
        return None
    if scored.utility == "neg_nll":
        return float(perplexity(np.float64(-predicted)))
    return ppl_of(scored.nll_MI[0], scored.num_tokens_I) / predicted if predicted > 0 else None
