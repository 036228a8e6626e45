"""The text in files as people have them: plain, JSON, CSV, Parquet, compressed; files and folders.

A file is read as what it is, by its suffix, and by its content where a suffix may mean two things.
What would be taken for something else than it is (JSON as plain text, one of two kinds in a folder)
is refused: its syntax would be scored as if it were language.

Documents are joined by a blank line.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from lpserve.errors import DataWarning, InputError, first_line
from lpserve.inputs.files import decoded, read_bytes, reason_of, regular_size

_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
_RECORDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_NO_TEXT = {
    **dict.fromkeys((".npy", ".pt", ".pth", ".bin", ".safetensors", ".pkl"), "arrays or weights"),
    **dict.fromkeys((".html", ".htm", ".xml", ".yaml", ".yml", ".toml"), "markup"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z"), "an archive"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".xlsx"), "a table of another format"),
    **dict.fromkeys((".pdf", ".docx", ".epub"), "a document"),
}
"""Suffixes of files whose bytes are no text to score, and what such files are."""
GROWTH, ALLOWED_BYTES = 100, 64 << 20
"""A file may grow to this many times its size, or to this many bytes, whichever is more: text
compresses to a tenth, and a file that grows further is made to fill the memory."""
MOST_TEXT_BYTES = 4 << 30
"""Of one file: its tokens take eight times the memory."""
_MOST_ROWS = 1 << 20
"""Rows that a table of any size may say it has, beside one for each of its bytes."""
_LOOKED_AT = 3
"""Lines that must all be JSON objects for a file to be taken for JSON lines."""


def read_text(path: Path, *, field: str, name: str) -> str:
    """The text of a file, or of all files of a folder in name order, which must be of one kind.

    Args:
        field: the field or column of every record that holds its text.
        name: the corpus, for messages.

    Raises:
        InputError: missing, no regular file, not UTF-8, of a kind that holds no text or is not
            read here, or a record without that field.
    """
    try:
        if path.is_dir():
            return "\n\n".join(read_text(p, field=field, name=name) for p in _one_kind(path))
        return _text_of(path, field, name)
    except InputError as error:
        prefix = f"corpus {name!r}: "
        raise InputError(f"{prefix}{str(error).removeprefix(prefix)}") from None
    except OSError as error:
        raise InputError(f"corpus {name!r}: {path} cannot be read: {reason_of(error)}") from None


def kind_of(path: Path) -> str:
    """The suffix that says what a file is, in lower case, a compression's suffix left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _one_kind(folder: Path) -> list[Path]:
    """A folder's files in name order; hidden ones and folders inside are left out."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if not files:
        raise InputError(f"folder {folder} holds no files")
    kinds = {kind_of(file): file.name for file in reversed(files)}
    if len(kinds) > 1:
        raise InputError(
            f"folder {folder} holds files of several kinds ({', '.join(sorted(kinds.values()))}): "
            "name a file, or a folder of one kind"
        )
    return files


def _text_of(path: Path, field: str, name: str) -> str:
    kind = kind_of(path)
    if kind in _NO_TEXT:
        raise InputError(f"{path} is {_NO_TEXT[kind]}, not a text; give a text, or .npz windows")
    if kind == ".parquet":
        return _joined(_parquet_texts(path, field), path, name)
    text = _decoded(path)
    if kind in (".csv", ".tsv"):
        delimiter = "\t" if kind == ".tsv" else ","
        return _joined(_csv_texts(path, text, field, delimiter), path, name)
    if kind in _RECORDS:
        return _joined(_json_texts(path, text, field), path, name)
    if _looks_like_json_lines(text):
        raise InputError(f"{path} holds JSON lines: name it .jsonl, or they are scored as text")
    return text


def _joined(texts: Iterator[str | None], path: Path, name: str) -> str:
    """Records' texts as one; those without a text (null) are left out, and their number is told."""
    listed = list(texts)
    found = [text for text in listed if text is not None]
    if nulls := len(listed) - len(found):
        told = f"corpus {name!r}: {path}: left out {nulls} of {len(listed)} records, which are null"
        warnings.warn(told, DataWarning, stacklevel=2)
    return "\n\n".join(found)


# -- bytes -------------------------------------------------------------------------------------


def _decoded(path: Path) -> str:
    text = decoded(_bytes_of(path), path)
    if "\0" in text:
        raise InputError(f"{path} holds zero bytes: it is no text")
    return text


