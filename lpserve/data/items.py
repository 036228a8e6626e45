"""What a game is played on: windows of texts, or questions of tasks.

Engines and the store know windows alone. A *unit* is what is drawn, weighed and resampled: a window
of a text, or a question of a task with the windows of all its answers. Whatever decides reads a
mask's losses on units.

Notation: M masks, N windows, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.data.questions import Questions
from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.types import IntArray, has_perplexity, is_task_utility, metric_of


@dataclass(frozen=True, eq=False)
class ItemSet:
    """Units of one or more named corpora: texts, or tasks."""

    windows: TokenWindows
    questions: Questions | None = None
    """None: the windows are the units."""

    @classmethod
    def of(cls, questions: Questions) -> ItemSet:
        return cls(questions.windows, questions)

    @property
    def corpora(self) -> tuple[tuple[str, int], ...]:
        """(name, number of units), in order."""
        return self.windows.corpora if self.questions is None else self.questions.corpora

    @property
    def num_items(self) -> int:
        return sum(count for _, count in self.corpora)

    @property
    def content_hash(self) -> str:
        return (self.questions or self.windows).content_hash

    @property
    def ppl_windows(self) -> TokenWindows:
        """One window for each unit, whose NLL is told as its perplexity: of a question, the right
        answer's."""
        if self.questions is None:
            return self.windows
        return self.windows.select(self.questions.right_rows_Q)

    @property
    def num_tokens_I(self) -> IntArray:
        """Scored positions of the told windows."""
        num_tokens_N = self.windows.num_tokens_N
        return num_tokens_N if self.questions is None else num_tokens_N[self.questions.right_rows_Q]

    def told(self, values: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """NLLs of the told windows, `float32[M, U]`, from sums `[M, N]` by metric."""
        nll_MN = values["nll"]
        return nll_MN if self.questions is None else nll_MN[:, self.questions.right_rows_Q]

    def losses(
        self, utility: str, values: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """What a utility is made of, `float32[M, U]`, from sums `[M, N]` by metric."""
        if self.questions is None:
            return values[metric_of(utility)]
        return self.questions.losses(utility, values)

    def other_losses(
        self, utility: str, values: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32] | None:
        """The same where they are not the told NLLs; None where the utility is about units of the
        other kind, too."""
        served = is_task_utility(utility) == (self.questions is not None)
        return self.losses(utility, values) if served and not has_perplexity(utility) else None

    def noise(self, utility: str, noise_nll: float, full_nll_N: NDArray[np.float32]) -> float:
        """Root mean square noise of a mask's mean loss, from that of its mean NLL (nats per token)
        and the whole model's NLLs; that of other losses on texts is taken for the same."""
        if self.questions is None or not noise_nll:
            return noise_nll
        return self.questions.noise(utility, noise_nll, full_nll_N)

    def window_rows(self, units: Sequence[int] | IntArray) -> IntArray:
        """Rows of the windows of these units."""
        if self.questions is None:
            return np.asarray(units, dtype=np.int64)
        return self.questions.window_rows(units)

    def first(self, num_items: int) -> ItemSet:
        """The first so many units of one corpus."""
        if self.questions is None:
            return ItemSet(self.windows.select(np.arange(num_items)))
        return ItemSet.of(self.questions.select(np.arange(num_items)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything of it, by name: `tokens` and `scored` are the told windows'."""
        told = self.ppl_windows
        arrays: dict[str, NDArray[Any]] = {"tokens": told.tokens_NT, "scored": told.scored_NT}
        if self.questions is not None:
            arrays |= {
                "answer_tokens": self.windows.tokens_NT,
                "answer_scored": self.windows.scored_NT,
                "answers": self.questions.answers_QC,
                "right": self.questions.right_QC,
                "chars": self.questions.chars_QC,
            }
        return arrays

    @classmethod
    def concatenate(cls, parts: Sequence[ItemSet]) -> ItemSet:
        """Several corpora as one; raises InputError where texts meet tasks, or windows repeat."""
        questions = [part.questions for part in parts if part.questions is not None]
        if not questions:
            return cls(TokenWindows.concatenate([part.windows for part in parts]))
        if len(questions) < len(parts):
            raise InputError("texts and tasks cannot be mixed: use one kind for a run")
        return cls.of(Questions.concatenate(questions))


def write_item_sets(path: Path, calibration: ItemSet, heldout: ItemSet) -> None:
    """Everything of both samples as one .npz, whole or not at all."""
    held = {f"heldout_{name}": array for name, array in heldout.arrays().items()}
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    np.savez_compressed(temporary, allow_pickle=False, **calibration.arrays(), **held)
    temporary.replace(path)
