"""The identity of a checkpoint: any byte changes it, nothing else does, the cache never lies."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lpserve.errors import InputError
from lpserve.model import content_hash
from lpserve.model.checkpoint import TensorEntry, read_checkpoint
from lpserve.model.content_hash import (
    checkpoint_hash,
    is_sampled,
    sampled_hash,
)
from lpserve.model.local import cache_folder

CONFIG = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}


def random_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tensors of very different sizes, one of them empty."""
    sizes = {"model.layers.0.w": 20_000, "model.layers.1.w": 7, "embed": 9_000, "empty": 0}
    return {name: rng.normal(size=n).astype(np.float32) for name, n in sizes.items()}


def write_one_file(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(names.values()):
        save_file({n: tensors[n] for n in tensors if names[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.fixture
def cached_at_once(tmp_path, monkeypatch) -> Path:
    """Every shard is cached as large, settled ones are; returns the cache's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hash, "CACHED_BYTES", 0)
    monkeypatch.setattr(content_hash, "SETTLED_S", 0.0)
    return tmp_path / "cache" / "lpserve" / "digests"


def hash_afresh(folder: Path, monkeypatch) -> tuple[str, list[str]]:
    """What another process would find, and what it would tell."""
    monkeypatch.setattr(content_hash, "_known", {})
    told: list[str] = []
    return checkpoint_hash(read_checkpoint(folder), tell=told.append), told


def slow_hash(folder: Path, piece_bytes: int) -> str:
    """The definition, a tensor after the other."""

    def digest(entry: TensorEntry) -> bytes:
        data = entry.shard.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
        pieces = [data[i : i + piece_bytes] for i in range(0, len(data), piece_bytes)]
        return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in pieces)).digest()

    text = json.dumps(CONFIG, sort_keys=True).encode()
    for entry in sorted(read_checkpoint(folder).tensors, key=lambda entry: entry.name):
        text += json.dumps([entry.name, entry.dtype, list(entry.shape)]).encode() + digest(entry)
    return "2-" + hashlib.sha256(text).hexdigest()


def test_the_hash_is_the_definitions_in_pieces_of_any_size(tmp_path, rng, monkeypatch):
    folder = write_one_file(tmp_path / "m", random_tensors(rng))
    for piece_bytes in (1000, 36_000, 1 << 25):
        monkeypatch.setattr(content_hash, "PIECE_BYTES", piece_bytes)
        assert hash_afresh(folder, monkeypatch)[0] == slow_hash(folder, piece_bytes)


def test_any_byte_that_is_loaded_changes_the_hash(tmp_path, rng):
    """Also where samples of the tensor had not looked."""
    folder = write_one_file(tmp_path / "m", random_tensors(rng))
    before = read_checkpoint(folder)
    found, sampled = checkpoint_hash(before), sampled_hash(before)
    entries = {entry.name: entry for entry in before.tensors}
    unseen = entries["model.layers.0.w"].offset + 20_000  # samples: 0 to 4096, the middle, the end
    anywhere = int(rng.integers(before.tensors[0].offset, before.shards[0].stat().st_size))
    hashes = {found}
    for i, place in enumerate((unseen, anywhere)):
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[place] ^= 1 << int(rng.integers(8))
        changed = tmp_path / f"changed {i}"
        write_one_file(changed, {})
        (changed / "model.safetensors").write_bytes(data)
        hashes.add(checkpoint_hash(read_checkpoint(changed)))
        if i == 0:
            assert sampled_hash(read_checkpoint(changed)) == sampled
    assert len(hashes) == 3 or anywhere == unseen


def test_rows_edited_in_place_are_another_model(tmp_path, rng):
    """The same file, in the same process."""
    folder = write_one_file(tmp_path / "m", random_tensors(rng))
    found = checkpoint_hash(read_checkpoint(folder))
    entry = next(e for e in read_checkpoint(folder).tensors if e.name == "embed")
    with entry.shard.open("r+b") as file:
        file.seek(entry.offset + 8_000)
        file.write(bytes(64))
    assert checkpoint_hash(read_checkpoint(folder)) != found


def test_shards_names_and_versions_do_not_matter_and_the_config_does(tmp_path, rng):
    tensors = random_tensors(rng)
    one = write_one_file(tmp_path / "one", tensors)
    found = checkpoint_hash(read_checkpoint(one))
    assert checkpoint_hash(read_checkpoint(write_shards(tmp_path / "two", tensors))) == found
    told = CONFIG | {"transformers_version": "9", "_name_or_path": "elsewhere"}
    (one / "config.json").write_text(json.dumps(told))
    assert checkpoint_hash(read_checkpoint(one)) == found
    (one / "config.json").write_text(json.dumps(CONFIG | {"rms_norm_eps": 1e-6}))
    assert checkpoint_hash(read_checkpoint(one)) != found


def test_hashes_of_samples_are_told_apart(tmp_path, rng):
    checkpoint = read_checkpoint(write_one_file(tmp_path / "m", random_tensors(rng)))
    assert is_sampled(sampled_hash(checkpoint))
    assert not is_sampled(checkpoint_hash(checkpoint))
    assert not is_sampled("synthetic-12-0")


# -- the cache ---------------------------------------------------------------------------------


def test_a_cached_digest_is_used_and_told_while_the_file_is_the_same(
    tmp_path, rng, monkeypatch, cached_at_once
):
    folder = write_shards(tmp_path / "m", random_tensors(rng))
    first, told = hash_afresh(folder, monkeypatch)
    assert [line.split(",")[0] for line in told] == [
        "hashing part-0.safetensors",
        "hashing part-1.safetensors",
    ]
    assert len(list(cached_at_once.iterdir())) == 2
    assert cached_at_once.stat().st_mode & 0o077 == 0

    def preadv(*_: object) -> int:
        raise AssertionError("the file is read")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        again, told = hash_afresh(folder, monkeypatch)
    assert again == first
    assert all("come from the cache" in line for line in told)
    assert len(told) == 2


@pytest.mark.parametrize("change", ["in place", "time put back", "replaced", "moved away"])
def test_a_changed_file_is_read_again(change, tmp_path, rng, monkeypatch, cached_at_once):
    folder = write_one_file(tmp_path / "m", random_tensors(rng))
    shard = folder / "model.safetensors"
    first, _ = hash_afresh(folder, monkeypatch)
    before = shard.stat()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    if change == "replaced":
        other = tmp_path / "other"
        other.write_bytes(data)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(shard)
    elif change == "moved away":
        shutil.move(folder, tmp_path / "elsewhere")
        folder = write_one_file(tmp_path / "m", random_tensors(rng))
    else:
        with shard.open("r+b") as file:
            file.write(data)
        if change == "time put back":
            os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    found, told = hash_afresh(folder, monkeypatch)
    assert "hashing" in told[0]
    assert found == slow_hash(folder, content_hash.PIECE_BYTES)
    assert found != first


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b'{"state": null, "digests": 3}',
        b'{"state": {}, "digests": {"embed": "00"}}',
    ],
)
def test_a_damaged_cache_is_passed_by_and_mended(
    damage, tmp_path, rng, monkeypatch, cached_at_once
):
    folder = write_one_file(tmp_path / "m", random_tensors(rng))
    first, _ = hash_afresh(folder, monkeypatch)
    (file,) = cached_at_once.iterdir()
    file.write_bytes(damage)
    assert hash_afresh(folder, monkeypatch)[0] == first
    assert json.loads(file.read_text())["digests"].keys() == {
        entry.name for entry in read_checkpoint(folder).tensors
    }


def test_digests_of_the_cache_that_are_none_are_not_taken(
    tmp_path, rng, monkeypatch, cached_at_once
):
    folder = write_one_file(tmp_path / "m", random_tensors(rng))
    first, _ = hash_afresh(folder, monkeypatch)
    (file,) = cached_at_once.iterdir()
    held = json.loads(file.read_text())
    held["digests"]["embed"] = "12ab"
    file.write_text(json.dumps(held))
    assert hash_afresh(folder, monkeypatch)[0] == first


def test_a_file_that_has_just_changed_is_not_cached(tmp_path, rng, monkeypatch, cached_at_once):
    """Another change within the clock's resolution would leave its times as they are."""
    monkeypatch.setattr(content_hash, "SETTLED_S", 3600.0)
    folder = write_one_file(tmp_path / "m", random_tensors(rng))
    first, _ = hash_afresh(folder, monkeypatch)
    assert not cached_at_once.exists()
    assert hash_afresh(folder, monkeypatch)[0] == first


def test_small_shards_leave_nothing_in_the_cache(tmp_path, rng, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content_hash, "SETTLED_S", 0.0)
    _, told = hash_afresh(write_one_file(tmp_path / "m", random_tensors(rng)), monkeypatch)
    assert told == []
    assert not cache_folder("digests").exists()


def test_a_link_in_the_cache_is_not_written_through(tmp_path, rng, monkeypatch, cached_at_once):
    folder = write_one_file(tmp_path / "m", random_tensors(rng))
    hash_afresh(folder, monkeypatch)
    (file,) = cached_at_once.iterdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    file.unlink()
    file.symlink_to(victim)
    hash_afresh(folder, monkeypatch)
    assert victim.read_text() == "mine"
    assert not file.is_symlink()


def test_a_cache_that_cannot_be_written_costs_time_alone(
    tmp_path, rng, monkeypatch, cached_at_once
):
    (tmp_path / "cache").write_text("a file where the folder should be")
    folder = write_one_file(tmp_path / "m", random_tensors(rng))
    first, _ = hash_afresh(folder, monkeypatch)
    assert first == slow_hash(folder, content_hash.PIECE_BYTES)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, rng, monkeypatch):
    folder = write_one_file(tmp_path / "m", random_tensors(rng))
    read, shard = os.preadv, folder / "model.safetensors"

    def preadv(*arguments: Any) -> int:
        os.utime(shard, ns=(0, 0))
        return read(*arguments)

    checkpoint = read_checkpoint(folder)
    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(InputError, match=re.escape(f"{shard} changes while it is read")):
        checkpoint_hash(checkpoint)
