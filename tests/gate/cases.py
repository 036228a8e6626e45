"""What a change of the code's structure must leave as it is: runs, and the files that they write.

Every case is a command line on recorded scores: `scores.parquet` beside its expected files is
imported into the run's store first, with the overlaps of single layers' effects beside it
(`overlaps.npz`), so that no arithmetic of an engine is in it and a store's keys (hashes of the
model, the players and the windows) are. What is left is NumPy, SciPy and
scikit-learn, held to one set of processor instructions by the environment below, so that the
results are the same to the last digit on every x86-64 processor with AVX2.

`python -m tests.gate.cases` records everything anew; what changed then shows in the diff, and the
commit says why. `python -m tests.gate.cases NAME ...` records single cases.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpserve.store.store import Store

FOLDER = Path(__file__).parent
EXPECTED = FOLDER / "expected"
ROOT = FOLDER.parent.parent
DEMO = ROOT / "lpserve" / "demo"
TEXTS = [
    "--calibration",
    f"sherlock={DEMO / 'calibration.txt'}",
    "--heldout",
    f"dracula={DEMO / 'heldout.txt'}",
    "--length",
    "128",
]
RUN_FILES = ("plan.json", "shapley.csv", "interactions.csv", "proposed.json")
MOST_BLOCKS = 100
STUDY_FILES = ("sweep.json", "sets.csv", "values.csv")
STUDY_COSTS = ("scores", "scores_new", "layer_forwards", "seconds")
"""Columns of sets.csv that say what scoring took: recorded scores take nothing."""


@dataclass(frozen=True, kw_only=True)
class GateCase:
    """A command, and which of its files are compared."""

    name: str
    arguments: tuple[str, ...]
    files: tuple[str, ...] = RUN_FILES
    recorded_scores: bool = True
    """False: the engine is synthetic and needs none."""
    adopted: bool = False
    """Whether they were recorded when a model was known by samples of its weights."""
    slow: bool = False


def _run(name: str, *arguments: Any, **other: Any) -> GateCase:
    given = [str(argument) for argument in arguments]
    return GateCase(name=name, arguments=("run", *given), **other)


def _synthetic(name: str, players: int, *arguments: Any, slow: bool = False) -> GateCase:
    options = ("--engine", "synthetic", "--engine-option", f"num_players={players}")
    numbers = ("--model", str(DEMO / "model"), *TEXTS, "--num-windows", 6, "--heldout-windows", 4)
    return _run(name, *options, *numbers, *arguments, recorded_scores=False, slow=slow)


ON_DEMO = ("--model", str(DEMO / "model"))
CASES = (
    _run(
        "demo",
        *ON_DEMO,
        *TEXTS,
        "--num-windows",
        10,
        "--heldout-windows",
        32,
        "--budget",
        400,
        "--max-removed",
        6,
        slow=True,
    ),
    _run(
        "screened",
        *ON_DEMO,
        *TEXTS,
        "--num-windows",
        16,
        "--heldout-windows",
        16,
        "--screen-windows",
        4,
        "--budget",
        160,
        "--max-removed",
        5,
        "--seed",
        3,
    ),
    _run(
        "task",
        *ON_DEMO,
        "--calibration",
        "task:dracula_last_word",
        "--include-path",
        DEMO / "tasks",
        "--utility",
        "task_margin",
        "--num-windows",
        40,
        "--heldout-windows",
        20,
        "--budget",
        80,
        "--max-removed",
        2,
        slow=True,
        adopted=True,
    ),
    _run(
        "ppl_ratio",
        *ON_DEMO,
        *TEXTS,
        "--num-windows",
        8,
        "--heldout-windows",
        8,
        "--utility",
        "ppl_ratio",
        "--budget",
        140,
        "--max-removed",
        4,
        "--seed",
        1,
    ),
    _synthetic("synthetic_both", 32, "--budget", 260, "--max-removed", 8),
    _synthetic(
        "synthetic_plan", 24, "--budget", 200, "--max-removed", 6, "--goal", "plan", "--seed", 5
    ),
    _synthetic(
        "synthetic_values",
        24,
        "--budget",
        150,
        "--max-removed",
        6,
        "--goal",
        "values",
        "--stop-width",
        "0.0001",
        "--seed",
        6,
        slow=True,
    ),
    GateCase(
        name="sweep_demo", arguments=("sweep", "--demo", "--yes"), files=STUDY_FILES, slow=True
    ),
)


def environment() -> dict[str, str]:
    """This process' environment, with arithmetic held to what every processor with AVX2 has."""
    return os.environ | {
        "OPENBLAS_CORETYPE": "Haswell",
        "OPENBLAS_NUM_THREADS": "1",
        "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL "
        "AVX512_ICL AVX512_SPR",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_CBWR": "COMPATIBLE",
        "PYTHONWARNINGS": "ignore",
    }


