"""The model card of an exported checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lpserve.model.checkpoint import Checkpoint

if TYPE_CHECKING:
    from lpserve.export.export import ExportReport


def model_card(checkpoint: Checkpoint, report: ExportReport) -> str:
    """What the checkpoint is and how it was checked, in Markdown.

    Args:
        checkpoint: the original.
        report: of the export.
    """
    name = Path(report.source).name
    removed = ", ".join(map(str, report.removed))
    total = len(report.removed) + len(report.kept)
    lines = [
        f"# {name} without {len(report.removed)} of {total} layers",
        "",
        f"Made by lpserve from `{name}` (content {report.source_hash[:18]}). Removed: layers "
        f"{removed}, counted from 0. No weight was changed or trained; the card, licence and "
        f"evaluations of `{name}` describe the original model.",
        "",
    ]
    if not report.verified:
        lines.append("**Not verified**: it was not reloaded and compared with the original.")
    else:
        lines.append(
            f"Verified: reloaded with transformers in {report.dtype}, it scores what the original "
            "scores with these layers skipped, within "
            f"{report.worst_relative_difference:.1e} of each of {report.num_windows} windows' loss."
        )
    if report.ppl is not None:
        lines.append(f"Perplexity on these windows: {report.ppl:.4f}.")
    if report.generates is False:
        lines.append("`generate` with a cache fails or differs, as it does in the original.")
    architecture = (checkpoint.config.get("architectures") or ["?"])[0]
    lines += ["", f"Class: `{architecture}`. The recipe for mergekit is `mergekit.yaml`.", ""]
    return "\n".join(lines)
