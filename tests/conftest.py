"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from tests.reference import save_model, small_config

SEED = int(os.environ.get("LPSERVE_TEST_SEED", secrets.randbits(31)))


def pytest_report_header() -> str:
    return f"fresh random inputs from LPSERVE_TEST_SEED={SEED}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh inputs each run; set LPSERVE_TEST_SEED to repeat one."""
    return np.random.default_rng([SEED, *request.node.nodeid.encode()])


@pytest.fixture
def one_blas_thread():
    """As in a run: on matrices this small, threads only wait for each other."""
    with threadpool_limits(1):
        yield


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
