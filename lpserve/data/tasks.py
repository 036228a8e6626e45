"""lm-eval's tasks: found, loaded with their data, and turned into questions.

A task that is unknown, has no data, or cannot be scored by likelihoods is refused here, before an
engine starts. lm-eval is imported late, by those who use tasks only.

Notation: Q questions, C the largest number of answers of a question.
"""

from __future__ import annotations

import difflib
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.config import TASK_PREFIX, is_task
from lpserve.data.corpora import WindowRequest, cut_corpora
from lpserve.data.items import ItemSet
from lpserve.data.questions import Questions
from lpserve.data.tokenizer import load_tokenizer
from lpserve.data.windows import HELDOUT_SHARE
from lpserve.errors import InputError, first_line

QUESTION_KINDS = ("multiple_choice", "loglikelihood")
"""lm-eval's kinds of tasks whose questions become `Questions`: every answer has a likelihood."""
FEWSHOT_SEED = 1234
"""Seed of the examples before a question; lm-eval's own."""
_UNLIKELY = -1e6  # a log-likelihood below all others
_DRAWS = 3  # random log-likelihoods on which a task's own rule and ours must agree


class TaskLoader:
    """lm-eval's tasks by name; tasks of a user's folder take precedence.

    Raises:
        InputError: lm-eval is not installed, there is no such folder or task, or its data cannot
            be had.
    """

    def __init__(self, names: Sequence[str], include_path: str | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(f"tasks need lm-eval ({error}): install lpserve[eval]") from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if include_path is not None and not Path(include_path).is_dir():
            raise InputError(f"task folder {include_path} does not exist")
        # reading lm-eval's own tasks takes long: not where those of the folder suffice
        self.manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
        if include_path is not None and not set(names) <= set(self.manager.all_tasks):
            self.manager = TaskManager(include_path=include_path)
        known = set(self.manager.all_tasks)
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(
                    f"task {name!r} is not known to lm-eval{hint} (own task files: --include-path)"
                )

    def load(self, names: Sequence[str]) -> dict[str, Any]:
        """Name -> lm-eval's task, its data loaded; a group gives all of its tasks."""
        with _one_line_errors(f"the data of tasks {', '.join(names)} cannot be had"):
            return self.manager.load(list(names))["tasks"]


def cut_item_sets(
    request: WindowRequest, model: str, *, include_path: str | None, num_fewshot: int | None
) -> tuple[list[ItemSet], list[ItemSet]]:
    """Calibration and held-out items, corpus by corpus; does not check for overlaps.

    Texts are cut as `corpora.cut_corpora` does. A task's questions are those that lm-eval
    evaluates. Where no corpus is held out, a fifth of the questions is, the same fifth whatever the
    seed; a task that is on one side only gives all of its questions to that side. The questions of
    a side are shuffled once with the seed and the first ones taken, so that a larger number
    contains the smaller.

    Raises:
        InputError: a text or task cannot be used, or gives too little.
    """
    tasks = [n for n, path in request.calibration.items() if is_task(path)]
    texts = {n: path for n, path in request.calibration.items() if not is_task(path)}
    held_tasks = [n for n, path in request.heldout.items() if is_task(path)]
    held_texts = {n: path for n, path in request.heldout.items() if not is_task(path)}
    if held_tasks and (texts or held_texts):
        raise InputError(
            f"held-out {held_tasks[0]!r} is a task beside texts: hold out texts, and evaluate the "
            "plan on tasks with lpserve eval"
        )
    if tasks and texts and not request.heldout:
        raise InputError("calibration has texts and tasks: name a held-out text with --heldout")
    found: dict[str, ItemSet] = {}
    heldout: list[ItemSet] = []
    if texts or held_texts:
        sides = cut_corpora(replace(request, calibration=texts, heldout=held_texts), model)
        found |= {n: ItemSet(windows) for n, windows in zip(texts, sides[0], strict=True)}
        heldout += [ItemSet(windows) for windows in sides[1]]
    if tasks or held_tasks:
        cutter = _TaskCutter(request, model, include_path, num_fewshot)
        for name in tasks:
            found[name] = cutter.calibration(name)
        if not held_texts:
            heldout += [cutter.heldout(name) for name in held_tasks or tasks]
    return [found[name] for name in request.calibration], heldout


class _TaskCutter:
    """Cuts the questions of the tasks of one request."""

    def __init__(
        self, request: WindowRequest, model: str, include_path: str | None, num_fewshot: int | None
    ) -> None:
        self._request = request
        own = {n: path for n, path in request.calibration.items() if is_task(path)}
        held = {n: path for n, path in request.heldout.items() if is_task(path)}
        if not request.heldout:
            held = own
        names = {path.removeprefix(TASK_PREFIX) for path in (*own.values(), *held.values())}
        loader = TaskLoader(sorted(names), include_path)
        tasks_of = {name: loader.load([name]) for name in sorted(names)}
        self._own, self._held = (
            {n: tasks_of[path.removeprefix(TASK_PREFIX)] for n, path in side.items()}
            for side in (own, held)
        )
        for side in (self._own, self._held):
            seen: dict[str, str] = {}
            for name, tasks in side.items():
                for task in tasks:
                    if task in seen:
                        raise InputError(f"{seen[task]!r} and {name!r} both hold task {task!r}")
                    seen[task] = name
        both = {t for tasks in self._own.values() for t in tasks}
        both &= {t for tasks in self._held.values() for t in tasks}
        every = {t: task for tasks in tasks_of.values() for t, task in tasks.items()}
        self._sides = {
            name: _sides(_without_repeats(_asked(name, task, num_fewshot)), name in both)
            for name, task in every.items()
        }
        """Task -> its questions that may calibrate, and that may be held out."""
        self._asker = _Asker(model)

    def calibration(self, name: str) -> ItemSet:
        """The calibration questions of one corpus of the request."""
        counts = self._request.num_windows
        count = counts if isinstance(counts, int) else counts[name]
        return self._cut(name, [self._sides[t][0] for t in self._own[name]], count, "")

    def heldout(self, name: str) -> ItemSet:
        """The held-out questions of one corpus of the request."""
        parts = [self._sides[t][1] for t in self._held[name]]
        return self._cut(name, parts, self._request.heldout_windows, " held out")

    def _cut(self, name: str, parts: Sequence[list[_Asked]], count: int, side: str) -> ItemSet:
        pool = [question for part in parts for question in part]
        if count > len(pool):
            raise InputError(
                f"task {name!r} has too few questions: {len(pool)} different ones{side}, {count} "
                "are asked for"
            )
        order = np.random.default_rng(self._request.seed).permutation(len(pool))[:count]
        return ItemSet.of(self._asker.questions([pool[i] for i in order.tolist()], name))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A question as lm-eval asks it: the requests that it sends to a model."""

    task_name: str
    task: Any
    doc: Any
    requests: tuple[tuple[str, str], ...]
    """Context and continuation of every answer."""
    others: int
    """Number of further requests (answers without a context), which no utility reads."""
    pairs: frozenset[tuple[str, str]]
    """(question, answer) texts without the examples before them: two questions that share one are
    the same."""


def _asked(name: str, task: Any, num_fewshot: int | None) -> list[_Asked]:
    """Every question of a task; raises InputError where it cannot be asked, or where its examples
    would reveal held-out questions."""
    kind = task.get_config("output_type")
    if kind not in QUESTION_KINDS:
        raise InputError(
            f"task {name!r} is of kind {kind!r}: a game's value is made of "
            f"{' or '.join(QUESTION_KINDS)}"
        )
    own = task.get_config("num_fewshot")
    if own == 0 and num_fewshot:
        raise InputError(f"task {name!r} is to be asked without examples: leave num_fewshot out")
    examples = own or 0 if num_fewshot is None else num_fewshot
    if examples and _examples_are_evaluated(task):
        raise InputError(
            f"task {name!r} takes its examples from the questions themselves, so that none could "
            "be held out: use --num-fewshot 0"
        )
    with _one_line_errors(f"task {name!r} cannot be asked"):
        task.set_config(key="num_fewshot", value=examples)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        with _quiet():
            task.build_all_requests()
        requests: dict[int, list[Any]] = {}
        for instance in task.instances:
            requests.setdefault(instance.doc_id, []).append(instance)
        return [_question(name, task, kind, some) for some in requests.values()]


def _question(name: str, task: Any, kind: str, instances: list[Any]) -> _Asked:
    answers = [i.args for i in sorted(instances, key=lambda i: i.idx)]
    doc = instances[0].doc
    choices = task.doc_to_choice(doc) if kind == "multiple_choice" else [task.doc_to_target(doc)]
    # with several contexts (Winogrande) these are the choices, and the text is the answer
    text = task.doc_to_target(doc) if getattr(task, "multiple_input", 0) else task.doc_to_text(doc)
    return _Asked(
        task_name=name,
        task=task,
        doc=doc,
        requests=tuple(answers[: len(choices)]),
        others=len(answers) - len(choices),
        pairs=frozenset((str(text), str(c)) for c in choices),
    )


def _examples_are_evaluated(task: Any) -> bool:
    """Whether the examples before a question are drawn from what lm-eval evaluates."""
    config, given = task.config, getattr(task, "fewshot_cfg", None)
    splits = [
        config.training_split if task.has_training_docs() else None,
        config.validation_split if task.has_validation_docs() else None,
        config.test_split if task.has_test_docs() else None,
    ]
    evaluated = splits[2] or splits[1]
    source = getattr(given, "split", None)
    if source is None and getattr(given, "samples", None) is not None:
        return False
    return evaluated == (source or next(split for split in splits if split is not None))


def _without_repeats(asked: Iterable[_Asked]) -> list[_Asked]:
    """The questions that share no (question, answer) text with an earlier one."""
    seen: set[tuple[str, str]] = set()
    found = []
    for question in asked:
        if seen.isdisjoint(question.pairs):
            found.append(question)
            seen |= question.pairs
    return found


def _sides(asked: list[_Asked], both: bool) -> tuple[list[_Asked], list[_Asked]]:
    """The questions that may calibrate and those that may be held out.

    The split does not depend on the seed, so that no run calibrates on what another holds out.

    Args:
        both: whether the task is on both sides; otherwise all of its questions may be on either.
    """
    if not both:
        return asked, asked
    order = np.random.default_rng(0).permutation(len(asked)).tolist()
    num_held = int(len(asked) * HELDOUT_SHARE)
    cut = len(asked) - num_held
    return [asked[i] for i in order[:cut]], [asked[i] for i in order[cut:]]


class _Asker:
    """Turns questions into windows, with a model's tokenizer."""

    def __init__(self, model: str) -> None:
        from lpserve.data.task_requests import max_input_length

        self._tokenizer = load_tokenizer(model)
        if self._tokenizer.bos_token_id is None and self._tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer in {model} has neither BOS nor EOS: tasks need one")
        self._draw = np.random.default_rng(0)
        self._max_length = max_input_length(model)

    def questions(self, asked: Sequence[_Asked], name: str) -> Questions:
        """Questions of one corpus; raises InputError where two have an answer in common."""
        from lpserve.data.task_requests import Row, encoded_rows, windows_of_rows

        rows: dict[Row, int] = {}
        widest = max(len(q.requests) for q in asked)
        shape = (len(asked), widest)
        answers = np.full(shape, -1)
        is_right, chars = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
        requests = [request for q in asked for request in q.requests]
        encoded = iter(encoded_rows(requests, self._tokenizer, self._max_length))
        for place, question in enumerate(asked):
            before = len(rows)
            num = len(question.requests)
            for c in range(num):
                row = rows.setdefault(next(encoded), len(rows))
                if row < before:
                    raise InputError(
                        f"task {question.task_name!r}: two questions have the same answer once "
                        f"they are cut to {self._max_length} tokens"
                    )
                answers[place, c] = row
            is_right[place, :num], chars[place, :num] = _judged(question, self._draw)
        return Questions(
            windows=windows_of_rows(list(rows), name),
            answers=answers,
            is_right=is_right,
            chars=chars,
            corpora=((name, len(asked)),),
        )


def _judged(
    question: _Asked, draw: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which answers are right by the task's own rule, `bool[C]`, and their characters, `int64[C]`.

    The rule is found by asking the task: it is given log-likelihoods that favour one answer after
    the other, and then random ones, on which its `acc` and `acc_norm` must be what ours are.

    Raises:
        InputError: the task does not judge by the likeliest answer.
    """
    where = f"task {question.task_name!r}"
    num = len(question.requests)
    task, doc = question.task, question.doc
    if task.get_config("output_type") == "loglikelihood":
        acc = [task.process_results(doc, [(-1.0, greedy)]).get("acc") for greedy in (False, True)]
        if acc != [0, 1]:
            raise InputError(f"{where} has no acc that is 1 for the model's own answer")
        return np.ones(1, dtype=bool), np.array([len(question.requests[0][1])])
    chars = np.array([len(choice) for choice in task.doc_to_choice(doc)], dtype=np.int64)

    def judge(likelihoods: NDArray[np.float64]) -> Mapping[str, Any]:
        results = [(float(value), False) for value in likelihoods]
        results += [(0.0, False)] * question.others
        with np.errstate(all="ignore"), _quiet(), _one_line_errors(f"{where} cannot be judged"):
            return task.process_results(doc, results)

    right = np.zeros(num, dtype=bool)
    for answer in range(num):
        found = judge(np.where(np.arange(num) == answer, -1.0, _UNLIKELY))
        value = found.get("acc", found.get("acc_norm"))
        if value is None:
            raise InputError(f"{where} reports neither acc nor acc_norm")
        right[answer] = value == 1
    if not right.any() or right.all():
        raise InputError(
            f"{where} has a question with {'no' if right.all() else 'only'} wrong "
            f"answers: {str(question.requests[0][0])[-80:]!r}"
        )
    for place in range(_DRAWS + 1):
        # likelihoods far apart and near, and all equal: then the first
        drawn = -draw.gamma(2.0, 10.0 ** draw.uniform(-3, 1), num) if place else np.full(num, -2.0)
        found = judge(drawn)
        ours = {"acc": drawn, "acc_norm": drawn / np.maximum(chars, 1)}
        for key, likelihoods in ours.items():
            known = key in found and (key == "acc" or bool(chars.all()))
            if known and found[key] != right[np.argmax(likelihoods)]:
                raise InputError(f"{where}: its {key} is not whether the likeliest answer is right")
    return right, chars


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turn errors of a task's own code into an InputError of one line that begins with `what`."""
    try:
        yield
    except Exception as error:  # whatever datasets, templates and functions of task files raise
        raise InputError(f"{what}: {first_line(error)}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's progress bars and notes, left out."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
