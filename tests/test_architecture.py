"""The layout, held by test: one test for each rule, each failing with all violations at once.

Source is read and not imported, but for the two tests at the end. A limit is not raised here: a
file or a folder that has outgrown it is divided. Exceptions have a reason beside them.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lpserve"
TESTS = ROOT / "tests"
PATHS = sorted(p for p in PACKAGE.rglob("*.py") if "templates" not in p.parts)

# A folder imports itself and the folders before it. The root's modules ("") are the vocabulary.
ORDER = (
    "inputs",
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
    "exhaustive",
    "study",
    "demo",
    "cli",
    "testing",
)
GROUND = {"errors"}
"""Modules at the root that every folder may import, the first included."""
FACES = {"", "__main__", "shapiq_game", "hf"}
"""Modules at the root that import what they show."""
INDEPENDENT = {
    "engine": set(),
    "store": set(),
    "surrogate": set(),
    "values": {"surrogate"},
    "plan": {"surrogate"},
}
"""Folders that build on vocabulary, model and data, and of the others on these alone."""
USERS = {
    "ray": ("scoring.ray",),
    "vllm": ("engine.vllm", "evaluation.speed_worker"),
    "torch": ("engine", "surrogate", "export", "evaluation", "testing", "hf"),
    "mlflow": ("report.tracking",),
    "matplotlib": ("report.plots",),
    "shapiq": ("shapiq_game",),
    "lm_eval": ("evaluation", "data.task", "cli.evaluate"),
    "sqlite3": ("store", "testing"),
}
"""Library -> beginnings of the names of the modules that may import it. The speed bench times a
vLLM without lpserve; `lpserve eval` hands over to lm-eval's command line."""
VLLM_INTERNALS = "engine.vllm.worker"
WITHOUT_TORCH = ("surrogate", "values", "plan", "rounds", "store", "model")
"""Folders that load neither torch nor transformers, ray or vllm when they are imported."""

