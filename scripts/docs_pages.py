"""Pages of the documentation that are made of the code and of measured results.

`pages()` gives whole pages by their path under docs/, `filled(text)` puts generated parts where a
page says `<!-- generated: NAME -->`. Nothing of it is kept in a file, so that it cannot drift;
`scripts/docs_hook.py` hands it to mkdocs. Imports neither mkdocs nor torch.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

from lpserve.cli.entry import make_parser
from lpserve.config import CHANGEABLE, EngineConfig, RunConfig, WindowConfig
from lpserve.rivals.registry import RIVALS
from lpserve.utility import TASK_UTILITIES, TEXT_UTILITIES, UTILITIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lpserve"
RESULTS = ROOT / "scripts" / "bench" / "results"


def pages() -> dict[str, str]:
    """Every page that is generated as a whole: path under docs/ -> Markdown."""
    found = {
        "reference/config.md": config_page(),
        "reference/cli.md": cli_page(),
        "develop/architecture.md": architecture_page(),
        "develop/contributing.md": contributing_page(),
    }
    for path in sorted(RESULTS.glob("*.md")):
        found[f"benchmarks/{path.name}"] = path.read_text(encoding="utf-8")
    return found


def filled(text: str) -> str:
    """A page with its generated parts in place."""
    parts = {
        "rivals": rivals_table,
        "text_utilities": lambda: utilities_table(TEXT_UTILITIES),
        "task_utilities": lambda: utilities_table(TASK_UTILITIES),
        "cluster": cluster_part,
    }
    return re.sub(r"<!-- generated: (\w+) -->", lambda found: parts[found[1]](), text)


def config_page() -> str:
    """Every key of a run's configuration, from the dataclasses."""
    docs = _field_docs()
    lines = [
        "# Configuration",
        "",
        "The keys of `lpserve run --config FILE` (TOML or YAML), of `lpserve.RunConfig` and, for",
        "all points of a study, of a study file. A flag has the same name with dashes, and wins",
        "over the file. Unknown keys are refused, and every value is checked before a model is",
        "touched. Keys marked \\* may differ when a run is resumed in its folder.",
        "",
    ]
    seen: set[str] = set()
    for title, kind in (
        ("Engines", EngineConfig),
        ("Windows", WindowConfig),
        ("The run", RunConfig),
    ):
        lines += [f"## {title}", "", "| key | default | meaning |", "|---|---|---|"]
        for one in fields(kind):
            if one.name in seen:
                continue
            seen.add(one.name)
            star = " \\*" if one.name in CHANGEABLE else ""
            if one.default is not MISSING:
                default = f"`{one.default!r}`"
            else:
                default = "required" if one.default_factory is MISSING else "empty"
            meaning = docs.get(one.name) or _flag_help(one.name)
            lines.append(f"| `{one.name}`{star} | {default} | {_cell(meaning)} |")
        lines.append("")
    return "\n".join(lines)


