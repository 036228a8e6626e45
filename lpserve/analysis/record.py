"""What a run scored, as one value and one file: everything that a decision reads.

Notation: M masks, P players, I items (windows of texts, or questions of tasks).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray

from lpserve.analysis.resample import mean_nll, window_weights
from lpserve.config import MIN_DISTANCE, SURROGATES
from lpserve.errors import InputError, first_line
from lpserve.inputs.arrays import array_of, read_arrays
from lpserve.inputs.documents import json_value
from lpserve.inputs.shapes import converted
from lpserve.plan.constraint import Constraint
from lpserve.plan.plan import Settlement
from lpserve.plan.targets import Target, cost_targets, size_targets
from lpserve.store.files import write_npz
from lpserve.types import BoolArray, FloatArray, IntArray, Player
from lpserve.utility import Utility, UtilityView, utility_named


def _about(
    write: Callable[[Any], Any] = lambda value: value,
    read: Callable[[Any], Any] = lambda value: value,
) -> dict[str, Any]:
    """How a field is kept as JSON in the array `about`."""
    return {"about": True, "write": write, "read": read}


def _array(
    key: str,
    write: Callable[[Any], Any] = np.asarray,
    read: Callable[[Any], Any] = lambda array: array,
) -> dict[str, Any]:
    """How a field is kept as an array of its own."""
    return {"key": key, "write": write, "read": read}


def _strings(array: NDArray[Any]) -> tuple[str, ...]:
    return tuple(str(text) for text in array)


def _rows(rows: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(rows, dtype=np.int64)


def _row_tuple(array: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(array.tolist())


def _players(rows: list[list[Any]]) -> tuple[Player, ...]:
    checked = converted(rows, list[tuple[int, int, str]], "rows")
    return tuple(Player(index=i, layer=layer, part=part) for i, layer, part in checked)


def _player_rows(players: tuple[Player, ...]) -> list[list[Any]]:
    return [[p.index, p.layer, p.part] for p in players]


def _corpora(rows: list[list[Any]]) -> tuple[tuple[str, int], ...]:
    return tuple(converted(rows, list[tuple[str, int]], "rows"))


def _settlements(rows: list[dict[str, Any]]) -> tuple[Settlement, ...]:
    return tuple(converted(rows, list[Settlement], "rows"))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """Everything that a decision reads. A field says itself how `scores.npz` holds it."""

    model: str = field(metadata=_about())
    model_hash: str = field(metadata=_about())
    utility: str = field(metadata=_about())
    surrogate: str = field(metadata=_about())
    sizes: tuple[int, int] = field(metadata=_about(list, tuple))
    seed: int = field(metadata=_about())
    max_removed: int = field(metadata=_about())
    protected: tuple[int, ...] = field(default=(), metadata=_about(list, tuple))
    """Players that every set which was searched keeps."""
    forced: tuple[int, ...] = field(default=(), metadata=_about(list, tuple))
    """Players that every set which was searched removes."""
    settlements: tuple[Settlement, ...] = field(
        default=(), metadata=_about(lambda some: [asdict(one) for one in some], _settlements)
    )
    """How the races of the plan's sizes ended."""
    alternatives: int = field(default=0, metadata=_about())
    """How many sets the plan lists for every size beside the best."""
    min_distance: int = field(default=MIN_DISTANCE, metadata=_about())
    """How many layers every two of them differ in, at least."""
    noise_nll: float = field(default=0.0, metadata=_about())
    """Noise of a mask's mean loss, root mean square (`ItemSet.noise`)."""
    stopped: str = field(metadata=_about())
    """Why no more masks were asked for."""
    corpora: tuple[tuple[str, int], ...] = field(
        metadata=_about(lambda c: [list(one) for one in c], _corpora)
    )
    """Name and number of calibration items of each corpus, in order."""
    players: tuple[Player, ...] = field(metadata=_about(_player_rows, _players))
    costs: dict[str, list[float]] = field(default_factory=dict, metadata=_about())
    """Cost (`lpserve.inputs.rules.COSTS`) -> that of each player; empty: the players are layers,
    and no cost was asked about."""
    target_cost: str = field(default="", metadata=_about())
    """The cost whose shares sets were searched for; empty: sets of numbers of players were."""
    target_shares: tuple[float, ...] = field(default=(), metadata=_about(list, tuple))
    masks_MP: BoolArray = field(metadata=_array("masks"))
    """Masks in the order in which they were asked for; the first keeps all."""
    nll_MI: NDArray[np.float32] = field(metadata=_array("nll"))
    """Used to report perplexity; of questions, NLLs of the correct answers. NaN rows: given up."""
    num_tokens_I: IntArray = field(metadata=_array("num_tokens"))
    """Tokens that the NLLs are summed over."""
    sources: tuple[str, ...] = field(metadata=_array("sources", read=_strings))
    """How each mask was found."""
    pruned_MP: BoolArray = field(metadata=_array("passed_by"))
    """Masks of greedy steps that were not scored, since they had no chance to be the best."""
    screen: tuple[int, ...] = field(default=(), metadata=_array("screen", _rows, _row_tuple))
    """Items that every mask was scored on; some masks on them alone, NaN elsewhere. Empty: no mask
    was screened."""
    heldout_masks_MP: BoolArray = field(metadata=_array("heldout_masks"))
    heldout_nll_MI: NDArray[np.float32] = field(metadata=_array("heldout_nll"))
    heldout_num_tokens_I: IntArray = field(metadata=_array("heldout_num_tokens"))
    loss_MI: NDArray[np.float32] = field(metadata=_array("loss"))
    """What the utility is made of, and every decision reads; `nll_MI` itself where the utility
    reports perplexity (then the file has no array of its own for it)."""
    heldout_loss_MI: NDArray[np.float32] | None = field(
        metadata=_array("heldout_loss"), default=None
    )
    """Losses of `heldout_masks_MP`; None where the utility is not defined on held-out items."""

    @property
    def objective(self) -> Utility:
        """The run's utility."""
        return utility_named(self.utility)

    @property
    def view(self) -> UtilityView:
        """The utility on the calibration items."""
        return UtilityView(self.objective, self.num_tokens_I, self.loss_MI[0])

    @property
    def num_players(self) -> int:
        return len(self.players)

    @property
    def within(self) -> Constraint:
        """Which sets were searched."""
        return Constraint(self.num_players, self.protected, self.forced)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What sets were searched for."""
        return self.targets_within(self.within, self.max_removed)

    def targets_within(self, within: Constraint, max_removed: int) -> tuple[Target, ...]:
        """The same under another constraint, and up to so many players removed."""
        if not self.target_cost:
            return size_targets(within, max_removed)
        costs = self.costs[self.target_cost]
        return cost_targets(within, self.target_shares, costs, self.target_cost)

    @property
    def corpus_sizes(self) -> list[int]:
        """Calibration items of each corpus, in order."""
        return [count for _, count in self.corpora]

    def scored_M(self) -> BoolArray:
        """Masks with a score, finite or not (a mask that was given up has NaN alone)."""
        return ~np.asarray(np.isnan(self.nll_MI).all(axis=1))

    def screened_M(self) -> BoolArray:
        """Masks with scores on the screen alone."""
        finite_MI = np.isfinite(self.nll_MI)
        if not self.screen:
            return np.zeros(len(finite_MI), dtype=bool)
        beyond = np.setdiff1d(np.arange(finite_MI.shape[1]), self.screen)
        on_screen_M = finite_MI[:, list(self.screen)].all(axis=1)
        return np.asarray(on_screen_M & np.isnan(self.nll_MI[:, beyond]).all(axis=1))

    def resampled(self, loss_MI: NDArray[np.float32]) -> FloatArray | None:
        """The utility under draws of the items, `float64[M, B]` (`lpserve.analysis.resample`).

        None for a single item.
        """
        if len(self.num_tokens_I) < 2:
            return None
        weights = window_weights(self.corpus_sizes, seed=self.seed)
        view = self.view
        full, mean = (
            mean_nll(some_MI.astype(np.float64), view.weight_I, weights)
            for some_MI in (view.full_loss_I[None], loss_MI)
        )
        return np.asarray(self.objective.of_mean(mean, full - mean), dtype=np.float64)


_ARRAY_KINDS = {
    **dict.fromkeys(("masks", "passed_by", "heldout_masks"), "b"),
    **dict.fromkeys(("nll", "loss", "heldout_nll", "heldout_loss"), "f"),
    **dict.fromkeys(("num_tokens", "heldout_num_tokens", "screen"), "iu"),
    "sources": "U",
}
"""Array -> what it holds (`lpserve.inputs.arrays.KINDS`)."""


def write_record_file(path: Path, record: RunRecord) -> None:
    """scores.npz: what `lpserve plan` decides from, without the store.

    Raises:
        DiskFullError, InputError: the file cannot be written; an older one stays as it is.
    """
    about: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    same = {"loss_MI": record.nll_MI, "heldout_loss_MI": record.heldout_nll_MI}
    for one in fields(record):
        value = getattr(record, one.name)
        if one.metadata.get("about"):
            about[one.name] = one.metadata["write"](value)
        elif value is not None and value is not same.get(one.name):
            arrays[one.metadata["key"]] = one.metadata["write"](value)
    write_npz(path, {"about": np.array(json.dumps(about)), **arrays})


def read_record(run: str | Path) -> RunRecord:
    """The record of a finished run; raises InputError when the folder holds none."""
    path = Path(run) / "scores.npz"
    source = f"{path} is no record of a run, or damaged"
    missing = f"{run} holds no finished run; finish `lpserve run` first"
    arrays = read_arrays(path, missing=missing)
    about = _read_about(arrays, source)
    values: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    hints = get_type_hints(RunRecord)
    for one in fields(RunRecord):
        key = one.metadata.get("key", one.name)
        if one.metadata.get("about"):
            if key in about:
                values[one.name] = _field_read(one, about[key], hints[one.name], source)
        elif key in arrays:
            array_of(arrays, key, _ARRAY_KINDS[key], _axes(one.name), sizes, source)
            values[one.name] = _field_read(one, arrays[key], None, source)
        elif one.name == "loss_MI" and "nll_MI" in values:
            values["loss_MI"] = values["nll_MI"]
        if one.name not in values and one.default is MISSING and one.default_factory is MISSING:
            raise InputError(f"{source}: it holds no {key}")
    if "heldout_loss_MI" not in values and utility_named(about["utility"]).reports_perplexity:
        values["heldout_loss_MI"] = values["heldout_nll_MI"]
    record = RunRecord(**values)
    _check_record(record, source)
    return record


def _read_about(arrays: Mapping[str, NDArray[Any]], source: str) -> dict[str, Any]:
    text = array_of(arrays, "about", "U", "", {}, source)
    about = json_value(str(text), source)
    if not isinstance(about, dict):
        raise InputError(f"{source}: it says nothing about the run")
    return about


def _field_read(one: Field[Any], held: Any, kind: Any, source: str) -> Any:
    """A field as `scores.npz` holds it, read; `kind`: its type, if it is no array."""
    try:
        value = one.metadata["read"](held)
    except (ValueError, TypeError, OverflowError, SystemError) as error:
        raise InputError(f"{source}: {one.name}: {first_line(error)}") from None
    return value if kind is None else converted(value, kind, f"{source}: {one.name}")


def _axes(name: str) -> str:
    """The axes of an array, from its field's suffix; held-out ones are in lower case, since they
    have other lengths."""
    plain = {"sources": "M", "screen": "S"}
    axes = plain.get(name) or {"pruned_MP": "RP"}.get(name) or name.rpartition("_")[2]
    return axes.lower().replace("p", "P") if name.startswith("heldout") else axes


def _check_record(record: RunRecord, source: str) -> None:
    """Raise InputError where a record's parts are not of one run."""
    utility_named(record.utility)
    masks_MP, items = record.masks_MP, len(record.num_tokens_I)
    contradictions = {
        "players": [p.index for p in record.players] != list(range(masks_MP.shape[1])),
        "corpora": sum(record.corpus_sizes) != items or min(record.corpus_sizes, default=0) < 1,
        "screen": not set(record.screen) <= set(range(items))
        or len(set(record.screen)) != len(record.screen),
        "num_tokens": bool((record.num_tokens_I < 1).any()),
        "masks": not len(masks_MP) or not masks_MP[0].all(),
        "surrogate": record.surrogate not in SURROGATES,
        "seed": record.seed < 0,
        "sizes": not 0 <= record.sizes[0] <= record.sizes[1] < record.num_players,
        "noise_nll": not 0 <= record.noise_nll < float("inf"),
        "max_removed": not 0 < record.max_removed < record.num_players,
        "costs": any(len(costs) != record.num_players for costs in record.costs.values()),
        "target_cost": bool(record.target_cost) != bool(record.target_shares)
        or (bool(record.target_cost) and record.target_cost not in record.costs)
        or not all(0 < share < 1 for share in record.target_shares),
        "alternatives": record.alternatives < 0 or record.min_distance < 1,
    }
    bound = [*record.protected, *record.forced]
    contradictions["protected"] = len(set(bound)) < len(bound) or not set(bound) <= set(
        range(record.num_players)
    )
    if wrong := [name for name, holds in contradictions.items() if holds]:
        raise InputError(f"{source}: its {wrong[0]} cannot be, or contradict the rest of it")


def heldout_losses(record: RunRecord) -> tuple[NDArray[np.float32], Utility]:
    """Losses `[M, I]` of the held-out masks, and the utility that they are of: a text's NLLs where
    the run's own utility is not defined on held-out items."""
    if record.heldout_loss_MI is not None:
        return record.heldout_loss_MI, record.objective
    return record.heldout_nll_MI, utility_named("neg_nll")
