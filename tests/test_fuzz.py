"""Every reader of what people give, on changed inputs: an answer or one line, never a traceback.

Inputs that work are changed a little, as bytes and as values, and read again. Whatever comes of it,
a reader raises an error of lpserve's own alone, whose text is one line; it ends soon, takes little
memory, and opens none of the files outside its folder that the inputs name.

The gate draws the same inputs each time, so that a failure is a change; with
LPSERVE_FRESH_STATISTICS=1 many more are drawn, others each time, and their counts are printed.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from lpserve.analysis.record import read_record
from lpserve.config import config_from
from lpserve.data.text_files import read_text
from lpserve.data.tokenizer import load_tokenizer
from lpserve.data.windows import TokenStream, TokenWindows
from lpserve.demo import FOLDER
from lpserve.engine.hf.engine import TransformersEngine
from lpserve.errors import LpserveError
from lpserve.exhaustive.game import optima, read_exhaustive
from lpserve.exhaustive.score import exhaustive
from lpserve.export.outlook import export_outlook
from lpserve.inputs.config_file import load_config_file
from lpserve.model.architecture import check_decoder, find_layer_prefix, read_architecture
from lpserve.model.checkpoint import read_checkpoint
from lpserve.plan.plan import load_plan
from lpserve.plan.set_files import read_sets
from lpserve.runner.run import run
from lpserve.runner.setup import check_model
from lpserve.store.run_folder import read_run_config
from lpserve.store.store import Store
from lpserve.store.tables import export_scores, import_scores
from lpserve.study.parse import study_of
from lpserve.testing.checkpoints import TEXT, write_gguf
from lpserve.testing.runs import exhaustive_config, make_config, write_texts
from lpserve.types import EngineSpec

FRESH = os.environ.get("LPSERVE_FRESH_STATISTICS") == "1"
EXAMPLES = int(os.environ.get("LPSERVE_FUZZ_INPUTS", 1000 if FRESH else 60))
SECONDS = 30
MEMORY = 500 << 20
LAYERS = 6
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

# -- changes ---------------------------------------------------------------------------------------

VALUES = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "0", "-1", "1e999", "NaN", "\0"),
    *("\ud800", "x" * 5000, ".", "..", "../outside.txt", "/etc/hostname", "a/b", "=1+1", "a\nb"),
    *([], {}, [None], [[]], [0] * 2000, [1, 1], {"": None}, {"a": {"b": {}}}, ["x", 1]),
]
TOKENS = [
    *(b"[" * 5000, b"{" * 5000, b'{"a":' * 5000, b"(" * 5000, b"- " * 3000, b"9" * 5000),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\xed\xa0\x80", b"\r", b"\n\n", b'"', b"'", b"\\"),
    *(b"&a [*a, *a]", b"*b", b"!!python/object:os.system ", b"1e999", b"nan", b"null", b",,", b":"),
    *(b"2026-13-45", b"0x", b"\\u0000", b"\\ud83d", b"# ", b"\t", b"=", b"[[a]]", b"<<: *a"),
]


@st.composite
def changed_bytes(draw: Any, base: bytes) -> bytes:
    """Bytes with up to three changes: cut, flipped, doubled, replaced, with odd tokens between."""
    data = bytearray(base)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.sampled_from([1, 2, 8, 64, 1000]))
        way = draw(st.sampled_from(["cut", "flip", "drop", "double", "token", "noise"]))
        if way == "cut":
            del data[place:]
        elif way == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif way == "drop":
            del data[place : place + size]
        elif way == "double":
            data[place:place] = data[place : place + size]
        elif way == "token":
            data[place:place] = draw(st.sampled_from(TOKENS))
        else:
            data[place : place + 8] = draw(st.binary(min_size=8, max_size=8))
    return bytes(data)


def places(value: Any) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value; of long lists the first few."""
    found: list[tuple[Any, ...]] = []
    left: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while left:
        path, here = left.pop()
        inner = here.items() if isinstance(here, dict) else enumerate(here[:8])
        for key, item in inner:
            found.append((*path, key))
            if isinstance(item, dict | list):
                left.append(((*path, key), item))
    return found