def _bytes_of(path: Path) -> bytes:
    """A file's bytes, decompressed as its suffix says; InputError where they are too many."""
    method = _COMPRESSED.get(path.suffix.lower())
    stored = read_bytes(path, most=MOST_TEXT_BYTES)
    if method is None:
        return stored
    limit = min(max(ALLOWED_BYTES, GROWTH * len(stored)), MOST_TEXT_BYTES)
    try:
        if method == "xz":
            with lzma.open(io.BytesIO(stored)) as file:
                data = file.read(limit + 1)
        else:
            with pa.input_stream(pa.py_buffer(stored), compression=method) as stream:
                data = stream.read(limit + 1)
    except (lzma.LZMAError, EOFError, pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be decompressed: {first_line(error)}") from None
    if len(data) > MOST_TEXT_BYTES:
        raise InputError(f"{path} grows to more than {MOST_TEXT_BYTES:,} bytes: cut it in parts")
    if len(data) > limit:
        raise InputError(f"{path} grows to more than {GROWTH} times its size: decompress it first")
    return data


# -- records -----------------------------------------------------------------------------------


def _looks_like_json_lines(text: str) -> bool:
    lines = [line for line in io.StringIO(text[: 1 << 20]) if line.strip()][:_LOOKED_AT]
    return bool(lines) and all(isinstance(_json_or_none(line), dict) for line in lines)


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_texts(path: Path, text: str, field: str) -> Iterator[str | None]:
    """Texts of JSON lines, of one JSON array of records or of texts, or of one record."""
    whole = _json_or_none(text) if text.lstrip()[:1] in ("[", "{") else None
    if isinstance(whole, dict) and "\n" in text.strip():  # on one line it is a line
        whole = [whole]
    if isinstance(whole, list):
        for number, record in enumerate(whole, start=1):
            where = f"{path} record {number}"
            yield (
                _checked(record, None, field, where)
                if isinstance(record, str)
                else _value(record, field, where)
            )
        return
    for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may hold U+2028
        if line.strip():
            where = f"{path} line {number}"
            yield _value(_record(line, where), field, where)


def _record(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON: {first_line(error)}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply") from None


def _value(record: Any, field: str, where: str) -> str | None:
    """A record's text; None where the record or its text is null."""
    if record is None or (isinstance(record, dict) and field in record and record[field] is None):
        return None
    value = record.get(field) if isinstance(record, dict) else None
    return _checked(value, record, field, where)


def _checked(value: Any, record: Any, field: str, where: str) -> str:
    """A record's text; InputError where it has none, with the fields that it has."""
    if not isinstance(value, str):
        there = (
            f"; its fields are {', '.join(map(str, record))}" if isinstance(record, dict) else ""
        )
        raise InputError(f"{where} has no text field {field!r}{there}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: the text holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
            "character"
        ) from None
    return value


def _csv_texts(path: Path, text: str, field: str, delimiter: str) -> Iterator[str | None]:
    """Texts of a table's column, which its first line names."""
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = list(rows.fieldnames or [])
        if field not in columns:
            raise InputError(
                f"{path} has no column {field!r}; its columns are {', '.join(columns)[:200]}"
            )
        for row in rows:
            yield _checked(row[field], row, field, f"{path} line {rows.line_num}")
    except csv.Error as error:
        raise InputError(f"{path} line {rows.line_num}: {error}") from None


def _parquet_texts(path: Path, field: str) -> Iterator[str | None]:
    """Texts of a table's column, read a batch after the other."""
    size = regular_size(path)
    limit = max(ALLOWED_BYTES, GROWTH * size)
    try:
        with parquet.ParquetFile(path) as table:
            if table.metadata.num_rows > max(_MOST_ROWS, size):
                raise InputError(f"{path} says it has {table.metadata.num_rows:,} rows: too many")
            columns = table.schema_arrow.names
            if field not in columns:
                raise InputError(
                    f"{path} has no column {field!r}; its columns are {', '.join(columns)[:200]}"
                )
            row = used = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                batch.validate(full=True)  # its texts are UTF-8
                for value in batch.column(0).to_pylist():
                    row += 1
                    if value is None:
                        yield None
                        continue
                    text = _checked(value, None, field, f"{path} row {row}")
                    used += len(text) + 2
                    if used > limit:
                        raise InputError(f"{path} grows to more than {GROWTH} times its size")
                    yield text
    except pa.ArrowException as error:
        raise InputError(f"{path} cannot be read as Parquet: {first_line(error)}") from None
