"""The documents of the bundled lm-eval tasks, for their `custom_dataset`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets


def continuation(**_: Any) -> dict[str, Any]:
    return _test_split("continuation")


def last_word(**_: Any) -> dict[str, Any]:
    return _test_split("last_word")


def _test_split(name: str) -> dict[str, Any]:
    lines = (Path(__file__).parent / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines if line])}
