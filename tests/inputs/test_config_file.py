"""Keys and values of configurations and studies: both formats give the same, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpserve.errors import InputError
from lpserve.inputs.config_file import MAX_CONFIG_BYTES, load_config_file


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_toml_and_yaml_give_the_same_keys(tmp_path):
    toml = written(tmp_path, "a.toml", 'model = "m"\nmax-removed = 3\nsizes = [1, 4]\n')
    yaml = written(tmp_path, "a.yaml", "model: m\nmax_removed: 3\nsizes: [1, 4]\n")
    wanted = {"model": "m", "max_removed": 3, "sizes": [1, 4]}
    assert load_config_file(toml) == load_config_file(yaml) == wanted


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.txt", "", r"the name must end in \.toml"),
        ("a.yaml", "- 1\n- 2\n", "must hold keys and values"),
        ("a.toml", "max-removed = 3\nmax_removed = 4\n", "'max_removed' is given twice, with -"),
        ("a.toml", "model = ", "a.toml"),
        ("a.yaml", "x" * (MAX_CONFIG_BYTES + 1), "a.yaml"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(name, text, reason, tmp_path):
    path = written(tmp_path, name, text)
    with pytest.raises(InputError, match=reason) as caught:
        load_config_file(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml"):
        load_config_file(tmp_path / "none.toml")
