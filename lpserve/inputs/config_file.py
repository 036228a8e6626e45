"""Keys and values of a configuration or a study, from a TOML or YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpserve.errors import InputError
from lpserve.inputs.documents import toml_value, yaml_value
from lpserve.inputs.files import read_document

MAX_CONFIG_BYTES = 1 << 20


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Keys and values of a TOML or YAML file, unchecked; `-` in a key stands for `_`.

    Raises:
        InputError: the file is missing, of another kind, too large, or cannot be parsed.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise InputError(f"config {path}: the name must end in .toml, .yaml or .yml")
    # a relative path is looked for where the process runs, in a Ray job the job's own folder
    text = read_document(path.absolute(), most=MAX_CONFIG_BYTES)
    parse = toml_value if path.suffix == ".toml" else yaml_value
    values = parse(text, f"config {path}")
    if not isinstance(values, dict):
        raise InputError(f"config {path} must hold keys and values")
    plain: dict[str, Any] = {}
    for name, value in values.items():
        key = str(name).replace("-", "_")
        if key in plain:
            raise InputError(f"config {path}: {key!r} is given twice, with - and with _")
        plain[key] = value
    return plain
