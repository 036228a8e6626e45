"""Bad input: one clear line, exit code 2, nothing written or lost; before any model is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lpserve.analysis.record import read_record
from lpserve.cli.entry import main
from lpserve.config import config_from
from lpserve.demo import FOLDER
from lpserve.errors import DiskFullError
from lpserve.masks import all_masks, keys, removed_players
from lpserve.runner.run import run
from lpserve.store.connection import StoreConnection
from lpserve.testing.reference import save_model, small_config
from lpserve.testing.runs import make_config, stored_scores

MODEL = str(FOLDER / "model")
TEXT = str(FOLDER / "calibration.txt")


@pytest.fixture(autouse=True)
def no_model_is_loaded(monkeypatch):
    """Any attempt to load weights fails the test."""
    import lpserve.engine.hf.engine

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(lpserve.engine.hf.engine, "_load", refuse)


def refused(capsys, tmp_path: Path, *argv: str) -> str:
    """Run the command line; returns its one line on stderr."""
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    capsys.readouterr()
    code = main([*argv])
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert code == 2, captured.err
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("lpserve: ")
    assert "Traceback" not in captured.err
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    return lines[0]


def run_flags(tmp_path: Path, **changes: object) -> list[str]:
    flags: dict[str, object] = {
        "model": MODEL,
        "calibration": TEXT,
        "num_windows": 4,
        "heldout_windows": 4,
        "length": 64,
        "budget": 100,
        "max_removed": 4,
        "out": tmp_path / "out",
    }
    flags |= changes
    argv = ["run"]
    for key, value in flags.items():
        argv += [f"--{key.replace('_', '-')}", str(value)]
    return argv


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_windows": 0}, "num_windows must be"),
        ({"heldout_windows": -1}, "heldout_windows must be"),
        ({"length": 1}, "length must be"),
        ({"budget": 0}, "budget must be"),
        ({"budget": 7}, "budget must be at least 26 for 12 players"),
        ({"max_removed": 12}, "max_removed must be at most 11 for 12 players"),
        ({"max_removed": 0}, "max_removed must be"),
        ({"sizes": "9,3"}, "sizes must be"),
        ({"length": 1000}, "longer than the model's 512 positions"),
        ({"num_windows": 5000}, "too short"),
        ({"utility": "colour"}, "utility must be one of"),
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"surrogate": "paper"}, "ppl_ratio"),
        ({"engines": 4}, "engines must be 1"),
        ({"calibration": "/no/such.txt"}, "does not exist"),
        ({"model": "/no/such"}, "is not a folder"),
        ({"grace_s": 0}, "grace_s must be"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, capsys, changes, words):
    assert words in refused(capsys, tmp_path, *run_flags(tmp_path, **changes))


def test_unknown_config_keys_are_refused_with_the_nearest_one(tmp_path, capsys):
    for name, text in (("a.toml", "bugdet = 5\n"), ("a.yaml", "bugdet: 5\n")):
        path = tmp_path / name
        path.write_text(text)
        line = refused(capsys, tmp_path, "run", "--config", str(path))
        assert "unknown key 'bugdet'" in line
        assert "'budget'" in line


def test_a_broken_config_file_is_refused(tmp_path, capsys):
    path = tmp_path / "a.toml"
    path.write_text("budget = = 5")
    assert "is no TOML" in refused(capsys, tmp_path, "run", "--config", str(path))
    assert "does not exist" in refused(
        capsys, tmp_path, "run", "--config", str(tmp_path / "b.toml")
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "not a decoder-only"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "not a decoder-only"),
        ({"is_encoder_decoder": True}, "not a decoder-only"),
    ],
)
def test_a_model_that_is_no_decoder_is_refused(tmp_path, capsys, change, words):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text()) | change
    (model / "config.json").write_text(json.dumps(config))
    assert words in refused(capsys, tmp_path, *run_flags(tmp_path, model=model))


def sharded_model(tmp_path: Path) -> Path:
    path = save_model(small_config("llama"), tmp_path / "sharded", 0, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / "model" / name, path / name)
    return path


def test_missing_and_corrupt_shards_are_refused(tmp_path, capsys):
    model = sharded_model(tmp_path)
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 3
    whole = shards[1].read_bytes()
    shards[1].unlink()
    line = refused(capsys, tmp_path, *run_flags(tmp_path, model=model))
    assert f"1 of {len(shards)} shards are missing" in line
    assert shards[1].name in line
    for broken in (whole[:-7], whole[:5], b"\xff" * len(whole), b""):
        shards[1].write_bytes(broken)
        line = refused(capsys, tmp_path, *run_flags(tmp_path, model=model))
        assert "corrupt" in line
        assert shards[1].name in line
    (model / "model.safetensors.index.json").write_text("{")
    assert "is no JSON" in refused(capsys, tmp_path, *run_flags(tmp_path, model=model))


def test_a_folder_without_weights_or_config_is_refused(tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    (model / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(
        capsys, tmp_path, *run_flags(tmp_path, model=model)
    )
    (model / "config.json").unlink()
    assert "config.json does not exist" in refused(
        capsys, tmp_path, *run_flags(tmp_path, model=model)
    )


@pytest.mark.thorough
def test_the_results_folder_of_another_game_is_refused(tmp_path, capsys, texts):
    out = run(make_config(tmp_path, texts)).folder
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.name != "run.lock"}
    line = refused(capsys, tmp_path, *run_flags(tmp_path, out=out))
    assert "belongs to another run" in line
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != "run.lock"} == before


@pytest.mark.thorough
def test_a_model_changed_in_place_is_another_game(tmp_path, texts):
    from lpserve.errors import InputError

    out = run(make_config(tmp_path, texts)).folder
    stored = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(stored | {"model_hash": "2-" + "0" * 64}))
    with pytest.raises(InputError, match="belongs to another game"):
        run(make_config(tmp_path, texts))


@pytest.mark.process
def test_a_store_in_use_by_another_run_is_refused(tmp_path, capsys):
    store = tmp_path / "shared.sqlite"
    code = (
        "import sys; from lpserve.store.store import Store; "
        f"s = Store({str(store)!r}, holder='the night run'); print('open', flush=True); "
        "sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline().strip() == "open"
        line = refused(capsys, tmp_path, *run_flags(tmp_path, store=store))
        assert "in use by the night run" in line
        assert str(holder.pid) in line
        holder.stdin.close()


def test_a_corrupt_store_is_kept_and_refused(tmp_path, capsys, rng):
    store = tmp_path / "scores.sqlite"
    junk = rng.bytes(20_000)
    store.write_bytes(junk)
    (tmp_path / "scores.sqlite.lock").touch()  # the lock file itself may appear
    line = refused(capsys, tmp_path, *run_flags(tmp_path, store=store))
    assert "corrupt" in line
    assert "left as it is" in line
    assert store.read_bytes() == junk


@pytest.mark.thorough
def test_a_full_disk_stops_the_run_and_the_same_command_resumes(tmp_path, texts, monkeypatch):
    """A real SQLITE_FULL, by a page limit set on the run's own connection."""
    np.savez(texts["calibration"], tokens=np.arange(60 * 40).reshape(60, 40))
    config = make_config(tmp_path, texts, budget=150)
    plain = StoreConnection._prepare

    def limited(self: StoreConnection, new: bool) -> None:
        plain(self, new)
        pages = self.db.execute("PRAGMA page_count").fetchone()[0]
        self.db.execute(f"PRAGMA max_page_count = {pages + 9}")

    monkeypatch.setattr(StoreConnection, "_prepare", limited)
    with pytest.raises(DiskFullError, match="free space and give the same command again"):
        run(config)
    monkeypatch.undo()
    kept = stored_scores(tmp_path / "run" / "scores.sqlite")
    assert kept
    after = run(config)
    scores = stored_scores(after.folder / "scores.sqlite")
    assert kept.items() <= scores.items()
    alone = run(make_config(tmp_path, texts, budget=150, out=str(tmp_path / "alone")))
    assert scores == stored_scores(alone.folder / "scores.sqlite")
    assert after.outcome.plan == alone.outcome.plan


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_file_system_is_one_line_and_exit_code_2(tmp_path, texts):
    """The command line on a tmpfs of 96 KiB: too small for the store."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        config = tmp_path / "run.toml"
        config.write_text(
            f'model = "synthetic"\nengine = "synthetic"\ncalibration = "{texts["calibration"]}"\n'
            f'heldout = "{texts["heldout"]}"\nbudget = 200\nmax_removed = 4\n'
            f'out = "{small}/run"\n[engine_options]\nnum_players = 8\n'
        )
        done = subprocess.run(
            [sys.executable, "-m", "lpserve", "run", "--config", str(config)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("lpserve: no space to write")
        assert "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", str(small)], check=True)


def finished_run(tmp_path: Path, texts) -> Path:
    return run(make_config(tmp_path, texts)).folder


@pytest.mark.thorough
def test_plans_out_of_range_are_refused(tmp_path, capsys, texts):
    out = finished_run(tmp_path, texts)
    assert "max_removed must be 1..4" in refused(
        capsys, tmp_path, "plan", str(out), "--max-removed", "5"
    )
    assert "9 is none of the 8 layers" in refused(
        capsys, tmp_path, "plan", str(out), "--protect", "9"
    )
    assert "player 1 cannot be both" in refused(
        capsys, tmp_path, "plan", str(out), "--protect", "1", "--force", "1"
    )
    assert "protect leaves 1 players to remove" in refused(
        capsys, tmp_path, "plan", str(out), "--protect", "0,1,2,3,4,5,6"
    )
    for flags, words in (
        (("--alternatives", "-1"), "--alternatives must be at least 0"),
        (("--alternatives", "2", "--min-distance", "5"), "--min-distance must be 1..4"),
        (("--min-distance", "2"), "--min-distance is about alternatives"),
    ):
        assert words in refused(capsys, tmp_path, "plan", str(out), *flags)
    sets = all_masks(8, kept=4)
    scored = set(keys(read_record(out).masks_MP))
    unscored = next(mask for mask, key in zip(sets, keys(sets), strict=True) if key not in scored)
    force = ",".join(map(str, removed_players(unscored)))
    assert "no scored set of 4 removed players would remove" in refused(
        capsys, tmp_path, "plan", str(out), "--force", force
    )
    assert "holds no finished run" in refused(capsys, tmp_path, "plan", str(tmp_path))


def test_exports_of_the_wrong_thing_are_refused(tmp_path, capsys, texts):
    out = finished_run(tmp_path, texts)
    target = tmp_path / "target"
    export = ["export", str(out), "--out", str(target), "--model", MODEL, "--remove"]
    assert "the plan removes 1 to 4 players: got 9" in refused(capsys, tmp_path, *export, "9")
    assert "the plan is for another model" in refused(capsys, tmp_path, *export, "2")
    assert "the plan has 0 alternatives for 2 removed: got 1" in refused(
        capsys, tmp_path, *export, "2", "--alternative", "1"
    )
    broken = tmp_path / "plan.json"
    broken.write_text('{"format": 1}')
    assert "is not an lpserve plan" in refused(
        capsys, tmp_path, *export, "2", "--plan", str(broken)
    )


def test_an_export_target_that_is_not_empty_is_refused(tmp_path):
    from lpserve.errors import InputError
    from lpserve.export.export import export_checkpoint

    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="is not empty"):
        export_checkpoint(MODEL, [3], tmp_path / "target")
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["mine.txt"]


def test_windows_of_another_tokenizer_are_refused(tmp_path, capsys):
    path = tmp_path / "w.npz"
    np.savez(path, tokens=np.arange(4090, 4122).reshape(2, 16))
    line = refused(capsys, tmp_path, *run_flags(tmp_path, calibration=path, heldout=TEXT))
    assert "outside the model's vocabulary of 4096" in line


def test_a_bad_value_type_in_a_config_names_its_key():
    from lpserve.errors import InputError

    base = {"model": "m", "calibration": "x.txt"}
    for key, value in (
        ("budget", "many"),
        ("budget", True),
        ("bos", 1),
        ("sizes", [1]),
        ("out", ""),
        ("progress_s", "x"),
        ("engine_options", 3),
    ):
        with pytest.raises(InputError, match=key):
            config_from(base | {key: value}, "test")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["run", "--modle", "x"], "lpserve run: unknown flag --modle; did you mean --model?"),
        (["exprt", "x"], "lpserve: no command 'exprt': did you mean 'export'?"),
        (["xyzzy"], "lpserve: no command 'xyzzy': there are run, plan, export"),
        (["run", "--bud=3"], "lpserve run: unknown flag --bud"),  # no flag is shortened
        (["run", "--xyzzy"], "lpserve run: unknown flag --xyzzy: see lpserve run --help"),
        (["run", "--budget", "x"], "lpserve run: argument --budget: invalid int value: 'x'"),
    ],
)
def test_flags_that_are_not_known_are_refused_in_one_line(argv, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(told)


def test_lm_evals_flags_are_its_own_and_its_model_refuses_unknown_arguments(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["lm-eval", "--help"])
    assert ended.value.code == 0
    assert "--model" in capsys.readouterr().out
    from lpserve.errors import InputError
    from lpserve.evaluation.lm_eval_model import LpserveLM

    with pytest.raises(InputError, match=r"unknown argument 'modle'; did you mean 'model'\?"):
        LpserveLM(**{"modle": MODEL})
    with pytest.raises(InputError, match="model is missing"):
        LpserveLM()


def test_a_goal_is_counted(capsys):
    for goal in ("plan", "values"):
        assert main(["cost", "--model", MODEL, "--goal", goal]) == 0
    assert "masks" in capsys.readouterr().out


def test_the_first_cause_and_whose_default_it_is_are_told(tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text("word " * 2000)
    flags = ["run", "--model", MODEL, "--calibration", str(text), "--out", str(tmp_path / "out")]
    assert "longer than the model's 512 positions" in refused(
        capsys, tmp_path, *flags, "--length", "1024"
    )
    told = refused(capsys, tmp_path, *flags, "--num-windows", "1")
    assert "64 are asked for (heldout_windows, of the last fifth of the text)" in told
