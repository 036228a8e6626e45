"""When a run may end before its budget is spent."""

from __future__ import annotations

from lpserve.rounds.history import AskedMasks, KnownUtilities
from lpserve.rounds.model import RoundModel
from lpserve.rounds.settings import StopRules
from lpserve.types import BoolArray

_RULE_ROUNDS = 2  # rounds in a row in which the rules must hold: one fit may be a fluke


class StopCheck:
    """Checks the stop rules round by round."""

    def __init__(self, rules: StopRules) -> None:
        self._rules = rules
        self._rounds_held = 0
        self.stopped = ""
        """The rules that ended the run, if they did."""

    def may_stop(
        self,
        model: RoundModel,
        known: KnownUtilities,
        waiting_MP: BoolArray,
        asked: AskedMasks,
    ) -> bool:
        """Whether the rules have held for two rounds."""
        if not self._rules.given:
            return False
        rules = self._rules
        settled = rules.chance is None or model.settled(
            known, waiting_MP, asked, chance=rules.chance, gain=rules.gain
        )
        holds = settled and (rules.width is None or model.narrow(rules.width))
        self._rounds_held = self._rounds_held + 1 if holds else 0
        if self._rounds_held >= _RULE_ROUNDS:
            self.stopped = str(self._rules)
        return bool(self.stopped)