MAX_FILE, MAX_CLASS, MAX_FUNCTION = 400, 250, 60  # lines
MIN_FILES, MAX_FILES = 5, 12  # .py files in a folder, subfolders apart
MAX_FMT_SKIP = 20
FEWER_FILES = {
    "demo": "data, and one function that names it",
    "demo/tasks": "lm-eval's task files and the function that they call",
}
OTHER_TESTS = {
    "cluster": "the files in cluster/",
    "scripts": "the scripts in scripts/",
    "gate": "results recorded to the last digit",
    "test_gate": "results recorded to the last digit",
    "test_architecture": "this file",
    "test_faults": "file calls that fail, in every command",
    "test_fuzz": "every reader of what people give, on changed inputs",
    "docs": "the README, the pages and the examples",
    "cli/test_bad_input": "refusals of the command line, whatever module they come from",
    "cli/test_unexpected": "exceptions that end a command, whatever module they come from",
    "cli/test_run_vllm": "`lpserve run` with the vLLM engine",
    "runner/test_kills": "processes that run and are killed",
    "engine/test_state_dtype": "the dtype of states, in every stack",
    "surrogate/test_registry": "what every surrogate promises",
}
"""Tests, or folders of tests, that are not those of one module, and of what they are."""
TESTED_BY = {
    "__main__": "cli/test_entry",
    "analysis/analyse": "runner/test_coordinator",
    "analysis/build_plan": "runner/test_coordinator",
    "analysis/heldout": "runner/test_coordinator",
    "analysis/record": "runner/test_coordinator",
    "cli/arguments": "cli/test_bad_input",
    "cli/compare": "rivals/test_compare",
    "cli/exhaustive": "exhaustive/test_score",
    "cli/evaluate": "evaluation/test_evaluate",
    "cli/export": "cli/test_entry",
    "cli/plan": "cli/test_entry",
    "cli/run": "cli/test_entry",
    "cli/scores": "cli/test_entry",
    "cli/speed": "evaluation/test_speed",
    "cli/sweep": "study/test_sweep",
    "data/prepare": "data/test_tasks",
    "data/task_requests": "data/test_tasks",
    "data/tokenizer": "model/test_own_code",
    "demo/tasks/documents": "data/test_tasks",
    "engine/base": "engine/hf/test_engine",
    "engine/hf/criteria": "rivals/test_compare",
    "engine/hf/in_use": "export/test_export",
    "engine/hf/kind": "engine/test_registry",
    "engine/hf/arguments": "engine/hf/test_stack",
    "engine/hf/recording": "engine/hf/test_stack",
    "engine/hf/structure": "engine/hf/test_stack",
    "engine/kind": "engine/test_registry",
    "engine/replay": "engine/hf/test_engine",
    "engine/scorer": "engine/vllm/test_stack",
    "engine/synthetic": "runner/test_coordinator",
    "engine/vllm/in_use": "evaluation/test_evaluate",
    "engine/vllm/kind": "engine/test_registry",
    "engine/vllm/paths": "engine/vllm/test_engine",
    "engine/vllm/process": "engine/vllm/test_engine",
    "engine/vllm/ranks": "engine/vllm/worker/test_extension",
    "engine/vllm/worker/model": "engine/vllm/test_engine",
    "engine/vllm/worker/parallel": "engine/vllm/worker/test_extension",
    "evaluation/results": "evaluation/test_evaluate",
    "evaluation/speed_worker": "evaluation/test_speed",
    "evaluation/task_evaluation": "evaluation/test_evaluate",
    "export/mergekit": "export/test_export",
    "export/reload": "export/test_export",
    "export/report": "export/test_export",
    "export/pruned_config": "export/test_export",
    "hf": "export/test_parts",
    "model/loading": "engine/hf/test_stack",
    "model/size": "runner/test_cost",
    "report/files": "runner/test_coordinator",
    "report/page": "runner/test_coordinator",
    "report/tables": "runner/test_coordinator",
    "rounds/model": "rounds/test_planner",
    "rounds/sources": "rounds/test_planner",
    "rounds/stopping": "rounds/test_planner",
    "runner/background": "runner/test_coordinator",
    "runner/conclusion": "runner/test_coordinator",
    "runner/manifest": "runner/test_coordinator",
    "runner/setup": "runner/test_coordinator",
    "scoring/local": "runner/test_coordinator",
    "scoring/open": "runner/test_coordinator",
    "scoring/pace": "scoring/test_dispatcher",
    "scoring/ray/fleet": "scoring/ray/test_pool",
    "scoring/ray/metrics": "scoring/ray/test_cluster",
    "scoring/signals": "runner/test_coordinator",
    "scoring/slots": "scoring/test_dispatcher",
    "scoring/tracker": "scoring/test_session",
    "store/connection": "store/test_store",
    "store/run_folder": "runner/test_coordinator",
    "store/schema": "store/test_store",
    "study/finished": "study/test_sweep",
    "study/output": "study/test_sweep",
    "study/tables": "study/test_sweep",
    "study/windows": "study/test_study",
    "study/page": "study/test_sweep",
    "surrogate/paper": "surrogate/test_gaussian",
    "types": "test_masks",
}
"""Modules that no test of their folder imports by name: parts of a process, a page or a loop that
is tested as one. Module -> test file."""


# -- reading the source ----------------------------------------------------------------------------


