"""Rivals on the same engines and windows: what each found, and what that cost.

Every rival proposes masks (`lpserve.rivals.registry`), the session scores them through one store,
and costs are counted for each as if it were alone (`lpserve.rivals.accounting`). A rival's set of a
size is the best that it scored on all calibration windows; held-out windows are reported and never
choose. Sets from files are scored as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.config import WindowConfig, resolved_max_removed
from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.inputs.rules import Targets
from lpserve.masks import full_mask, removed_players
from lpserve.model.players import has_groups, has_parts, player_label
from lpserve.plan.constraint import Constraint
from lpserve.plan.layer_sets import LayerSet, layer_set_masks
from lpserve.plan.targets import Target, cost_targets, read_targets, size_targets
from lpserve.report.csv_rows import csv_text
from lpserve.rivals.accounting import Spent
from lpserve.rivals.proposer import Answer, Ask, SearchSetting, best_sets, drive
from lpserve.rivals.registry import RIVALS, Measurement
from lpserve.runner.setup import Costs, costs_of, layer_costs, windows_of
from lpserve.scoring.open import players_of
from lpserve.scoring.progress import Progress
from lpserve.scoring.session import ScoringSession
from lpserve.store.files import make_folder, write_text
from lpserve.types import BoolArray, FloatArray, Player, perplexity

RESULTS_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class CompareConfig(WindowConfig):
    """Which rivals to compare, on which windows, with which engines."""

    rivals: tuple[str, ...] = tuple(RIVALS)
    sets: tuple[LayerSet, ...] = ()
    """Sets from other sources, scored like the rivals' sets."""
    max_removed: int | None = None
    target: Targets | None = None
    """In place of `max_removed`: the best sets that keep at most these shares of a cost."""
    budget: int = 400
    """Largest number of masks of each rival; a mask on some windows counts for that share."""
    seed: int = 0
    out: str = "baselines"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and self.max_removed is not None:
            raise InputError("max_removed counts players, target a cost: give one of the two")
        for name in self.rivals:
            if name not in RIVALS:
                raise InputError(f"rivals must be of {', '.join(RIVALS)}: got {name!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSet:
    """What a rival found for one number of removed layers, or one share of a cost."""

    rival: str
    num_removed: int
    removed: tuple[int, ...]
    calibration_ppl: float
    heldout_ppl: float
    target: float | None = None
    """The share; None for a number removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RivalCost:
    """What a rival's masks cost, counted as if no other rival had scored any."""

    rival: str
    masks: int
    tokens: int
    layer_forwards: float
    """The head of each mask counts as `acquisition.HEAD_COST` layers; what is measured beside masks
    counts too."""
    note: str = ""
    """What it took besides scoring masks, or why the rival did not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Everything that a comparison found, and what it cost."""

    found: tuple[FoundSet, ...]
    costs: tuple[RivalCost, ...]
    full_calibration_ppl: float
    full_heldout_ppl: float
    masks_scored: int
    masks_read: int


def compare(config: CompareConfig, progress: Progress | None = None) -> Comparison:
    """Run every rival and write results.csv, costs.csv and results.json into the folder.

    Called again with the same config it continues where it was stopped: scores are read back from
    the folder's store.

    Raises:
        InputError: something cannot be used; raised before an engine starts.
        RunInterrupted: a signal came; what was scored is kept.
    """
    players = players_of(config)
    num_players = len(players)
    layer_set_masks(config.sets, players)  # refused before a model loads
    calibration, heldout = windows_of(config)
    by_parts = config.target is not None and has_parts(players)
    targets: tuple[Target, ...] = ()
    if not by_parts:  # what parts cost is known once an engine has found them
        targets = _targets(config, num_players, _whole_costs(config, players, calibration.length))
        _check_start(config, players, targets, calibration.num_windows)
    folder = Path(config.out)
    make_folder(folder, "results folder")
    with ScoringSession(
        config,
        calibration,
        store=folder / "scores.sqlite",
        holder=f"a comparison in {folder}",
        longest=heldout.length,
        progress=progress,
    ) as session:
        session.compare_first()
        if session.compares:
            session.check_same_scores(calibration)
        if by_parts:
            note = session.progress.note
            costs = costs_of(config.model, session.info, calibration.length, needed=True, note=note)
            targets = _targets(config, num_players, costs)
            _check_start(config, players, targets, calibration.num_windows)
        comparison = _Comparing(config, session, calibration, heldout, targets).run()
        _write(folder, config, session, comparison)
    return comparison


def _whole_costs(config: CompareConfig, players: Sequence[Player], length: int) -> Costs:
    return {} if config.target is None else layer_costs(config, players, length)


def _targets(config: CompareConfig, num_players: int, costs: Costs) -> tuple[Target, ...]:
    """What the best sets are wanted for."""
    everything = Constraint(num_players)
    if config.target is None:
        return size_targets(everything, resolved_max_removed(config.max_removed, num_players))
    cost, shares = read_targets(config.target)
    return cost_targets(everything, shares, costs[cost], cost)


def _check_start(
    config: CompareConfig, players: Sequence[Player], targets: Sequence[Target], num_windows: int
) -> None:
    """Start every rival that needs nothing but scores: what one of them refuses is raised here."""
    setting = _setting(config, players, targets, num_windows)
    for name in config.rivals:
        needs = RIVALS[name].needs
        if needs is None or not needs.refusal:
            with closing(RIVALS[name].make(setting)) as proposer:
                next(proposer)


def _setting(
    config: CompareConfig, players: Sequence[Player], targets: Sequence[Target], num_windows: int
) -> SearchSetting:
    return SearchSetting(
        num_players=len(players),
        parts=tuple(player.part for player in players),
        max_removed=max(target.sizes[-1] for target in targets),
        costs=tuple(targets) if config.target is not None else (),
        num_windows=num_windows,
        budget=config.budget,
        seed=config.seed,
    )


class _Comparing:
    def __init__(
        self,
        config: CompareConfig,
        session: ScoringSession,
        calibration: TokenWindows,
        heldout: TokenWindows,
        targets: Sequence[Target],
    ) -> None:
        self._config, self._session, self._targets = config, session, targets
        self._calibration, self._heldout = calibration, heldout
        self._players = session.info.num_players
        players = session.info.players
        self._setting = _setting(config, players, targets, calibration.num_windows)
        self._measurements: dict[str, Any] = {}

    def run(self) -> Comparison:
        sets: list[tuple[str, Target | None, BoolArray, float]] = []
        costs = []
        for name in self._config.rivals:
            record, note, beside = self._driven(name)
            costs.append(self._cost(name, record, note, beside))
            found = best_sets(record, self._targets)
            sets += [(name, target, *best) for target, best in found.items()]
        given = [s for s in self._config.sets if s.removed]
        if given:
            masks_MP = layer_set_masks(given, self._session.info.players)
            nll_M = self._score("sets", Ask(masks_MP))
            sets += [
                (s.name, target, mask_P, float(nll))
                for s, mask_P, nll in zip(given, masks_MP, nll_M, strict=True)
                for target in self._met(mask_P)
            ]
        return self._comparison(sets, costs)

    def _met(self, mask_P: BoolArray) -> list[Target | None]:
        """The hardest share that a set from elsewhere meets, if shares are asked for."""
        met: list[Target | None] = [t for t in self._setting.costs if t.holds(mask_P[None])[0]]
        return met[-1:] or [None]

    def _comparison(
        self,
        sets: Sequence[tuple[str, Target | None, BoolArray, float]],
        costs: list[RivalCost],
    ) -> Comparison:
        masks_MP = np.array([full_mask(self._players), *(mask_P for _, _, mask_P, _ in sets)])
        heldout_M = self._mean("held-out", masks_MP, self._heldout)
        full = self._mean("full model", masks_MP[:1], self._calibration)[0]
        found = [
            FoundSet(
                rival=name,
                num_removed=len(removed_players(mask_P)),
                removed=removed_players(mask_P),
                calibration_ppl=float(perplexity(nll)),
                heldout_ppl=float(perplexity(heldout)),
                target=target.share if target is not None else None,
            )
            for (name, target, mask_P, nll), heldout in zip(sets, heldout_M[1:], strict=True)
        ]
        return Comparison(
            found=tuple(found),
            costs=tuple(costs),
            full_calibration_ppl=float(perplexity(full)),
            full_heldout_ppl=float(perplexity(heldout_M[0])),
            masks_scored=self._session.masks_scored,
            masks_read=self._session.masks_read,
        )

    def _driven(self, name: str) -> tuple[list[Answer], str, float]:
        """All that a rival scored, a note on what else it did or why it did not run, and what that
        took in layer-forwards."""
        rival, setting, note, beside = RIVALS[name], self._setting, "", 0.0
        grouped = has_groups(self._session.info.players)
        if rival.needs is not None and rival.needs.refusal and grouped:
            return [], "not run: it judges single layers or halves, not groups", 0.0
        if rival.needs is not None:
            measured = self._measured(rival.needs)
            if measured is not None:
                setting, note = replace(setting, measured=measured), rival.needs.cost
                beside = rival.needs.forwards(self._players)
            elif rival.needs.refusal:
                return [], rival.needs.refusal, 0.0
        record = drive(
            rival.make(setting),
            lambda ask: self._score(name, ask),
            setting.budget,
            setting.num_windows,
        )
        return record, note, beside

    def _measured(self, needs: Measurement) -> Any:
        """The measurement inside the model, made once; None where the engines cannot make it."""
        if needs.cost not in self._measurements:
            found = needs.measure(self._session, self._calibration)
            self._measurements[needs.cost] = found
        return self._measurements[needs.cost]

    def _score(self, stage: str, ask: Ask) -> FloatArray:
        windows = self._calibration
        if ask.windows is not None:
            windows = windows.select(np.array(ask.windows))
        return self._mean(stage, ask.masks_MP, windows)

    def _mean(self, stage: str, masks_MP: BoolArray, windows: TokenWindows) -> FloatArray:
        nll_MN = self._session.score(masks_MP, windows, stage=stage)["nll"].astype(np.float64)
        return np.asarray(nll_MN.sum(axis=1) / windows.num_tokens_N.sum(), dtype=np.float64)

    def _cost(self, name: str, record: Sequence[Answer], note: str, beside: float) -> RivalCost:
        spent = Spent(self._calibration.num_windows)
        for answer in record:
            spent.add(answer.ask)
        return RivalCost(
            rival=name,
            masks=spent.masks,
            tokens=spent.tokens(self._calibration.lengths_N),
            layer_forwards=spent.forwards + beside,
            note=note,
        )


def _write(
    folder: Path, config: CompareConfig, session: ScoringSession, comparison: Comparison
) -> None:
    import lpserve

    info = session.info
    found = [
        [
            f.rival,
            f.num_removed,
            " ".join(player_label(info.players[player]) for player in f.removed),
            f.calibration_ppl,
            f.heldout_ppl,
            f.target,
        ]
        for f in comparison.found
    ]
    costs = [
        [c.rival, RIVALS[c.rival].source, c.masks, c.tokens, c.layer_forwards, c.note]
        for c in comparison.costs
    ]
    about = {
        "format": RESULTS_FORMAT,
        "model": info.model,
        "model_hash": info.model_hash,
        "engine": {"kind": info.kind, "path": info.path, "dtype": info.dtype},
        "calibration": config.calibration,
        "heldout": config.heldout,
        "num_windows": config.num_windows,
        "length": config.length,
        "target": config.target,
        "budget": config.budget,
        "seed": config.seed,
        "window_seed": config.window_seed,
        "full_calibration_ppl": comparison.full_calibration_ppl,
        "full_heldout_ppl": comparison.full_heldout_ppl,
        "versions": {"lpserve": lpserve.__version__, **info.versions},
    }
    header = ["rival", "num_removed", "removed", "calibration_ppl", "heldout_ppl", "target"]
    write_text(folder / "results.csv", csv_text(header, found))
    header = ["rival", "source", "masks", "tokens", "layer_forwards", "note"]
    write_text(folder / "costs.csv", csv_text(header, costs))
    write_text(folder / "results.json", json.dumps(about, indent=1) + "\n")
