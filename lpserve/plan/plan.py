"""Choosing sets: the greedy step, the ranking, and the plan itself.

Proposes and judges, never scores. A set is given by the mask that keeps the rest. Everything is
deterministic; ties go to the smaller mask key.

Notation: M masks, P players, r = number removed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.errors import InputError
from lpserve.masks import drop_one, keys, removed_players, without
from lpserve.types import BoolArray, FloatArray
from lpserve.utility import utility_named

PLAN_FORMAT = 1
_PASS_BY = 4.0  # standard deviations of how losses change from step to step
_LEAST_CHANGES = 8  # with fewer known changes no set of a step is passed by


def best_row(masks_MP: BoolArray, utilities_M: FloatArray) -> int | None:
    """Row of the highest finite utility, ties to the smaller key; None when none is finite."""
    rows = np.flatnonzero(np.isfinite(utilities_M))
    if not len(rows):
        return None
    best = utilities_M[rows].max()
    tied = rows[utilities_M[rows] == best]
    tied_keys = keys(masks_MP[tied])
    return int(tied[tied_keys.index(min(tied_keys))])


def ranking_mask(values_P: FloatArray, num_removed: int) -> BoolArray:
    """Drop the players of the lowest values (ties to the earlier player), `bool[P]`."""
    order = np.argsort(values_P, kind="stable")
    return without(len(values_P), [int(i) for i in order[:num_removed]])


def greedy_path(
    masks_MP: BoolArray,
    utilities_M: FloatArray,
    max_removed: int,
    passed_by: Collection[bytes] = (),
) -> list[BoolArray]:
    """Drop the player whose loss costs least, again and again, among scored masks (SLEB's rule).

    Stops where a step's masks were not all asked for: the path is then shorter than `max_removed`.

    Args:
        passed_by: keys of masks that a step need not score, since they had no chance to be best.
    """
    row_of = {key: row for row, key in enumerate(keys(masks_MP))}
    current = np.ones(masks_MP.shape[1], dtype=bool)
    path: list[BoolArray] = []
    for _ in range(max_removed):
        options = drop_one(current)
        found = [(key, row_of.get(key)) for key in keys(options)]
        if any(row is None and key not in passed_by for key, row in found):
            break
        rows = np.array([row for _, row in found if row is not None], dtype=np.int64)
        best = best_row(masks_MP[rows], utilities_M[rows])
        if best is None:
            break
        current = masks_MP[rows[best]]
        path.append(current)
    return path


def can_be_best(
    path: Sequence[BoolArray], masks_MP: BoolArray, utilities_M: FloatArray
) -> BoolArray:
    """Which sets of the next greedy step may be its best, `bool[Q]` in the order of `drop_one`.

    What a player's drop costs changes little from one step to the next: what it cost last predicts
    what it costs now (as in the lazy greedy of Minoux 1978, but layer games are not submodular, so
    no old loss is a bound). How far losses move, and together drift, is read off the changes of the
    cheaper half of the players from the last step to the one before. A set is passed by when it
    lies behind the least by more than 4 standard deviations of what both may have moved since they
    were scored; never while fewer than 8 changes are known.

    Args:
        path: the steps so far, at least one.
    """
    loss_SP = _losses([np.ones(masks_MP.shape[1], dtype=bool), *path], masks_MP, utilities_M)
    options = np.flatnonzero(path[-1])
    change = _last_changes(loss_SP)
    if len(change) < _LEAST_CHANGES:
        return np.ones(len(options), dtype=bool)
    steps = len(loss_SP)
    known_SQ = np.isfinite(loss_SP[:, options])
    age_Q = known_SQ[::-1].argmax(axis=0)
    predicted_Q = loss_SP[steps - 1 - age_Q, options] + change.mean() * age_Q
    predicted_Q[~known_SQ.any(axis=0)] = -np.inf  # nothing is known of it
    if not np.isfinite(predicted_Q).any():
        return np.ones(len(options), dtype=bool)
    least = int(np.argmin(np.where(np.isfinite(predicted_Q), predicted_Q, np.inf)))
    moved_Q = change.std(ddof=1) * np.sqrt(age_Q + age_Q[least])
    return np.asarray(predicted_Q - predicted_Q[least] <= _PASS_BY * moved_Q)


def _losses(path: Sequence[BoolArray], masks_MP: BoolArray, utilities_M: FloatArray) -> FloatArray:
    """What dropping a player cost at each mask of a path, `float64[S, P]`; NaN: not scored."""
    row_of = {key: row for row, key in enumerate(keys(masks_MP))}
    loss_SP = np.full((len(path), masks_MP.shape[1]), np.nan)
    for step, mask_P in enumerate(path):
        here = row_of.get(keys(mask_P[None])[0])
        for player, key in zip(np.flatnonzero(mask_P), keys(drop_one(mask_P)), strict=True):
            row = row_of.get(key)
            if here is not None and row is not None:
                loss_SP[step, player] = utilities_M[here] - utilities_M[row]
    return loss_SP


def _last_changes(loss_SP: FloatArray) -> FloatArray:
    """How losses changed from step to step, of the cheaper half of the players; the last steps
    first, until they are enough."""
    found: list[FloatArray] = []
    for step in range(len(loss_SP) - 1, 0, -1):
        before_P = loss_SP[step - 1]
        both = np.flatnonzero(np.isfinite(before_P) & np.isfinite(loss_SP[step]))
        both = both[np.argsort(before_P[both], kind="stable")]
        cheap = both[: max(_LEAST_CHANGES, len(both) // 2)]
        found.append(loss_SP[step, cheap] - before_P[cheap])
        if sum(map(len, found)) >= _LEAST_CHANGES:
            break
    return np.concatenate([np.empty(0), *found])


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A really scored set."""

    removed: list[int]
    source: str
    """How it was found: `search`, `greedy`, `ranking`, `values` or `design`."""
    calibration_ppl: float
    predicted_ppl: float | None = None
    """The surrogate's prediction from all other scores."""
    heldout_ppl: float | None = None
    heldout_delta: float | None = None
    """Held-out mean loss minus the chosen set's, in `Utility.loss_unit`; below 0 it does better
    there. Of NLLs where the utility is not defined on the held-out windows."""
    heldout_delta_stderr: float | None = None
    """Its standard error, paired over windows (questions)."""
    calibration_utility: float | None = None
    predicted_utility: float | None = None
    """The surrogate's prediction from all other scores."""
    heldout_utility: float | None = None
    """None where the utility is not defined on the held-out windows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unseen:
    """The set that was not scored and is likeliest to beat the plan's."""

    removed: list[int]
    predicted_ppl: float | None
    chance: float
    """Probability that its calibration perplexity is lower by more than `gain`."""
    gain: float
    """Share of perplexity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanEntry:
    """What to remove for one number of removed players."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A pruning plan for every number of removed players: the content of `plan.json`."""

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
    """Those of `masks_scored` that were scored on a few windows alone
    (`lpserve.rounds.screening`)."""
    stopped: str = ""
    """Why no more masks were scored."""
    full_calibration_utility: float | None = None
    full_heldout_utility: float | None = None
    heldout_drawn: str = "windows"
    """What was held out: `windows` of texts, or `questions` of tasks."""
    protected: list[int] = field(default_factory=list)
    format: int = PLAN_FORMAT

    @property
    def tells_utility(self) -> bool:
        """Whether its figures are the utility's, since no perplexity says what that is."""
        of_ppl = utility_named(self.utility).reports_perplexity
        return not of_ppl and self.full_calibration_utility is not None

    @property
    def perplexity_of(self) -> str:
        """Whose perplexity it tells."""
        if utility_named(self.utility).item == "window":
            return ""
        text = self.heldout_drawn == "windows"
        return "of right answers" + (" (held out: of the text)" if text else "")

    def entry(self, num_removed: int) -> PlanEntry:
        """The entry for r; raises InputError when the plan has none."""
        for entry in self.plans:
            if entry.num_removed == num_removed:
                return entry
        most = max((entry.num_removed for entry in self.plans), default=0)
        raise InputError(f"the plan removes 1 to {most} players: got {num_removed}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def load_plan(path: str | Path) -> Plan:
    """Read a `plan.json`.

    Raises:
        InputError: missing, not a plan, or of another format.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != PLAN_FORMAT:
            raise InputError(
                f"{path} has plan format {data['format']}; this lpserve reads {PLAN_FORMAT}"
            )
        entries = [
            PlanEntry(
                **{
                    **e,
                    "candidates": [Candidate(**c) for c in e["candidates"]],
                    "unseen": Unseen(**e["unseen"]) if e.get("unseen") else None,
                }
            )
            for e in data.pop("plans")
        ]
        return Plan(**data, plans=entries)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run `lpserve run` first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not an lpserve plan ({error})") from None


def choose_candidates(
    masks_MP: BoolArray,
    utilities_M: FloatArray,
    num_removed: int,
    *,
    greedy: Sequence[BoolArray],
    ranking: BoolArray | None,
    sources: dict[bytes, str],
    protected: Sequence[int] = (),
) -> list[tuple[int, str]]:
    """Rows of the candidates for one r, the best first, with how each was found.

    The two best scored sets, the greedy set and the ranking's, where they were scored and keep the
    protected players.
    """
    kept = masks_MP.shape[1] - num_removed
    allowed = (masks_MP.sum(axis=1) == kept) & masks_MP[:, list(protected)].all(axis=1)
    rows = np.flatnonzero(allowed & np.isfinite(utilities_M))
    if not len(rows):
        return []
    mask_keys = keys(masks_MP[rows])
    order = sorted(range(len(rows)), key=lambda i: (-utilities_M[rows[i]], mask_keys[i]))
    wanted: dict[bytes, str] = {}
    if len(greedy) >= num_removed:
        wanted[keys(greedy[num_removed - 1][None])[0]] = "greedy"
    if ranking is not None:
        wanted.setdefault(keys(ranking[None])[0], "ranking")
    chosen: list[tuple[int, str]] = []
    for place, i in enumerate(order):
        key = mask_keys[i]
        if place < 2 or key in wanted:
            chosen.append((int(rows[i]), wanted.get(key) or sources.get(key, "design")))
    return chosen


def removed_list(mask_P: BoolArray) -> list[int]:
    return list(removed_players(mask_P))