def command(*arguments: str) -> None:
    """Run lpserve's command line, and fail with its own words."""
    done = subprocess.run(
        [sys.executable, "-m", "lpserve", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"lpserve {arguments[0]} exits {done.returncode}:\n{done.stderr}")


def run_case(case: GateCase, out: Path) -> dict[str, str]:
    """Run a case into `out`: file name -> text, without paths and versions."""
    store = out / "scores.sqlite" if case.arguments[0] == "sweep" else out.with_suffix(".sqlite")
    scores = EXPECTED / case.name / "scores.parquet"
    store.parent.mkdir(parents=True, exist_ok=True)
    if case.recorded_scores and scores.exists():
        command("scores", str(store), "--import", str(scores))
        if case.adopted:
            command("scores", str(store), "--adopt", str(DEMO / "model"))
        put_overlaps(store, scores.with_name("overlaps.npz"))
    given = () if case.arguments[0] == "sweep" else ("--store", str(store))
    command(*case.arguments, "--out", str(out), *given)
    return comparable({name: written(out, name) for name in case.files})


def put_overlaps(store: Path, recorded: Path) -> None:
    """Put recorded overlaps into a store that holds the scores they were recorded with."""
    if recorded.exists():
        with np.load(recorded) as held, Store(store) as opened:
            (game,) = [opened.game_id(game) for game in opened.games().values()]
            for block in held:
                opened.put_overlap(game, int(block), held[block])


def record_overlaps(store: Path, path: Path) -> None:
    """Write a store's overlaps, block by block; nothing where it holds none."""
    with Store(store) as opened:
        (game,) = [opened.game_id(game) for game in opened.games().values()]
        found = {str(block): opened.get_overlap(game, block) for block in range(1, MOST_BLOCKS)}
    held = {block: overlap for block, overlap in found.items() if overlap is not None}
    if held:
        np.savez_compressed(path, allow_pickle=False, **held)


def comparable(texts: dict[str, str]) -> dict[str, str]:
    """A study's files without what it cost here, and with its points numbered: their ids are hashes
    of paths, too. Files of runs are as they are."""
    if "sweep.json" not in texts:
        return texts
    texts = texts | {
        "sweep.json": re.sub(r'( "scores_(?:new|read)": )\d+', r"\1-1", texts["sweep.json"]),
        "sets.csv": without_columns(texts["sets.csv"], STUDY_COSTS),
    }
    ids = re.findall(r'"(?:point|masks_of)": "([0-9a-f]{10})"', texts["sweep.json"])
    for number, point in enumerate(dict.fromkeys(ids)):
        texts = {name: text.replace(point, f"point-{number}") for name, text in texts.items()}
    return texts


def without_columns(text: str, names: Sequence[str]) -> str:
    """A CSV table without some columns."""
    rows = list(csv.DictReader(io.StringIO(text)))
    kept = io.StringIO()
    left = [name for name in rows[0] if name not in names]
    writer = csv.DictWriter(kept, left, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return kept.getvalue()


def written(out: Path, name: str) -> str:
    """The text of a result file; `proposed.json` is every mask in the order of its proposal."""
    if name == "proposed.json":
        with np.load(out / "scores.npz") as data:
            masks, sources = data["masks"], data["sources"]
        lines = ["".join("01"[bit] for bit in mask.astype(int)) for mask in masks]
        pairs = [f"{line} {source}" for line, source in zip(lines, sources, strict=True)]
        return json.dumps(pairs, indent=0) + "\n"
    text = (out / name).read_text(encoding="utf-8")
    for path, short in ((out, "OUT"), (DEMO, "DEMO"), (ROOT, "ROOT")):
        text = text.replace(str(path), short)
    return text


def arithmetic() -> str:
    """What a small piece of the same arithmetic gives here, in full: other digits mean that this
    machine cannot repeat the recorded ones."""
    code = (
        "import numpy as np, scipy.linalg as s; r = np.random.default_rng(0);"
        "a = r.standard_normal((60, 40)); k = np.exp(-(a @ a.T) ** 2 / 50) + 9 * np.eye(60);"
        "print(repr([float(s.cho_solve(s.cho_factor(k), np.log(abs(a[:, 0]))).sum()),"
        " float(np.linalg.eigvalsh(k).std())]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def record(names: list[str]) -> None:
    """Write the expected files of some cases, or of all."""
    (EXPECTED / "arithmetic.txt").write_text(arithmetic() + "\n")
    for case in CASES:
        if names and case.name not in names:
            continue
        folder = EXPECTED / case.name
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as parent:
            out = Path(parent) / "out"
            texts = run_case(case, out)
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            scores = folder / "scores.parquet"
            if case.recorded_scores and not scores.exists():
                of_study = out / "scores.sqlite"
                store = of_study if of_study.exists() else out.with_suffix(".sqlite")
                command("scores", str(store), "--out", str(scores))
                record_overlaps(store, folder / "overlaps.npz")
        sys.stdout.write(f"recorded {case.name}\n")


if __name__ == "__main__":
    record(sys.argv[1:])
