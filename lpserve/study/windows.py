"""The windows of a study's points, cut once for each model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lpserve.config import RunConfig
from lpserve.data.corpora import WindowRequest
from lpserve.data.items import ItemSet
from lpserve.data.prepare import check_utility
from lpserve.data.tasks import cut_item_sets
from lpserve.data.windows import TokenWindows
from lpserve.runner.setup import check_sides
from lpserve.study.study import Study
from lpserve.utility import utility_named


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StudyWindows:
    """The windows of one model's points: held-out ones are the same for all of them."""

    heldout: ItemSet
    cells: dict[tuple[int, bool, int], dict[str, ItemSet]]
    """(length, bos, window_seed) -> corpus -> calibration windows (of a task: questions), as many
    as the largest point needs."""
    uncut: frozenset[str]
    """Corpora of which every point uses all windows (.npz)."""

    @property
    def longest(self) -> TokenWindows:
        """The set with the longest windows."""
        sides = [items for corpora in self.cells.values() for items in corpora.values()]
        return max((s.windows for s in [self.heldout, *sides]), key=lambda windows: windows.length)

    def of(self, config: RunConfig) -> tuple[ItemSet, ItemSet]:
        """Calibration and held-out items of a point: the first items of each of its corpora.

        Raises:
            InputError: two corpora of the point have a window in common.
        """
        parts = [
            items if name in self.uncut else items.first(config.num_windows)
            for name, items in self.cells[_cell_of(config)].items()
            if name in config.calibration
        ]
        return ItemSet.concatenate(parts), self.heldout

    def atoms(self, configs: Sequence[RunConfig]) -> list[TokenWindows]:
        """The windows in parts each of which a point uses completely or not at all.

        Stored in such parts, no score of a mask on a window is ever made twice, whichever points
        ask for it in whichever order.
        """
        found: list[TokenWindows] = []
        mine = {s.content_hash: s for s in (self.of(config)[0] for config in configs)}
        sets = [set(items.windows.window_hashes) for items in mine.values()]
        seen: set[str] = set()
        for corpora_of in self.cells.values():
            for items in corpora_of.values():
                parts: dict[tuple[bool, ...], list[int]] = {}
                for row, name in enumerate(items.windows.window_hashes):
                    pattern = tuple(name in own for own in sets)
                    if any(pattern) and name not in seen:
                        parts.setdefault(pattern, []).append(row)
                    seen.add(name)
                found += [items.windows.select(rows) for rows in parts.values()]
        return found


def study_windows(study: Study, configs: Sequence[RunConfig]) -> StudyWindows:
    """The windows of the points of one model.

    Held-out windows are cut once, as long as the longest calibration windows, with the first
    point's BOS and seed, so that all points are measured on the same windows. Without held-out
    texts they come from the last fifth of every corpus of the study.

    Raises:
        InputError: a text is unreadable or too short, windows of the two sides share text, or they
            do not fit the model.
    """
    base = configs[0]
    counts: dict[tuple[int, bool, int], dict[str, int]] = {}
    for config in configs:
        own = counts.setdefault(_cell_of(config), {})
        for name in config.calibration:
            own[name] = max(own.get(name, 1), config.num_windows)
    used = {name for own in counts.values() for name in own}
    texts = {n: p for n, p in study.base.calibration.items() if n in used}
    longest = max(length for length, _, _ in counts)
    reference = (longest, base.bos, base.window_seed)
    cells: dict[tuple[int, bool, int], dict[str, ItemSet]] = {}
    heldout: list[ItemSet] = []
    for cell in dict.fromkeys([*counts, reference]):
        own = counts.get(cell, {})
        length, bos, seed = cell
        request = WindowRequest(
            calibration=texts,
            heldout=base.heldout,
            num_windows={n: own.get(n, 1) for n in texts},
            heldout_windows=base.heldout_windows,
            length=length,
            seed=seed,
            bos=bos,
            field=base.text_field,
        )
        calibration, held = cut_item_sets(
            request, base.model, include_path=base.include_path, num_fewshot=base.num_fewshot
        )
        if cell == reference:
            heldout = held
        if own:
            cut = dict(zip(texts, calibration, strict=True))
            cells[cell] = {name: cut[name] for name in texts if name in own}
    uncut = frozenset(n for n, p in texts.items() if p.endswith(".npz"))
    windows = StudyWindows(heldout=ItemSet.concatenate(heldout), cells=cells, uncut=uncut)
    checked: set[str] = set()
    for config in configs:
        config.check_unused_keys(num_fewshot=False)
        calibration, held = windows.of(config)
        check_utility(utility_named(config.utility), calibration, held)
        if calibration.content_hash not in checked:
            check_sides(base, calibration, held)
        checked.add(calibration.content_hash)
    return windows


def all_windows(study: Study) -> dict[str, StudyWindows]:
    """Model -> the windows of its points, cut and checked; raises InputError."""
    configs: dict[str, list[RunConfig]] = {}
    for family in study.families():
        members = [family.leader, *family.points]
        configs.setdefault(family.leader.config.model, []).extend(p.config for p in members)
    return {model: study_windows(study, own) for model, own in configs.items()}


def _cell_of(config: RunConfig) -> tuple[int, bool, int]:
    return config.length, config.bos, config.window_seed