def cli_page() -> str:
    """Every command with its flags, from the parser."""
    lines = [
        "# Command line",
        "",
        "Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.",
        "",
    ]
    for name, command in commands().items():
        lines += [f"## lpserve {name}", "", "```text"]
        lines += [line.rstrip() for line in (command.description or "").strip().splitlines()]
        lines += ["```", ""]
        actions = [a for a in command._actions if not isinstance(a, argparse._HelpAction)]
        if actions:
            lines += ["| flag | meaning |", "|---|---|"]
        for action in actions:
            shown = ", ".join(action.option_strings) or str(action.metavar or action.dest)
            if action.option_strings and action.nargs != 0:
                shown += f" {action.metavar or action.dest.upper()}"
            meaning = (action.help or "").replace("%%", "%")
            if meaning != argparse.SUPPRESS:
                lines.append(f"| `{shown}` | {_cell(meaning)} |")
        lines.append("")
    return "\n".join(lines)


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser by name."""
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("the parser has no commands")


def architecture_page() -> str:
    """The folders and every file with one sentence, and the rules that tests hold."""
    rules = ROOT / "tests" / "test_architecture.py"
    tree = ast.parse(rules.read_text(encoding="utf-8"))
    order = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER"
    )
    lines = [
        "# Architecture",
        "",
        "A folder imports itself and the folders before it, in this order; the modules at the root",
        "are the vocabulary of all.",
        "",
        " → ".join(f"`{folder or 'the root'}`" for folder in order),
        "",
        "## Rules",
        "",
        "`tests/test_architecture.py` holds one test for each rule:",
        "",
    ]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            text = node.name.removeprefix("test_").replace("_", " ")
            lines.append(f"* {text}")
    lines += ["", "## Files", ""]
    for folder in order:
        lines += _folder_part(PACKAGE / folder if folder else PACKAGE, folder)
    return "\n".join(lines)


def _folder_part(folder: Path, name: str) -> list[str]:
    said = first_sentence(folder / "__init__.py")
    lines = [f"### lpserve/{name + '/' if name else ''}", "", said, "", "| file | what it is |"]
    lines.append("|---|---|")
    paths = sorted(folder.rglob("*.py") if name else folder.glob("*.py"))
    for path in paths:
        if path.name == "__init__.py" and path.parent == folder:
            continue
        place = path.relative_to(folder).as_posix()
        lines.append(f"| `{place}` | {_cell(first_sentence(path))} |")
    return [*lines, ""]


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(said.partition("\n\n")[0].split())
    found = re.match(r".*?[.!?](?=\s|$)(?<!e\.g\.)", paragraph)
    return found[0] if found else paragraph


def contributing_page() -> str:
    """CONTRIBUTING.md with its links made those of the site."""
    return _site_links((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "../")


def rivals_table() -> str:
    """The rivals in the order of the registry."""
    rows = [
        f"| `{name}` | {_cell(rival.source)} | {rival.needs.cost if rival.needs else 'scores'} |"
        for name, rival in RIVALS.items()
    ]
    return "\n".join(["| `--rivals` | search | needs |", "|---|---|---|", *rows])


def utilities_table(names: Sequence[str]) -> str:
    """Utilities with what they are."""
    rows = [f"| `{name}` | {_cell(UTILITIES[name].about)} |" for name in names]
    return "\n".join(["| `--utility` | what a mask is worth |", "|---|---|", *rows])


def cluster_part() -> str:
    """cluster/README.md, one heading deeper."""
    text = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    text = text.replace("# lpserve on a cluster", "# On a cluster", 1)
    blocks = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    blocks[::2] = [re.sub(r"(?m)^#", "##", block) for block in blocks[::2]]
    return _site_links("".join(blocks), "")


def _site_links(text: str, up: str) -> str:
    """Links to results and pages as the site has them; links to other files become their names."""

    def link(found: re.Match[str]) -> str:
        words, target = found[1], found[2]
        result = re.search(r"scripts/bench/results/(\w+)\.md$", target)
        if result:
            return f"[{words}]({up}benchmarks/{result[1]}.md)"
        page = re.match(r"(?:\.\./)?docs/(.+)", target)
        if page:
            return f"[{words}]({up}{page[1]})"
        return found[0] if target.startswith(("http", "#")) else f"`{words.strip('`')}`"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, text)


def _field_docs() -> dict[str, str]:
    """The texts below the fields of the configuration's classes."""
    docs: dict[str, str] = {}
    tree = ast.parse((PACKAGE / "config.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for one, after in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(one, ast.AnnAssign)
                and isinstance(one.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[one.target.id] = str(after.value.value)
    return docs


def _flag_help(key: str) -> str:
    """What the flag of a key says, for keys without a text of their own."""
    for action in commands()["run"]._actions:
        if action.dest == key:
            return (action.help or "").replace("%%", "%")
    return ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
