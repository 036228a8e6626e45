"""Windows against the plain tokenized text: what is cut, hashed, held out and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpserve.data.corpora import WindowRequest, check_no_overlap, cut_windows
from lpserve.data.tokenizer import load_tokenizer
from lpserve.data.windows import TokenStream, TokenWindows
from lpserve.demo import FOLDER
from lpserve.errors import InputError

TEXT = FOLDER / "calibration.txt"
OTHER = FOLDER / "heldout.txt"
MODEL = FOLDER / "model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def ids_of(tokenizer) -> Callable[[str | Path], list[int]]:
    """A text (or a file's text) as token ids."""

    def tokenize(text: str | Path) -> list[int]:
        text = text.read_text() if isinstance(text, Path) else text
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return tokenize


def places(windows: TokenWindows, ids: list[int], *, bos: int | None = None) -> list[int]:
    """Where in the token stream each window was cut, as a multiple of what it takes of it."""
    found = []
    for tokens in windows.tokens_NT.tolist():
        if bos is not None:
            assert tokens[0] == bos
            tokens = tokens[1:]
        starts = range(0, len(ids) - len(tokens) + 1, len(tokens))
        found.append(next(i for i in starts if ids[i : i + len(tokens)] == tokens))
    return found


def hashes(windows: TokenWindows) -> list[str]:
    return list(windows.window_hashes)


def random_windows(rng, num: int = 4, length: int = 24, high: int = 4096) -> TokenWindows:
    return TokenWindows.from_tokens(rng.integers(high, size=(num, length)))


def assert_one_line(error: pytest.ExceptionInfo[InputError], words: str) -> None:
    assert len(str(error.value).splitlines()) == 1
    assert words in str(error.value)


# -- cutting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [16, 33, 500])
def test_windows_are_disjoint_cuts_of_the_text(length, tokenizer, ids_of, rng):
    seed = int(rng.integers(1 << 31))
    windows = TokenWindows.from_file(
        TEXT, tokenizer=tokenizer, num_windows=30, length=length, seed=seed
    )
    assert windows.tokens_NT.shape == windows.scored_NT.shape == (30, length)
    assert len(set(places(windows, ids_of(TEXT)))) == 30
    assert windows.corpora == (("calibration", 30),)
    assert windows.num_tokens_N.tolist() == [length - 1] * 30
    assert not windows.scored_NT[:, 0].any()


def test_bos_counts_in_the_length_and_is_not_scored(tokenizer, ids_of, rng):
    windows = TokenWindows.from_file(
        TEXT, tokenizer=MODEL, num_windows=9, length=20, seed=int(rng.integers(99)), bos=True
    )
    assert windows.length == 20
    assert len(set(places(windows, ids_of(TEXT), bos=tokenizer.bos_token_id))) == 9
    assert windows.scored_NT.tolist() == [[False] + [True] * 19] * 9


def test_more_windows_contain_fewer(tokenizer, rng):
    seed = int(rng.integers(1 << 31))
    few, many = (
        TokenWindows.from_file(TEXT, tokenizer=tokenizer, num_windows=n, length=40, seed=seed)
        for n in (11, 150)
    )
    assert hashes(many)[:11] == hashes(few)


def test_the_seed_alone_decides_the_cut(tokenizer, rng):
    seed = int(rng.integers(1 << 31))
    first, again, other = (
        TokenWindows.from_file(TEXT, tokenizer=tokenizer, num_windows=20, length=40, seed=s)
        for s in (seed, seed, seed + 1)
    )
    assert first.content_hash == again.content_hash != other.content_hash
    assert set(hashes(first)) != set(hashes(other))


def test_equal_windows_of_a_repeating_text_are_taken_once(tokenizer):
    refrain, verse = [[7] * 10] * 30, [[n] * 10 for n in range(20, 25)]
    stream = TokenStream("song", np.array(refrain + verse, dtype=np.int32).ravel(), None)
    windows = stream.cut(6, 10, seed=3, bos=False)
    assert sorted(windows.tokens_NT[:, 0].tolist()) == [7, 20, 21, 22, 23, 24]
    with pytest.raises(InputError) as error:
        stream.cut(7, 10, seed=3, bos=False)
    assert_one_line(error, "only 6 different windows")


def test_a_folder_is_its_text_files_in_name_order(tmp_path, tokenizer, ids_of):
    folder = tmp_path / "books"
    folder.mkdir()
    parts = TEXT.read_text()[:9000], OTHER.read_text()[:9000]
    (folder / "b.txt").write_text(parts[1])
    (folder / "a.txt").write_text(parts[0])
    windows = TokenWindows.from_file(folder, tokenizer=tokenizer, num_windows=100, length=30)
    assert len(set(places(windows, ids_of("\n\n".join(parts))))) == 100
    assert windows.corpora == (("books", 100),)


def test_a_jsonl_is_the_named_field_of_its_records(tmp_path, tokenizer, ids_of):
    text = TEXT.read_text()
    records = [text[:3000], "a line\u2028a separator inside\x85 and\na newline", text[3000:9000]]
    lines = [json.dumps({"body": r, "text": "no"}, ensure_ascii=False) for r in records]
    path = tmp_path / "some.jsonl"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    windows = TokenWindows.from_file(
        path, tokenizer=tokenizer, num_windows=60, length=30, field="body", name="mine"
    )
    assert len(set(places(windows, ids_of("\n\n".join(records))))) == 60
    assert windows.corpora == (("mine", 60),)


def test_an_npz_gives_its_tokens_and_scored_positions(tmp_path, rng):
    tokens = rng.integers(4096, size=(5, 12)).astype(np.uint16)
    scored = rng.random((5, 12)) < 0.5
    scored[:, 0], scored[:, -1] = False, True
    np.savez(tmp_path / "a.npz", tokens=tokens, scored=scored)
    np.savez(tmp_path / "b.npz", tokens=tokens)
    given = TokenWindows.from_npz(tmp_path / "a.npz", name="mine")
    assert np.array_equal(given.tokens_NT, tokens)
    assert np.array_equal(given.scored_NT, scored)
    assert given.num_tokens_N.tolist() == [sum(row) for row in scored.tolist()]
    assert given.corpora == (("mine", 5),)
    plain = TokenWindows.from_npz(tmp_path / "b.npz")
    assert plain.scored_NT.tolist() == [[False] + [True] * 11] * 5


def test_selected_windows_keep_their_hash_and_corpus(rng):
    a, b = random_windows(rng), random_windows(rng, 3)
    both = TokenWindows.concatenate(
        [
            TokenWindows(a.tokens_NT, a.scored_NT, (("a", 4),)),
            TokenWindows(b.tokens_NT, b.scored_NT, (("b", 3),)),
        ]
    )
    some = both.select([6, 4, 0, 1, 5])
    assert hashes(some) == [hashes(both)[i] for i in (6, 4, 0, 1, 5)]
    assert some.corpora == (("b", 2), ("a", 2), ("b", 1))
    assert np.array_equal(both.select([2], length=10).tokens_NT, a.tokens_NT[[2], :10])


# -- hashes ----------------------------------------------------------------------------------------


def test_right_padding_is_left_out_of_the_hash(rng):
    tokens, scored = rng.integers(4096, size=(6, 30)), rng.random((6, 30)) < 0.6
    scored[:, 0] = False
    ends = rng.integers(2, 30, size=6)
    for row, end in enumerate(ends):
        scored[row, end - 1], scored[row, end:] = True, False
    padded = TokenWindows.from_tokens(tokens, scored)
    other = tokens.copy()
    for row, end in enumerate(ends):
        other[row, end:] = -100
    assert hashes(TokenWindows.from_tokens(other, scored)) == hashes(padded)
    assert padded.lengths_N.tolist() == ends.tolist()
    for row, end in enumerate(ends):
        cut = TokenWindows.from_tokens(tokens[[row], :end], scored[[row], :end])
        assert hashes(cut) == hashes(padded)[row : row + 1]
        assert not padded.tokens_NT[row, end:].any()


def test_padding_to_a_common_length_changes_no_hash(rng):
    parts = [
        TokenWindows(w.tokens_NT, w.scored_NT, ((name, w.num_windows),))
        for name, w in (("a", random_windows(rng, 3, 10)), ("b", random_windows(rng, 2, 17)))
    ]
    both = TokenWindows.concatenate(parts)
    assert both.length == 17
    assert hashes(both) == hashes(parts[0]) + hashes(parts[1])
    assert both.num_tokens_N.tolist() == [9] * 3 + [16] * 2


def test_any_token_scored_flag_or_order_changes_the_hash(rng):
    tokens = rng.integers(4096, size=(1, 12))
    scored = np.array([[False] + [True] * 11])
    seen = {TokenWindows.from_tokens(tokens, scored).content_hash}
    for place in range(12):
        changed = tokens.copy()
        changed[0, place] += 1
        seen.add(TokenWindows.from_tokens(changed, scored).content_hash)
    for place in range(1, 12):
        fewer = scored.copy()
        fewer[0, place] = False
        seen.add(TokenWindows.from_tokens(tokens, fewer).content_hash)
    assert len(seen) == 1 + 12 + 11
    windows = random_windows(rng)
    assert windows.select([1, 0]).content_hash != windows.select([0, 1]).content_hash


# -- calibration and held-out ----------------------------------------------------------------------


def request(calibration: dict[str, Path], heldout: dict[str, Path], **changes: Any):
    values: dict[str, Any] = {"num_windows": 12, "heldout_windows": 5, "length": 64, "seed": 1}
    return WindowRequest(
        calibration={name: str(path) for name, path in calibration.items()},
        heldout={name: str(path) for name, path in heldout.items()},
        **values | changes,
    )


@pytest.mark.parametrize("heldout", ["none", "same", "copy"])
def test_one_text_is_split_80_to_20(heldout, tmp_path, tokenizer, ids_of, rng):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(TEXT.read_bytes())
    given = {"none": {}, "same": {"h": TEXT}, "copy": {"h": copy}}[heldout]
    ids = ids_of(TEXT)
    at = len(ids) - len(ids) // 5
    # every window there is, so that a wrong border shows
    wanted = {"num_windows": at // 64 - 2, "heldout_windows": (len(ids) - at) // 64 - 2}
    calibration, held = cut_windows(
        request({"c": TEXT}, given, seed=int(rng.integers(99)), **wanted), tokenizer
    )
    assert len(set(places(calibration, ids[:at]))) == calibration.num_windows
    assert len(set(places(held, ids[at:]))) == held.num_windows
    assert calibration.corpora == (("c", wanted["num_windows"]),)
    assert held.corpora == (("h" if given else "c", wanted["heldout_windows"]),)


def test_different_texts_are_used_whole(tokenizer, ids_of):
    size = len(ids_of(TEXT)) // 64 - 2
    calibration, held = cut_windows(request({"c": TEXT}, {"h": OTHER}, num_windows=size), tokenizer)
    assert max(places(calibration, ids_of(TEXT))) > 0.9 * 64 * size
    assert len(set(places(held, ids_of(OTHER)))) == 5


def test_several_corpora_keep_their_names_and_each_gives_its_windows(tmp_path, tokenizer, rng):
    np.savez(tmp_path / "t.npz", tokens=rng.integers(4096, size=(3, 70)))
    calibration, held = cut_windows(
        request({"a": TEXT, "t": tmp_path / "t.npz", "b": OTHER}, {"h": OTHER}), tokenizer
    )
    assert calibration.corpora == (("a", 12), ("t", 3), ("b", 12))
    assert calibration.length == 70
    assert held.corpora == (("h", 5),)
    only_texts, held = cut_windows(request({"a": TEXT, "b": OTHER}, {}), tokenizer)
    assert only_texts.corpora == (("a", 12), ("b", 12))
    assert held.corpora == (("a", 5), ("b", 5))


def test_windows_in_calibration_and_heldout_alike_are_refused(tmp_path, tokenizer, rng):
    tokens = rng.integers(4096, size=(6, 16))
    np.savez(tmp_path / "c.npz", tokens=tokens)
    np.savez(tmp_path / "h.npz", tokens=np.concatenate([rng.integers(4096, size=(2, 16)), tokens]))
    with pytest.raises(InputError) as error:
        cut_windows(request({"c": tmp_path / "c.npz"}, {"h": tmp_path / "h.npz"}), tokenizer)
    assert_one_line(
        error, "6 windows are in calibration and held-out alike, first held-out window 2"
    )


def shares_a_run(a: TokenWindows, b: TokenWindows, run: int) -> bool:
    def runs(windows: TokenWindows) -> set[tuple[int, ...]]:
        return {
            tuple(tokens[i : i + run])
            for tokens, length in zip(windows.tokens_NT.tolist(), windows.lengths_N, strict=True)
            for i in range(length - run + 1)
        }

    return not runs(a).isdisjoint(runs(b))


@pytest.mark.parametrize(
    ("length", "run"), [(40, 32), (64, 32), (100, 50), (200, 100)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("change", [-1, 0])
def test_a_verbatim_run_of_a_window_is_refused_from_its_length_on(length, run, change, rng):
    planted = run + change
    for high in (2, 4096):
        calibration, held = (
            rng.integers(high, size=(5, length)) + first for first in (0, high)
        )  # no token in common
        row, other = rng.integers(5, size=2)
        source, target = rng.integers(length - planted + 1, size=2)
        held[row, target : target + planted] = calibration[other, source : source + planted]
        sides = TokenWindows.from_tokens(calibration), TokenWindows.from_tokens(held)
        assert shares_a_run(*sides, run) == (change == 0)
        if change == 0:
            with pytest.raises(InputError) as error:
                check_no_overlap(*sides)
            assert_one_line(error, f"verbatim run of {run} tokens")
        else:
            check_no_overlap(*sides)


def test_windows_of_different_lengths_and_paddings_are_compared_by_their_tokens(rng):
    """Padding is no text: runs of zeros behind the last scored position are not shared."""
    scored = np.arange(80) < rng.integers(2, 48, size=(6, 1))
    scored[:, 0] = False
    calibration = TokenWindows.from_tokens(rng.integers(1, 4096, size=(6, 80)), scored)
    held = TokenWindows.from_tokens(rng.integers(1, 4096, size=(6, 80)), scored)
    check_no_overlap(calibration, held)
    check_no_overlap(calibration, random_windows(rng, length=8))
    whole = random_windows(rng, length=80)
    with pytest.raises(InputError, match="verbatim run of 32"):
        check_no_overlap(whole, TokenWindows.from_tokens(whole.tokens_NT[:, 7:50]))


# -- bad input -------------------------------------------------------------------------------------


def one(dtype: Any = np.int64) -> np.ndarray:
    return np.ones((2, 3), dtype=dtype)


@pytest.mark.parametrize(
    ("tokens", "scored", "words"),
    [
        (np.arange(5), None, "must be [N, T]"),
        (np.ones((0, 5), dtype=int), None, "must be [N, T]"),
        (np.ones((5, 1), dtype=int), None, "T >= 2: got shape [5, 1]"),
        (one(float), None, "must be integers: got float64"),
        (one(bool), None, "must be integers: got bool"),
        (-one(), None, "must lie in 0..2**31-1"),
        (one() << 31, None, "must lie in 0..2**31-1"),
        (one(), one(), "scored must be bool [2, 3]: got int64 [2, 3]"),
        (one(), one(bool)[:1], "scored must be bool [2, 3]: got bool [1, 3]"),
        (one(), one(bool), "position 0"),
        (one(), np.array([[False, True, True], [False] * 3]), "window 1 has no scored position"),
    ],
)
def test_token_arrays_of_another_form_are_refused(tokens, scored, words):
    with pytest.raises(InputError) as error:
        TokenWindows.from_tokens(tokens, scored, name="mine")
    assert_one_line(error, words)
    assert "corpus 'mine'" in str(error.value)


def write_npz(path: Path, rng, kind: str) -> None:
    tokens = np.arange(8000).reshape(2, -1)
    if kind == "name":
        np.savez_compressed(path, ids=tokens)
    else:
        np.savez_compressed(path, tokens=tokens)
    whole = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "random":
        path.write_bytes(rng.bytes(500))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "damaged":
        path.write_bytes(whole[:300] + bytes(200) + whole[500:])
    elif kind == "an array":
        with path.open("wb") as file:
            np.save(file, np.ones((2, 3), dtype=int))
    elif kind == "objects":
        np.savez(path, tokens=np.array([[1, None]], dtype=object))


@pytest.mark.parametrize(
    ("kind", "words"),
    [("missing", "does not exist"), ("name", "no array named 'tokens'")]
    + [
        (k, "is no .npz of arrays")
        for k in ("random", "empty", "truncated", "damaged", "an array", "objects")
    ],
)
def test_an_npz_that_cannot_be_read_is_refused(kind, words, tmp_path, rng):
    path = tmp_path / "w.npz"
    write_npz(path, rng, kind)
    with pytest.raises(InputError) as error:
        TokenWindows.from_npz(path)
    assert_one_line(error, words)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", None, "does not exist"),
        ("a.txt", b"caf\xe9 " * 500, "cannot be read as UTF-8"),
        ("a.txt", b"", "too short: 0 tokens make 0 windows of 16; 4 are asked for"),
        ("a.txt", b"One line.", "too short"),
        ("a.txt", b"\n", "too short"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 has no text field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 3}\n', "line 3 has no text field 'text'"),
        ("a.jsonl", b'{"text": "a"', "line 1 is no JSON: "),
        ("a.jsonl", b"[3]", "record 1 has no text field 'text'"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(name, content, words, tmp_path, tokenizer):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        TokenWindows.from_file(path, tokenizer=tokenizer, num_windows=4, length=16)
    assert_one_line(error, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_windows": 0}, "need num_windows >= 1"),
        ({"length": 1}, "length >= 2"),
        ({"num_windows": 10**6}, "is too short"),
        ({"length": 10**6}, "is too short"),
        ({"tokenizer": "/no/such/folder"}, "is not a folder"),
        ({"tokenizer": FOLDER}, "no usable tokenizer"),
    ],
)
def test_cuts_that_cannot_be_made_are_refused(changes, words):
    values = {"tokenizer": MODEL, "num_windows": 4, "length": 16} | changes
    with pytest.raises(InputError) as error:
        TokenWindows.from_file(TEXT, **values)
    assert_one_line(error, words)


def test_a_folder_without_texts_is_refused(tmp_path, tokenizer):
    with pytest.raises(InputError) as error:
        TokenWindows.from_file(tmp_path, tokenizer=tokenizer, num_windows=1, length=9)
    assert_one_line(error, "holds no files")


def test_bos_is_refused_where_the_tokenizer_has_none(rng):
    stream = TokenStream("a", rng.integers(99, size=100).astype(np.int32), None)
    with pytest.raises(InputError) as error:
        stream.cut(2, 10, seed=0, bos=True)
    assert_one_line(error, "the tokenizer has no BOS")


def test_calibration_of_npz_alone_needs_a_heldout(tmp_path, tokenizer, rng):
    np.savez(tmp_path / "c.npz", tokens=rng.integers(99, size=(3, 20)))
    with pytest.raises(InputError) as error:
        cut_windows(request({"c": tmp_path / "c.npz"}, {}), tokenizer)
    assert_one_line(error, "name a held-out")


def test_repeated_names_and_repeated_windows_are_refused(rng, tokenizer):
    windows = random_windows(rng)
    with pytest.raises(InputError) as error:
        TokenWindows.concatenate([windows, random_windows(rng)])
    assert_one_line(error, "names repeat: tokens, tokens")
    renamed = TokenWindows(windows.tokens_NT, windows.scored_NT, (("other", 4),))
    with pytest.raises(InputError) as error:
        TokenWindows.concatenate([windows, renamed])
    assert_one_line(error, "the same window comes twice")
    with pytest.raises(InputError) as error:
        cut_windows(request({"a": TEXT, "b": TEXT}, {"h": OTHER}), tokenizer)
    assert_one_line(error, "the same window comes twice")
