"""Tokenizers on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpserve.errors import InputError, LpserveError, first_line
from lpserve.inputs.documents import read_json_object, shown
from lpserve.inputs.files import is_there
from lpserve.model.gguf import readable_folder
from lpserve.model.loading import transformers_library
from lpserve.model.local import FROM_FOLDER

MOST_IDS = 10_000_000
"""Token ids must be below: vocabularies have some 300,000, and a table of all ids is allocated."""


def load_tokenizer(tokenizer: str | Path | Any) -> Any:
    """A transformers tokenizer from a local folder; anything else is returned as it is."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    folder = readable_folder(tokenizer)
    if not folder.is_dir():
        raise InputError(f"tokenizer {str(tokenizer)!r} is not a folder")
    _check_ids(folder / "tokenizer.json")
    try:
        return transformers_library().AutoTokenizer.from_pretrained(str(folder), **FROM_FOLDER)
    except LpserveError:  # a signal
        raise
    except Exception as error:  # transformers raises many kinds for a folder without a tokenizer
        line = first_line(error)
        if "custom code" in line:
            line = "it needs Python code of its own, which is never run"
        raise InputError(
            f"no usable tokenizer in {tokenizer} ({line}); add tokenizer.json or give .npz windows"
        ) from None


def _check_ids(path: Path) -> None:
    """Raise InputError where a tokenizer.json names a token id that no vocabulary has."""
    if not is_there(path):
        return
    content = read_json_object(path, repeats=True)
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    wrong = [i for i in ids if isinstance(i, int) and not 0 <= i < MOST_IDS]
    if wrong:
        raise InputError(f"{path} names token id {shown(wrong[0])}: ids are 0 to {MOST_IDS - 1:,}")
