"""The end of a run: values, plan, held-out check of the plan's sets, the files of its folder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lpserve.analysis.analyse import analyse
from lpserve.analysis.build_plan import Outcome, candidate_masks, make_plan
from lpserve.analysis.record import RunRecord
from lpserve.config import MIN_DISTANCE
from lpserve.masks import key_text, keys
from lpserve.plan.targets import read_targets
from lpserve.report.files import write_outputs
from lpserve.rounds.history import latest_scores
from lpserve.runner.coordinator import RunLoop
from lpserve.runner.settling import settle


def conclude(loop: RunLoop) -> Outcome:
    """Estimate values, choose the plan, score its candidates on held-out items, write the folder.

    Raises:
        RunInterrupted: a signal came; what was scored is kept.
    """
    record = record_of(loop)
    analysis = analyse(record)
    if loop.race is not None:
        found = settle(loop, record, analysis.utilities_M, loop.race)
        record = replace(record, settlements=found)
    wanted_MP = candidate_masks(record, analysis)
    calibration = loop.tracker
    request = loop.score_apart(wanted_MP, loop.heldout, "held-out")
    nll_MI = loop.heldout.ppl_nll(request.values)
    record = replace(
        record,
        heldout_masks_MP=wanted_MP,
        heldout_nll_MI=nll_MI,
        heldout_loss_MI=_heldout_losses(loop, nll_MI, request.values),
    )
    quarantined = {**calibration.quarantined, **loop.tracker.quarantined}
    outcome = Outcome(
        scored=record,
        analysis=analysis,
        plan=make_plan(record, analysis),
        quarantined={
            key_text(key, record.num_players): reason for key, reason in quarantined.items()
        },
    )
    write_outputs(loop.folder, outcome, config_json=loop.described)
    loop.folder.event("finished", masks_scored=outcome.plan.masks_scored)
    return outcome


def _heldout_losses(
    loop: RunLoop, nll_MI: NDArray[np.float32], values: dict[str, NDArray[np.float32]]
) -> NDArray[np.float32] | None:
    """Losses on held-out items; None where the utility is about items of the other kind."""
    if loop.utility.reports_perplexity:
        return nll_MI
    if not loop.heldout.serves(loop.utility):
        return None
    return loop.heldout.losses(loop.utility, values)


def record_of(loop: RunLoop) -> RunRecord:
    """What the run has scored on calibration items; held-out fields are empty."""
    latest = latest_scores(loop.rounds)
    info, config = loop.info, loop.config
    target_cost, shares = read_targets(config.target) if config.target else ("", ())
    return RunRecord(
        model=info.model,
        model_hash=info.model_hash,
        players=info.players,
        costs=loop.costs,
        target_cost=target_cost,
        target_shares=tuple(sorted(shares, reverse=True)),
        utility=config.utility,
        surrogate=config.surrogate,
        sizes=loop.settings.sizes,
        max_removed=loop.settings.max_removed,
        protected=loop.settings.within.protected,
        forced=loop.settings.within.forced,
        alternatives=config.alternatives,
        min_distance=config.min_distance or MIN_DISTANCE,
        seed=config.seed,
        noise_nll=loop.noise_loss,
        masks_MP=latest.masks_MP,
        nll_MI=latest.nll_MI,
        loss_MI=latest.loss_MI,
        num_tokens_I=loop.calibration.num_tokens_I,
        corpora=loop.calibration.corpora,
        sources=tuple(loop.planner.sources[key] for key in keys(latest.masks_MP)),
        pruned_MP=np.empty((0, info.num_players), dtype=bool),
        stopped=_why_ended(loop, len(latest.masks_MP)),
        screen=() if loop.screen is None else tuple(loop.screen.tolist()),
        heldout_masks_MP=latest.masks_MP[:0],
        heldout_nll_MI=np.empty((0, loop.heldout.num_items), dtype=np.float32),
        heldout_num_tokens_I=loop.heldout.num_tokens_I,
    )


def _why_ended(loop: RunLoop, num_masks: int) -> str:
    if loop.adopted:
        return loop.adopted
    if num_masks >= loop.config.budget:
        return f"the budget of {loop.config.budget} masks is spent"
    return loop.planner.stopped or "every mask that plan and values can use is scored"
