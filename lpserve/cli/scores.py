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
        help="copy a score store to or from Parquet or CSV",
        description="One row for each game, mask and window, with its NLL in nats.",
    )
    scores.set_defaults(run=_scores)
    scores.add_argument("store", metavar="STORE", help="a store file, or a run folder")
    way = scores.add_mutually_exclusive_group(required=True)
    way.add_argument("--out", metavar="FILE", help="write .parquet or .csv")
    way.add_argument("--import", dest="source", metavar="FILE", help="read .parquet or .csv")


def _scores(arguments: argparse.Namespace) -> int:
    from lpserve.store.store import Store
    from lpserve.store.tables import export_scores, import_scores

    path = Path(arguments.store)
    path = path / "scores.sqlite" if path.is_dir() else path
    if arguments.out and not path.exists():
        raise InputError(f"store {path} does not exist")
    with Store(path, holder="lpserve scores") as store:
        if arguments.out:
            print(f"{export_scores(store, arguments.out)} rows written to {arguments.out}")
        else:
            print(f"{import_scores(store, arguments.source)} new scores in {path}")
    return 0
