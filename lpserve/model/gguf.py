"""Models in GGUF, the format of llama.cpp: dequantized once by transformers, then read as others.

transformers reads a GGUF file into one of its own models and dequantizes the weights. What it makes
of it is kept as a checkpoint folder (float32, which holds dequantized weights exactly) in the
user's cache folder, and engines, tokenizers and exports read that. Imports transformers late.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from lpserve.errors import DataWarning, InputError, LpserveError, typed_first_line
from lpserve.inputs.documents import read_json_object
from lpserve.inputs.files import is_there, reason_of, regular_size
from lpserve.model.gguf_header import tensor_types
from lpserve.model.local import FROM_FOLDER, cache_folder

SUFFIX = ".gguf"
RECORD_NAME = "lpserve-gguf.json"
"""Beside the checkpoint: the file that it was made of. Written last."""


def readable_folder(model: str | Path) -> Path:
    """The checkpoint folder of a model: the path itself, or what a GGUF file was converted to.

    A path is of GGUF when it ends in `.gguf`, or is a folder with one such file and no config.json.

    Raises:
        InputError: the file is damaged, or transformers cannot read it; the package `gguf` is
            missing; the disk has no room; or a folder holds several such files.
    """
    path = Path(model)
    file = _gguf_file(path)
    return path if file is None else _converted(file)


def convert(file: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as the checkpoint folder `target`, in float32.

    The folder takes its name when it is complete.

    Raises:
        InputError: as `readable_folder`; or another folder of that name is there.
    """
    types, numbers = tensor_types(file)
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"model {file} is a GGUF file, which takes the package gguf: pip install gguf"
        )
    warnings.warn(
        f"{file}: weights are dequantized to float32 ({4 * numbers / 1e9:.2g} GB), once, into "
        f"{target}; scores are of these",
        DataWarning,
        stacklevel=2,
    )
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < 4.4 * numbers:
            raise InputError(
                f"{target.parent} has {free / 1e9:.2g} GB free, the weights of {file.name} take "
                f"{4 * numbers / 1e9:.2g} GB in float32: set XDG_CACHE_HOME to a folder with room"
            )
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as made:
            _write_checkpoint(file, Path(made))
            _write_record(file, types, Path(made))
            with suppress(OSError):  # another process was faster: its folder is the same
                Path(made).rename(target)
            Path(made).mkdir(exist_ok=True)  # for the end of the block to remove
    except OSError as error:
        raise InputError(f"{target.parent}: {reason_of(error)}") from None
    if not is_there(target / RECORD_NAME):
        raise InputError(f"{target} cannot be written: remove what is there")


def gguf_record(folder: Path) -> dict[str, Any] | None:
    """What a converted folder was made of: `file`, `sha256`, `types` of its tensors, and the
    version of `transformers`; None: the folder is no converted one."""
    path = folder / RECORD_NAME
    return read_json_object(path) if is_there(path) else None


def _gguf_file(path: Path) -> Path | None:
    is_folder = is_there(path) and path.is_dir()
    if path.suffix.lower() == SUFFIX and not is_folder:
        return path
    if not is_folder or is_there(path / "config.json"):
        return None
    try:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() == SUFFIX)
    except OSError as error:
        raise InputError(f"{path}: {reason_of(error)}") from None
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise InputError(f"model {path} holds several GGUF files ({names}): give the path of one")
    return found[0] if found else None


def _converted(file: Path) -> Path:
    regular_size(file)
    found = file.stat()
    state = [str(file.resolve()), found.st_size, found.st_mtime_ns, found.st_ino]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    target = cache_folder("gguf") / f"{file.stem}-{key}"
    if not is_there(target / RECORD_NAME):
        convert(file, target)
    return target


def _write_checkpoint(file: Path, folder: Path) -> None:
    """The model and its tokenizer as transformers reads them."""
    import transformers

    folder_of_file = str(file.parent)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder_of_file,
            gguf_file=file.name,
            dtype="float32",
            quantization_config=transformers.GgufConfig(dequantize=True),
            **FROM_FOLDER,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder_of_file, gguf_file=file.name, **FROM_FOLDER
        )
    except LpserveError:  # a signal
        raise
    except Exception as error:  # whatever transformers and the package raise for a file
        raise InputError(
            f"model {file}: transformers cannot read it: {typed_first_line(error)}"
        ) from None
    vars(model.config).pop("quantization_config", None)  # the weights are plain numbers now
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_record(file: Path, types: dict[str, int], folder: Path) -> None:
    record = {
        "file": str(file.resolve()),
        "sha256": _sha256(file),
        "types": types,
        "transformers": importlib.metadata.version("transformers"),
    }
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
