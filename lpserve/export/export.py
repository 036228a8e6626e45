"""A pruned checkpoint, written shard by shard, then reloaded and compared.

Layers are renumbered and every config field known to be per layer is cut
(`lpserve.export.pruned_config`). The result is written beside its target (`writer`) and moved there
once a fresh process has loaded it with `AutoModelForCausalLM` and scored what the skip engine
scores (`verify`).
"""

from __future__ import annotations

import json
import numbers
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.analysis.record import read_record
from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.export.parts import part_tensors, slim_config
from lpserve.export.pruned_config import prune_config
from lpserve.export.report import ExportReport, model_card
from lpserve.export.verify import (
    VERIFY_TOLERANCE,
    Verification,
    random_windows,
    skip_engine,
    verify_checkpoint,
)
from lpserve.export.writer import ADVICE, CARD_NAME, REPORT_NAME, write_checkpoint
from lpserve.masks import without
from lpserve.model.checkpoint import Checkpoint, read_checkpoint
from lpserve.model.content_hash import checkpoint_hash
from lpserve.model.players import player_label, players_from, removed_parts
from lpserve.plan.plan import load_plan
from lpserve.store.files import make_folder, space_checked, write_text
from lpserve.store.run_folder import read_run_config
from lpserve.types import FloatArray, Player

PARTIAL_NAME = ".lpserve-partial"


