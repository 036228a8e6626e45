"""What an evaluation is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from lpserve.config import EngineConfig
from lpserve.data.protocols import Protocol
from lpserve.plan.layer_sets import LayerSet


@dataclass(frozen=True, kw_only=True)
class EvalConfig(EngineConfig):
    """What to evaluate, and with which engines."""

    sets: tuple[LayerSet, ...] = ()
    """Sets of removed layers; the full model is always evaluated as well."""
    texts: dict[str, str] = field(default_factory=dict)
    """Name -> text, folder of .txt or .jsonl, for perplexity."""
    protocol: Protocol = field(default_factory=Protocol)
    """How texts are cut into windows."""
    text_field: str = "text"
    """The jsonl field that holds the text."""
    tasks: tuple[str, ...] = ()
    """Names of lm-eval's tasks and groups."""
    include_path: str | None = None
    """Folder of task files that lm-eval should know beside its own."""
    num_fewshot: int | None = None
    """Examples before a question; None: as the task says."""
    limit: int | None = None
    """Documents of each task that are evaluated at most; None: all."""
    max_length: int | None = None
    """Tokens of a request that the model is given; default: one less than its positions."""
    out: str = "eval"
    """Folder of the scores and results."""
