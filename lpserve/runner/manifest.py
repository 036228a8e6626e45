"""What a run's folder says about the run: the windows that it was scored on."""

from __future__ import annotations

from pathlib import Path

from lpserve.data.items import ItemSet
from lpserve.store.files import write_npz


def write_windows_file(path: Path, calibration: ItemSet, heldout: ItemSet) -> None:
    """Write windows.npz, from which both item sets can be read again.

    Raises:
        DiskFullError, InputError: the file cannot be written; an older one is left as it was.
    """
    held = {f"heldout_{name}": array for name, array in heldout.arrays().items()}
    write_npz(path, {**calibration.arrays(), **held})
