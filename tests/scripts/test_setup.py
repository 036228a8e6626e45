"""What `scripts/setup` leaves in the environment."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import lpserve


def test_an_editable_install_is_a_plain_path_that_editors_follow():
    """With setuptools' import hook instead, type checkers do not find the package."""
    site = Path(sysconfig.get_paths()["purelib"])
    (path,) = site.glob("__editable__.lpserve-*.pth")
    assert (Path(path.read_text().strip()) / "lpserve" / "py.typed").is_file()
    assert Path(lpserve.__file__).with_name("py.typed").is_file()
