"""Files are read as what they are, or refused: syntax is never scored as language."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from lpserve.data.text_files import read_text
from lpserve.errors import DataWarning, InputError

DOCUMENTS = ["One line.", 'Two\nlines, "quoted".', "A café\u2028and a separator", "=1+1"]
JOINED = "\n\n".join(DOCUMENTS)
RECORDS = [{"text": document, "url": "http://x"} for document in DOCUMENTS]
LINES = "\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS)


def table(delimiter: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["url", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(RECORDS)
    return text.getvalue()


def parquet_bytes(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def compressed(data: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


READ = {
    "a.txt": JOINED.encode(),
    "wiki.test.raw": JOINED.encode(),
    "noname": JOINED.encode(),
    "bom.txt": b"\xef\xbb\xbf" + JOINED.encode(),
    "a.jsonl": LINES.encode(),
    "a.JSONL": LINES.encode(),
    "a.ndjson": LINES.encode(),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "c4-train.00000-of-01024.json": LINES.encode(),
    "array.json": json.dumps(RECORDS, indent=1).encode(),
    "texts.json": json.dumps(DOCUMENTS).encode(),
    "one.json": json.dumps({"text": JOINED}).encode(),
    "a.csv": table(",").encode(),
    "a.tsv": table("\t").encode(),
    "a.parquet": parquet_bytes(RECORDS),
    "a.txt.gz": gzip.compress(JOINED.encode()),
    "a.json.gz": gzip.compress(LINES.encode()),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.csv.xz": lzma.compress(table(",").encode()),
    "a.jsonl.zst": compressed(LINES.encode(), "zstd"),
}


@pytest.mark.parametrize("name", READ)
def test_every_kind_gives_the_same_documents(name, tmp_path):
    assert read_text(written(tmp_path, name, READ[name]), field="text", name="c") == JOINED


@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "a.parquet"])
def test_another_field_is_read_by_its_name(name, tmp_path):
    path = written(tmp_path, name, READ[name])
    assert read_text(path, field="url", name="c") == "\n\n".join(["http://x"] * 4)


def test_a_folder_of_one_kind_is_read_in_name_order(tmp_path):
    for i in (2, 0, 1):
        line = json.dumps({"text": f"part {i}"})
        written(
            tmp_path,
            f"{i}.jsonl.gz" if i else "0.jsonl",
            gzip.compress(line.encode()) if i else line.encode(),
        )
    written(tmp_path, ".hidden", b"left out")
    (tmp_path / "folder.txt").mkdir()
    assert read_text(tmp_path, field="text", name="c") == "part 0\n\npart 1\n\npart 2"


SHAREGPT = [{"conversations": [{"from": "human", "value": "hi"}]}]

REFUSED = [
    ("a.txt", LINES.encode(), "holds JSON lines: name it .jsonl"),
    ("noname", LINES.encode(), "holds JSON lines"),
    ("a.txt", JOINED.encode("utf-16"), "is UTF-16: save it as UTF-8"),
    ("a.txt", "café".encode("latin-1") * 9, "cannot be read as UTF-8 (byte 3)"),
    ("a.txt", b"\0\1\2", "holds zero bytes"),
    ("a.npy", b"\x93NUMPY", "is arrays or weights, not a text"),
    ("a.pt", b"PK", "is arrays or weights, not a text"),
    ("a.tar.gz", b"", "is an archive"),
    ("a.html", b"<p>", "is markup"),
    (
        "a.json",
        json.dumps(SHAREGPT).encode(),
        "record 1 has no text field 'text'; its fields are conversations",
    ),
    ("a.json", b"{", "line 1 is no JSON: "),
    ("a.json", b"[" * 100_000, "line 1 is nested too deeply"),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"body": null, "url": 1}',
        "line 2 has no text field 'text'; its fields are body, url",
    ),
    ("a.jsonl", b'{"text": "a \\ud83d b"}', "line 1: the text holds half of a surrogate pair"),
    ("a.jsonl", b'[{"text": "a \\ud83d b"}]', "record 1: the text holds half of a surrogate pair"),
    ("a.csv", b"a,b\n1,2\n", "has no column 'text'; its columns are a, b"),
    ("a.csv", b"", "has no column 'text'"),
    ("a.csv", b'text,b\n"a,2\n', "line"),
    ("a.parquet", b"PAR1", "cannot be read as Parquet"),
    ("a.parquet", parquet_bytes([{"body": "a"}]), "has no column 'text'; its columns are body"),
    ("a.parquet", parquet_bytes([{"text": "a"}, {"text": [1]}][1:]), "row 1 has no text field"),
    ("a.txt.gz", b"no gzip", "cannot be decompressed"),
    ("a.txt.zst", b"no zstd", "cannot be decompressed"),
    ("a.txt.xz", b"no xz", "cannot be decompressed"),
    ("a.txt.gz", gzip.compress(b"a b " * (40 << 20)), "grows to more than 100 times"),
]


@pytest.mark.parametrize(
    ("name", "data", "told"), REFUSED, ids=[f"{n}-{t[:20]}" for n, _, t in REFUSED]
)
def test_what_is_no_text_is_refused_in_one_line(name, data, told, tmp_path):
    path = written(tmp_path, name, data)
    with pytest.raises(InputError) as caught:
        read_text(path, field="text", name="mine")
    message = str(caught.value)
    assert message.startswith(f"corpus 'mine': {path}")
    assert told in message
    assert "\n" not in message


def test_a_folder_of_several_kinds_is_refused(tmp_path):
    written(tmp_path, "README.txt", b"about the data")
    written(tmp_path, "a.jsonl", LINES.encode())
    written(tmp_path, "b.jsonl", LINES.encode())
    with pytest.raises(InputError, match=r"files of several kinds \(README.txt, a.jsonl\)"):
        read_text(tmp_path, field="text", name="c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no files"):
        read_text(tmp_path / "empty", field="text", name="c")


def test_what_has_no_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.txt")
    for path in (tmp_path / "fifo.txt", Path("/dev/zero")):
        with pytest.raises(InputError, match="is no regular file"):
            read_text(path, field="text", name="c")


@pytest.mark.parametrize(
    ("rows", "text", "told"),
    [
        (2 << 20, "a", "says it has 2,097,152 rows"),
        (1 << 19, "a" * 200, "grows to more than 100 times its size"),
    ],
)
def test_a_table_of_few_bytes_that_grows_is_refused(rows, text, told, tmp_path):
    """Equal texts are kept once: many rows take some kilobytes."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), [text])
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": column}), path)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(InputError, match=told):
        read_text(path, field="text", name="c")


