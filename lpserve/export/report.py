"""What an export did: its report, and the model card that it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ZEROED_NOTE = (
    "Parts of layers that are gone have weights of zero: they add nothing, and take as much time "
    "and memory as before. Any program that loads the original loads this."
)
SLIM_NOTE = (
    "Parts of layers that are gone have no weights here and take no time; attention among them has "
    "no keys and values in the cache. transformers loads the model once `lpserve.hf` is imported, "
    "vLLM where lpserve is installed."
)
SLIM_EXAMPLE = (
    "```python",
    "import lpserve.hf",
    "from transformers import AutoModelForCausalLM",
    "",
    'model = AutoModelForCausalLM.from_pretrained("path/to/this")',
    "```",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was exported and how it was checked; also written as lpserve_export.json."""

    source: str
    """Folder of the original checkpoint."""
    source_hash: str
    """Its content hash."""
    removed: list[int]
    """0-based layers of the original model that are gone, sorted."""
    zeroed: list[str]
    """Parts of kept layers whose weights are zero, such as `7.attention`."""
    left_out: list[str]
    """Parts of kept layers whose weights are not in the checkpoint."""
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

    @property
    def what(self) -> str:
        """What is gone, in words: `layers 3, 5; 7.attention`."""
        layers = f"layers {', '.join(map(str, self.removed))}" if self.removed else ""
        return "; ".join(filter(None, [layers, ", ".join([*self.zeroed, *self.left_out])]))


def model_card(report: ExportReport) -> str:
    """What the checkpoint is and how it was checked, in Markdown."""
    name = Path(report.source).name
    total = len(report.removed) + len(report.kept)
    parts = len(report.zeroed) + len(report.left_out)
    others = f" and {parts} parts of others" if parts else ""
    lines = [
        f"# {name} without {len(report.removed)} of {total} layers{others}",
        "",
        f"Made by lpserve from `{name}` (content {report.source_hash[:18]}). Removed: "
        f"{report.what}, counted from 0. No other weight was changed, and none trained; the card, "
        f"licence and evaluations of `{name}` describe the original model.",
        "",
    ]
    if report.zeroed:
        lines += [ZEROED_NOTE, ""]
    if report.left_out:
        lines += [SLIM_NOTE, "", *SLIM_EXAMPLE, ""]
    if not report.verified:
        lines.append("**Not verified**: it was not reloaded and compared with the original.")
    else:
        lines.append(
            f"Verified: reloaded with transformers in {report.dtype}, it scores what the original "
            "scores with these skipped, within "
            f"{report.worst_relative_difference:.1e} of each of {report.num_windows} windows' loss."
        )
    if report.ppl is not None:
        lines.append(f"Perplexity on these windows: {report.ppl:.4f}.")
    if report.generates is False:
        lines.append("`generate` with a cache fails or differs, as it does in the original.")
    if not parts:
        lines += ["", "The same pruning as a recipe for mergekit: `mergekit.yaml`."]
    return "\n".join([*lines, ""])
