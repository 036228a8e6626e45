"""Conventions held by test: imports follow the flow, files are small, the README's tree is true."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lpserve"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each module may import those named before it in the flow. Sets on one line stand side by side.
FLOW = [
    {"errors"},
    {"types"},
    {"locks", "background", "config", "mounts", "lease", "signals"},
    {"resample"},
    {"checkpoint", "windows", "masks", "runfolder", "progress"},
    {"history", "questions", "task_requests"},
    {"sample"},
    {"tasks"},
    {"engine.base"},
    {"engine.head", "engine.recorded", "engine.trie", "engine.synthetic", "engine.reload"},
    {"speed", "speed_worker"},
    {"engine.criteria"},
    {"engine.scorer", "engine.hf_stack", "engine.vllm_stack", "engine.vllm_attention"},
    {"engine.vllm_worker.contract"},
    {"engine.vllm_worker.model"},
    {"engine.vllm_worker"},
    {"engine.vllm_options"},
    {"engine.vllm_process"},
    {"engine.hf", "engine.vllm"},
    {"engine"},
    {"store_format"},
    {"store"},
    {"score_tables", "pool"},
    {"ray_pool.actor", "ray_pool.cluster", "ray_pool.metrics"},
    {"ray_pool"},
    {"dispatcher"},
    {"scoreboard", "kernel"},
    {"surrogate.base", "semivalue"},
    {"surrogate.gaussian", "surrogate.paper", "surrogate.crossfit"},
    {"surrogate.boosting", "surrogate.ensemble", "surrogate.stack"},
    {"surrogate.auto"},
    {"surrogate"},
    {"acquisition", "shapley", "scored", "interaction"},
    {"plan", "search", "shapiq_game", "correction", "fidelity"},
    {"rounds", "sensitivity"},
    {"baselines", "outcome"},
    {"spending"},
    {"export", "report", "cost", "admission", "plots"},
    {"scoring", "layer_sets", "protocols", "tracking"},
    {"coordinator", "lm_eval_model", "study", "agreement"},
    {"sweep"},
    {"sweep_report", "study_cost"},
    {"demo", "evaluate", "compare", "demo.tasks.documents"},
    {"cli.arguments"},
    {"cli.evaluate", "cli.compare", "cli.speed", "cli.sweep"},
    {"cli"},
    {"__main__", ""},
]
LEVEL = {name: level for level, names in enumerate(FLOW) for name in names}
HEAVY = {"torch", "transformers", "ray", "vllm"}
WITHOUT_HEAVY = (
    "errors", "types", "config", "masks", "locks", "checkpoint", "store", "lease", "cost",
)  # fmt: skip


def module_name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_follow_the_flow_and_never_point_back(path):
    name = module_name(path)
    assert name in LEVEL, f"{name} has no place in the flow: add it to FLOW"
    for imported in imports(path):
        if not imported.startswith("lpserve."):
            continue
        other = imported.removeprefix("lpserve.")
        if name == "":
            continue  # the package's front names everything
        if name == "engine" and other.startswith("engine."):
            continue
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}, which comes after it"


@pytest.mark.parametrize("name", WITHOUT_HEAVY)
def test_light_modules_load_no_heavy_library(name):
    code = f"import sys, lpserve.{name}; print([m for m in {sorted(HEAVY)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_coordinator_is_imported_by_those_who_start_runs_alone():
    users = {module_name(p) for p in MODULES if "lpserve.coordinator" in imports(p)}
    assert users == {"cli", "sweep", ""}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_files_and_functions_stay_small(path):
    assert len(path.read_text().splitlines()) <= 500
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 80, f"{node.name} has {length} lines"


def test_every_module_says_what_it_is():
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_readme_tree_matches_the_package():
    readme = (PACKAGE.parent / "README.md").read_text()
    for path in MODULES:
        if path.name not in ("__init__.py", "__main__.py"):
            assert path.name in readme, f"README's file tree lacks {path.name}"


def test_public_names_resolve():
    import lpserve

    for name in lpserve.__all__:
        assert getattr(lpserve, name) is not None
    with pytest.raises(AttributeError):
        _ = lpserve.no_such_name
