"""Questions of tasks: which windows their answers are, and what a mask loses on them.

A question has one or more answers; each is a window (the question's text, then the answer, whose
tokens are scored), so that a mask's log-likelihood of an answer is minus the window's NLL. A
question with several answers is a choice between them; one with a single answer is *open-ended*:
the model is to produce it (as in LAMBADA).

Everything that lm-eval's `acc` and `acc_norm` depend on is here, so that the losses of all masks
are one array operation. Knows no model, no tokenizer and no task library.

Notation: M masks, N windows, Q questions, C the largest number of answers of a question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from lpserve.data.windows import TokenWindows
from lpserve.errors import InputError
from lpserve.types import BoolArray, FloatArray, IntArray
from lpserve.utility import UTILITIES, Utility


@dataclass(frozen=True, eq=False)
class Questions:
    """Q questions over N windows, no window shared by two questions."""

    windows: TokenWindows
    """Every answer of every question, once."""
    answers: IntArray
    """Rows of `windows`; -1 where a question has fewer answers."""
    is_right: BoolArray
    """Which answers are right: at least one of every question."""
    chars: IntArray
    """Characters of the answers, by which `_norm` utilities divide; 0 where there is none."""
    corpora: tuple[tuple[str, int], ...]
    """(task, number of questions), in order."""

    @property
    def num_questions(self) -> int:
        """Q."""
        return len(self.answers)

    @cached_property
    def open_ended(self) -> BoolArray:
        """Which questions are open-ended: they have one answer, which the model is to produce."""
        return np.asarray((self.answers >= 0).sum(axis=1) == 1)

    @cached_property
    def right_rows(self) -> IntArray:
        """Rows of the windows of the (first) right answers."""
        return self.answers[np.arange(self.num_questions), self.is_right.argmax(axis=1)]

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over the windows and everything that losses depend on."""
        digest = hashlib.sha256(self.windows.content_hash.encode())
        for question in range(self.num_questions):
            is_answer = self.answers[question] >= 0  # padding to C answers does not count
            for array in (self.answers, self.is_right, self.chars):
                digest.update(array[question][is_answer].astype("<i8").tobytes())
            digest.update(b"|")
        return digest.hexdigest()

    def check(self, utility: Utility) -> None:
        """Raise InputError where a utility is not defined on these questions."""
        if utility.normed and self.open_ended.any():
            raise InputError(
                f"utility {utility.name} compares answers by their length; a task has "
                "open-ended questions: use task_acc or task_margin"
            )
        if utility.normed and (self.chars[self.answers >= 0] == 0).any():
            raise InputError(f"utility {utility.name} divides by an answer's length; one is empty")

    def losses(
        self, utility: Utility, values: Mapping[str, NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """What every mask loses on every question, `float32[M, Q]`; NaN where an answer's score is
        not finite.

        * `task_acc`: 1 where the likeliest answer (of equals, the first) is wrong; for an
          open-ended question, 1 where any token of the answer is not the model's first choice;
        * `task_margin`: the likeliest wrong answer's log-likelihood minus that of the likeliest
          right one, nats; for an open-ended question, minus the answer's log-likelihood;
        * `task_acc_norm`, `task_margin_norm`: these losses with every log-likelihood divided by
          the number of the answer's characters.

        Args:
            values: metric -> sums `float32[M, N]`: `nll`, and `misses` for `task_acc` of open-ended
                questions.
        """
        likelihood = self._log_likelihoods(values["nll"], normed=utility.normed)
        is_answer = self.answers >= 0
        finite = (np.isfinite(likelihood) | ~is_answer).all(axis=2)
        if utility.formula == "share":
            best = likelihood.argmax(axis=2)
            loss = 1.0 - self.is_right[np.arange(self.num_questions), best]
            if self.open_ended.any():
                misses_MN = values["misses"]
                missed = misses_MN[:, self.right_rows[self.open_ended]]
                loss[:, self.open_ended] = np.where(np.isnan(missed), np.nan, missed > 0)
        else:
            best_right = np.where(self.is_right, likelihood, -np.inf).max(axis=2)
            best_wrong = np.where(self.is_right, -np.inf, likelihood).max(axis=2)
            with np.errstate(invalid="ignore"):  # what is not finite is left out below
                loss = np.where(self.open_ended, 0.0, best_wrong) - best_right
        return np.where(finite, loss, np.nan).astype(np.float32)

    def noise(self, utility: Utility, noise_nll: float, full_nll_N: NDArray[np.float32]) -> float:
        """Root mean square noise of a mask's mean loss, from that of its mean NLL over all windows.

        Tokens are taken to err independently and alike, nats. A margin has the errors of two
        answers of the question's mean length; an answer is picked wrongly with the probability that
        they exceed the full model's margin; misses of open-ended questions err as NLLs do (in
        bfloat16 0.8 to 0.9 times as far). Measured on the bundled tasks and model in bfloat16, on
        16 masks and 20 questions: 0.79 (choices) and 1.00 (last words) times this for
        `task_margin`.

        Args:
            noise_nll: nats per token.
        """
        num_tokens_N = self.windows.num_tokens_N
        of_token = noise_nll * float(np.sqrt(num_tokens_N.sum()))
        is_answer = self.answers >= 0
        tokens = np.where(is_answer, num_tokens_N[self.answers], 0)
        chars = np.maximum(self.chars, 1) if utility.normed else np.ones_like(tokens)
        error = np.sqrt(tokens) / chars
        mean = (error**2).sum(axis=1) / is_answer.sum(axis=1)
        variance = of_token**2 * np.where(self.open_ended, 1.0, 2.0) * mean
        if utility.formula == "share":
            margin = UTILITIES["task_margin_norm" if utility.normed else "task_margin"]
            margins = self.losses(margin, {"nll": full_nll_N[None]})[0].astype(np.float64)
            wrong_chance = ndtr(-np.abs(margins) / np.maximum(np.sqrt(variance), 1e-300))
            variance = np.where(
                self.open_ended, np.minimum(variance, 0.25), wrong_chance * (1.0 - wrong_chance)
            )
        return float(np.sqrt(variance.sum()) / self.num_questions)

    def _log_likelihoods(self, nll_MN: NDArray[np.float32], *, normed: bool) -> FloatArray:
        """Log-likelihoods of the answers `[M, Q, C]`, -inf where there is none."""
        likelihood = -nll_MN[:, self.answers].astype(np.float64)
        if normed:
            likelihood /= np.maximum(self.chars, 1)
        return np.where(self.answers >= 0, likelihood, -np.inf)

    def window_rows(self, questions: Sequence[int] | IntArray) -> IntArray:
        """Rows of the windows of all answers of these questions, sorted."""
        rows = np.unique(self.answers[np.asarray(questions, dtype=np.int64)])
        return rows[rows >= 0]

    def select(self, questions: Sequence[int] | IntArray) -> Questions:
        """These questions, in that order, with no windows but theirs."""
        picked = np.asarray(questions, dtype=np.int64)
        names = np.repeat([n for n, _ in self.corpora], [c for _, c in self.corpora])[picked]
        if len(set(names.tolist())) > 1:
            raise ValueError("questions of several tasks are selected task by task")
        rows = self.window_rows(picked)
        place = np.full(self.windows.num_windows + 1, -1)  # the last stands for "no answer"
        place[rows] = np.arange(len(rows))
        return Questions(
            windows=self.windows.select(rows),
            answers=place[self.answers[picked]],
            is_right=self.is_right[picked],
            chars=self.chars[picked],
            corpora=((str(names[0]), len(picked)),),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Questions]) -> Questions:
        """Questions of several tasks; raises InputError where two have a window in common."""
        widest = max(part.answers.shape[1] for part in parts)

        def padded(array: NDArray[Any], value: int) -> NDArray[Any]:
            gap = widest - array.shape[1]
            return np.pad(array, ((0, 0), (0, gap)), constant_values=value)

        answers, start = [], 0
        for part in parts:
            answers.append(padded(np.where(part.answers < 0, -1, part.answers + start), -1))
            start += part.windows.num_windows
        return cls(
            windows=TokenWindows.concatenate([part.windows for part in parts]),
            answers=np.concatenate(answers),
            is_right=np.concatenate([padded(part.is_right, 0) for part in parts]),
            chars=np.concatenate([padded(part.chars, 0) for part in parts]),
            corpora=tuple(corpus for part in parts for corpus in part.corpora),
        )
