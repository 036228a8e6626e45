"""Files written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def write_npz(path: Path, **arrays: Any) -> None:
    """Write arrays as one compressed .npz."""
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    temporary.replace(path)
