"""Utilities of lm-eval's tasks: what questions lose against lm-eval's verdicts and plain loops,
runs against every mask scored, what is refused.

lm-eval judges the very scores that the store holds, so that accuracies are equal; of means over
some ten questions, in nats, 1e-5 is what float32 sums leave.
"""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import LlamaConfig

import lpserve
from lpserve.analysis.record import read_record
from lpserve.cli.entry import main
from lpserve.config import config_from
from lpserve.data.items import ItemSet
from lpserve.data.questions import Questions
from lpserve.data.windows import TokenWindows
from lpserve.demo import FOLDER
from lpserve.errors import InputError
from lpserve.evaluation.evaluate import evaluate
from lpserve.evaluation.settings import EvalConfig
from lpserve.masks import all_masks, full_mask, key_text, keys
from lpserve.model.players import layer_players
from lpserve.plan.layer_sets import LayerSet, full_model, layer_set_masks
from lpserve.runner.run import run
from lpserve.runner.setup import check_model, item_sets_of
from lpserve.scoring.session import ScoringSession
from lpserve.testing.games import shapley_by_hand
from lpserve.testing.reference import save_model, slow_but
from lpserve.testing.runs import stored_scores
from lpserve.utility import TASK_UTILITIES, UTILITIES, utility_named
from tests.conftest import SEED