NULLS = {
    "a.jsonl": b'{"text": "one"}\nnull\n{"text": null}\n{"text": "two"}\n',
    "a.json": b'[{"text": "one"}, null, {"text": null}, {"text": "two"}]',
    "a.parquet": parquet_bytes([{"text": t} for t in ("one", None, None, "two")]),
}


@pytest.mark.parametrize("name", NULLS)
def test_records_that_are_null_are_left_out_and_counted(name, tmp_path):
    (tmp_path / name).write_bytes(NULLS[name])
    with pytest.warns(DataWarning, match=f"corpus 'c': .*{name}: left out 2 of 4 records"):
        assert read_text(tmp_path / name, field="text", name="c") == "one\n\ntwo"


def test_records_are_read_for_their_text_alone(tmp_path):
    """An empty part of a folder, and half a character beside the text, say nothing of the text."""
    (tmp_path / "1.jsonl").write_text('{"text": "one", "title": "\\ud83d"}\n')
    (tmp_path / "2.jsonl").write_text("")
    assert read_text(tmp_path, field="text", name="c").strip() == "one"


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_text(tmp_path / "missing.txt", field="text", name="c")
    with pytest.raises(InputError, match="File name too long"):
        read_text(tmp_path / ("a" * 300), field="text", name="c")
