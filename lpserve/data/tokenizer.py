"""Tokenizers on disk."""

from __future__ import annotations

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
        loaded = AutoTokenizer.from_pretrained(str(tokenizer), **FROM_FOLDER)
        loaded("a", add_special_tokens=False)  # some faults of its files show at work
        return loaded
    except Exception as error:  # transformers raises many kinds for a folder without a tokenizer
        line = first_line(error)
        if "custom code" in line:
            line = "it needs Python code of its own, which is never run"
        raise InputError(
            f"no usable tokenizer in {tokenizer} ({line}); add tokenizer.json or give .npz windows"
        ) from None
