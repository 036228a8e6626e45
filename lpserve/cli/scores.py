"""`lpserve scores`: a score store as a table, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lpserve.errors import InputError


def add_scores(commands: Any) -> None:
    """Define `lpserve scores`."""
    scores = commands.add_parser(
        "scores",
        help="copy a score store to or from Parquet or CSV; take over scores of an old version",
        description="A table has one row for each game, mask and window, with its NLL in nats.",
    )
    scores.set_defaults(run=_scores)
    scores.add_argument("store", metavar="STORE", help="a store file, or a run folder")
    way = scores.add_mutually_exclusive_group(required=True)
    way.add_argument("--out", metavar="FILE", help="write .parquet or .csv")
    way.add_argument("--import", dest="source", metavar="FILE", help="read .parquet or .csv")
    way.add_argument(
        "--adopt",
        dest="model",
        metavar="MODEL",
        help="take over this checkpoint's scores that an earlier version kept under a hash of "
        "samples of the weights; only where the weights have not changed since",
    )


def _scores(arguments: argparse.Namespace) -> int:
    from lpserve.store.store import Store
    from lpserve.store.tables import export_scores, import_scores

    given = Path(arguments.store)
    path = given / "scores.sqlite" if given.is_dir() else given
    if not arguments.source and not path.exists():
        raise InputError(f"store {path} does not exist")
    if arguments.model:
        return _adopt(given, path, arguments.model)
    with Store(path, holder="lpserve scores") as store:
        if arguments.out:
            print(f"{export_scores(store, arguments.out)} rows written to {arguments.out}")
        else:
            print(f"{import_scores(store, arguments.source)} new scores in {path}")
    return 0


def _adopt(given: Path, path: Path, model: str) -> int:
    """Re-key the store at `path`, which is that of the run folder `given`, or the same file."""
    from lpserve.model.checkpoint import read_checkpoint
    from lpserve.model.content_hash import checkpoint_hash, sampled_hash
    from lpserve.store.rekey import rekey_run, rekey_store

    checkpoint = read_checkpoint(model)
    old, new = sampled_hash(checkpoint), checkpoint_hash(checkpoint)
    moved = rekey_run(given, old, new) if given.is_dir() else rekey_store(path, old, new)
    if not moved:
        raise InputError(f"store {path} holds no scores of {model} under a hash of samples")
    count = sum(scores for _, scores in moved.values())
    print(f"{count} scores of {model} in {path} are now kept under the hash of all its weights")
    return 0
