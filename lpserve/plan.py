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

PLAN_FORMAT = 1


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
    """Held-out mean NLL minus the chosen set's, nats per token; below 0 it does better there."""
    heldout_delta_stderr: float | None = None
    """Its standard error, paired over windows."""


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
    """How the choice depends on the windows (`lpserve.sensitivity.Stability`)."""


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
    stopped: str = ""
    """Why no more masks were scored."""
    protected: list[int] = field(default_factory=list)
    format: int = PLAN_FORMAT

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