def export_checkpoint(
    model: str | Path,
    removed: Sequence[int],
    out: str | Path,
    *,
    players: Sequence[Player] | None = None,
    slim: bool = False,
    verify: bool = True,
    windows: TokenWindows | None = None,
    expected_nll_N: FloatArray | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> ExportReport:
    """Write the checkpoint `model` without the removed layers to the folder `out`.

    Args:
        removed: 0-based layers of the original model; with `players`, indices of players.
        out: a folder that does not exist or is empty.
        players: what `removed` counts, for a set out of a plan
            (`lpserve.model.players.players_from(plan.players)`); None: the layers.
        slim: leave the weights of absent parts out, for `lpserve.hf` to load; else they are zeros.
        verify: reload in a fresh process and compare.
        windows: what to compare on, 4 x 64 random tokens by default.
        expected_nll_N: the skip engine's summed NLL of every window; default: an engine is opened.
        dtype: of the comparison, as `device`.

    Raises:
        InputError: something cannot be used, or the pruned structure cannot be expressed in the
            model's config; nothing has been written.
        ExportError: the reloaded checkpoint scores otherwise, or does not generate; it is removed.
    """
    indices = _whole_numbers(removed)
    layers, parts = (indices, []) if players is None else removed_parts(players, indices)
    _check_target(target := Path(out), dtype)
    checkpoint = read_checkpoint(model)
    pruned = prune_config(checkpoint, layers)
    compared = windows or random_windows(pruned.vocab_size)
    tensors: set[str] = set()
    if parts or (verify and expected_nll_N is None):
        skipped = skip_engine(checkpoint, players or (), indices, compared, dtype, device)
        expected_nll_N = skipped.nll_N if expected_nll_N is None else expected_nll_N
        tensors = part_tensors(checkpoint, pruned.prefix, parts, skipped.modules)
        if slim and parts:
            config = slim_config(checkpoint, pruned, parts, skipped.modules, skipped.absent)
            pruned = replace(pruned, config=config)
    with _written_aside(target) as partial:
        left_behind = write_checkpoint(checkpoint, pruned, partial, tensors, left_out=slim)
        found = None
        if verify and expected_nll_N is not None:
            given = compared, expected_nll_N, dtype, device
            found = verify_checkpoint(partial, *given, original=checkpoint)
        report = ExportReport(
            **_as_removed(checkpoint, layers, parts, slim=slim),
            **_as_found(found, compared, with_ppl=windows is not None),
            kept=pruned.kept,
            dtype=dtype,
            left_behind=left_behind,
        )
        _write_report(partial, report)
    return report


def _write_report(folder: Path, report: ExportReport) -> None:
    write_text(folder / CARD_NAME, model_card(report))
    write_text(folder / REPORT_NAME, json.dumps(asdict(report), indent=1) + "\n")


def _as_removed(
    checkpoint: Checkpoint, layers: Sequence[int], parts: Sequence[Player], *, slim: bool
) -> dict[str, Any]:
    """A report's fields about the original and what is gone of it."""
    named = [player_label(part) for part in sorted(parts, key=lambda p: (p.layer, p.part))]
    return {
        "source": str(checkpoint.path.resolve()),
        "source_hash": checkpoint_hash(checkpoint),
        "removed": sorted(layers),
        "zeroed": [] if slim else named,
        "left_out": named if slim else [],
    }


def _as_found(
    found: Verification | None, compared: TokenWindows, *, with_ppl: bool
) -> dict[str, Any]:
    """A report's fields about the comparison."""
    return {
        "verified": found is not None,
        "num_windows": compared.num_windows if found else 0,
        "generates": found and found.generates,
        "worst_relative_difference": found and found.worst_relative_difference,
        "ppl": found.ppl if found and with_ppl else None,
    }


def _whole_numbers(removed: Sequence[int]) -> list[int]:
    """Whole numbers of any kind, numpy's among them."""
    for value in removed:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise InputError(f"removed layers must be whole numbers: got {value!r}")
    if not len(removed):
        raise InputError("nothing is removed: name a layer at least")
    return [int(value) for value in removed]


def _check_target(target: Path, dtype: str) -> None:
    if dtype not in VERIFY_TOLERANCE:
        raise InputError(f"unknown dtype {dtype!r}: one of {', '.join(VERIFY_TOLERANCE)}")
    try:
        taken = target.exists() and (
            not target.is_dir() or any(p.name != PARTIAL_NAME for p in target.iterdir())
        )
    except OSError as error:
        raise InputError(
            f"export target {target} cannot be read: {error.strerror or error}"
        ) from None
    if taken:
        raise InputError(f"export target {target} is not empty: choose another folder")


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """A new folder whose content becomes the target's at the end; after an error it is removed.

    It lies beside a target that does not exist yet, and takes its place in one step. In a target
    that does exist (the current folder, a mounted volume) it lies inside, and its files move up,
    the config last.
    """
    inside = target.exists()
    partial = (
        target / PARTIAL_NAME
        if inside
        else Path(os.path.abspath(target)).with_name(f".{target.name}.partial")
    )
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise InputError(f"{partial} is in the way: remove it, or choose another folder")
    make_folder(partial.parent, "folder")
    with space_checked(partial, ADVICE):
        if partial.exists():  # left by an export that was killed
            shutil.rmtree(partial)
        partial.mkdir()
    try:
        yield partial
        with space_checked(target, ADVICE):
            if inside:
                for path in sorted(partial.iterdir(), key=lambda p: p.name == "config.json"):
                    path.replace(target / path.name)
                partial.rmdir()
            else:
                partial.replace(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def export_run(
    run: str | Path,
    wanted: int | str,
    out: str | Path,
    *,
    alternative: int = 0,
    slim: bool = False,
    plan_path: str | Path | None = None,
    model: str | Path | None = None,
    device: str = "auto",
    verify: bool = True,
) -> ExportReport:
    """Export what a run's plan removes, compared on the run's own windows and scores.

    Args:
        run: folder of a finished run.
        wanted: r, the number of players to remove, or the share of a cost (`params=0.8`) of a plan
            by cost.
        alternative: the number of the plan's alternative for it, from 1; 0: its best set.
        slim: as of `export_checkpoint`.
        plan_path: another plan of this run; None: the folder's plan.json.
        model: checkpoint folder; None: the path that the plan names.

    Raises:
        InputError: no finished run, a plan or model that is not of this run, or one of the reasons
            of `export_checkpoint`.
    """
    folder = Path(run)
    plan = load_plan(plan_path or folder / "plan.json")
    removed = plan.removed_by(wanted, alternative)
    players = players_from(plan.players)
    source = Path(model or plan.model)
    found = checkpoint_hash(read_checkpoint(source))
    scored = read_record(folder)
    if not found == plan.model_hash == scored.model_hash:
        raise InputError(
            f"the plan is for another model: {source} has content {found[:16]}, the plan "
            f"{plan.model_hash[:16]}, the run {scored.model_hash[:16]}"
        )
    windows = TokenWindows.from_npz(folder / "windows.npz", name="calibration")
    stored = read_run_config(folder / "config.json")
    if windows.num_windows != scored.nll_MI.shape[1]:
        raise InputError(
            f"run {folder} was extended to other windows and has not finished: give its command "
            "again, then export"
        )
    row = np.flatnonzero((scored.masks_MP == without(scored.num_players, removed)).all(axis=1))
    return export_checkpoint(
        source,
        removed,
        out,
        players=players,
        slim=slim,
        verify=verify,
        windows=windows,
        dtype=stored["config"]["dtype"],
        device=device,
        expected_nll_N=scored.nll_MI[row[0]].astype(np.float64) if len(row) else None,
    )
