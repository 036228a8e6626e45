"""Sets of layers evaluated without exporting, against lm-eval's own model on the export.

Log-likelihoods within 1e-4 (float32; a continuation is some ten terms, rounding is worth 1e-5 of
them), picks equal.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from typing import Any, cast

import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import lpserve
from lpserve.cli.entry import main
from lpserve.config import EngineConfig
from lpserve.data.protocols import PROTOCOLS, Protocol
from lpserve.data.tokenizer import load_tokenizer
from lpserve.data.windows import TokenWindows
from lpserve.demo import FOLDER
from lpserve.errors import InputError
from lpserve.evaluation.evaluate import evaluate, sets_from
from lpserve.evaluation.lm_eval_model import SetsLM, max_input_length
from lpserve.evaluation.settings import EvalConfig
from lpserve.model.players import layer_players
from lpserve.plan.layer_sets import LayerSet, full_model, layer_set_masks
from lpserve.scoring.session import ScoringSession
from lpserve.testing.reference import window_nll
from lpserve.testing.runs import plan_of_another_model

pytestmark = pytest.mark.process

MODEL = str(FOLDER / "model")
TASKS = ("dracula_continuation", "dracula_last_word")
REMOVED = (2, 7, 8)
TOLERANCE = 1e-4
MAX_LENGTH = 96


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The bundled model without three layers, and lm-eval's own model of it."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    lpserve.export_checkpoint(MODEL, removed=list(REMOVED), out=folder)
    return folder, cast("Any", HFLM)(
        pretrained=str(folder), dtype="float32", device="cpu", batch_size=1, max_length=MAX_LENGTH
    )


@pytest.fixture
def lm(tmp_path):
    """Ours, for the full model, that set, and another."""
    sets = [full_model(), LayerSet("three", REMOVED), LayerSet("first", (0,))]
    probe = TokenWindows.from_tokens(np.array([[0, 1]]))
    config = EngineConfig(model=MODEL)
    with ScoringSession(
        config, probe, store=tmp_path / "s.sqlite", holder="a test", longest=MAX_LENGTH + 1
    ) as session:
        lm = SetsLM(
            session,
            load_tokenizer(MODEL),
            layer_set_masks(sets, layer_players(12)),
            max_length=MAX_LENGTH,
        )
        lm.current = 1
        yield lm


def requests(kind: Any, arguments: list[tuple]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]


def some_pairs(rng) -> list[tuple[str, str]]:
    """Contexts and continuations: short, long beyond what the model is given, empty, repeated."""
    words = (FOLDER / "heldout.txt").read_text().split()
    pairs = []
    for num_context in [0, 0, 1, 3, 20, 60, 150, *rng.integers(5, 40, 8).tolist()]:
        start = int(rng.integers(1000, len(words) - 300))
        context = " ".join(words[start : start + num_context])
        more = words[start + num_context :][: int(rng.integers(1, 6))]
        pairs.append((context, (" " if num_context else "") + " ".join(more)))
    pairs.append((pairs[5][0] + " ", pairs[5][1].strip()))  # a space that belongs to what follows
    return [*pairs, pairs[4], pairs[3]]


def test_loglikelihoods_are_those_of_lm_evals_own_model(lm, pruned, rng):
    pairs = some_pairs(rng)
    theirs = pruned[1].loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    ours = lm.loglikelihood(requests("loglikelihood", pairs))
    for (got, greedy), (wanted, wanted_greedy) in zip(ours, theirs, strict=True):
        assert got == pytest.approx(wanted, rel=TOLERANCE)
        assert greedy == wanted_greedy
    under = zip(*_under(lm, (0, 2), pairs), strict=True)
    assert all(abs(a[0] - b[0]) > 100 * TOLERANCE for a, b in under)  # sets matter


def _under(lm, rows, pairs):
    found = []
    for row in rows:
        lm.current = row
        found.append(lm.loglikelihood(requests("loglikelihood", pairs)))
    return found


def test_rolling_loglikelihoods_are_those_of_lm_evals_own_model(lm, pruned, rng):
    words = (FOLDER / "heldout.txt").read_text().split()
    texts = []
    for count in (1, 40, 300):  # 300 words are several windows
        start = int(rng.integers(1000, len(words) - 400))
        texts.append((" ".join(words[start : start + count]),))
    theirs = pruned[1].loglikelihood_rolling(requests("loglikelihood_rolling", texts), True)
    ours = lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts), True)
    assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_greedy_is_seen(lm):
    """A continuation that the model would choose itself, token by token."""
    tokens = lm.tok_encode("It was a dark night, and the wind")
    model = lm._session.pool._engine._model
    import torch

    with torch.inference_mode():
        ids = torch.tensor([tokens])
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    chosen = ids[0, len(tokens) :].tolist()
    lm.current = 0
    other = [*chosen[:-1], (chosen[-1] + 1) % 4096]
    answers = lm._loglikelihood_tokens([(None, tokens, chosen), (None, tokens, other)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_tasks_pick_as_with_lm_evals_own_model(pruned, tmp_path):
    config = EvalConfig(
        model=MODEL,
        sets=(LayerSet("three", REMOVED),),
        tasks=TASKS,
        limit=30,
        include_path=str(FOLDER / "tasks"),
        max_length=MAX_LENGTH,
        out=str(tmp_path / "eval"),
    )
    ours = evaluate(config)
    found: Any = cast("Any", simple_evaluate)(
        pruned[1],
        tasks=list(TASKS),
        limit=30,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(FOLDER / "tasks"), include_defaults=False),
    )
    for task in TASKS:
        for name in ("acc", "acc_norm", "perplexity"):
            wanted = found["results"][task].get(f"{name},none")
            if wanted is None:
                continue
            got = ours.value("three", f"{task} {name}")
            if name == "perplexity":
                assert got == pytest.approx(wanted, rel=TOLERANCE)
            else:
                assert got == wanted
    assert ours.value("three", f"{TASKS[0]} acc") != ours.value("all layers", f"{TASKS[1]} acc")
    rows = (tmp_path / "eval" / "results.csv").read_text().splitlines()
    assert rows[0] == "set,removed,measure,value,stderr"
    assert len(rows) == 1 + len(ours.results) == 1 + 2 * 4
    # again, with one set more: only that is scored
    again = evaluate(
        config.__class__(**{**config.__dict__, "sets": (*config.sets, LayerSet("first", (0,)))})
    )
    assert (again.masks_scored, again.masks_read) == (1, 2)
    assert [r for r in again.results if r.layer_set != "first"] == list(ours.results)


def test_requests_that_lose_their_beginning_are_told(tmp_path, capsys):
    """Contexts of the bundled tasks have 50 words and more: none is asked whole in 24 tokens."""
    values = {
        "model": MODEL,
        "sets": (LayerSet("three", REMOVED),),
        "tasks": TASKS[1:],
        "limit": 3,
        "include_path": str(FOLDER / "tasks"),
    }
    short = evaluate(EvalConfig(**values, max_length=24, out=str(tmp_path / "short")))
    assert short.requests_cut == 3
    told = capsys.readouterr().err
    assert told.count("3 requests are longer than 24 tokens and lost their beginning") == 1
    assert json.loads((tmp_path / "short" / "results.json").read_text())["requests_cut"] == 3
    whole = evaluate(EvalConfig(**values, out=str(tmp_path / "whole")))
    assert whole.requests_cut == 0
    assert "lost their beginning" not in capsys.readouterr().err


@pytest.fixture
def short_text(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text((FOLDER / "heldout.txt").read_text()[20000:32000])
    return str(path)


def test_perplexity_of_a_set_is_that_of_its_export(pruned, short_text, tmp_path):
    protocol = Protocol(length=100, stride=60, bos="none")
    sets = tuple(LayerSet(str(r), r) for r in ((0,), REMOVED, (1, 2, 3, 4)))
    config = EvalConfig(
        model=MODEL,
        sets=sets,
        texts={"novel": short_text},
        protocol=protocol,
        out=str(tmp_path / "all"),
    )
    together = evaluate(config)
    exported = evaluate(
        EvalConfig(
            model=str(pruned[0]),
            texts={"novel": short_text},
            protocol=protocol,
            out=str(tmp_path / "exported"),
        )
    )
    assert together.value(str(REMOVED), "ppl novel") == pytest.approx(
        exported.value("model", "ppl novel"), rel=1e-5
    )
    assert together.layer_forwards < together.skip_layer_forwards
    about = json.loads((tmp_path / "all" / "results.json").read_text())
    assert about["protocols"]["novel"].startswith("windows of 100 tokens, stride 60, no BOS: ")
    assert about["engine"]["path"].startswith("transformers/")
    from transformers import AutoModelForCausalLM

    from lpserve.data.protocols import protocol_windows

    cut = protocol_windows(short_text, load_tokenizer(MODEL), protocol, name="novel")
    model = AutoModelForCausalLM.from_pretrained(pruned[0], dtype="float32").eval()
    nll = window_nll(model, cut.windows.tokens_NT, cut.windows.scored_NT)
    by_hand = math.exp(nll.sum() / cut.windows.num_tokens_N.sum())
    assert together.value(str(REMOVED), "ppl novel") == pytest.approx(by_hand, rel=1e-5)


def test_evaluations_in_one_folder_add_up(pruned, short_text, tmp_path):
    """Figures of other sets stay; an export has its own name; another model's do not stay."""

    def results(model: str, removed: tuple[int, ...], out: str = "a") -> list[str]:
        sets = (LayerSet("mine", removed),) if removed else ()
        evaluate(
            EvalConfig(
                model=model,
                sets=sets,
                texts={"t": short_text},
                protocol=Protocol(length=100, stride=100, bos="none"),
                out=str(tmp_path / out),
            )
        )
        lines = (tmp_path / out / "results.csv").read_text().splitlines()[1:]
        return [",".join(line.split(",")[:3]) for line in lines]

    assert results(MODEL, (3,)) == ["all layers,,ppl t", "mine,3,ppl t"]
    assert results(MODEL, (4,)) == ["all layers,,ppl t", "mine,3,ppl t", "mine,4,ppl t"]
    assert results(MODEL, (3,)) == ["all layers,,ppl t", "mine,3,ppl t", "mine,4,ppl t"]
    assert results(str(pruned[0]), ()) == ["model,,ppl t"]
    (tmp_path / "a" / "results.json").write_text("[]")
    with pytest.raises(InputError, match="holds no JSON object"):
        results(MODEL, (3,))


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on(short_text, tmp_path):
    """SIGKILL once something is stored, SIGINT once more is, then to the end. There are several
    units of work: masks go to an engine sixteen together."""
    out = tmp_path / "eval"
    pairs = list(combinations(range(12), 2))
    count = 1 + len(pairs)
    command = [
        sys.executable,
        "-m",
        "lpserve",
        "eval",
        "--model",
        MODEL,
        "--text",
        short_text,
        "--protocol",
        "llm-pruner-128",
        "--out",
        str(out),
        "--progress-s",
        "0.2",
        *(f for i, j in pairs for f in ("--removed", f"{i},{j}")),
    ]

    def stored() -> int:
        import sqlite3

        try:
            with sqlite3.connect(f"file:{out / 'scores.sqlite'}?mode=ro", uri=True) as db:
                return db.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
        except sqlite3.Error:
            return 0

    before = 0
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while stored() <= before and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        _, error = process.communicate()
        assert process.returncode == code, error
        before = stored()
    assert before < count
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{count - before} masks scored, {before} read from the store" in done.stdout
    sets = tuple(LayerSet(f"-{i},{j}", (i, j)) for i, j in pairs)
    config = EvalConfig(
        model=MODEL,
        sets=sets,
        texts={"short": short_text},
        out=str(tmp_path / "fresh"),
        protocol=PROTOCOLS["llm-pruner-128"],
    )
    evaluate(config)
    undisturbed = (tmp_path / "fresh" / "results.csv").read_text()
    assert undisturbed == (out / "results.csv").read_text()


