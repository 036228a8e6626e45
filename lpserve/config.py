"""A run's configuration: one flat set of keys, from a TOML or YAML file or from flags.

Imports no torch, vllm or ray. Unknown keys are refused; every value is checked before a model is
touched.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta

from lpserve.errors import InputError
from lpserve.inputs.files import check_lasting, is_there
from lpserve.inputs.plain import plain_value
from lpserve.inputs.rules import (
    MOST,
    Count,
    CountOr0,
    LayerNames,
    Length,
    Options,
    PlayerKind,
    Positive,
    Seconds,
    Share,
    Sizes,
    Switch,
    Targets,
    Text,
    default_round_size,
    one_of,
)
from lpserve.inputs.shapes import check_value
from lpserve.redact import redact
from lpserve.utility import TASK_UTILITIES, utility_named

POOLS = ("local", "ray")
DTYPES = ("float32", "bfloat16", "float16")
SURROGATES = {
    "auto": "lpserve.surrogate.auto",
    "ridge": "lpserve.surrogate.gaussian",
    "gp": "lpserve.surrogate.gaussian",
    "gp+ridge": "lpserve.surrogate.gaussian",
    "boosting": "lpserve.surrogate.boosting",
    "ensemble": "lpserve.surrogate.ensemble",
    "paper": "lpserve.surrogate.paper",
}
"""Name -> the module whose `build` makes it (`lpserve.surrogate.base.Surrogate`)."""
GOALS = ("both", "plan", "values")
TASK_PREFIX = "task:"
"""Begins a corpus that is a task of lm-eval, not a path."""
MIN_DISTANCE = 2
"""Layers that alternatives differ in, unless the user names a number."""
STOP_GAIN = 0.001
"""Share of perplexity by which a set is said to beat another, unless the user names one."""

CHANGEABLE = (
    "budget",
    "pool",
    "engines",
    "engine",
    "engine_options",
    "grace_s",
    "progress_s",
    "stop_chance",
    "stop_gain",
    "stop_width",
    "settle",
    "tie",
    "max_windows",
    "alternatives",
    "min_distance",
    "mlflow",
    "experiment",
)
"""Keys that may differ when a run is resumed in its folder; another engine must play the same
game."""

GROWING = ("num_windows", "heldout_windows")
"""Keys that may be larger when a run is resumed: the larger number of windows holds the smaller."""

_CORPORA = {"calibration", "heldout"}


Pool = Annotated[str, one_of(POOLS)]
Dtype = Annotated[str, one_of(DTYPES)]
Goal = Annotated[str, one_of(GOALS)]
Engines = Annotated[
    Annotated[int, Meta(ge=1, le=MOST)] | Literal["auto"],
    Meta(description="a whole number, at least 1, or auto"),
]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engines score: what a run, an evaluation and a comparison have in common."""

    model: Text
    """Checkpoint folder."""
    engine: Text = "transformers"
    pool: Pool = "local"
    engines: Engines = 1
    """How many, or `auto`: as many as the cluster can hold."""
    dtype: Dtype = "float32"
    device: Text = "auto"
    players: PlayerKind = "layer"
    """What is dropped: whole layers, (`half`) attention and feed-forward parts apart, or
    (`groups:FILE`) lists of these that go together."""
    engine_options: Options = field(default_factory=dict)
    """Options of the engine kind, such as state_budget_mb; for vllm any argument of vllm.LLM."""
    grace_s: Seconds = 30.0
    """Seconds that an interrupted job waits for scores in flight."""
    progress_s: Seconds = 10.0
    """Seconds between progress lines outside a terminal."""

    def __post_init__(self) -> None:
        """Makes every value plain, and checks it against the type of its key."""
        values = {f.name: plain_value(getattr(self, f.name), f.name) for f in fields(self)}
        for key in values.keys() & _CORPORA:
            values[key] = corpora(values[key], key)
        kinds = _kinds(type(self))
        for key, value in values.items():
            check_value(value, kinds[key], key)
            object.__setattr__(self, key, value)
            if key in ("out", "store") and value is not None:
                check_lasting(value, key)
        local = self.pool == "local"
        _require(not local or self.engines == 1, "engines", self.engines, "1 with the local pool")


