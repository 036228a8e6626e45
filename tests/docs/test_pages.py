"""README, pages and examples: code in them runs, commands parse, configs are read, and generated
pages say what the code says."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import lpserve
from lpserve.cli.entry import make_parser
from lpserve.config import RunConfig, config_from
from lpserve.demo import FOLDER
from lpserve.inputs.config_file import load_config_file
from lpserve.rivals.registry import RIVALS
from lpserve.study.parse import study_of
from scripts.docs_pages import PACKAGE, commands, filled, first_sentence, pages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
WRITTEN = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *(ROOT / folder / "README.md" for folder in ("cluster", "examples")),
    *sorted(DOCS.rglob("*.md")),
]
GENERATED = pages()


def blocks(language: str) -> list[Any]:
    """Every code block in a language, with its file and number as the test's name."""
    found = []
    for path in WRITTEN:
        texts = re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)
        name = path.relative_to(ROOT).as_posix()
        found += [pytest.param(text, id=f"{name}-{n}") for n, text in enumerate(texts)]
    return found


def command_lines() -> list[Any]:
    """Every `lpserve ...` of a shell block, as its words."""
    found = []
    for block in blocks("bash"):
        for line in re.sub(r"\\\n\s*", " ", block.values[0]).splitlines():
            match = re.match(r"(?:ray job submit .*?-- )?lpserve (.*)", line)
            if match:
                words = [w for w in shlex.split(match[1], comments=True) if w != "..."]
                found.append(pytest.param(words, id=" ".join(words)[:70]))
    return found


# -- the README ------------------------------------------------------------------------------------


def test_the_readme_is_short_and_names_every_folder():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    part = text.partition("## Folders")[2]
    folders = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert [name for name in folders if f"{name}/" not in part] == []
    assert (DOCS / "images" / "report.png").stat().st_size < 200_000


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_to_files(path):
    made = {DOCS / name for name in GENERATED}
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not target.startswith(("http", "#")):
            place = Path(os.path.normpath(path.parent / target.partition("#")[0]))
            assert place.exists() or place in made, target


# -- code in pages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"))
def test_python_names_what_there_is(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lpserve":
            assert node.attr in lpserve.__all__ or hasattr(lpserve, node.attr)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("block", [b for b in blocks("python") if "lpserve.demo" in b.values[0]])
def test_examples_on_the_bundled_model_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, "a page", "exec"), names)
    for name in re.findall(r'savefig\("(\S+)"\)', block):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000
    values = names["values"]
    assert isinstance(values, lpserve.ShapleyValues)
    assert np.isfinite(values.values_P).all()
    assert (values.stderr_P > 0).any()
    assert isinstance(names["plan"], lpserve.Plan)
    assert (tmp_path / "pruned" / "config.json").exists()
    assert "masks/s" in capsys.readouterr().err


def test_the_readme_has_an_example_that_runs():
    (example,) = [b for b in blocks("python") if "lpserve.demo" in b.values[0]]
    assert example.id == "README.md-0"
    assert len(example.values[0].strip().splitlines()) < 35


@pytest.mark.parametrize("words", command_lines())
def test_commands_are_ones_that_lpserve_takes(words):
    assert make_parser().parse_args(words)


def test_commands_of_every_kind_are_shown():
    shown = {line.values[0][0] for line in command_lines()}
    assert shown >= set(commands()) - {"lm-eval"}


@pytest.mark.parametrize("block", blocks("toml"))
def test_toml_in_pages_is_a_run(block, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(block)
    assert config_from(load_config_file(path), "a page").budget


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_in_pages_is_a_study(block, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(block)
    values = load_config_file(path)
    values |= {"model": str(FOLDER / "model"), "max_removed": 8, "removed": [4, 8]}
    assert len(study_of(values, "a page").points) > 1


# -- examples --------------------------------------------------------------------------------------


def test_configs_of_the_examples_are_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    run = config_from(load_config_file("examples/run.toml"), "run.toml")
    study = study_of(load_config_file("examples/study.yaml"), "study.yaml")
    assert len(study.points) == 9
    for config in (run, study.base):
        texts = [*config.calibration.values(), *config.heldout.values()]
        assert all(Path(path).exists() for path in (config.model, *texts))


def test_the_examples_are_all_listed():
    text = (EXAMPLES / "README.md").read_text()
    names = [path.name for path in EXAMPLES.iterdir() if path.is_file() and path.suffix != ".md"]
    assert all(f"({name})" in text for name in names)


@pytest.mark.slow
@pytest.mark.process
def test_the_notebook_runs_and_keeps_no_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = json.loads((EXAMPLES / "demo.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["report"].verified


@pytest.mark.slow
def test_the_rival_of_ones_own_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RIVALS, "blocks", RIVALS["greedy"])  # and taken out again
    example = runpy.run_path(str(EXAMPLES / "own_rival.py"))
    example["main"](str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "blocks" in printed
    assert "greedy" in printed


# -- generated pages -------------------------------------------------------------------------------


def test_the_pages_of_configuration_and_commands_are_complete():
    keys = GENERATED["reference/config.md"]
    for one in fields(RunConfig):
        (row,) = re.findall(rf"(?m)^\| `{one.name}`.*$", keys)
        assert row.rpartition("| ")[0].rpartition("| ")[2].strip("| ") or one.name, row
        assert not row.endswith("|  |"), f"{one.name} has no meaning"
    text = GENERATED["reference/cli.md"]
    for name, command in commands().items():
        assert f"## lpserve {name}\n" in text
        for flag in (flag for action in command._actions for flag in action.option_strings):
            assert flag in text or flag in ("-h", "--help")


def test_the_page_of_the_architecture_has_every_file():
    text = GENERATED["develop/architecture.md"]
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":
            sentence = " ".join(first_sentence(path).split()).replace("|", "\\|")
            assert f"`{path.name}` |" in text or f"/{path.name}` |" in text
            assert sentence.replace("<", "&lt;") in text


def test_parts_of_pages_are_generated():
    rivals = filled((DOCS / "guide" / "rivals.md").read_text())
    assert all(f"| `{name}` | {rival.source} |" in rivals for name, rival in RIVALS.items())
    cluster = filled((DOCS / "cluster.md").read_text())
    assert "### 9. Security" in cluster
    assert "generated:" not in rivals + cluster


def test_the_site_has_every_page():
    def leaves(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [
            leaf
            for one in (entry.values() if isinstance(entry, dict) else entry)
            for leaf in leaves(one)
        ]

    nav = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | set(GENERATED)
    assert sorted(nav) == sorted(there)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="scripts/setup docs installs mkdocs"
)
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "python" / "index.html").exists()


# -- the porch -------------------------------------------------------------------------------------


def test_pre_commit_runs_the_checks_of_scripts_test():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checks = (ROOT / "scripts" / "test").read_text()
    entries = [hook["entry"] for hook in hooks]
    assert len(entries) == 3
    assert all(entry in checks for entry in entries)


def test_the_citation_names_the_paper_and_the_prior_art():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lpserve.__version__
    assert "2602.07804" in citation["preferred-citation"]["journal"]
    assert [len(one["authors"]) for one in citation["references"]] == [4, 4]
