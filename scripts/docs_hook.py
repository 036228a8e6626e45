"""mkdocs hook: adds the generated pages of `docs_pages` to the documentation."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def _generator() -> Any:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return import_module("scripts.docs_pages")


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' event: the generated pages become files of the site."""
    make = import_module("mkdocs.structure.files").File.generated
    for path, content in _generator().pages().items():
        files.append(make(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **event: Any) -> str:
    """mkdocs' event: the generated parts of a page take their places."""
    return _generator().filled(markdown)
