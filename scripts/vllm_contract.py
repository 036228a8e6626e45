"""Check a vLLM wheel or source folder against what lpserve relies on, by reading it.

    PYTHONPATH=. python scripts/vllm_contract.py vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl

For releases that cannot run on the machine at hand. Nothing of the wheel is imported: names,
parameters and attributes of `CONTRACT` in lpserve/engine/vllm/worker/contract.py are looked up in
its syntax trees.
Prints one line for each difference; exits 1 if there is any.
"""

from __future__ import annotations

import ast
import functools
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from lpserve.engine.vllm.worker.contract import CONTRACT, Touched

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Source:
    """Modules of a wheel or folder, by dotted name."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path) if path.is_file() else None
        self._folder = path

    @functools.cache  # noqa: B019  (one instance, one run)
    def text(self, module: str) -> tuple[str, bool] | None:
        """Source, and whether it is a package's front; None where there is no such module."""
        base = module.replace(".", "/")
        for name, package in ((f"{base}.py", False), (f"{base}/__init__.py", True)):
            if self._zip is not None:
                if name in self._zip.NameToInfo:
                    return self._zip.read(name).decode(), package
            elif (self._folder / name).exists():
                return (self._folder / name).read_text(), package
        return None

    def find(self, module: str, name: str) -> tuple[str, Definition] | None:
        """The module and the definition of a class or function, through re-exports."""
        found = self.text(module)
        if found is None:
            return None
        text, package = found
        for node in _statements(ast.parse(text)):
            if isinstance(node, Definition) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom):
                other = _absolute(node, module, package)
                for alias in node.names:
                    if alias.name == "*" or (alias.asname or alias.name) == name:
                        result = self.find(other, name if alias.name == "*" else alias.name)
                        if result is not None:
                            return result
        return None

    def member(self, module: str, owner: ast.ClassDef, name: str) -> Definition | None:
        """A method of a class or of its bases."""
        for node in _statements(owner):
            if isinstance(node, Definition) and node.name == name:
                return node
        for where, base in self.bases(module, owner):
            found = self.member(where, base, name)
            if found is not None:
                return found
        return None

    def bases(self, module: str, owner: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        for base in owner.bases:
            name = base.id if isinstance(base, ast.Name) else None
            found = self.find(module, name) if name else None
            if found is not None and isinstance(found[1], ast.ClassDef):
                yield found[0], found[1]

    def has_attribute(self, module: str, owner: ast.ClassDef, name: str) -> bool:
        """Whether a class or a base sets or declares the attribute."""
        for node in _statements(owner):
            if isinstance(node, Definition) and node.name == name:
                return True
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", 0)]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return True
        for node in ast.walk(owner):
            if isinstance(node, ast.Attribute) and node.attr == name:
                of_self = isinstance(node.value, ast.Name) and node.value.id == "self"
                if of_self and isinstance(node.ctx, ast.Store):
                    return True
        return any(
            self.has_attribute(where, base, name) for where, base in self.bases(module, owner)
        )


def check(source: Source, touched: Touched) -> Iterator[str]:
    """What of one entry of the contract a release lacks."""
    where = f"{touched.module}.{touched.name}"
    first, *rest = touched.name.split(".")
    found = source.find(touched.module, first)
    if found is None:
        yield f"{where}: not found"
        return
    module, definition = found
    owner = definition
    for part in rest:
        member = source.member(module, owner, part) if isinstance(owner, ast.ClassDef) else None
        if member is None:
            yield f"{where}: {owner.name} has no {part}"
            return
        definition = member
    if touched.parameters and not isinstance(definition, ast.ClassDef):
        arguments = definition.args
        names = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        for parameter in touched.parameters:
            if parameter not in names:
                yield f"{where}: takes no {parameter!r}"
    for attribute in touched.attributes:
        if isinstance(definition, ast.ClassDef) and not source.has_attribute(
            module, definition, attribute
        ):
            yield f"{where}: has no attribute {attribute!r}"


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Statements of a body, those inside `if` and `try` too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from _statements(child)
        else:
            yield child


def _absolute(node: ast.ImportFrom, module: str, package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).exists():
        print("usage: vllm_contract.py WHEEL_OR_FOLDER", file=sys.stderr)
        return 2
    source = Source(Path(sys.argv[1]))
    differences = [line for touched in CONTRACT for line in check(source, touched)]
    print("\n".join(differences) or f"{len(CONTRACT)} entries: nothing differs")
    return int(bool(differences))


if __name__ == "__main__":
    sys.exit(main())
