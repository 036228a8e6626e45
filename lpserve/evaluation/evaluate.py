"""Measures what removing sets of layers does to a model: perplexity on texts, lm-eval's tasks.

Masks are scored as they are in a run: all sets together, their prefixes shared, and every score is
in the store before it counts. An evaluation that was stopped continues where it was, and a further
set or task costs only itself.

Everything is checked before an engine starts: sets, texts, tasks and their data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lpserve.config import EngineConfig
from lpserve.data.prepare import check_windows
from lpserve.data.protocols import ProtocolWindows, protocol_windows
from lpserve.data.tokenizer import load_tokenizer
from lpserve.data.windows import TokenWindows
from lpserve.engine.registry import engine_kind
from lpserve.errors import InputError
from lpserve.evaluation.results import Evaluation, Result, evaluated_by, write_results
from lpserve.evaluation.settings import EvalConfig
from lpserve.evaluation.task_evaluation import TaskEvaluation
from lpserve.export.writer import REPORT_NAME
from lpserve.inputs.files import is_there
from lpserve.model.checkpoint import read_checkpoint
from lpserve.model.content_hash import checkpoint_hash
from lpserve.model.players import num_layers_of
from lpserve.plan.layer_sets import LayerSet, full_model, layer_set_masks, named_apart
from lpserve.plan.set_files import read_sets
from lpserve.scoring.open import players_of
from lpserve.scoring.progress import Progress
from lpserve.scoring.session import ScoringSession
from lpserve.store.files import make_folder
from lpserve.types import BoolArray, perplexity


def evaluate(config: EvalConfig, progress: Progress | None = None) -> Evaluation:
    """Evaluate sets of layers; writes results.json and results.csv into the folder.

    Raises:
        InputError: an unknown task, missing data, a text or set that does not fit; before any
            engine starts.
        RunInterrupted: what was scored is kept, and the same call goes on from there.
    """
    players = players_of(config)
    sets = [_whole(config), *dict.fromkeys(s for s in config.sets if s.removed)]
    if not config.texts and not config.tasks:
        raise InputError("nothing to evaluate: name a text (--text) or a task (--tasks)")
    names = [s.name for s in sets]
    masks_MP = layer_set_masks(sets, players)  # what cannot be is refused before a model loads
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two sets are named {twice!r}")
    tokenizer = load_tokenizer(config.model)
    cuts = {
        name: protocol_windows(path, tokenizer, config.protocol, name=name, field=config.text_field)
        for name, path in config.texts.items()
    }
    for cut in cuts.values():
        check_windows(read_checkpoint(config.model), cut.windows)
    tasks = TaskEvaluation(config) if config.tasks else None
    folder = Path(config.out)
    make_folder(folder, "results folder")
    probe = TokenWindows.from_tokens(np.array([[0, 1]]), name="probe")
    longest = max([cut.windows.length for cut in cuts.values()], default=2)
    if tasks is not None:
        longest = max(longest, tasks.max_length + 1)
    with ScoringSession(
        config,
        probe,
        store=folder / "scores.sqlite",
        holder=f"an evaluation in {folder}",
        longest=longest,
        progress=progress,
    ) as session:
        if not evaluated_by(folder, session.info):
            session.compare_first()
        results = _perplexities(session, sets, masks_MP, cuts)
        requests_cut = 0
        if tasks is not None:
            figures, requests_cut = tasks.run(session, tokenizer, sets, masks_MP)
            results += figures
        evaluation = Evaluation(
            results=tuple(results),
            protocols={name: str(cut) for name, cut in cuts.items()},
            masks_scored=session.masks_scored,
            masks_read=session.masks_read,
            layer_forwards=session.work.layer_forwards,
            skip_layer_forwards=session.work.skip_layer_forwards,
            requests_cut=requests_cut,
        )
        write_results(folder, config, session.info, evaluation)
    return evaluation


def _whole(config: EvalConfig) -> LayerSet:
    """The set that removes nothing: of an exported checkpoint, under the checkpoint's name."""
    folder = Path(config.model)
    return LayerSet(folder.resolve().name, ()) if is_there(folder / REPORT_NAME) else full_model()


def _perplexities(
    session: ScoringSession,
    sets: Sequence[LayerSet],
    masks_MP: BoolArray,
    cuts: dict[str, ProtocolWindows],
) -> list[Result]:
    results = []
    for name, cut in cuts.items():
        nll_MN = session.score(masks_MP, cut.windows, stage=name)["nll"].astype(np.float64)
        ppl_M = perplexity(nll_MN.sum(axis=1) / cut.windows.num_tokens_N.sum())
        results += [
            Result(
                layer_set=s.name,
                removed=s.removed,
                measure=f"ppl {name}",
                value=float(ppl),
                stderr=None,
            )
            for s, ppl in zip(sets, ppl_M, strict=True)
        ]
    return results


def sets_from(
    paths: Sequence[str], config: EngineConfig, remove: Sequence[int] = ()
) -> list[LayerSet]:
    """The sets of plans, run folders and other tools' files.

    Args:
        remove: the numbers of removed layers to take; empty: all.

    Raises:
        InputError: a file cannot be read, is of another model, or has no set of these numbers.
    """
    if not paths:
        return []
    num_players = num_layers_of(players_of(config))
    model_hash = None
    if engine_kind(config.engine).reads_checkpoint:
        model_hash = checkpoint_hash(read_checkpoint(config.model))
    found: list[tuple[Path, LayerSet]] = []
    for path in paths:
        sets = read_sets(path, num_players, model_hash)
        chosen = [s for s in sets if not remove or len(s.removed) in remove]
        if not chosen:
            raise InputError(f"{path} has no set of {', '.join(map(str, remove))} layers")
        found += [(Path(path), s) for s in chosen]
    return named_apart(found)
