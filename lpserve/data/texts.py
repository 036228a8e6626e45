"""Texts and tokenizers on disk: what windows and questions are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lpserve.errors import InputError, first_line
from lpserve.model.own_code import FROM_FOLDER


def load_tokenizer(tokenizer: str | Path | Any) -> Any:
    """A transformers tokenizer from a local folder; anything else is returned as it is."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    if not Path(tokenizer).is_dir():
        raise InputError(f"tokenizer {str(tokenizer)!r} is not a folder")
    try:
        return AutoTokenizer.from_pretrained(str(tokenizer), **FROM_FOLDER)
    except Exception as error:  # transformers raises many kinds for a folder without a tokenizer
        line = first_line(error)
        if "custom code" in line:
            line = "it needs Python code of its own, which is never run"
        raise InputError(
            f"no usable tokenizer in {tokenizer} ({line}); add tokenizer.json or give .npz windows"
        ) from None


def read_text(path: Path, *, field: str, name: str) -> str:
    """The text of a file, of a folder's `.txt` files in name order, or of a `.jsonl` file's field;
    several are joined by a blank line.

    Args:
        field: the field of every jsonl record that holds its text.
        name: the corpus, for messages.

    Raises:
        InputError: missing, not UTF-8, or a record without that field.
    """
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise InputError(f"corpus {name!r}: folder {path} holds no .txt files")
        return "\n\n".join(read_text(file, field=field, name=name) for file in files)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"corpus {name!r}: {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"corpus {name!r}: {path} cannot be read as UTF-8: {error}") from None
    if path.suffix != ".jsonl":
        return text
    records = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError):
            value = None
        if not isinstance(value, str):
            raise InputError(f"corpus {name!r}: {path} line {number} has no text field {field!r}")
        records.append(value)
    return "\n\n".join(records)
