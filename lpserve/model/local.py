"""What stays on this machine: models come from folders, what is made of them goes to a cache."""

from __future__ import annotations

import os
from pathlib import Path
from types import MappingProxyType

FROM_FOLDER = MappingProxyType({"local_files_only": True, "trust_remote_code": False})
"""Arguments of every `from_pretrained`: nothing from a network, no code from the folder. Left to
itself transformers asks whether to run such code, and a `y` on standard input runs it."""


def cache_folder(kind: str) -> Path:
    """Where results of one kind are kept: under XDG_CACHE_HOME, else under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lpserve" / kind
