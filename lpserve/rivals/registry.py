"""Every rival by name: its source, what it needs, and the function that makes its proposer.

A new rival is one file in this folder with a function `propose(setting) -> Proposer`, and one line
here. Those listed here are named as "module:function" and imported when they are made, so that the
command line can list the names without loading what they need; a rival of one's own may be given as
the function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lpserve.engine.base import HasHiddenStates, HasTaylorImportance

if TYPE_CHECKING:
    from lpserve.data.windows import TokenWindows
    from lpserve.rivals.proposer import Proposer, SearchSetting
    from lpserve.scoring.session import ScoringSession


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What is measured inside the model for a rival, beside scoring masks."""

    measure: Callable[[ScoringSession, TokenWindows], Any]
    """From a session and the calibration windows; None where its engines cannot measure it."""
    cost: str
    """What it takes, in words."""
    forwards: Callable[[int], float]
    """What it takes, in layer-forwards, from the number of players."""
    refusal: str = ""
    """Why the rival did not run where it cannot be measured; "": it runs without."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A search for sets of players to remove."""

    source: str
    """Where it comes from, in words."""
    proposer: str | Callable[[SearchSetting], Proposer]
    """The function that begins the search, or "module:function" in this folder."""
    needs: Measurement | None = None
    """What `SearchSetting.measured` has to hold; None: the rival needs nothing but scores."""
    plans_its_budget: bool = False
    """Whether the search depends on the budget; others are cut wherever it ends."""

    def make(self, setting: SearchSetting) -> Proposer:
        """The rival's proposer for a game.

        Raises:
            InputError: the rival cannot begin with this setting (some raise at the first step).
        """
        if callable(self.proposer):
            return self.proposer(setting)
        module, _, function = self.proposer.partition(":")
        return getattr(import_module(f"lpserve.rivals.{module}"), function)(setting)


def _of_engine(capability: type, method: str) -> Callable[[ScoringSession, TokenWindows], Any]:
    """A measurement by a method of an engine in this process, on the windows it was opened with."""

    def measure(session: ScoringSession, _windows: TokenWindows) -> Any:
        return session.with_engine(
            lambda engine: getattr(engine, method)() if isinstance(engine, capability) else None
        )

    return measure


def _overlap(session: ScoringSession, windows: TokenWindows) -> Any:
    from lpserve.scoring.session import single_overlap  # a session loads what runs engines

    return single_overlap(session, windows)


def _overlap_forwards(players: int) -> float:
    from lpserve.rounds.acquisition import HEAD_COST  # loads scipy

    return HEAD_COST * (players + 1)


HIDDEN_STATES = Measurement(
    measure=_of_engine(HasHiddenStates, "hidden_states"),
    cost="one forward pass over the calibration windows",
    forwards=float,
    refusal="not run: hidden states need engine transformers in this process",
)
GRADIENTS = Measurement(
    measure=_of_engine(HasTaylorImportance, "taylor_importance"),
    cost="one forward and backward pass over the calibration windows",
    forwards=lambda players: 3.0 * players,  # a backward pass takes twice a forward pass
    refusal="not run: gradients need engine transformers in this process",
)
OVERLAP = Measurement(
    measure=_overlap,
    cost="the heads of the whole model and of every single layer's drop, once more",
    forwards=_overlap_forwards,
)

RIVALS: dict[str, Rival] = {
    "lpserve": Rival("this project, --goal plan", "ours:propose", OVERLAP, plans_its_budget=True),
    "random": Rival("uniform sets of every size in turn", "random_sets:propose"),
    "last": Rival("the last layers (arXiv 2411.15558)", "criteria:propose_last"),
    "shortgpt": Rival(
        "block influence (ShortGPT, arXiv 2403.03853)", "criteria:propose_shortgpt", HIDDEN_STATES
    ),
    "angular": Rival(
        "most alike ends of a block (arXiv 2403.17887)", "criteria:propose_angular", HIDDEN_STATES
    ),
    "oneshot": Rival(
        "perplexity without one layer (Shortened-LLaMA, arXiv 2402.02834)", "one_shot:propose"
    ),
    "taylor": Rival(
        "Taylor+ (Shortened-LLaMA, arXiv 2402.02834)", "criteria:propose_taylor", GRADIENTS
    ),
    "greedy": Rival(
        "greedy, re-evaluated at every step (SLEB, arXiv 2402.09025; over halves of layers: "
        "BlockPruner, arXiv 2406.10594)",
        "greedy:propose",
    ),
    "evopress": Rival(
        "evolution, few windows first (EvoPress, arXiv 2410.14649)", "evopress:propose"
    ),
    "paper": Rival(
        "8,000 random masks, a network, values (arXiv 2602.07804)",
        "paper:propose",
        plans_its_budget=True,
    ),
}
"""In the order of the tables."""
