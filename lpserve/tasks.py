"""lm-eval's tasks: found, loaded with their data, and turned into questions.

Whatever cannot be had or served is refused here, before an engine starts. lm-eval is imported when
a task is asked for.
"""

from __future__ import annotations

import difflib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpserve.config import TASK_PREFIX, is_task
from lpserve.errors import InputError
from lpserve.questions import Questions
from lpserve.sample import Sample
from lpserve.windows import HELDOUT_SHARE, WindowRequest, cut_corpora, load_tokenizer

SERVED = ("multiple_choice", "loglikelihood")
"""Kinds of tasks whose questions have an answer of known likelihood."""
FEWSHOT_SEED = 1234
"""As `lm_eval` draws the examples before a question."""
_UNLIKELY = -1e6  # a log-likelihood below all others
_DRAWS = 3  # random answers that a task's own rule and ours must judge alike


class TaskLoader:
    """lm-eval's tasks by name; a folder of the user's goes first.

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
        """Name -> lm-eval's task, its data loaded; of a group, all of its tasks."""
        try:
            return self.manager.load(list(names))["tasks"]
        except Exception as error:  # of datasets, the hub, yaml, ...
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the data of tasks {', '.join(names)} cannot be had: {line}"
            ) from None


def cut_samples(
    request: WindowRequest, model: str, *, include_path: str | None, num_fewshot: int | None
) -> tuple[list[Sample], list[Sample]]:
    """Calibration and held-out samples, corpus by corpus; overlaps are not looked for.

    Texts are cut as `windows.cut_corpora` does. A task's questions are those that lm-eval
    evaluates, in one seeded permutation: the first of its first four fifths calibrate, and the
    first of the last fifth are held out where no other corpus is. A task that is named on one side
    alone gives all of its questions to that side. A larger number of questions contains the
    smaller.

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
    found: dict[str, Sample] = {}
    heldout: list[Sample] = []
    if texts or held_texts:
        sides = cut_corpora(replace(request, calibration=texts, heldout=held_texts), model)
        found |= {n: Sample(windows) for n, windows in zip(texts, sides[0], strict=True)}
        heldout += [Sample(windows) for windows in sides[1]]
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
        self._tasks = {
            name: path.removeprefix(TASK_PREFIX)
            for name, path in [*request.heldout.items(), *request.calibration.items()]
            if is_task(path)
        }
        self._loader = TaskLoader(list(dict.fromkeys(self._tasks.values())), include_path)
        self._asker = _Asker(model)
        self._num_fewshot = num_fewshot
        self._asked: dict[str, list[_Asked]] = {}
        calibration = {p for p in request.calibration.values() if is_task(p)}
        self._shared = calibration & set(request.heldout.values() or calibration)

    def calibration(self, name: str) -> Sample:
        counts = self._request.num_windows
        path = self._request.calibration[name]
        asked = self._questions(name)
        if path in self._shared:
            asked = asked[: len(asked) - int(len(asked) * HELDOUT_SHARE)]
        return self._cut(name, asked, counts if isinstance(counts, int) else counts[name], "")

    def heldout(self, name: str) -> Sample:
        path = self._request.heldout.get(name) or self._request.calibration[name]
        asked = self._questions(name)
        if path in self._shared:
            asked = asked[len(asked) - int(len(asked) * HELDOUT_SHARE) :]
        return self._cut(name, asked, self._request.heldout_windows, " held out")

    def _questions(self, name: str) -> list[_Asked]:
        """Different questions of a task, in the order in which they are taken."""
        task_name = self._tasks[name]
        if task_name not in self._asked:
            loaded = self._loader.load([task_name])
            every = [q for t, task in loaded.items() for q in _asked(t, task, self._num_fewshot)]
            order = np.random.default_rng(self._request.seed).permutation(len(every))
            seen: set[tuple[str, str]] = set()
            fresh: list[_Asked] = []
            for place in order.tolist():
                if seen.isdisjoint(every[place].requests):
                    fresh.append(every[place])
                seen.update(every[place].requests)
            self._asked[task_name] = fresh
        return self._asked[task_name]

    def _cut(self, name: str, asked: Sequence[_Asked], count: int, side: str) -> Sample:
        if count > len(asked):
            raise InputError(
                f"task {self._tasks[name]!r} has too few questions: {len(asked)} different ones"
                f"{side}, {count} are asked for"
            )
        return Sample.of(self._asker.questions(asked[:count], name))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A question as lm-eval asks it."""

    task_name: str
    task: Any
    doc: Any
    requests: tuple[tuple[str, str], ...]
    """Context and continuation of every answer."""
    others: int
    """Requests beside those (answers without a context), which no utility reads."""


