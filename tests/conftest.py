"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from lpserve.testing.reference import save_model, small_config
from lpserve.testing.runs import write_texts

# in the environment, so that pytest's worker processes have the one that is told
SEED = int(os.environ.setdefault("LPSERVE_TEST_SEED", str(secrets.randbits(31))))

FRESH_STATISTICS = os.environ.get("LPSERVE_FRESH_STATISTICS") == "1"


def pytest_report_header() -> str:
    inputs = f"fresh random inputs from LPSERVE_TEST_SEED={SEED}"
    return inputs if FRESH_STATISTICS else f"{inputs}, but of statistical claims"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules with the longest tests first: at the end no worker is left alone with one of them."""
    waits = ("vllm", "ray", "process", "thorough")
    order: dict[Path, int] = {}
    for item in items:
        marked = [n for n, mark in enumerate(waits) if item.get_closest_marker(mark)]
        order[item.path] = min([*marked, order.get(item.path, len(waits))])
    items.sort(key=lambda item: order[item.path])


def drawn_for(request: pytest.FixtureRequest, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, *request.node.nodeid.encode()])


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh inputs each run, for what holds of all of them; set LPSERVE_TEST_SEED to repeat one."""
    return drawn_for(request, SEED)


@pytest.fixture
def statistical_rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """For what holds of most inputs (an average, a coverage, a found optimum): the same inputs each
    run, so that a failure is a change, and fresh ones with LPSERVE_FRESH_STATISTICS=1."""
    return drawn_for(request, SEED if FRESH_STATISTICS else 0)


@pytest.fixture(scope="module")
def module_rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """`rng` for the fixtures of a module."""
    return drawn_for(request, SEED)


@pytest.fixture
def texts(tmp_path: Path, rng: np.random.Generator) -> dict[str, str]:
    """Calibration and held-out windows as .npz: name -> path."""
    return write_texts(tmp_path, rng)


@pytest.fixture
def one_blas_thread():
    """As in a run: on matrices this small, threads only wait for each other."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where an engine is opened in this process."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("an engine was opened")

    monkeypatch.setattr("lpserve.scoring.open.LocalPool", opened)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory):
    """family -> folder of a tiny random model, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp("models") / family
            made[family] = save_model(small_config(family), path, SEED)
        return made[family]

    return make