@pytest.mark.slow  # half a minute of imports
def test_lm_evals_command_line_knows_the_model(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lpserve",
            "lm-eval",
            "run",
            "--model",
            "lpserve",
            "--model_args",
            f"model={MODEL},removed=2+7+8,store={tmp_path / 's.sqlite'}",
            "--tasks",
            "dracula_continuation",
            "--include_path",
            str(FOLDER / "tasks"),
            "--limit",
            "4",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dracula_continuation" in done.stdout
    assert "acc_norm" in done.stdout


def test_a_set_without_finite_scores_is_left_out_and_said(
    short_text, tmp_path, monkeypatch, capsys
):
    """One set whose scores are NaN: the others keep their figures."""
    from lpserve.engine.hf.engine import TransformersEngine

    original = TransformersEngine.score

    def score(self, masks_MP, *args, **kwargs):
        scores = original(self, masks_MP, *args, **kwargs)
        scores.nll_MN[~masks_MP[:, 3]] = np.nan
        return scores

    monkeypatch.setattr(TransformersEngine, "score", score)
    config = EvalConfig(
        model=MODEL,
        sets=(LayerSet("bad", (3,)), LayerSet("good", (8,))),
        tasks=TASKS[:1],
        limit=4,
        texts={"novel": short_text},
        protocol=Protocol(length=64),
        out=str(tmp_path / "eval"),
        include_path=str(FOLDER / "tasks"),
    )
    found = evaluate(config)
    assert "bad: log-likelihoods of requests are not finite" in capsys.readouterr().err
    measured = {(r.layer_set, r.measure) for r in found.results}
    assert ("good", f"{TASKS[0]} acc") in measured
    assert ("bad", f"{TASKS[0]} acc") not in measured
    assert math.isnan(found.value("bad", "ppl novel"))
    assert math.isfinite(found.value("good", "ppl novel"))


def test_sets_come_from_plans_and_files(tmp_path, rng):
    engine = EngineConfig(model=MODEL)
    lists = tmp_path / "sets.txt"
    lists.write_text("theirs: 1,2\n5\n")
    assert sets_from([str(lists)], engine) == [LayerSet("theirs", (1, 2)), LayerSet("-5", (5,))]
    assert sets_from([str(lists)], engine, [2]) == [LayerSet("theirs", (1, 2))]
    with pytest.raises(InputError, match="has no set of 4 layers"):
        sets_from([str(lists)], engine, [4])


def test_a_model_is_given_one_token_less_than_it_has_positions():
    assert max_input_length(MODEL) == 511


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "nothing to evaluate"),
        (["--tasks", "dracula_continuatio"], "did you mean 'dracula_continuation'"),
        (["--text", "/no/such.txt"], "/no/such.txt does not exist"),
        (["--text", "{text}", "--protocol", "gptq"], "protocol must be one of"),
        (["--text", "{text}"], "windows of 2048 tokens are longer than the model's 512"),
        (["--text", "{text}", "--length", "64", "--stride", "65"], "stride must be 1..length"),
        (["--text", "{text}", "--length", "64", "--bos", "no"], "bos must be one of"),
        (["--text", "{text}", "--length", "64", "--removed", "12"], "--removed: layer 12 is not"),
        (["--text", "{text}", "--length", "64", "--mask", "01"], "is no mask of 12 layers"),
        (["--text", "{text}", "--length", "64", "--sets", "/no/plan.json"], "does not exist"),
        (["--tasks", "broken", "--include-path", "{tasks}"], "the data of tasks broken"),
        (
            ["--tasks", "writes", "--include-path", "{tasks}"],
            "task 'writes' generates text: text is",
        ),
        (["--tasks", "x", "--include-path", "/no/tasks"], "task folder /no/tasks does not exist"),
        (["--text", "{text}", "--length", "64", "--sets", "{plan}"], "for another model"),
    ],
)
def test_bad_input_is_one_line_before_any_engine(
    flags, reason, short_text, tmp_path, capsys, no_engine
):
    tasks = tmp_path / "tasks"
    shutil.copytree(FOLDER / "tasks", tasks)
    (tasks / "broken.yaml").write_text(
        "task: broken\ncustom_dataset: !function documents.nothing\noutput_type: loglikelihood\n"
        "test_split: test\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    (tasks / "writes.yaml").write_text(
        "task: writes\ncustom_dataset: !function documents.last_word\noutput_type: generate_until\n"
        "test_split: test\ndoc_to_text: context\ndoc_to_target: word\n"
    )
    plan = tmp_path / "plan.json"
    plan.write_text(plan_of_another_model())
    names = {"text": short_text, "tasks": str(tasks), "plan": str(plan)}
    include = [] if "--include-path" in flags else ["--include-path", str(tasks)]
    filled = [flag.format(**names) for flag in flags]
    code = main(["eval", "--model", MODEL, *filled, *include, "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2, lines
    assert reason in lines[-1]
    assert lines[-1].startswith("lpserve: ")
    assert not (tmp_path / "out").exists()


WRITES = """
task: writes
custom_dataset: !function documents.last_word
output_type: generate_until
test_split: test
doc_to_text: context
doc_to_target: "{{word}}"
generation_kwargs: {until: [",", "the"], max_gen_toks: 70, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.vllm
@pytest.mark.slow  # a start of vLLM, and three evaluations
def test_generated_texts_are_those_of_the_exported_checkpoint(pruned, tmp_path):
    """vLLM under masks against transformers' own generation: the same strings, stops and all."""
    tasks = tmp_path / "tasks"
    shutil.copytree(FOLDER / "tasks", tasks)
    (tasks / "writes.yaml").write_text(WRITES)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    _, theirs = pruned
    texts = {}
    sets = [full_model(), LayerSet("three", REMOVED)]
    probe = TokenWindows.from_tokens(np.array([[0, 1]]))
    config = EngineConfig(model=MODEL, engine="vllm")
    with ScoringSession(
        config, probe, store=tmp_path / "s.sqlite", holder="a test", longest=MAX_LENGTH + 1
    ) as session:
        ours = SetsLM(
            session,
            load_tokenizer(MODEL),
            layer_set_masks(sets, layer_players(12)),
            max_length=MAX_LENGTH,
        )
        for name, lm in (("whole", ours), ("three", ours), ("theirs", theirs)):
            ours.current = int(name == "three")
            found: Any = cast("Any", simple_evaluate)(
                lm, tasks=["writes"], task_manager=manager, limit=8, bootstrap_iters=0
            )
            samples = found["samples"]["writes"]
            texts[name] = [sample["resps"][0][0] for sample in samples]
        long = [Instance("generate_until", {}, ("a", {"until": [], "max_gen_toks": MAX_LENGTH}), 0)]
        with pytest.raises(InputError, match="the model reads"):
            ours.generate_until(long)
        drawn = [Instance("generate_until", {}, ("a", {"until": [], "temperature": 0.7}), 0)]
        with pytest.raises(InputError, match="asks for sampled text"):
            ours.generate_until(drawn)
    assert texts["three"] == texts["theirs"]
    assert texts["whole"] != texts["three"]
    assert len({len(text) for text in texts["three"]}) > 1  # stops were met at different places
    assert not any("," in text or "the" in text for text in texts["three"])


def test_what_cannot_generate_says_so(lm):
    request = Instance("generate_until", {}, ("Once", {"until": ["."], "max_gen_toks": 3}), 0)
    with pytest.raises(InputError, match="generated by vLLM in this process"):
        lm.generate_until([request])