def _asked(name: str, task: Any, num_fewshot: int | None) -> Iterator[_Asked]:
    kind = task.get_config("output_type")
    if kind not in SERVED:
        raise InputError(
            f"task {name!r} is of kind {kind!r}: a game's value is made of {' or '.join(SERVED)}"
        )
    # as lm_eval's evaluator prepares a task: one that says 0 examples keeps to it
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with _quiet():
        task.build_all_requests()
    requests: dict[int, list[Any]] = {}
    for instance in task.instances:
        requests.setdefault(instance.doc_id, []).append(instance)
    for some in requests.values():
        answers = [i.args for i in sorted(some, key=lambda i: i.idx)]
        doc = some[0].doc
        num = len(task.doc_to_choice(doc)) if kind == "multiple_choice" else 1
        yield _Asked(
            task_name=name, task=task, doc=doc, requests=tuple(answers[:num]),
            others=len(answers) - num,
        )  # fmt: skip


class _Asker:
    """Turns questions into windows, with a model's tokenizer."""

    def __init__(self, model: str) -> None:
        from lpserve.task_requests import max_input_length

        self._tokenizer = load_tokenizer(model)
        self._max_length = max_input_length(model)

    def questions(self, asked: Sequence[_Asked], name: str) -> Questions:
        """Questions of one corpus; raises InputError where two have an answer in common."""
        from lpserve.task_requests import Row, encoded_rows, windows_of_rows

        rows: dict[Row, int] = {}
        widest = max(len(q.requests) for q in asked)
        shape = (len(asked), widest)
        answers_QC = np.full(shape, -1)
        right_QC, chars_QC = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
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
                answers_QC[place, c] = row
            right_QC[place, :num], chars_QC[place, :num] = _judged(question)
        return Questions(
            windows=windows_of_rows(list(rows), name), answers_QC=answers_QC, right_QC=right_QC,
            chars_QC=chars_QC, corpora=((name, len(asked)),),
        )  # fmt: skip


def _judged(question: _Asked) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which answers are right, `bool[C]`, and their characters, `int64[C]`, as the task itself
    judges; raises InputError where its rule is not the likeliest answer."""
    where = f"task {question.task_name!r}"
    num = len(question.requests)
    task, doc = question.task, question.doc
    if task.get_config("output_type") == "loglikelihood":
        told = [task.process_results(doc, [(-1.0, greedy)]).get("acc") for greedy in (False, True)]
        if told != [0, 1]:
            raise InputError(f"{where} has no acc that is 1 for the model's own answer")
        return np.ones(1, dtype=bool), np.array([len(question.requests[0][1])])
    chars = np.array([len(choice) for choice in task.doc_to_choice(doc)], dtype=np.int64)

    def judge(likelihoods: NDArray[np.float64]) -> Mapping[str, Any]:
        told = [(float(value), False) for value in likelihoods] + [(0.0, False)] * question.others
        with np.errstate(all="ignore"), _quiet():
            return task.process_results(doc, told)

    right = np.zeros(num, dtype=bool)
    for answer in range(num):
        found = judge(np.where(np.arange(num) == answer, -1.0, _UNLIKELY))
        value = found.get("acc", found.get("acc_norm"))
        if value is None:
            raise InputError(f"{where} reports neither acc nor acc_norm")
        right[answer] = value == 1
    if not right.any() or right.all():
        raise InputError(f"{where} has a question with {'no' if right.all() else 'only'} wrong "
                         f"answers: {str(question.requests[0][0])[-80:]!r}")  # fmt: skip
    draw = np.random.default_rng(0)
    for _ in range(_DRAWS):
        told = -draw.gamma(2.0, 5.0, num)
        found = judge(told)
        ours = {"acc": told, "acc_norm": told / np.maximum(chars, 1)}
        for key, likelihoods in ours.items():
            known = key in found and (key == "acc" or bool(chars.all()))
            if known and found[key] != right[np.argmax(likelihoods)]:
                raise InputError(f"{where}: its {key} is not whether the likeliest answer is right")
    return right, chars


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's progress bars and notes, left out."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