NUM_LAYERS = 6
TASKS = str(FOLDER / "tasks")
CHOICE, LAST_WORD = "dracula_continuation", "dracula_last_word"
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> str:
    """Six random layers with the bundled model's tokenizer."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=4096,
        max_position_embeddings=256,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    folder = save_model(config, tmp_path_factory.mktemp("task-models") / "small", SEED)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / "model" / name, folder)
    return str(folder)


def task_run_values(tmp_path, model: str, task: str, utility: str, **changes) -> dict:
    return {
        "model": model,
        "calibration": f"task:{task}",
        "utility": utility,
        "include_path": TASKS,
        "num_windows": 8,
        "heldout_windows": 5,
        "budget": 64,
        "max_removed": 3,
        "sizes": [0, NUM_LAYERS - 1],
        "surrogate": "gp",
        "out": str(tmp_path / "run"),
        "progress_s": 100.0,
    } | changes


def some_questions(rng, num_questions: int = 30) -> tuple[Questions, np.ndarray]:
    """Questions with one to five answers, some several right ones, and scores with ties."""
    counts = rng.integers(1, 6, num_questions)
    counts[:4] = [1, 2, 3, 5]
    answers = np.full((num_questions, 5), -1)
    right = np.zeros((num_questions, 5), dtype=bool)
    start = 0
    for q, count in enumerate(counts):
        answers[q, :count] = rng.permutation(np.arange(start, start + count))
        right[q, rng.choice(count, int(rng.integers(1, max(count, 2))), replace=False)] = True
        start += count
    tokens = rng.integers(2, 90, (start, 7))
    scored = np.zeros((start, 7), dtype=bool)
    scored[:, -2:] = True
    chars = np.where(answers >= 0, rng.integers(1, 20, answers.shape), 0)
    windows = TokenWindows.from_tokens(tokens, scored, name="t")
    questions = Questions(windows, answers, right, chars, (("t", num_questions),))
    nll_MN = rng.integers(1, 40, (9, start)).astype(np.float32) / 4  # quarters: ties happen
    return questions, nll_MN


def loss_by_hand(utility: str, answers, right, chars, nll_N, misses_N) -> float:
    rows = [r for r in answers if r >= 0]
    told = [
        -float(nll_N[r]) / (c if utility.endswith("norm") else 1)
        for r, c in zip(answers, chars, strict=True)
        if r >= 0
    ]
    if len(rows) == 1:
        if "acc" in utility:
            return float(misses_N[rows[0]] > 0)
        return -told[0]
    if "acc" in utility:
        return float(not right[told.index(max(told))])
    good = [t for t, is_right in zip(told, right, strict=False) if is_right]
    bad = [t for t, is_right in zip(told, right, strict=False) if not is_right]
    return max(bad) - max(good)


@pytest.mark.parametrize("utility", TASK_UTILITIES)
def test_losses_are_those_of_a_plain_loop(utility, rng):
    questions, nll_MN = some_questions(rng)
    misses_MN = rng.integers(0, 2, nll_MN.shape).astype(np.float32)
    got_MQ = questions.losses(utility_named(utility), {"nll": nll_MN, "misses": misses_MN})
    for m, q in np.ndindex(*got_MQ.shape):
        wanted = loss_by_hand(
            utility,
            questions.answers[q],
            questions.is_right[q],
            questions.chars[q],
            nll_MN[m],
            misses_MN[m],
        )
        assert got_MQ[m, q] == pytest.approx(wanted, rel=1e-6)
    assert len(np.unique(got_MQ)) > 1


@pytest.mark.parametrize("utility", TASK_UTILITIES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_question_with_an_answer_that_has_no_score_has_no_loss(utility, bad, rng):
    questions, nll_MN = some_questions(rng)
    misses_MN = np.zeros_like(nll_MN)
    question = int(rng.integers(questions.num_questions))
    nll_MN[3, questions.answers[question][0]] = bad
    got_MQ = questions.losses(utility_named(utility), {"nll": nll_MN, "misses": misses_MN})
    missing = np.argwhere(np.isnan(got_MQ)).tolist()
    assert missing == [[3, question]]


@pytest.mark.parametrize("utility", TASK_UTILITIES)
def test_noise_of_a_loss_is_that_of_its_answers(utility, rng):
    """Against NLLs of which every token errs by chance, answers of one length (the formula takes
    the mean length). 4,000 draws tell 2%; the rest of the 25% is for questions on which a third
    answer comes near the first two."""
    questions, _ = some_questions(rng, 60)
    questions = replace(questions, chars=np.where(questions.answers >= 0, 10, 0))
    if "margin" not in utility:  # misses of open-ended ones are not made of NLLs
        questions = questions.select(np.flatnonzero(~questions.open_ended))
    num_tokens_N = questions.windows.num_tokens_N
    full_N = rng.gamma(2.0, 5.0, len(num_tokens_N)).astype(np.float32)
    of_token = 0.5
    drawn = rng.normal(0, of_token * np.sqrt(num_tokens_N), (4000, len(num_tokens_N)))
    nll_MN = (full_N + drawn).astype(np.float32)
    mean_M = (
        questions.losses(utility_named(utility), {"nll": nll_MN}).astype(np.float64).mean(axis=1)
    )
    noise = of_token / np.sqrt(num_tokens_N.sum())
    told = questions.noise(utility_named(utility), noise, full_N)
    assert told == pytest.approx(mean_M.std(), rel=0.25)


def test_parts_of_questions_are_the_same_questions(rng):
    questions, nll_MN = some_questions(rng)
    values = {"nll": nll_MN, "misses": rng.integers(0, 2, nll_MN.shape).astype(np.float32)}
    picked = rng.permutation(questions.num_questions)[:7]
    part = questions.select(picked)
    rows = questions.window_rows(picked)
    assert part.windows.window_hashes == tuple(questions.windows.window_hashes[r] for r in rows)
    whole = questions.losses(UTILITIES["task_margin"], values)
    some = part.losses(UTILITIES["task_margin"], {k: v[:, rows] for k, v in values.items()})
    assert np.array_equal(some, whole[:, picked])
    other, other_nll_MN = some_questions(rng)
    renamed = TokenWindows.from_tokens(
        other.windows.tokens_NT + 100, other.windows.scored_NT, name="u"
    )
    other = Questions(renamed, other.answers, other.is_right, other.chars, (("u", 30),))
    both = Questions.concatenate([part, other])
    joined = {"nll": np.concatenate([nll_MN[:, rows], other_nll_MN], axis=1)}
    assert both.corpora == (("t", 7), ("u", 30))
    assert np.array_equal(
        both.losses(UTILITIES["task_margin"], joined),
        np.concatenate(
            [some, other.losses(UTILITIES["task_margin"], {"nll": other_nll_MN})], axis=1
        ),
    )
    assert both.content_hash != Questions.concatenate([other, part]).content_hash


TRAIN_SPLIT = """

def _halves(name):
    documents = _test_split(name)["test"]
    return {"test": documents.select(range(15)), "train": documents.select(range(15, 30))}

def more_continuation(**_):
    return _halves("continuation")

def more_last_word(**_):
    return _halves("last_word")