@st.composite
def changed_value(draw: Any, base: Any) -> Any:
    """A JSON value in which up to two values are replaced, left out, renamed or added."""
    value = json.loads(json.dumps(base))
    for _ in range(draw(st.integers(1, 2))):
        options = places(value)
        if not options:
            return copy.deepcopy(draw(st.sampled_from(VALUES)))
        *path, last = draw(st.sampled_from(options))
        inside = value
        for key in path:
            inside = inside[key]
        way = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"]))
        odd = copy.deepcopy(draw(st.sampled_from(VALUES)))
        if way == "replace":
            inside[last] = odd
        elif way == "drop":
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw(st.sampled_from(["extra", "", "0", "layers", "format"]))] = odd
        else:
            inside.append(odd)
    return value


def changed_json(base: Any) -> st.SearchStrategy[bytes]:
    """A JSON document, changed as a value or as bytes."""
    return st.one_of(
        changed_value(base).map(lambda value: json.dumps(value).encode()),
        changed_bytes(json.dumps(base).encode()),
    )


@st.composite
def changed_npz(draw: Any, base: dict[str, Any]) -> bytes:
    """An .npz whose arrays, their headers or whose bytes are changed."""
    arrays = dict(base)
    way = draw(st.sampled_from(["bytes", "drop", "kind", "shape", "values", "header"]))
    name = draw(st.sampled_from(sorted(arrays)))
    array = np.asarray(arrays[name])
    if way == "drop":
        del arrays[name]
    elif way == "kind":
        kind = draw(st.sampled_from(["f8", "i1", "u8", "U3", "?", "c8", "M8[s]", "V4", "S2"]))
        arrays[name] = np.zeros(array.shape, dtype=kind)
    elif way == "shape":
        shape = draw(st.sampled_from([(), (0,), (1,), (2, 3), (1, 1, 1), (0, 0), (7, 6)]))
        arrays[name] = np.resize(array, shape)
    elif way == "values" and array.size and array.dtype.kind in "fiu":
        array = array.copy()
        at = draw(st.integers(0, array.size - 1))
        top = 10 if array.dtype.kind == "f" else np.iinfo(array.dtype).max
        array.flat[at] = draw(st.sampled_from([0, 1, top])) * draw(st.sampled_from([1, -1]))
        arrays[name] = array
    file = io.BytesIO()
    np.savez(file, **arrays)
    data = file.getvalue()
    if way == "header":
        odd = draw(st.sampled_from([b"(9999999999999,)", b"(-1,)", b"((),)", b"(1e9,)", b"("]))
        start = data.find(b"'shape': ")
        end = data.find(b"}", start)
        data = data[:start] + (b"'shape': " + odd).ljust(end - start)[: end - start] + data[end:]
    return draw(changed_bytes(data)) if way == "bytes" else data


@st.composite
def changed_shard(draw: Any, base: bytes) -> bytes:
    """A safetensors file whose header is changed as a value, or which is changed as bytes."""
    (length,) = struct.unpack("<Q", base[:8])
    if draw(st.booleans()):
        return draw(changed_bytes(base))
    header = json.dumps(draw(changed_value(json.loads(base[8 : 8 + length])))).encode()
    wrong = draw(st.sampled_from([0, 0, 0, 1, -1, 2**40]))
    return struct.pack("<Q", max(len(header) + wrong, 0)) + header + base[8 + length :]


# -- what must hold --------------------------------------------------------------------------------

_watched: list[str] | None = None


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open" and isinstance(arguments[0], str | bytes):
        _watched.append(os.fsdecode(arguments[0]))


sys.addaudithook(_note_opened)
counts: dict[str, list[int]] = {}
"""Reader -> inputs read, inputs refused."""


@pytest.fixture(scope="module", autouse=True)
def told(request) -> Iterator[None]:
    """Says at the end how many inputs were tried."""
    yield
    writer = request.config.get_terminal_writer()
    for name, (done, refused) in counts.items():
        writer.line(f"{name}: {done + refused} inputs, {done} read, {refused} refused")


def _late(*_: Any) -> None:
    raise AssertionError(f"still reading after {SECONDS} s")


@contextmanager
def watched() -> Iterator[list[str]]:
    """The names of files that are opened inside; fails where it takes too long."""
    global _watched
    _watched = opened = []
    before = signal.signal(signal.SIGALRM, _late)
    signal.alarm(SECONDS)
    try:
        yield opened
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        _watched = None


