"""Conventions held by test: imports follow the flow, files are small, the README's tree is true."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lpserve"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A folder imports itself and the folders before it. The root's modules are the vocabulary.
ORDER = (
    "",
    "model",
    "data",
    "engine",
    "store",
    "surrogate",
    "scoring",
    "values",
    "plan",
    "rounds",
    "analysis",
    "report",
    "runner",
    "export",
    "evaluation",
    "rivals",
    "study",
    "demo",
    "cli",
    "testing",
)
FACES = ("", "__main__", "shapiq_game")
"""Modules at the root that import what they show."""
HEAVY = {"torch", "transformers", "ray", "vllm"}
WITHOUT_HEAVY = (
    "errors",
    "types",
    "config",
    "masks",
    "model.checkpoint",
    "store.lock",
    "store.store",
    "store.lease",
    "runner.cost",
)


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


def folder_of(name: str) -> str:
    """The folder of a module or package, "" for the vocabulary at the root."""
    first = name.partition(".")[0]
    return first if (PACKAGE / first).is_dir() else ""


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_follow_the_flow_and_never_point_back(path):
    name = module_name(path)
    if name in FACES:
        return
    for imported in imports(path):
        if not imported.startswith("lpserve."):
            continue
        other = imported.removeprefix("lpserve.")
        here, there = ORDER.index(folder_of(name)), ORDER.index(folder_of(other))
        assert there <= here, f"{name} imports {other}, which comes after it"


@pytest.mark.parametrize("name", WITHOUT_HEAVY)
def test_light_modules_load_no_heavy_library(name):
    code = f"import sys, lpserve.{name}; print([m for m in {sorted(HEAVY)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_coordinator_is_imported_by_those_who_start_runs_alone():
    users = {module_name(p) for p in MODULES if "lpserve.runner.run" in imports(p)}
    assert users == {"cli.run", "study.finished", "study.sweep", ""}


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


def test_public_names_resolve():
    import lpserve

    for name in lpserve.__all__:
        assert getattr(lpserve, name) is not None
    with pytest.raises(AttributeError):
        _ = lpserve.no_such_name
