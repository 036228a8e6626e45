"""mkdocs hook: adds the generated pages of `docs_pages`, and writes formulas as MathML."""

from __future__ import annotations

import html
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(?:\(|\[)(.*?)\\(?:\)|\])</\1>', re.DOTALL)
"""What pymdownx.arithmatex makes of $...$ and $$...$$."""

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


def on_page_content(content: str, **event: Any) -> str:
    """mkdocs' event: formulas become MathML, which browsers show without a script."""
    convert = import_module("latex2mathml.converter").convert
    return FORMULA.sub(
        lambda found: convert(
            html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline"
        ),
        content,
    )
