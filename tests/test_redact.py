"""Passwords and tokens in addresses appear in no file and no message."""

from __future__ import annotations

import json

import pytest

from lpserve.cli.entry import main
from lpserve.config import as_json
from lpserve.redact import redact
from lpserve.testing.runs import make_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://anna:hunter2@host:5000/x", "http://***@host:5000/x"),
        ("postgresql+psycopg2://anna:p%40ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("https://tok3n@host", "https://***@host"),
        ("https://a:b@c@host/x", "https://***@host/x"),
        ("https://host/x?token=abc&page=2", "https://host/x?token=***&page=2"),
        ("https://host/x?page=2&api_key=abc#top", "https://host/x?page=2&api_key=***#top"),
        (
            "https://host/x?X-Amz-Signature=abc;sig=def",
            "https://host/x?X-Amz-Signature=***;sig=***",
        ),
        (
            "cannot reach 'ftp://u:p@h' or (http://u:q@h/z)",
            "cannot reach 'ftp://***@h' or (http://***@h/z)",
        ),
        ("sqlite:///runs/mlflow.db", "sqlite:///runs/mlflow.db"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("mail anna@host about https://host", "mail anna@host about https://host"),
    ],
)
def test_what_is_secret_in_an_address_is_replaced(text, expected):
    assert redact(text) == expected
    assert redact(expected) == expected


def test_secrets_are_found_outside_their_address_too():
    address = "https://anna:p%40ss@host/x?token=t0ken"
    told = "login with 'p@ss' failed (p%40ss, t0ken) at host"
    assert redact(told, address) == "login with '***' failed (***, ***) at host"


ADDRESSES = [
    "http://anna:hunter2@127.0.0.1:9/",
    "http://127.0.0.1:9/?token=hunter2",
    "http://hunter2@127.0.0.1:9",
    "postgresql://anna:hunter2@127.0.0.1:9/mlflow",
    "nonsense://anna:hunter2@127.0.0.1:9/mlflow",
    "http://anna:hunter2@127.0.0.1:notaport/",
]


@pytest.mark.filterwarnings("ignore")  # mlflow's own
@pytest.mark.thorough
@pytest.mark.parametrize("address", ADDRESSES)
def test_a_run_tells_no_secret_of_its_mlflow_address(address, tmp_path, texts, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = make_config(tmp_path, texts, mlflow=address)
    assert "hunter2" not in json.dumps(as_json(config))
    flags = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in (
            ("model", "synthetic"),
            ("engine", "synthetic"),
            ("calibration", texts["calibration"]),
            ("heldout", texts["heldout"]),
            ("budget", 90),
            ("max_removed", 4),
            ("mlflow", address),
            ("out", tmp_path / "out"),
        )
    ]
    assert main(["run", *flags]) == 2
    told = capsys.readouterr()
    assert "mlflow" in told.err
    assert "hunter2" not in told.err + told.out
    assert len(told.err.strip().splitlines()) == 1
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert b"hunter2" not in file.read_bytes(), file
