"""The pruning plan: the content of `plan.json`, written and read.

Knows nothing about how a plan comes about (`lpserve.analysis.analyse`); perplexities are of the
windows that the run scored. Field names are the keys of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lpserve.errors import InputError
from lpserve.inputs.documents import read_json_object, shown
from lpserve.inputs.shapes import check_names, converted
from lpserve.model.players import kinds_of, player_label, players_from
from lpserve.plan.constraint import constraint_text
from lpserve.plan.targets import read_targets
from lpserve.utility import utility_named

PLAN_FORMAT = 1
COST_WORDS = {
    "params": "the parameters of all layers",
    "flops": "the FLOP of a token in all layers",
    "kv": "the keys and values that a token leaves in the cache",
}
_SAME_SHARE = 1e-6  # shares that differ by less are the same, as people write them
UNSETTLED = "the draw of "
"""How a warning begins that another draw of the windows (questions) may choose another set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A scored set of one size; perplexities and utilities are on calibration windows unless named
    held-out."""

    removed: list[int]
    source: str
    """How it was found: `search`, `greedy`, `ranking`, `values` or `design`."""
    calibration_ppl: float
    predicted_ppl: float | None = None
    """The surrogate's prediction from all other scores."""
    heldout_ppl: float | None = None
    heldout_delta: float | None = None
    """Held-out mean loss minus the chosen set's, in `Utility.loss_unit`; below 0 this set does
    better there. NLLs are compared where the utility is not defined on the held-out windows."""
    heldout_delta_stderr: float | None = None
    """Its standard error, paired over windows (questions)."""
    calibration_utility: float | None = None
    predicted_utility: float | None = None
    """The surrogate's prediction from all other scores."""
    heldout_utility: float | None = None
    """None where the utility is not defined on the held-out windows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unseen:
    """The unscored set with the highest probability of improvement over the plan's set."""

    removed: list[int]
    predicted_ppl: float | None
    chance: float
    """Probability that its calibration perplexity is lower by more than `gain`."""
    gain: float
    """Share of perplexity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settlement:
    """How the race of one size ended (`lpserve.plan.race`)."""

    removed: list[int]
    """The set that won; of those that tie, the one that holds the smaller plan's set if one does,
    else the one of the lowest loss."""
    outcome: str
    """`wins`, or `tie`: the others differ by less than the tie, or all windows cannot tell."""
    ties: list[list[int]]
    """What the other sets remove that tie."""
    contenders: int
    windows: int
    """Windows that the race read."""
    confidence: float
    """The best of the contenders is among those that are left at least so often."""
    behind: float
    """Mean loss of `removed` beyond the lowest of those that tie, nats per token."""
    half_width: float | None
    """How far the bounds of the ties' differences reach to either side, nats per token."""
    target: float | None = None
    """The entry's share of a cost (`PlanEntry.target`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanEntry:
    """What to remove for one number of removed players, or for one share of a cost."""

    num_removed: int
    removed: list[int]
    source: str
    calibration_ppl: float
    predicted_ppl: float | None
    heldout_ppl: float | None
    candidates: list[Candidate]
    warnings: list[str] = field(default_factory=list)
    unseen: Unseen | None = None
    """None: every set of this size was scored."""
    stability: dict[str, Any] | None = None
    """How the choice depends on the windows (`lpserve.analysis.stability.Stability`)."""
    calibration_utility: float | None = None
    predicted_utility: float | None = None
    heldout_utility: float | None = None
    target: float | None = None
    """The share of the plan's `target_cost` that the set keeps at most; None: the plan is by number
    removed."""
    settlement: Settlement | None = None
    """None: no race was run."""
    alternatives: list[Candidate] = field(default_factory=list)
    """The best scored sets that are unlike `removed` and one another, the best first
    (`Plan.min_distance`)."""

    @property
    def is_open(self) -> bool:
        """Whether other sets of the size may be as good: they tie, or were not told apart."""
        if self.settlement is not None:
            return self.settlement.outcome == "tie"
        return any(warning.startswith(UNSETTLED) for warning in self.warnings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A pruning plan for every number of removed players, or share of a cost: the content of
    `plan.json`."""

    model: str
    model_hash: str
    num_players: int
    players: list[dict[str, Any]]
    utility: str
    masks_scored: int
    heldout_masks: int
    full_calibration_ppl: float
    full_heldout_ppl: float | None
    plans: list[PlanEntry]
    masks_screened: int = 0
    """The masks among `masks_scored` that were scored on the screen's few windows alone
    (`lpserve.rounds.screening`)."""
    stopped: str = ""
    """Why no more masks were scored."""
    full_calibration_utility: float | None = None
    full_heldout_utility: float | None = None
    heldout_drawn: str = "windows"
    """What was held out: `windows` of texts, or `questions` of tasks."""
    protected: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    alternatives: int = 0
    """How many sets were wanted beside each entry's."""
    min_distance: int | None = None
    """Players that every two sets of an entry and its alternatives differ in, at least: each
    removes so many that the other keeps. None: there are no alternatives."""
    costs: dict[str, list[float]] = field(default_factory=dict)
    """Cost (`lpserve.inputs.rules.COSTS`) -> that of each player; empty: the players are layers,
    and no cost was asked about."""
    target_cost: str = ""
    """The cost whose shares the entries are for; empty: they are for numbers removed."""
    format: int = PLAN_FORMAT

    def share_left(self, cost: str, removed: Sequence[int]) -> float:
        """The share of all players' cost that is left without some of them."""
        total = sum(self.costs[cost])
        return 1.0 - sum(self.costs[cost][player] for player in removed) / total if total else 1.0

    @property
    def constraint(self) -> str:
        """Which sets it chose from, in words; empty: from all."""
        names = (self._labels(some) for some in (self.protected, self.forced))
        return constraint_text(*names)

    @property
    def unit(self) -> str:
        """What its players are: `layers`, `parts of layers`."""
        return kinds_of(players_from(self.players))

    def names(self, removed: Iterable[int]) -> str:
        """Players by their labels: `3, 7.attention`."""
        return ", ".join(self._labels(removed))

    def _labels(self, some: Iterable[int]) -> list[str]:
        labels = [player_label(player) for player in players_from(self.players)]
        return [labels[player] for player in some]

    @property
    def reports_utility(self) -> bool:
        """Whether it reports the utility itself, because no perplexity stands for it."""
        of_ppl = utility_named(self.utility).reports_perplexity
        return not of_ppl and self.full_calibration_utility is not None

    @property
    def perplexity_of(self) -> str:
        """What its perplexities are of, in words: empty for texts."""
        if utility_named(self.utility).item == "window":
            return ""
        text = self.heldout_drawn == "windows"
        return "of right answers" + (" (held out: of the text)" if text else "")

    @property
    def notes(self) -> list[str]:
        """What to know of the sets, each thing once; `~` marks sizes that are open."""
        found = []
        raced = [e.settlement for e in self.plans if e.settlement is not None]
        if raced:
            won = sum(one.outcome == "wins" for one in raced)
            found.append(
                f"raced on up to {max(one.windows for one in raced)} further windows: for {won} of "
                f"{len(raced)} sizes the set shown is the best of its contenders "
                f"({raced[0].confidence:.0%} each)"
            )
        if costs := [one.behind for one in raced if one.ties]:
            found.append(
                "~ ties with other sets (`ties` in plan.json): they differ by less than the tie, "
                "or all windows cannot tell; the set shown is at most "
                f"{max(costs):.4f} nats per token behind"
            )
        doubtful = [e for e in self.plans if e.settlement is None and e.is_open]
        if doubtful:
            costs = [float((e.stability or {}).get("regret", 0.0)) for e in doubtful]
            drawn = "questions" if utility_named(self.utility).item == "question" else "windows"
            more = "; --settle 0.9 --max-windows N races them on more" * (drawn == "windows")
            found.append(
                f"~ another draw of the {drawn} may choose another set; choosing this one costs "
                f"{min(costs):.1%} to {max(costs):.1%} of perplexity on average (`stability` in "
                f"plan.json){more}"
            )
        few = [self.label(e) for e in self.plans if len(e.alternatives) < self.alternatives]
        if few:
            found.append(
                f"the scored sets of {', '.join(few)}{self._removed} hold "
                f"fewer than {self.alternatives} alternatives that differ in {self.min_distance} "
                f"{self.unit}"
            )
        for entry in self.plans:
            found += [
                f"note: {self.label(entry)}{self._removed}: {warning}"
                for warning in entry.warnings
                if not warning.startswith(UNSETTLED)
            ]
        return found

    @property
    def _removed(self) -> str:
        """What follows a label in a sentence."""
        return "" if self.target_cost else " removed"

    def label(self, entry: PlanEntry) -> str:
        """What an entry is for: `5` (removed), `params=0.8`."""
        if entry.target is None:
            return str(entry.num_removed)
        return f"{self.target_cost}={entry.target:g}"

    def place(self, entry: PlanEntry) -> float:
        """How far an entry prunes: players removed, or percent of the cost."""
        return entry.num_removed if entry.target is None else 100.0 * (1.0 - entry.target)

    @property
    def axis(self) -> str:
        """What `place` counts, in words."""
        return f"% of {self.target_cost} removed" if self.target_cost else f"{self.unit} removed"

    def entry(self, wanted: int | str) -> PlanEntry:
        """The entry for one number removed, or for a share of a cost such as `params=0.8`; raises
        InputError when the plan has none."""
        labels = [self.label(entry) for entry in self.plans]
        if isinstance(wanted, str) or self.target_cost:
            cost, shares = read_targets(wanted) if isinstance(wanted, str) else ("", ())
            for entry in self.plans if cost == self.target_cost else ():
                if len(shares) == 1 and abs((entry.target or 0.0) - shares[0]) < _SAME_SHARE:
                    return entry
            raise InputError(
                f"the plan has sets for {', '.join(labels)}{self._removed}: got {wanted}"
            )
        for entry in self.plans:
            if entry.num_removed == wanted:
                return entry
        sizes = [entry.num_removed for entry in self.plans]
        least, most = min(sizes, default=1), max(sizes, default=0)
        raise InputError(f"the plan removes {least} to {most} players: got {wanted}")

    def removed_by(self, wanted: int | str, alternative: int = 0) -> list[int]:
        """What the plan's set for a number removed or a share of a cost (`entry`) removes, or what
        its alternative of that number (from 1) does; raises InputError where there is none."""
        entry = self.entry(wanted)
        if alternative == 0:
            return entry.removed
        if not 0 < alternative <= len(entry.alternatives):
            raise InputError(
                f"the plan has {len(entry.alternatives)} alternatives for {self.label(entry)}"
                f"{self._removed}: got {alternative} (`lpserve plan RUN --alternatives K --out "
                "FILE` lists more)"
            )
        return entry.alternatives[alternative - 1].removed

    def to_json(self) -> str:
        """The content of `plan.json`."""
        return json.dumps(asdict(self), indent=1) + "\n"


