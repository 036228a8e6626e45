"""What a game is played on: windows of texts, or questions of tasks.

Engines and the store know windows alone. An *item* is what is sampled, weighted and resampled: a
window of a text, or a question of a task with the windows of all its answers. Every decision reads
a mask's losses on items.

Notation: M masks, N windows, I items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.data.questions import Questions
from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.types import IntArray
from lpserve.utility import Utility


@dataclass(frozen=True, eq=False)
class ItemSet:
    """Items of one or more named corpora: texts, or tasks."""

    windows: TokenWindows
    questions: Questions | None = None
    """None: the windows are the items."""

    @classmethod
    def of(cls, questions: Questions) -> ItemSet:
        """The items of some questions."""
        return cls(questions.windows, questions)

    @property
    def corpora(self) -> tuple[tuple[str, int], ...]:
        """(name, number of items), in order."""
        return self.windows.corpora if self.questions is None else self.questions.corpora

    @property
    def num_items(self) -> int:
        """Items of all corpora together."""
        return sum(count for _, count in self.corpora)

    @property
    def content_hash(self) -> str:
        """SHA-256 over everything that losses depend on."""
        return (self.questions or self.windows).content_hash

    @property
    def ppl_windows(self) -> TokenWindows:
        """One window per item, used to report perplexity: the window itself, or a question's
        correct answer."""
        if self.questions is None:
            return self.windows
        return self.windows.select(self.questions.right_rows)

    @property
    def num_tokens_I(self) -> IntArray:
        """Scored positions of `ppl_windows`."""
        num_tokens_N = self.windows.num_tokens_N
        return num_tokens_N if self.questions is None else num_tokens_N[self.questions.right_rows]

    def ppl_nll(self, values: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """NLLs of `ppl_windows`, `float32[M, I]`, from sums `[M, N]` by metric."""
        nll_MN = values["nll"]
        return nll_MN if self.questions is None else nll_MN[:, self.questions.right_rows]

    def serves(self, utility: Utility) -> bool:
        """Whether the utility is about items of this kind."""
        return (utility.item == "question") == (self.questions is not None)

    def losses(
        self, utility: Utility, values: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """What a utility is made of, `float32[M, I]`, from sums `[M, N]` by metric."""
        if self.questions is None:
            return values[utility.metric]
        return self.questions.losses(utility, values)

    def noise(self, utility: Utility, noise_nll: float, full_nll_N: NDArray[np.float32]) -> float:
        """Root mean square noise of a mask's mean loss.

        On texts it is taken to be that of the mean NLL whatever the metric (in bfloat16 on a GPU
        other losses strayed from float32 0.8 to 0.9 times as far: scripts/bench/results/gpu.md).

        Args:
            noise_nll: of a mask's mean NLL, nats per token.
            full_nll_N: the full model's NLLs.
        """
        if self.questions is None or not noise_nll:
            return noise_nll
        return self.questions.noise(utility, noise_nll, full_nll_N)

    def window_rows(self, items: Sequence[int] | IntArray) -> IntArray:
        """Rows of the windows of these items."""
        if self.questions is None:
            return np.asarray(items, dtype=np.int64)
        return self.questions.window_rows(items)

    def first(self, num_items: int) -> ItemSet:
        """The first `num_items` items of one corpus."""
        if self.questions is None:
            return ItemSet(self.windows.select(np.arange(num_items)))
        return ItemSet.of(self.questions.select(np.arange(num_items)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything of it, by name: `tokens` and `scored` are those of `ppl_windows`."""
        shown = self.ppl_windows
        arrays: dict[str, NDArray[Any]] = {"tokens": shown.tokens_NT, "scored": shown.scored_NT}
        if self.questions is not None:
            arrays |= {
                "answer_tokens": self.windows.tokens_NT,
                "answer_scored": self.windows.scored_NT,
                "answers": self.questions.answers,
                "right": self.questions.is_right,
                "chars": self.questions.chars,
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
