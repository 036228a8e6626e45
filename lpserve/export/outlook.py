"""What can be exported of a model, found out before a run spends its budget.

Four sets are tried on models without weights: the first layer alone, the last, one in the middle,
and every second layer. No weight is read.
"""

from __future__ import annotations

from lpserve.errors import InputError
from lpserve.export.pruned_config import prune, read_original
from lpserve.model.checkpoint import Checkpoint


def export_outlook(checkpoint: Checkpoint) -> list[str]:
    """Sentences about sets that no checkpoint can be written of; none where all that were tried
    can."""
    try:
        original = read_original(checkpoint)
    except InputError as reason:
        return [f"no set of this model can be exported: {reason}"]
    num_layers = original.skeleton.num_layers
    if num_layers < 2:
        return []
    tried = {
        "removes layer 0": [0],
        f"removes layer {num_layers - 1}": [num_layers - 1],
        f"removes layer {num_layers // 2}": [num_layers // 2],
        "removes every second layer": list(range(1, num_layers, 2)),
    }
    reasons: dict[str, str] = {}
    for about, removed in tried.items():
        try:
            prune(original, removed)
        except InputError as reason:
            reasons[about] = str(reason)
    if len(reasons) == len(tried):
        return [f"no set that was tried can be exported: {next(iter(reasons.values()))}"]
    return [
        f"a set that {about} cannot be exported in every case: {reason}"
        for about, reason in reasons.items()
    ]