def load_plan(path: str | Path) -> Plan:
    """Read a `plan.json`.

    Raises:
        InputError: the file is missing, is not a plan, or has another format version.
    """
    data = read_json_object(Path(path), missing="finish `lpserve run` first")
    if "format" not in data:
        raise InputError(f"{path} is not an lpserve plan: it names no format")
    if data["format"] != PLAN_FORMAT:
        raise InputError(
            f"{path} has plan format {shown(data['format'])}; this lpserve reads {PLAN_FORMAT}"
        )
    check_names(data, Plan, str(path))
    plan = converted(data, Plan, f"{path} is not an lpserve plan")
    for given in data["plans"]:
        check_names(given, PlanEntry, str(path))
    _check_content(plan, str(path))
    return plan


def _check_content(plan: Plan, source: str) -> None:
    """Raise InputError where a plan of the right shape contradicts itself."""
    utility_named(plan.utility)
    indices = [player.index for player in players_from(plan.players)]
    if len(indices) != plan.num_players or indices != list(range(len(indices))):
        raise InputError(f"{source}: its {plan.num_players} players must be numbered from 0")
    if any(len(costs) != plan.num_players or min(costs) < 0 for costs in plan.costs.values()):
        raise InputError(f"{source}: costs must hold a number for each of its players")
    removing = "" if plan.target_cost else " removed"
    if plan.target_cost and plan.target_cost not in plan.costs:
        raise InputError(f"{source}: it is for shares of {plan.target_cost}, and has no such costs")
    for entry in plan.plans:
        if (entry.target is None) == bool(plan.target_cost):
            raise InputError(f"{source}: an entry must have a target if and only if the plan has")
        for removed in (entry.removed, *(other.removed for other in entry.alternatives)):
            wrong = len(set(removed)) != len(removed) or (
                len(removed) != entry.num_removed
                if entry.target is None
                else plan.share_left(plan.target_cost, removed) > entry.target + _SAME_SHARE
            )
            if wrong or not set(removed) <= set(indices):
                raise InputError(
                    f"{source}: the entry for {plan.label(entry)}{removing} lists {removed}"
                )