@dataclass(frozen=True, kw_only=True)
class WindowConfig(EngineConfig):
    """And on which windows: what a run and a comparison have in common."""

    calibration: dict[str, str]
    """Corpus name -> text, .jsonl, .json, .csv or .parquet (also .gz, .zst), folder of one kind,
    .npz, or task:NAME, a task of lm-eval."""
    heldout: dict[str, str] = field(default_factory=dict)
    """The same for held-out windows; empty: the last fifth of the calibration texts."""
    num_windows: Count = 10
    """Calibration windows of each text, questions of each task."""
    heldout_windows: Count = 64
    """The same, held out."""
    length: Length = 128
    """Tokens of a text's window."""
    bos: Switch = False
    """Begin every window with the tokenizer's BOS."""
    text_field: Text = "text"
    """The field or column that holds the text of a record."""
    window_seed: CountOr0 = 0
    """Seed of the windows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.calibration), "calibration", "nothing", "a text to calibrate on")


@dataclass(frozen=True, kw_only=True)
class RunConfig(WindowConfig):
    """Everything a run depends on. Keys are the flags of `lpserve run`."""

    include_path: Text | None = None
    """Folder of task files that lm-eval should know beside its own."""
    num_fewshot: CountOr0 | None = None
    """Examples before each question of a task; None: as the task says."""
    screen_windows: CountOr0 = 0
    """Sets are first scored on so many windows of each corpus; 0: every mask on all windows."""
    budget: Count = 400
    """Most masks scored on calibration windows."""
    max_removed: Count | None = None
    """Plans for 1..max_removed players; default: 3/8 of the layers."""
    target: Targets | None = None
    """In place of `max_removed`: plans that keep at most these shares of a cost of all players."""
    protect: LayerNames | None = None
    """Layers (or parts) that stay: no set that removes one of them is searched or planned."""
    force: LayerNames | None = None
    """Layers (or parts) that go: every set that is searched or planned removes them."""
    sizes: Sizes | None = None
    """Shapley sizes (before the player joins); default (P - max_removed, P - 1)."""
    utility: Text = "neg_nll"
    """What a coalition is worth (`lpserve.utility.UTILITIES`); those of tasks are for tasks."""
    surrogate: Text = "auto"
    goal: Goal = "both"
    """What masks are chosen for: the `plan`, the `values` (then no set is searched), or `both`."""
    round_size: Count | None = None
    """Masks of a round once the walk outwards has ended, at least; default: the number of players,
    with goal `plan` a quarter of it, at least 8."""
    stop_chance: Share | None = None
    """Stop before the budget once no unseen set has a higher probability than this of beating the
    plan by more than `stop_gain`."""
    stop_gain: Share = STOP_GAIN
    """Share of perplexity that `stop_chance` is about."""
    stop_width: Positive | None = None
    """Stop before the budget once every value's 90% interval reaches at most this far to either
    side, in the utility's units. With `stop_chance`: once both hold."""
    settle: Share | None = None
    """The best sets race on further windows until this is the probability of the best, or a tie."""
    max_windows: Count | None = None
    """With `settle`: windows of each text, those that chose the sets included."""
    tie: Share = 0.005
    """Sets that differ by less than this share of perplexity tie."""
    alternatives: CountOr0 = 0
    """How many further sets the plan lists for every size: the best scored ones that are unlike."""
    min_distance: Count | None = None
    """With `alternatives`: every two sets of a size differ in at least so many layers, each of
    which removes so many that the other keeps; default: 2."""
    seed: CountOr0 = 0
    """Seed of the sampled masks."""
    store: Text | None = None
    """Score store; default: scores.sqlite in the run folder."""
    out: Text = "run"
    """Run folder."""
    mlflow: Text | None = None
    """Where MLflow tracks: a server's URL, or what else MLflow takes; None: nowhere."""
    experiment: Text = "lpserve"
    """MLflow's experiment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        utility_named(self.utility)
        known = ", ".join(SURROGATES)
        _require(self.surrogate in SURROGATES, "surrogate", self.surrogate, f"one of {known}")
        _require(
            self.surrogate != "paper" or self.utility == "ppl_ratio",
            "surrogate",
            "paper",
            "used with utility ppl_ratio, which its sigmoid needs",
        )
        if self.target is not None and self.max_removed is not None:
            raise InputError("max_removed counts players, target a cost: give one of the two")
        for key in ("protect", "force", "alternatives", "target"):
            if self.goal == "values" and getattr(self, key):
                raise InputError(f"{key} is about the plan, and goal values searches none")
        if self.min_distance is not None and not self.alternatives:
            raise InputError("min_distance is about alternatives: say how many, 3 say")

    @property
    def store_path(self) -> Path:
        return Path(self.store) if self.store else Path(self.out) / "scores.sqlite"

    def resolved(self, num_players: int) -> RunConfig:
        """With every default that depends on the number of players filled in, and checked."""
        most = num_players - 1
        self._check_units()
        round_size = self.round_size or default_round_size(num_players, self.goal)
        apart = self.min_distance or MIN_DISTANCE
        distance = apart if self.alternatives else None
        if self.target is None:
            removed = resolved_max_removed(self.max_removed, num_players)
            sizes = self.sizes or (num_players - removed, most)
        else:  # costs say how many players may go
            removed, sizes = most, self.sizes or (0, most)
        _require(
            0 <= sizes[0] <= sizes[1] <= most,
            "sizes",
            list(sizes),
            f"0 <= k_min <= k_max <= {most}",
        )
        _require(
            not self.alternatives or apart <= removed,
            "min_distance",
            apart,
            f"at most max_removed, {removed}, for any sets to be so unlike",
        )
        changed = replace(self, round_size=round_size, min_distance=distance)
        if self.target is not None:
            return changed
        return replace(changed, max_removed=removed, sizes=sizes)

    def _check_units(self) -> None:
        """Tasks are calibrated on for utilities of tasks, texts for all others."""
        wanted = utility_named(self.utility).item == "question"
        for name, path in self.calibration.items():
            if is_task(path) == wanted:
                continue
            if wanted:
                raise InputError(
                    f"utility {self.utility} is about tasks, calibration {name!r} is a text: name "
                    f"tasks, such as {TASK_PREFIX}hellaswag"
                )
            raise InputError(
                f"calibration {name!r} is a task, utility {self.utility} is about texts: use one "
                f"of {', '.join(TASK_UTILITIES)}"
            )

    def check_files(self) -> None:
        """Raise InputError where a corpus is missing."""
        for key in ("calibration", "heldout"):
            for name, path in getattr(self, key).items():
                if not is_task(path) and not is_there(Path(path)):
                    raise InputError(f"corpus {name!r}: {path} does not exist")

    def check_unused_keys(self, *, num_fewshot: bool) -> None:
        """Raise InputError where a key was given that nothing here reads.

        Args:
            num_fewshot: whether that is asked about, too (in a study other points may read it).
        """
        corpora_of = [*self.calibration.values(), *self.heldout.values()]
        idle: dict[str, Any] = {}
        if all(is_task(path) for path in corpora_of):
            idle = {"length": 128, "bos": False, "text_field": "text"}
        elif num_fewshot and not any(is_task(path) for path in corpora_of):
            idle = {"num_fewshot": None}
        for key, default in idle.items():
            if getattr(self, key) != default:
                kinds = ("texts", "tasks") if key != "num_fewshot" else ("tasks", "texts")
                raise InputError(f"{key} is about {kinds[0]}, and there are {kinds[1]} alone")


def is_task(path: str) -> bool:
    """Whether a corpus is a task of lm-eval, not a path."""
    return path.startswith(TASK_PREFIX)


def resolved_max_removed(max_removed: int | None, num_players: int) -> int:
    """The most players to remove: 3/8 of them where none is given; raises InputError."""
    most = num_players - 1
    removed = max_removed or max(1, min(most, (3 * num_players) // 8))
    _require(most >= 1, "model", f"{num_players} players", "a model of at least 2 players")
    _require(removed <= most, "max_removed", removed, f"at most {most} for {num_players} players")
    return removed


def config_from(values: Mapping[str, Any], source: str) -> RunConfig:
    """A config from plain values.

    Raises:
        InputError: an unknown or missing key, or a value out of range; names the key and `source`.
    """
    known = [f.name for f in fields(RunConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f": known are {', '.join(known)}"
            raise InputError(f"{source}: unknown key {key!r}{hint}")
    for key in ("model", "calibration"):
        if values.get(key) in (None, "", {}, []):
            raise InputError(f"{source}: {key} is missing (--{key})")
    merged = dict(values)
    if isinstance(sizes := merged.get("sizes"), list):
        merged["sizes"] = tuple(sizes)
    return RunConfig(**merged)


def corpora(value: Any, key: str) -> dict[str, str]:
    """Corpora from a path, `name=path`, a list of these, or a mapping: name -> path.

    Raises:
        InputError: the value is none of these, or two corpora have one name.
    """
    rule = "a path, a list of paths, or a table of names and paths"
    value = plain_value(value, key)
    if isinstance(value, dict):
        for name, path in value.items():
            _require(isinstance(path, str) and path != "", f"{key}.{name}", path, "a path")
        return value
    items = [value] if isinstance(value, str) else value
    _require(isinstance(items, list | tuple), key, value, rule)
    named: dict[str, str] = {}
    for item in items:
        _require(isinstance(item, str) and item != "", key, item, rule)
        name, found, path = item.partition("=")
        if not found:
            path = item
            name = path.removeprefix(TASK_PREFIX) if is_task(path) else Path(path).stem
        if name in named:
            raise InputError(f"{key}: two corpora are named {name!r}; use name=path")
        named[name] = path
    return named


def as_json(config: RunConfig) -> dict[str, Any]:
    """Plain values that `config_from` reads back; names, passwords and tokens in MLflow's address
    are hidden, since they are written to files."""
    values = asdict(config)
    if config.mlflow is not None:
        values["mlflow"] = redact(config.mlflow, config.mlflow)
    values["sizes"] = list(config.sizes) if config.sizes else None
    return values


@cache
def _kinds(config: type) -> dict[str, Any]:
    """Key -> the type of its values, with the rules that go with it."""
    return get_type_hints(config, include_extras=True)


def _require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise InputError(f"{key} must be {rule}: got {value!r}")