def name_of(path: Path) -> str:
    """`lpserve/plan/search.py` -> "plan.search"; a package has its folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PATHS}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def folder_of(name: str) -> str:
    """The first folder of a module or package, "" for the vocabulary at the root."""
    first = name.partition(".")[0]
    return first if (PACKAGE / first).is_dir() else ""


def libraries(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names of all modules that a file imports, wherever it does so."""
    found = set()
    for node in tree_of(path).body if top_level else ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def lpserve_imports(path: Path) -> Iterator[tuple[str, str | None, str]]:
    """(module, name imported from it or None, name it has here) of each import from lpserve."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lpserve."):
                    yield alias.name.removeprefix("lpserve."), None, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lpserve":
            module = (node.module or "").removeprefix("lpserve").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".removeprefix(".")
                if inner in MODULES:
                    yield inner, None, alias.asname or alias.name
                else:
                    yield module, alias.name, alias.asname or alias.name


def uses(name: str) -> set[str]:
    """The lpserve modules that a module imports."""
    return {module for module, *_ in lpserve_imports(MODULES[name])}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def lines_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def report(violations: Iterable[str]) -> None:
    found = sorted(set(violations))
    assert not found, f"{len(found)} violations:\n" + "\n".join(found)


# -- who imports whom ------------------------------------------------------------------------------


def test_folders_import_earlier_folders_only():
    assert {folder_of(name) for name in MODULES} <= set(ORDER)
    report(
        f"{name} imports {other}"
        for name in MODULES
        if name not in FACES
        for other in uses(name)
        if other not in GROUND and ORDER.index(folder_of(other)) > ORDER.index(folder_of(name))
    )


def test_no_modules_of_a_folder_import_each_other_in_a_circle():
    graph = {
        name: {o for o in uses(name) if folder_of(o) == folder_of(name) and o != name}
        for name in MODULES
        if name not in FACES
    }

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        left = [start]
        while left:
            more = graph.get(left.pop(), set()) - found
            found |= more
            left += more
        return found

    after = {name: reached(name) for name in graph}
    report(
        " <-> ".join(sorted({name} | {o for o in after[name] if name in after.get(o, set())}))
        for name in graph
        if name in after[name]
    )


def test_independent_folders_build_on_no_other():
    report(
        f"{name} imports {other}"
        for name in MODULES
        for folder in [folder_of(name)]
        if folder in INDEPENDENT
        for other in uses(name)
        if folder_of(other) not in {"", "inputs", "model", "data", folder} | INDEPENDENT[folder]
    )


def test_each_library_is_imported_in_its_place():
    report(
        f"{name} imports {library}"
        for name, path in MODULES.items()
        for library in libraries(path)
        for top in [library.partition(".")[0]]
        if (top in USERS and not name.startswith(USERS[top]))
        or (library.startswith("vllm.") and not name.startswith(VLLM_INTERNALS))
    )


def test_nothing_but_tests_and_scripts_imports_the_testing_folder():
    report(
        f"{name} imports {other}"
        for name in MODULES
        if folder_of(name) != "testing"
        for other in uses(name)
        if folder_of(other) == "testing"
    )
    report(
        f"{path.relative_to(ROOT)} imports {library}"
        for path in TESTS.rglob("*.py")
        for library in libraries(path)
        if re.search(r"(^|\.)test_", library)
    )


def test_testing_imports_pytest_only_where_a_helper_needs_it():
    report(
        name
        for name, path in MODULES.items()
        if folder_of(name) == "testing" and "pytest" in libraries(path, top_level=True)
    )


# -- names -----------------------------------------------------------------------------------------


def methods_of(node: ast.ClassDef) -> set[str]:
    return {n.name for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}


def overridden(name: str) -> Iterator[str]:
    """Private methods of base classes in other modules that classes of this one define again."""
    imported = {here: (module, what) for module, what, here in lpserve_imports(MODULES[name])}
    for node in ast.walk(tree_of(MODULES[name])):
        if not isinstance(node, ast.ClassDef):
            continue
        for base in node.bases:
            module, what = imported.get(ast.unparse(base).partition("[")[0], (None, None))
            if module not in MODULES or what is None:
                continue
            for other in tree_of(MODULES[module]).body:
                if isinstance(other, ast.ClassDef) and other.name == what:
                    for method in filter(is_private, methods_of(node) & methods_of(other)):
                        yield f"{name}.{node.name} overrides {module}.{what}.{method}"


def test_no_module_uses_private_names_of_another():
    violations = []
    for name, path in MODULES.items():
        modules_here = {}
        for module, what, here in lpserve_imports(path):
            if what is None:
                modules_here[here] = module
            elif is_private(what):
                violations.append(f"{name} imports {module}.{what}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                module = modules_here.get(ast.unparse(node.value))
                if module is not None:
                    violations.append(f"{name} reads {module}.{node.attr}")
        violations += overridden(name)
    report(violations)


def test_public_classes_have_names_of_their_own():
    homes = defaultdict(list)
    for name, path in MODULES.items():
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not is_private(node.name):
                homes[node.name].append(name)
    report(f"{one}: {', '.join(where)}" for one, where in homes.items() if len(where) > 1)


def test_public_functions_of_one_name_have_one_signature():
    homes = defaultdict(dict)
    for name, path in MODULES.items():
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef) and not is_private(node.name):
                homes[node.name][name] = ast.unparse(node.args)  # a result may be narrower
    report(
        f"{one}: {', '.join(where)}"
        for one, where in homes.items()
        if len(set(where.values())) > 1 and not one.startswith("__")
    )


# -- sizes -----------------------------------------------------------------------------------------


def test_files_are_small():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    report(f"{name}: {length} lines" for name, length in lengths.items() if length > MAX_FILE)


def test_classes_and_functions_are_small():
    report(
        f"{name}.{node.name}: {lines_of(node)} lines"
        for name, path in MODULES.items()
        for node in ast.walk(tree_of(path))
        if (isinstance(node, ast.ClassDef) and lines_of(node) > MAX_CLASS)
        or (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and lines_of(node) > MAX_FUNCTION
        )
    )


def test_folders_hold_five_to_twelve_files():
    counts = defaultdict(int)
    for path in PATHS:
        counts[path.parent.relative_to(PACKAGE).as_posix()] += 1
    report(
        f"{folder}: {count} files"
        for folder, count in counts.items()
        if count > MAX_FILES or (count < MIN_FILES and folder not in FEWER_FILES)
    )


def test_suffixes_are_axes_of_the_legend():
    """`masks_MP`, not `masks_QP`: the letters are those that CONTRIBUTING names."""
    legend = set(re.findall(r"^\| `(\w)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    assert {"M", "P", "N", "T", "d"} <= legend
    violations = []
    for name, path in MODULES.items():
        with tokenize.open(path) as source:
            words = {t.string for t in tokenize.generate_tokens(source.readline)}
        for word in sorted(words):
            suffix = re.fullmatch(r"_?[a-z][a-z0-9_]*_1?([A-Z][A-Za-z0-9]*)", word)
            if suffix and not set(suffix[1]) <= legend:
                violations.append(f"{name}: {word}")
    report(violations)


def test_the_formatter_is_the_style():
    skips = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in ("lpserve", "scripts", "tests")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if line.rstrip().endswith("# fmt: skip")
    ]
    assert len(skips) <= MAX_FMT_SKIP, "\n".join(skips)


# -- tests and docstrings --------------------------------------------------------------------------


def test_every_module_says_what_it_is():
    report(name for name, path in MODULES.items() if not ast.get_docstring(tree_of(path)))


def test_tests_mirror_the_folders():
    """A test file is named after a module and lies in its folder, or is listed with a reason."""
    violations = []
    for path in sorted(TESTS.rglob("test_*.py")):
        place = path.relative_to(TESTS).with_suffix("")
        listed = {place.as_posix(), place.parts[0]} & set(OTHER_TESTS)
        module = PACKAGE / place.parent / f"{place.name.removeprefix('test_')}.py"
        if not listed and not module.exists():
            violations.append(f"tests/{place}.py: there is no {module.relative_to(ROOT)}")
    for folder in {path.parent for path in TESTS.rglob("test_*.py")}:
        assert (folder / "__init__.py").exists(), folder
    report(violations)


def test_every_module_is_tested_where_one_looks_for_it():
    """By a file of its own, by one of its folder's test files, which imports it by name, or by the
    file listed for it. Helpers in `lpserve.testing` are tested by their users."""
    violations = [
        f"{module}: listed with tests/{test}.py"
        for module, test in TESTED_BY.items()
        if not ((PACKAGE / f"{module}.py").exists() and (TESTS / f"{test}.py").exists())
    ]
    for name, path in MODULES.items():
        place = path.relative_to(PACKAGE).with_suffix("")
        if (
            place.name == "__init__"
            or place.as_posix() in TESTED_BY
            or folder_of(name) == "testing"
        ):
            continue
        if (TESTS / place.parent / f"test_{place.name}.py").exists():
            continue
        near = [p for p in (TESTS / place.parent).glob("test_*.py") if p != Path(__file__)]
        if not any(name in {module for module, *_ in lpserve_imports(p)} for p in near):
            violations.append(name)
    report(violations)


# -- imported --------------------------------------------------------------------------------------


@pytest.mark.process
def test_light_modules_load_no_heavy_library():
    light = [
        f"lpserve.{name}"
        for name in MODULES
        if name not in FACES and (folder_of(name) in WITHOUT_TORCH or folder_of(name) == "")
    ]
    code = (
        f"import importlib, sys\nfor name in {light!r}:\n    importlib.import_module(name)\n"
        "    for heavy in ('torch', 'transformers', 'ray', 'vllm'):\n"
        "        if heavy in sys.modules:\n"
        "            print(name, 'loads', heavy)\n            sys.modules.pop(heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report(done.stdout.splitlines())


def test_public_names_resolve():
    import lpserve

    for name in lpserve.__all__:
        assert getattr(lpserve, name) is not None
    with pytest.raises(AttributeError):
        _ = lpserve.no_such_name