"""


@pytest.fixture(scope="session")
def few_documents(tmp_path_factory) -> str:
    """The bundled tasks with their first fifteen documents, the next fifteen for examples."""
    folder = tmp_path_factory.mktemp("few") / "tasks"
    shutil.copytree(TASKS, folder)
    documents = folder / "documents.py"
    documents.write_text(documents.read_text() + TRAIN_SPLIT)
    for path in folder.glob("*.yaml"):
        text = path.read_text().replace("!function documents.", "!function documents.more_")
        path.write_text(text + "training_split: train\n")
    return str(folder)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("task", "utility", "metric", "num_fewshot"),
    [
        (CHOICE, "task_acc", "acc", None),
        pytest.param(CHOICE, "task_acc_norm", "acc_norm", 2, marks=pytest.mark.slow),
        pytest.param(LAST_WORD, "task_acc", "acc", None, marks=pytest.mark.slow),
        pytest.param(LAST_WORD, "task_margin", "perplexity", 2, marks=pytest.mark.slow),
    ],
)
def test_verdicts_are_lm_evals_own(task, utility, metric, num_fewshot, few_documents, tmp_path):
    """The bundled model on all documents of a task: calibration and held-out questions together."""
    sets = [full_model(), LayerSet("first", (0,)), LayerSet("some", (1, 2, 7, 8, 10, 11))]
    model = str(FOLDER / "model")
    tasks, num = (few_documents, 15) if task == CHOICE or num_fewshot else (TASKS, 100)
    config = config_from(
        task_run_values(
            tmp_path,
            model,
            task,
            utility,
            num_windows=num * 4 // 5,
            heldout_windows=num // 5,
            num_fewshot=num_fewshot,
            sizes=None,
            include_path=tasks,
        ),
        "test",
    )
    losses = []
    for sample in item_sets_of(config):
        with lpserve.open_engine(model, sample.windows) as engine:
            scores = engine.score(
                layer_set_masks(sets, layer_players(12)), extra_metrics=("misses",)
            )
        values = {k: scores.of(k).astype(np.float32) for k in ("nll", "misses")}
        losses.append(sample.losses(utility_named(utility), values))
    mean_M = np.concatenate(losses, axis=1).astype(np.float64).mean(axis=1)
    told = evaluate(
        EvalConfig(
            model=model,
            sets=tuple(sets[1:]),
            tasks=(task,),
            include_path=tasks,
            num_fewshot=num_fewshot,
            out=str(tmp_path / "eval"),
        )
    )
    wanted = np.array([told.value(s.name, f"{task} {metric}") for s in sets])
    got = np.exp(mean_M) if metric == "perplexity" else 1.0 - mean_M
    assert got == pytest.approx(wanted, rel=TOLERANCE)
    assert len(set(wanted.tolist())) > 1


@pytest.mark.thorough
@pytest.mark.parametrize(
    "utility",
    [
        "task_margin",
        *(pytest.param(u, marks=pytest.mark.slow) for u in ("task_acc", "task_margin_norm")),
    ],
)
def test_values_and_plan_are_about_the_questions(utility, small_model, tmp_path, capsys):
    task = LAST_WORD if utility == "task_margin" else CHOICE
    config = config_from(task_run_values(tmp_path, small_model, task, utility), "test")
    calibration, heldout = item_sets_of(config)
    loss, held = mean_losses(small_model, calibration, utility), {}
    if len(set(loss.values())) == 1:
        pytest.skip("the random model answers alike under every mask")
    held = mean_losses(small_model, heldout, utility)
    result = run(config)
    outcome = result.outcome
    assert len(outcome.scored.masks_MP) == 2**NUM_LAYERS
    expected = shapley_by_hand(loss, NUM_LAYERS)
    assert np.abs(outcome.analysis.values.values_P - expected).max() < TOLERANCE
    base = 1.0 if utility == "task_acc" else 0.0
    for entry in outcome.plan.plans:
        chosen = full_mask(NUM_LAYERS)
        chosen[entry.removed] = False
        key = keys(chosen[None])[0]
        sizes = [k for k in loss if key_text(k, NUM_LAYERS).count("0") == entry.num_removed]
        assert loss[key] <= min(loss[k] for k in sizes) + TOLERANCE
        assert entry.calibration_utility == pytest.approx(base - loss[key], abs=TOLERANCE)
        assert entry.heldout_utility == pytest.approx(base - held[key], abs=TOLERANCE)
        right = calibration.ppl_windows
        with lpserve.open_engine(small_model, right) as engine:
            ppl = engine.score(chosen[None]).perplexity_M()[0]
        assert entry.calibration_ppl == pytest.approx(ppl, rel=TOLERANCE)
        for other in entry.candidates[1:]:
            mask_P = full_mask(NUM_LAYERS)
            mask_P[other.removed] = False
            gap = held[keys(mask_P[None])[0]] - held[key]
            assert other.heldout_delta == pytest.approx(gap, abs=2 * TOLERANCE)
    again = read_record(result.folder)
    assert np.array_equal(again.loss_MI, outcome.scored.loss_MI)
    assert main(["plan", str(result.folder), "--max-removed", "2"]) == 0
    printed = capsys.readouterr().out
    assert utility in printed
    assert "perplexity of right answers" in printed
    page = (result.folder / "report.html").read_text()
    assert f"calibration {utility}" in page
    assert "questions" in page
    assert f"{outcome.plan.plans[0].calibration_utility:.4g}" in page


def mean_losses(model: str, sample: ItemSet, utility: str) -> dict[bytes, float]:
    masks_MP = all_masks(NUM_LAYERS)
    with lpserve.open_engine(model, sample.windows) as engine:
        scores = engine.score(masks_MP, extra_metrics=("misses",))
    values = {k: scores.of(k).astype(np.float32) for k in ("nll", "misses")}
    mean_M = sample.losses(utility_named(utility), values).astype(np.float64).mean(axis=1)
    return dict(zip(keys(masks_MP), mean_M.tolist(), strict=True))


@pytest.mark.slow
def test_a_run_of_a_task_resumes_extends_and_exports(small_model, tmp_path, capsys):
    tasks = tmp_path / "tasks"
    shutil.copytree(TASKS, tasks)
    values = task_run_values(
        tmp_path, small_model, CHOICE, "task_margin", budget=30, sizes=None, include_path=str(tasks)
    )
    run(config_from(values, "test"))
    before = stored_scores(tmp_path / "run" / "scores.sqlite")
    result = run(config_from(values | {"budget": 45}, "test"))
    after = stored_scores(tmp_path / "run" / "scores.sqlite")
    assert before.items() <= after.items()
    once = run(config_from(values | {"budget": 45, "out": str(tmp_path / "once")}, "test"))
    assert once.outcome.plan.plans == result.outcome.plan.plans
    assert run(config_from(values | {"budget": 45}, "test")).scores_new == 0
    out = tmp_path / "pruned"
    assert main(["export", str(result.folder), "--remove", "2", "--out", str(out)]) == 0
    assert "on 8 calibration windows" in capsys.readouterr().out
    with np.load(result.folder / "windows.npz") as stored:
        calibration, _ = item_sets_of(config_from(values, "test"))
        assert calibration.questions is not None
        assert np.array_equal(stored["answer_tokens"], calibration.windows.tokens_NT)
        assert np.array_equal(stored["answers"], calibration.questions.answers)
        assert np.array_equal(stored["right"], calibration.questions.is_right)
    path = tasks / "continuation.jsonl"
    documents = [json.loads(line) for line in path.read_text().split("\n") if line]
    for document in documents:
        document["gold"] = (document["gold"] + 1) % 4  # the same windows, other right answers
    path.write_text("\n".join(json.dumps(document) for document in documents))
    with pytest.raises(InputError, match="the calibration text has changed"):
        run(config_from(values | {"budget": 45}, "test"))


@pytest.mark.thorough
def test_few_questions_may_screen_sets(small_model, tmp_path):
    values = task_run_values(
        tmp_path,
        small_model,
        CHOICE,
        "task_margin",
        screen_windows=3,
        budget=50,
        sizes=None,
        max_removed=4,
    )
    # a run may end with every set that it screened scored whole: of 40 random models none did, one
    # left two such sets; another seed then
    for seed in range(4):
        values |= {"seed": seed, "out": str(tmp_path / f"run-{seed}")}
        scored = run(config_from(values, "test")).outcome.scored
        screened_M = scored.screened_M()
        if screened_M.any():
            break
    else:
        pytest.fail("no run left a screened set")
    assert scored.screen == (0, 1, 2)
    for row in np.flatnonzero(screened_M):
        assert np.isfinite(scored.loss_MI[row, :3]).all()
        assert np.isnan(scored.loss_MI[row, 3:]).all()
    whole_M = np.isfinite(scored.loss_MI).all(axis=1)
    assert (whole_M | screened_M).all()
    # and the store holds no score of the other questions' windows
    calibration, _ = item_sets_of(config_from(values, "test"))
    hashes = np.array(calibration.windows.window_hashes)
    on_screen = set(hashes[calibration.window_rows([0, 1, 2])])
    stored = stored_scores(Path(values["out"]) / "scores.sqlite")
    mine = set(hashes)
    for key in keys(scored.masks_MP[screened_M]):
        assert {window for k, window in stored if k == key and window in mine} == on_screen


def test_more_questions_contain_fewer_and_sides_never_meet(small_model, tmp_path, rng):
    seed = int(rng.integers(1000))
    values = task_run_values(tmp_path, small_model, CHOICE, "task_margin", window_seed=seed)
    few, held_few = item_sets_of(config_from(values, "test"))
    more, held = item_sets_of(config_from(values | {"num_windows": 40, "heldout_windows": 20}, "x"))
    assert few.content_hash == more.first(8).content_hash
    assert held_few.content_hash == held.first(5).content_hash
    hashes = [set(s.windows.window_hashes) for s in (more, held)]
    assert not hashes[0] & hashes[1]
    other, _ = item_sets_of(config_from(values | {"window_seed": seed + 1}, "test"))
    assert other.content_hash != few.content_hash
    both = values | {"calibration": {"a": f"task:{CHOICE}", "b": f"task:{LAST_WORD}"}}
    mixed, _ = item_sets_of(config_from(both, "test"))
    assert mixed.corpora == (("a", 8), ("b", 8))
    text = values | {"calibration": f"task:{LAST_WORD}", "heldout": str(FOLDER / "calibration.txt")}
    _, of_text = item_sets_of(config_from(text, "test"))
    assert of_text.questions is None
    assert of_text.num_items == 5


# -- tasks of other kinds ------------------------------------------------------------------------

DOCUMENTS = '''
import datasets

def made(**_):
    return {"test": datasets.Dataset.from_list(%r)}

def contrary(doc, results):
    """Right where the least likely answer is."""
    told = [r[0] for r in results]
    return {"acc": float(told.index(min(told)) == doc["gold"])}

def wide(doc, results):
    """Right only where the answer is likelier by a wide margin."""
    told = sorted((r[0], i) for i, r in enumerate(results))
    return {"acc": float(told[-1][1] == doc["gold"] and told[-1][0] - told[-2][0] > 0.05)}
'''


def own_task(folder: Path, documents: list[dict], **config) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "made_documents.py").write_text(DOCUMENTS % documents)
    given = {
        "task": "made",
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    } | config
    lines = yaml.safe_dump({k: v for k, v in given.items() if not str(v).startswith("!")})
    lines += "custom_dataset: !function made_documents.made\n"
    lines += "".join(f"{k}: {v}\n" for k, v in given.items() if str(v).startswith("!"))
    (folder / "made.yaml").write_text(lines)
    return str(folder)


def made_documents(rng, gold) -> list[dict]:
    words = (FOLDER / "heldout.txt").read_text().split()
    found = []
    for _ in range(30):
        start = int(rng.integers(1000, len(words) - 100))
        choices = [
            " ".join(words[start + 20 + 5 * c :][: int(rng.integers(1, 5))]) for c in range(4)
        ]
        found.append(
            {
                "context": " ".join(words[start : start + 15]),
                "choices": choices,
                "gold": gold(rng),
                "answer": words[start + 60],
            }
        )
    return found


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind",
    slow_but(("several right", "several contexts", "mutual information"), "mutual information"),
)
def test_tasks_of_other_kinds_are_judged_as_lm_eval_does(kind, small_model, tmp_path, rng):
    changes: dict = {}
    gold = lambda rng: int(rng.integers(4))  # noqa: E731
    if kind == "several right":
        gold = lambda rng: sorted(rng.choice(4, 2, replace=False).tolist())  # noqa: E731
    if kind == "several contexts":
        # as Winogrande: the answer is the same, what it is read after differs
        changes = {"doc_to_text": "gold", "doc_to_target": "answer", "doc_to_choice": "choices"}
    if kind == "mutual information":
        changes = {"metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]}
    tasks = own_task(tmp_path / "own", made_documents(rng, gold), **changes)
    values = task_run_values(
        tmp_path,
        small_model,
        "made",
        "task_acc",
        include_path=tasks,
        num_windows=24,
        heldout_windows=6,
    )
    sides = item_sets_of(config_from(values, "test"))
    sets = [
        full_model(),
        LayerSet("one", (2,)),
        LayerSet("two", (1, 4)),
        LayerSet("most", (0, 3, 5)),
    ]
    losses = []
    for sample in sides:
        with lpserve.open_engine(small_model, sample.windows) as engine:
            nll_MN = engine.score(layer_set_masks(sets, layer_players(NUM_LAYERS))).nll_MN.astype(
                np.float32
            )
        assert len(np.unique(nll_MN, axis=0)) == len(sets)  # the sets are told apart
        values = {"nll": nll_MN, "misses": np.zeros_like(nll_MN)}
        losses.append(sample.losses(UTILITIES["task_acc"], values))
    mean_M = np.concatenate(losses, axis=1).astype(np.float64).mean(axis=1)
    told = evaluate(
        EvalConfig(
            model=small_model,
            sets=tuple(sets[1:]),
            tasks=("made",),
            include_path=tasks,
            out=str(tmp_path / "eval"),
        )
    )
    wanted = [told.value(s.name, "made acc") for s in sets]
    assert 1.0 - mean_M == pytest.approx(wanted)


def test_questions_are_known_by_themselves_and_not_by_how_wide_others_are(rng):
    questions, _ = some_questions(rng)
    narrow = np.flatnonzero((questions.answers >= 0).sum(axis=1) <= 3)[:4]
    part = questions.select(narrow)
    trimmed = replace(
        part,
        answers=part.answers[:, :3],
        is_right=part.is_right[:, :3],
        chars=part.chars[:, :3],
    )
    assert trimmed.content_hash == part.content_hash
    other = replace(part, is_right=np.roll(part.is_right, 1, axis=0))
    assert other.content_hash != part.content_hash or (part.is_right == other.is_right).all()


@pytest.mark.slow
def test_a_study_of_questions_of_all_widths_grows(small_model, tmp_path, rng):
    from lpserve.study.parse import study_of
    from lpserve.study.sweep import sweep

    documents = made_documents(rng, lambda rng: int(rng.integers(2)))
    for document in documents:
        document["choices"] = document["choices"][: int(rng.integers(2, 5))]
    tasks = own_task(tmp_path / "own", documents)
    values = task_run_values(
        tmp_path,
        small_model,
        "made",
        "task_margin",
        include_path=tasks,
        budget=30,
        sizes=None,
        max_removed=2,
        heldout_windows=4,
        masks="own",
        calibration={"made": "task:made"},
        sweep={"num_windows": [3, 4], "window_seed": [0, 1]},
        out=str(tmp_path / "study"),
    )
    first = sweep(study_of(values, "test"))
    assert [run.failed for run in first.runs] == [""] * 4
    assert first.scores_twice == 0
    more = values | {"sweep": {"num_windows": [3, 4, 20], "window_seed": [0, 1]}}
    second = sweep(study_of(more, "test"))
    assert [run.failed for run in second.runs] == [""] * 6
    again = {run.point.id: run for run in second.runs}
    for known in first.runs:
        assert again[known.point.id].seconds == known.seconds  # read, not made again


def test_examples_never_tell_what_is_held_out(small_model, tmp_path, rng):
    documents = made_documents(rng, lambda rng: int(rng.integers(4)))
    tasks = own_task(tmp_path / "own", documents + documents)
    values = task_run_values(
        tmp_path,
        small_model,
        "made",
        "task_acc",
        include_path=tasks,
        num_windows=24,
        heldout_windows=6,
    )
    with pytest.raises(InputError, match="so that none could be held out"):
        item_sets_of(config_from(values | {"num_fewshot": 2}, "test"))
    path = tmp_path / "own" / "made_documents.py"
    path.write_text(
        path.read_text().replace(
            'return {"test": datasets',
            'return {"train": datasets.Dataset.from_list('
            '[{"context": "one", "choices": ["a", "b"], "gold": 0, "answer": "c"}] * 5), '
            '"test": datasets',
        )
    )
    path = tmp_path / "own" / "made.yaml"
    path.write_text(path.read_text() + "training_split: train\n")
    sides = item_sets_of(config_from(values | {"num_fewshot": 2}, "test"))
    # every document is there twice, after other examples: each is asked once
    scored = [
        {
            w[n - 12 : n].tobytes()
            for w, n in zip(s.windows.tokens_NT, s.windows.lengths_N, strict=True)
        }
        for s in sides
    ]
    assert sum(s.num_items for s in sides) == 30
    assert not scored[0] & scored[1]
    with pytest.raises(InputError, match="'made' cannot be asked: "):
        item_sets_of(config_from(values | {"num_fewshot": 6}, "test"))


def test_what_one_seed_holds_out_no_other_calibrates_on(small_model, tmp_path):
    values = task_run_values(
        tmp_path, small_model, CHOICE, "task_acc", num_windows=80, heldout_windows=20
    )
    sides = [item_sets_of(config_from(values | {"window_seed": s}, "test")) for s in (0, 1)]
    sets = [[set(s.windows.window_hashes) for s in both] for both in sides]
    assert sets[0] == sets[1]


@pytest.mark.thorough
def test_a_mask_without_a_score_of_a_wrong_answer_is_not_read_again(small_model, tmp_path):
    """A study whose leader was given up on one window of a wrong answer."""
    from lpserve.runner.run import run_at

    config = config_from(
        task_run_values(tmp_path, small_model, CHOICE, "task_margin", budget=40, sizes=None), "test"
    )
    result = run(config)
    scored = result.outcome.scored
    loss_MI = scored.loss_MI.copy()
    loss_MI[5, 3] = np.nan  # the right answers' NLLs are all there
    with sqlite3.connect(tmp_path / "run" / "scores.sqlite") as db:
        db.execute("DELETE FROM scores WHERE mask = ?", (keys(scored.masks_MP)[5],))
    follower = replace(config, seed=1, out=str(tmp_path / "follower"))
    samples = item_sets_of(config)
    store = tmp_path / "run" / "scores.sqlite"
    with closing(ScoringSession(config, samples[0].windows, store=store)) as session:
        told = run_at(
            check_model(follower),
            samples,
            session,
            masks_of=replace(scored, loss_MI=loss_MI),
        )
    assert np.isnan(told.outcome.scored.loss_MI[5]).any()


@pytest.mark.slow
def test_shares_of_a_margin_are_for_each_token(small_model, tmp_path):
    """A task without choices is a text whose scored tokens are the answers': of the same windows,
    the draws of questions and of windows tell alike."""
    values = task_run_values(tmp_path, small_model, LAST_WORD, "task_margin", num_windows=12)
    calibration, heldout = item_sets_of(config_from(values, "test"))
    for name, sample in (("calibration", calibration), ("heldout", heldout)):
        np.savez(
            tmp_path / f"{name}.npz",
            tokens=sample.windows.tokens_NT,
            scored=sample.windows.scored_NT,
        )
    plain = {k: v for k, v in values.items() if k != "include_path"}
    text = run(
        config_from(
            plain
            | {
                "utility": "neg_nll",
                "calibration": str(tmp_path / "calibration.npz"),
                "heldout": str(tmp_path / "heldout.npz"),
                "out": str(tmp_path / "text"),
            },
            "test",
        )
    ).outcome.plan
    task = run(config_from(values, "test")).outcome.plan
    for mine, theirs in zip(task.plans, text.plans, strict=True):
        assert mine.stability is not None
        assert theirs.stability is not None
        assert mine.stability["regret"] < 3 * theirs.stability["regret"] + 0.05


def test_a_question_that_comes_twice_is_asked_once(small_model, tmp_path, rng):
    documents = made_documents(rng, lambda rng: int(rng.integers(4)))
    tasks = own_task(tmp_path / "own", documents + documents[:10])
    values = task_run_values(
        tmp_path,
        small_model,
        "made",
        "task_acc",
        include_path=tasks,
        num_windows=24,
        heldout_windows=6,
    )
    sample, heldout = item_sets_of(config_from(values, "test"))
    # two choices of one question may be the same word: one window
    different = {
        (document["context"], choice) for document in documents for choice in document["choices"]
    }
    assert sample.windows.num_windows + heldout.windows.num_windows == len(different)
    with pytest.raises(InputError, match="too few questions: 24 different ones, 25 are asked for"):
        item_sets_of(config_from(values | {"num_windows": 25}, "test"))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param(
            {"calibration": "task:dracula_continuaton"},
            "did you mean 'dracula_continuation'?",
            marks=pytest.mark.slow,
        ),
        ({"include_path": "nowhere"}, "task folder nowhere does not exist"),
        ({"utility": "neg_nll"}, "is a task, utility neg_nll is about texts"),
        ({"calibration": str(FOLDER / "calibration.txt")}, "is about tasks, calibration 'calibra"),
        ({"utility": "task_f1"}, "task_acc, task_acc_norm, task_margin, task_margin_norm: got"),
        ({"num_windows": 81}, "too few questions: 80 different ones, 81 are asked for"),
        ({"heldout_windows": 21}, "too few questions: 20 different ones held out, 21"),
        ({"heldout": {"a": f"task:{LAST_WORD}", "b": __file__}}, "held-out 'a' is a task beside"),
        ({"calibration": f"task:{LAST_WORD}", "utility": "task_acc_norm"}, "open-ended"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number, at least 0"),
        ({"screen_windows": 8}, "screen_windows must be below the number of windows"),
        ({"length": 64}, "length is about texts, and there are tasks alone"),
        ({"bos": True}, "bos is about texts, and there are tasks alone"),
        ({"calibration": {"a": f"task:{CHOICE}", "b": f"task:{CHOICE}"}}, "'a' and 'b' both hold"),
    ],
)
def test_bad_input_is_one_line_before_any_engine(
    changes, said, small_model, tmp_path, no_engine, capsys
):
    values = task_run_values(tmp_path, small_model, CHOICE, "task_acc") | changes
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["run", "--config", str(path)]) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed
    assert "\n" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", ["contrary", "wide"])
def test_a_task_with_a_rule_of_its_own_is_refused(rule, small_model, tmp_path, rng):
    documents = made_documents(rng, lambda rng: int(rng.integers(4)))
    tasks = own_task(
        tmp_path / "own", documents, process_results=f"!function made_documents.{rule}"
    )
    values = task_run_values(tmp_path, small_model, "made", "task_acc", include_path=tasks)
    with pytest.raises(InputError, match="task 'made'"):
        item_sets_of(config_from(values, "test"))


def test_examples_are_about_tasks(tmp_path, small_model):
    values = task_run_values(
        tmp_path,
        small_model,
        CHOICE,
        "neg_nll",
        num_fewshot=1,
        calibration=str(FOLDER / "calibration.txt"),
    )
    del values["include_path"]
    with pytest.raises(InputError, match="num_fewshot is about tasks, and there are texts"):
        run(config_from(values, "test"))


def test_a_task_that_generates_is_refused(small_model, tmp_path, rng):
    documents = made_documents(rng, lambda rng: "word")
    tasks = own_task(
        tmp_path / "own",
        documents,
        output_type="generate_until",
        metric_list=[{"metric": "exact_match"}],
    )
    values = task_run_values(tmp_path, small_model, "made", "task_acc", include_path=tasks)
    with pytest.raises(InputError, match="is of kind 'generate_until'"):
        item_sets_of(config_from(values, "test"))


def test_rivals_are_not_compared_on_tasks(small_model, tmp_path, capsys):
    told = main(
        [
            "baselines",
            "--model",
            small_model,
            "--calibration",
            f"task:{CHOICE}",
            "--out",
            str(tmp_path / "b"),
        ]
    )
    assert told == 2
    assert "only lpserve run and lpserve sweep take tasks" in capsys.readouterr().err


# -- studies -------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_study_of_tasks_scores_everything_once(small_model, tmp_path):
    from lpserve.study.output import write_sweep
    from lpserve.study.parse import study_of
    from lpserve.study.sweep import sweep

    values = task_run_values(
        tmp_path,
        small_model,
        CHOICE,
        "task_acc",
        budget=40,
        sizes=None,
        max_removed=2,
        heldout_windows=4,
        out=str(tmp_path / "study"),
        calibration={"choice": f"task:{CHOICE}", "word": f"task:{LAST_WORD}"},
        sweep={
            "calibration": {"choice": ["choice"], "both": ["choice", "word"]},
            "num_windows": [3, 5],
            "utility": ["task_acc", "task_margin"],
            "seed": [0, 1],
        },
    )
    result = sweep(study_of(values, "test"))
    assert not result.failed
    assert len(result.points) == 16
    assert result.scores_twice == 0
    assert result.scores_new == result.scores_held
    write_sweep(result)
    with (tmp_path / "study" / "sets.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        plan = json.loads((tmp_path / "study" / "points" / row["point"] / "plan.json").read_text())
        entry = plan["plans"][int(row["num_removed"]) - 1]
        assert float(row["calibration_utility"]) == entry["calibration_utility"]
        assert float(row["heldout_utility"]) == entry["heldout_utility"]
    # a point's answers are those of the scores of its own questions
    point = next(p for p in result.points if p.masks_of != p.point.id)
    scored = read_record(point.folder)
    calibration, _ = item_sets_of(point.point.config)
    assert scored.corpora == calibration.corpora
    with lpserve.open_engine(small_model, calibration.windows) as engine:
        scores = engine.score(scored.masks_MP, extra_metrics=("misses",))
    told = {k: scores.of(k).astype(np.float32) for k in ("nll", "misses")}
    loss_MQ = calibration.losses(scored.view.utility, told)
    mine, theirs = (
        utility_named(scored.utility).of(l_MQ.astype(np.float64), scored.view.weight_I, l_MQ[0])
        for l_MQ in (loss_MQ, scored.loss_MI)
    )
    assert mine == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.thorough
def test_a_study_may_hold_texts_beside_tasks_with_a_text_held_out(small_model, tmp_path):
    from lpserve.study.parse import study_of
    from lpserve.study.sweep import sweep
    from lpserve.study.windows import all_windows

    values = task_run_values(
        tmp_path,
        small_model,
        CHOICE,
        "task_acc",
        budget=30,
        sizes=None,
        max_removed=2,
        heldout_windows=4,
        num_windows=3,
        length=24,
        out=str(tmp_path / "study"),
        calibration={"choice": f"task:{CHOICE}", "text": str(FOLDER / "calibration.txt")},
        sweep=[
            {"calibration": {"choice": ["choice"]}, "utility": ["task_margin"]},
            {"calibration": {"text": ["text"]}, "utility": ["neg_nll", "neg_kl"]},
        ],
    )
    with pytest.raises(InputError, match="name a held-out text"):
        all_windows(study_of(values, "test"))
    (tmp_path / "held.txt").write_text((FOLDER / "heldout.txt").read_text()[:20000])
    study = study_of(values | {"heldout": str(tmp_path / "held.txt")}, "test")
    assert len(study.families()) == 2
    result = sweep(study)
    assert [run.failed for run in result.runs] == ["", "", ""]
    assert result.scores_twice == 0
    for finished in result.points:
        plan = lpserve.load_plan(finished.folder / "plan.json")
        assert plan.full_heldout_ppl is not None
        known = plan.full_heldout_utility is not None
        assert known == (finished.point.config.utility != "task_margin")
