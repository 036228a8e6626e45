"""What an export did: its report, and the model card that it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was exported and how it was checked; also written as lpserve_export.json."""

    source: str
    """Folder of the original checkpoint."""
    source_hash: str
    """Its content hash."""
    removed: list[int]
    """0-based layers of the original model, sorted."""
    kept: list[int]
    """The other layers, sorted."""
    verified: bool
    """Whether the written checkpoint was reloaded and compared."""
    generates: bool | None
    """Whether it generates with a cache as without; None when not verified. False: the original
    does not either."""
    dtype: str
    """Of the comparison."""
    num_windows: int
    """Windows compared; 0 when not verified."""
    worst_relative_difference: float | None
    """Largest difference of a window's NLL from the skip engine's; None when not verified."""
    ppl: float | None
    """Perplexity of the reloaded checkpoint on these windows; None when not verified, or on random
    tokens, of which it says nothing."""
    left_behind: list[str]
    """Files of the original's folder that were not copied, weights aside."""


def model_card(report: ExportReport) -> str:
    """What the checkpoint is and how it was checked, in Markdown."""
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
    lines += ["", "The same pruning as a recipe for mergekit: `mergekit.yaml`.", ""]
    return "\n".join(lines)
