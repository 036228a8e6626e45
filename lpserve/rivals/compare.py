"""Rivals on the same engines and windows, in one table: what each found, and what it cost.

Every rival proposes masks (`lpserve.rivals.baselines`), the session scores them through one store,
and costs are counted for each as if it were alone (`lpserve.rivals.accounting`). A rival's set of a
size is the best that it scored on all calibration windows; held-out windows report, they never
choose. Sets from files are scored beside them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.config import WindowConfig, resolved_max_removed
from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.masks import full_mask, removed_players
from lpserve.plan.layer_sets import LayerSet, layer_set_masks
from lpserve.rivals import baselines
from lpserve.rivals.accounting import Spent
from lpserve.rivals.baselines import Answer, Ask, Proposer, best_sets, drive
from lpserve.rounds.planner import RoundSettings
from lpserve.runner.setup import num_players_of, windows_of
from lpserve.scoring.progress import Progress
from lpserve.scoring.session import ScoringSession
from lpserve.types import BoolArray, FloatArray, perplexity

RESULTS_FORMAT = 1
SOURCES = {
    "lpserve": "this project, --goal plan",
    "random": "uniform sets of every size in turn",
    "last": "the last layers (arXiv 2411.15558)",
    "shortgpt": "block influence (ShortGPT, arXiv 2403.03853)",
    "angular": "most alike ends of a block (arXiv 2403.17887)",
    "oneshot": "perplexity without one layer (Shortened-LLaMA, arXiv 2402.02834)",
    "taylor": "Taylor+ (Shortened-LLaMA, arXiv 2402.02834)",
    "greedy": "greedy, re-evaluated at every step (SLEB, arXiv 2402.09025)",
    "evopress": "evolution, few windows first (EvoPress, arXiv 2410.14649)",
    "paper": "8,000 random masks, a network, values (arXiv 2602.07804)",
}
"""Rivals by name, and where each comes from."""
NEEDS_ENGINE = ("shortgpt", "angular", "taylor")
"""Rivals that look inside the model."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(WindowConfig):
    """Whom to compare, on what, with which engines."""

    rivals: tuple[str, ...] = tuple(SOURCES)
    sets: tuple[LayerSet, ...] = ()
    """Sets from elsewhere, scored beside the rivals'."""
    max_removed: int | None = None
    budget: int = 400
    """Most masks of each rival; one on few windows counts for its share."""
    seed: int = 0
    out: str = "baselines"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.rivals:
            if name not in SOURCES:
                raise InputError(f"rivals must be of {', '.join(SOURCES)}: got {name!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a rival found for one number of removed layers."""

    rival: str
    num_removed: int
    removed: tuple[int, ...]
    calibration_ppl: float
    heldout_ppl: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a rival's masks cost, as if it were alone."""

    rival: str
    masks: int
    tokens: int
    layer_forwards: float
    """With a mask's head counted as `acquisition.HEAD_COST` layers."""
    note: str = ""
    """What it did beside scoring masks, or why it did not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Everything that was found, and its cost."""

    found: tuple[Found, ...]
    costs: tuple[Cost, ...]
    full_calibration_ppl: float
    full_heldout_ppl: float
    masks_scored: int
    masks_read: int


def compare(config: CompareConfig, progress: Progress | None = None) -> Comparison:
    """Run every rival and write results.csv, costs.csv and results.json into the folder.

    The same config goes on where it was stopped: scores are read back from the folder's store.

    Raises:
        InputError: something cannot be used; raised before an engine starts.
        RunInterrupted: a signal came; what was scored is kept.
    """
    num_players = num_players_of(config)
    most = resolved_max_removed(config.max_removed, num_players)
    calibration, heldout = windows_of(config)
    _check_budget(config, num_players, most)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    with ScoringSession(
        config,
        calibration,
        store=folder / "scores.sqlite",
        holder=f"a comparison in {folder}",
        longest=heldout.length,
        progress=progress,
    ) as session:
        comparison = _Comparing(config, session, calibration, heldout, most).run()
        _write(folder, config, session, comparison)
    return comparison


def _check_budget(config: CompareConfig, num_players: int, most: int) -> None:
    """Refuse what a rival cannot begin with."""
    if "lpserve" in config.rivals:
        least = _our_settings(config, num_players, most).minimum_budget()
        if config.budget < least:
            raise InputError(f"budget must be at least {least} for lpserve: got {config.budget}")
    if "paper" in config.rivals:
        with closing(_proposer("paper", config, num_players, most, 1)) as proposer:
            next(proposer)


def _our_settings(config: CompareConfig, num_players: int, most: int) -> RoundSettings:
    return RoundSettings(
        num_players=num_players,
        max_removed=most,
        sizes=(num_players - most, num_players - 1),
        seed=config.seed,
        surrogate="auto",
        round_size=num_players,
        goal="plan",
    )


def _proposer(
    name: str, config: CompareConfig, players: int, most: int, num_windows: int
) -> Proposer:
    """A rival that needs nothing but scores."""
    if name == "lpserve":
        return baselines.ours(_our_settings(config, players, most))
    if name == "random":
        return baselines.random_search(players, most, config.seed)
    if name == "last":
        return baselines.last_layers(players, most)
    if name == "oneshot":
        return baselines.one_shot(players, most)
    if name == "greedy":
        return baselines.greedy(players, most)
    if name == "evopress":
        return baselines.evolutionary(players, most, num_windows=num_windows, seed=config.seed)
    assert name == "paper"
    return baselines.paper(players, most, budget=config.budget, seed=config.seed)


class _Comparing:
    def __init__(
        self,
        config: CompareConfig,
        session: ScoringSession,
        calibration: TokenWindows,
        heldout: TokenWindows,
        most: int,
    ) -> None:
        self._config, self._session, self._most = config, session, most
        self._calibration, self._heldout = calibration, heldout
        self._players = session.info.num_players
        self._states: Any = None

    def run(self) -> Comparison:
        sets: list[tuple[str, BoolArray, float]] = []
        costs = []
        for name in self._config.rivals:
            record, note = self._driven(name)
            costs.append(self._cost(name, record, note))
            found = best_sets(record)
            sets += [(name, *found[r]) for r in sorted(found) if 1 <= r <= self._most]
        given = [s for s in self._config.sets if s.removed]
        if given:
            masks_MP = layer_set_masks(given, self._players)
            nll_M = self._score("sets", Ask(masks_MP))
            sets += [(s.name, m, float(v)) for s, m, v in zip(given, masks_MP, nll_M, strict=True)]
        return self._comparison(sets, costs)

    def _comparison(
        self, sets: Sequence[tuple[str, BoolArray, float]], costs: list[Cost]
    ) -> Comparison:
        masks_MP = np.array([full_mask(self._players), *(mask_P for _, mask_P, _ in sets)])
        heldout_M = self._mean("held-out", masks_MP, self._heldout)
        full = self._mean("whole model", masks_MP[:1], self._calibration)[0]
        found = [
            Found(
                rival=name,
                num_removed=len(removed_players(mask_P)),
                removed=removed_players(mask_P),
                calibration_ppl=float(perplexity(nll)),
                heldout_ppl=float(perplexity(heldout)),
            )
            for (name, mask_P, nll), heldout in zip(sets, heldout_M[1:], strict=True)
        ]
        return Comparison(
            found=tuple(found),
            costs=tuple(costs),
            full_calibration_ppl=float(perplexity(full)),
            full_heldout_ppl=float(perplexity(heldout_M[0])),
            masks_scored=self._session.masks_scored,
            masks_read=self._session.masks_read,
        )

    def _driven(self, name: str) -> tuple[list[Answer], str]:
        """What a rival scored, and what it did beside."""
        note = ""
        if name in NEEDS_ENGINE:
            proposer, note = self._inside(name)
            if proposer is None:
                return [], note
        else:
            proposer = _proposer(
                name, self._config, self._players, self._most, self._calibration.num_windows
            )
        record = drive(
            proposer,
            lambda ask: self._score(name, ask),
            self._config.budget,
            self._calibration.num_windows,
        )
        return record, note

    def _inside(self, name: str) -> tuple[Proposer | None, str]:
        """A rival that looks inside the model, where the engine lets it."""
        if name == "taylor":
            values_P = self._session.with_engine(_if_it_can("taylor_importance"))
            if values_P is None:
                return None, "not run: gradients need engine transformers in this process"
            note = "one forward and backward pass over the calibration windows"
            return baselines.taylor(values_P, self._most), note
        if self._states is None:
            self._states = self._session.with_engine(_if_it_can("hidden_states"))
        if self._states is None:
            return None, "not run: hidden states need engine transformers in this process"
        note = "one forward pass over the calibration windows"
        if name == "shortgpt":
            return baselines.block_influence(self._states.influence_P, self._most), note
        return baselines.contiguous_layers(self._states.distance_LL, self._most), note

    def _score(self, stage: str, ask: Ask) -> FloatArray:
        windows = self._calibration
        if ask.windows is not None:
            windows = windows.select(np.array(ask.windows))
        return self._mean(stage, ask.masks_MP, windows)

    def _mean(self, stage: str, masks_MP: BoolArray, windows: TokenWindows) -> FloatArray:
        nll_MN = self._session.score(masks_MP, windows, stage=stage)["nll"].astype(np.float64)
        return np.asarray(nll_MN.sum(axis=1) / windows.num_tokens_N.sum(), dtype=np.float64)

    def _cost(self, name: str, record: Sequence[Answer], note: str) -> Cost:
        spent = Spent(self._calibration.num_windows)
        for scored in record:
            spent.add(scored.ask)
        return Cost(
            rival=name,
            masks=spent.masks,
            tokens=spent.tokens(self._calibration.lengths_N),
            layer_forwards=spent.forwards,
            note=note,
        )


def _if_it_can(method: str) -> Callable[[Any], Any]:
    return lambda engine: getattr(engine, method)() if hasattr(engine, method) else None


def _write(
    folder: Path, config: CompareConfig, session: ScoringSession, comparison: Comparison
) -> None:
    import lpserve

    info = session.info
    found, costs = io.StringIO(), io.StringIO()
    writer = csv.writer(found, lineterminator="\n")
    writer.writerow(["rival", "num_removed", "removed", "calibration_ppl", "heldout_ppl"])
    for f in comparison.found:
        writer.writerow(
            [
                f.rival,
                f.num_removed,
                " ".join(map(str, f.removed)),
                repr(f.calibration_ppl),
                repr(f.heldout_ppl),
            ]
        )
    writer = csv.writer(costs, lineterminator="\n")
    writer.writerow(["rival", "source", "masks", "tokens", "layer_forwards", "note"])
    for c in comparison.costs:
        writer.writerow(
            [c.rival, SOURCES[c.rival], c.masks, c.tokens, repr(c.layer_forwards), c.note]
        )
    about = {
        "format": RESULTS_FORMAT,
        "model": info.model,
        "model_hash": info.model_hash,
        "engine": {"kind": info.kind, "path": info.path, "dtype": info.dtype},
        "calibration": config.calibration,
        "heldout": config.heldout,
        "num_windows": config.num_windows,
        "length": config.length,
        "budget": config.budget,
        "seed": config.seed,
        "window_seed": config.window_seed,
        "full_calibration_ppl": comparison.full_calibration_ppl,
        "full_heldout_ppl": comparison.full_heldout_ppl,
        "versions": {"lpserve": lpserve.__version__, **info.versions},
    }
    (folder / "results.csv").write_text(found.getvalue(), encoding="utf-8")
    (folder / "costs.csv").write_text(costs.getvalue(), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