def check(name: str, folder: Path, action: Callable[[], object]) -> None:
    """Run a reader; see the module for what must hold."""
    count = counts.setdefault(name, [0, 0])
    line, problems = "", []
    with watched() as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            action()
            count[0] += 1
        except LpserveError as error:
            count[1] += 1
            line = str(error)
            problems = [problem for problem in ("\n", "\r") if problem in line.strip()]
    assert not problems, line
    assert len(line) < 3000
    outside = folder.parent / "outside.txt"
    assert not [path for path in opened if os.path.realpath(path) == str(outside)]
    assert "/etc/hostname" not in opened


Reader = Callable[[Path], object]


def fuzzed(
    path: Path,
    base: bytes,
    inputs: st.SearchStrategy[bytes],
    read: Reader,
    *,
    name: str = "",
    share: int = 1,
    memory: int = MEMORY,
) -> None:
    """Read a file that works, then with each of the drawn inputs in its place.

    Args:
        share: the slower a reader, the fewer inputs: a share of all.
    """
    (path.parents[1] / "outside.txt").write_text("0,1\n")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=EXAMPLES // share,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # the inputs are small as they are
        derandomize=not FRESH,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(inputs)
    def each(data: bytes) -> None:
        path.write_bytes(data)
        check(name or path.name, path.parent, lambda: read(path))

    each()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    assert grown < memory, f"{grown >> 20} MB more memory"


def packed(arrays: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def json_bytes(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- configs and studies ---------------------------------------------------------------------------

TOML = b"""model = "demo"
calibration = {a = "a.txt"}
budget = 300
sizes = [2, 5]
stop_chance = 0.5
engine_options = {num_players = 6}
engine = "synthetic"
bos = false
out = "run"
"""
YAML = b"""model: &m demo
calibration: [a.txt, b=b.txt]
budget: 300
sizes: [2, 5]
engine: synthetic
engine_options: {num_players: 6}
out: run
"""
STUDY = b"""model = "synthetic"
engine = "synthetic"
engine_options = {num_players = 6}
calibration = {a = "a.npz", b = "b.npz"}
max_removed = 2
budget = 60
masks = "own"
removed = [1, 2]
[sweep]
seed = [0, 1, 2]
utility = ["neg_nll", "ppl_ratio"]
[sweep.calibration]
one = ["a"]
both = ["a", "b"]
"""


def read_config(path: Path) -> None:
    check_model(config_from(load_config_file(path), f"config {path}"))


def read_study(path: Path) -> None:
    study_of(load_config_file(path), f"study {path}")


@pytest.mark.parametrize(
    ("file", "base", "read"),
    [
        ("run.toml", TOML, read_config),
        ("run.yaml", YAML, read_config),
        ("study.toml", STUDY, read_study),
        ("study.yaml", YAML + b"sweep: {seed: [0, 1]}\n", read_study),
    ],
)
def test_configs_and_studies(file, base, read, tmp_path):
    share = 2 if file.endswith(".yaml") else 1  # its parser is slow
    fuzzed(tmp_path / "in" / file, base, changed_bytes(base), read, share=share)


CONFIG = {
    **{"model": "demo", "calibration": {"a": "a.txt"}, "heldout": ["b.txt"], "budget": 300},
    **{"sizes": [2, 5], "engine": "synthetic", "engine_options": {"num_players": 6}, "seed": 1},
    **{"stop_width": 0.5, "stop_gain": 0.1, "bos": True, "store": "s", "mlflow": None, "length": 9},
    **{"pool": "local", "engines": 1, "dtype": "float32", "grace_s": 3, "num_fewshot": None},
}


def test_config_values(tmp_path):
    def read(path: Path) -> None:
        value = json.loads(path.read_bytes())
        check_model(config_from(value if isinstance(value, dict) else {"model": value}, "values"))

    inputs = changed_value(CONFIG).map(json_bytes)
    fuzzed(tmp_path / "in" / "config values", json_bytes(CONFIG), inputs, read)


# -- sets and plans --------------------------------------------------------------------------------

SETS = {
    "lists.txt": b'first: 1, 2\nsecond = [3, 4]\n5;0 # a comment\nREMOVED="1,2"\n',
    "drop.txt": b"none\nattn+mlp\nnone\nnone\nmlp+attn\nnone\n",
    "recipe.yaml": b"slices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
    b"- sources: [{model: a, layer_range: [4, 6]}]\nmerge_method: passthrough\ndtype: float32\n",
}


@pytest.mark.parametrize("file", SETS)
def test_sets(file, tmp_path):
    base = SETS[file]
    share = 2 if file.endswith(".yaml") else 1
    changed = changed_bytes(base)
    fuzzed(tmp_path / "in" / file, base, changed, lambda p: read_sets(p, LAYERS), share=share)


@pytest.mark.parametrize("base", [{"a": [1, 2], "b": [3]}, [[1, 2], [3]], [1, "2", 3.0]])
def test_json_sets(base, tmp_path):
    path = tmp_path / "in" / "sets.json"
    fuzzed(path, json_bytes(base), changed_json(base), lambda p: read_sets(p, LAYERS))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run of a synthetic game."""
    folder = tmp_path_factory.mktemp("finished")
    texts = write_texts(folder, np.random.default_rng(0))
    return run(make_config(folder, texts, engine_options={"num_players": LAYERS})).folder


def test_plans(finished, tmp_path):
    plan = json.loads((finished / "plan.json").read_bytes())

    def read(path: Path) -> None:
        load_plan(path)
        read_sets(path, LAYERS)

    fuzzed(tmp_path / "in" / "plan.json", json_bytes(plan), changed_json(plan), read)


# -- run folders -----------------------------------------------------------------------------------


def arrays_of(path: Path) -> dict[str, Any]:
    with np.load(path) as data:
        return {name: data[name] for name in data.files}


def test_records(finished, tmp_path):
    from lpserve.analysis.analyse import analyse
    from lpserve.analysis.build_plan import make_plan

    def read(path: Path) -> None:
        record = read_record(path.parent)
        make_plan(record, analyse(record))

    base = arrays_of(finished / "scores.npz")
    path = tmp_path / "in" / "scores.npz"
    fuzzed(path, packed(base), changed_npz(base), read, share=6)
    about = json.loads(str(base.pop("about")))

    def with_about(value: Any) -> bytes:
        return packed({"about": np.array(json.dumps(value)), **base})

    inputs = changed_value(about).map(with_about)
    fuzzed(path, with_about(about), inputs, read, name="scores.npz, about", share=6)


def test_window_files(finished, tmp_path):
    base = arrays_of(finished / "windows.npz")
    path = tmp_path / "in" / "windows.npz"
    fuzzed(path, packed(base), changed_npz(base), TokenWindows.from_npz)


def test_configs_of_runs(finished, tmp_path):
    base = json.loads((finished / "config.json").read_bytes())
    path = tmp_path / "in" / "config.json"
    fuzzed(path, json_bytes(base), changed_json(base), read_run_config)


@pytest.mark.parametrize("file", ["config.json", "scores.sqlite", "events.jsonl"])
def test_runs_that_go_on_in_a_changed_folder(file, tmp_path, rng):
    texts = write_texts(tmp_path, rng)
    config = make_config(tmp_path, texts, engine_options={"num_players": LAYERS}, budget=40)
    whole = {p.name: p.read_bytes() for p in run(config).folder.iterdir() if p.is_file()}
    base = whole[file]
    inputs = changed_json(json.loads(base)) if file == "config.json" else changed_bytes(base)

    def read(path: Path) -> None:
        for name, data in whole.items():
            if name != file:
                (path.parent / name).write_bytes(data)
        run(make_config(tmp_path, texts, engine_options={"num_players": LAYERS}, budget=40))

    fuzzed(tmp_path / "run" / file, base, inputs, read, name=f"a run's {file}", share=20)


# -- texts and tables ------------------------------------------------------------------------------


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


RECORDS = [{"text": "a b c", "id": 1}, {"text": "d \u2028 e"}, {"text": None}]
LINES = "\n".join(map(json.dumps, RECORDS)).encode()
TEXTS = {
    "a.txt": b"Some plain text.\nIn two lines.\n",
    "a.jsonl": LINES,
    "a.json": json.dumps(RECORDS).encode(),
    "a.csv": b'text,id\n"a, b",1\nc,2\n',
    "a.parquet": parquet_of(RECORDS),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.txt.zst": pa.compress(b"Some plain text. " * 9, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("file", TEXTS)
def test_texts(file, tmp_path):
    inputs = changed_bytes(TEXTS[file])
    if file == "a.json":
        inputs = changed_json(RECORDS)

    def read(path: Path) -> None:
        read_text(path, field="text", name="corpus")

    fuzzed(tmp_path / "in" / file, TEXTS[file], inputs, read)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_score_tables(kind, finished, tmp_path):
    table = tmp_path / f"base.{kind}"
    with Store(finished / "scores.sqlite") as store:
        export_scores(store, table)
    base = table.read_bytes()
    if kind == "csv":
        base = b"\n".join(base.split(b"\n")[:20]) + b"\n"

    def read(path: Path) -> None:
        target = path.parent / "store.sqlite"
        target.unlink(missing_ok=True)
        with Store(target) as store:
            import_scores(store, path)

    fuzzed(tmp_path / "in" / f"scores.{kind}", base, changed_bytes(base), read)


@pytest.mark.parametrize("file", ["game.json", "segments/000000.parquet", "windows.npz"])
def test_exhaustive_games(file, tmp_path, rng):
    folder = exhaustive(
        exhaustive_config(tmp_path, write_texts(tmp_path, rng), max_removed=2)
    ).folder
    base = (folder / file).read_bytes()
    inputs = changed_bytes(base)
    if file == "game.json":
        inputs = changed_json(json.loads(base))
    elif file == "windows.npz":
        inputs = changed_npz(arrays_of(folder / file))

    def read(_: Path) -> None:
        optima(folder)
        read_exhaustive(folder).utilities_M()

    fuzzed(folder / file, base, inputs, read, name=f"a game's {file}")


# -- checkpoints -----------------------------------------------------------------------------------


def read_model(path: Path) -> None:
    checkpoint = read_checkpoint(path.parent)
    check_decoder(checkpoint)
    layers = read_architecture(checkpoint).num_layers
    if layers is not None:
        find_layer_prefix(checkpoint, layers)


@pytest.fixture
def model(tmp_path) -> Path:
    """A checkpoint of four small layers."""
    folder = tmp_path / "in"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).save_pretrained(folder)
    return folder


def test_shards(model):
    base = (model / "model.safetensors").read_bytes()
    fuzzed(model / "model.safetensors", base, changed_shard(base), read_model)


def test_indices(model):
    names = [entry.name for entry in read_checkpoint(model).tensors]
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(names, "model-1.safetensors"),
    }
    file = "model.safetensors.index.json"
    fuzzed(model / file, json_bytes(index), changed_json(index), read_model)


def test_model_configs(model):
    """Read, then loaded by transformers and scored. A size that the config does not name is the
    default of its class (4,096 wide), and transformers makes room for that before it compares."""
    windows = TokenWindows.from_tokens(np.arange(24).reshape(2, 12) + 3)
    masks = np.ones((2, TEXT["num_hidden_layers"]), dtype=bool)
    masks[1, 1] = False

    def read(path: Path) -> None:
        read_model(path)
        export_outlook(read_checkpoint(path.parent))
        spec = EngineSpec(
            kind="transformers", model=str(path.parent), dtype="float32", device="cpu"
        )
        engine = TransformersEngine(spec, windows)
        try:
            engine.score(masks[:, : len(engine.info.players)])
        finally:
            engine.close()

    base = json.loads((model / "config.json").read_bytes())
    path = model / "config.json"
    fuzzed(
        path,
        json_bytes(base),
        changed_json(base),
        read,
        name="a model's config",
        share=4,
        memory=2 << 30,
    )


def test_gguf_files(tmp_path, monkeypatch, rng):
    """Changed before the tensors begin, and dequantized where the file is read."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "in" / "a.gguf"
    path.parent.mkdir()
    write_gguf(path, rng)
    base = path.read_bytes()
    header = base[: base.index(b"blk.3.ffn_norm.weight") + 60]

    def read(path: Path) -> None:
        check_decoder(read_checkpoint(path))
        load_tokenizer(path)

    inputs = changed_bytes(header).map(lambda head: head + base[len(header) :])
    fuzzed(path, base, inputs, read, share=4)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_tokenizers(file, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in (FOLDER / "model").glob("*token*"):
        shutil.copy(path, folder)
    base = json.loads((folder / file).read_bytes())

    def read(path: Path) -> None:
        tokenizer = load_tokenizer(path.parent)
        (path.parent / "a.txt").write_text("It was a dark night. " * 40)
        TokenStream.read(path.parent / "a.txt", tokenizer, field="text", name="a")

    fuzzed(folder / file, json_bytes(base), changed_json(base), read, share=3)
