"""A surrogate of one's own: one module with `build`, one entry in `SURROGATES`."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest

from lpserve.config import SURROGATES, RunConfig
from lpserve.errors import InputError
from lpserve.masks import all_masks
from lpserve.surrogate import KernelSurrogate, acquisition_model, make_surrogate


def test_one_module_and_one_entry_register_a_surrogate(monkeypatch):
    def build(kind: str, seed: int, *, quick: bool) -> KernelSurrogate:
        calls.append((kind, seed, quick))
        return KernelSurrogate("ridge")

    calls: list[tuple[str, int, bool]] = []
    module = ModuleType("my_surrogate")
    monkeypatch.setattr(module, "build", build, raising=False)
    monkeypatch.setitem(sys.modules, "my_surrogate", module)
    with pytest.raises(InputError, match="surrogate must be one of auto, ridge"):
        RunConfig(model="m", calibration={"a": "b"}, surrogate="mine")
    monkeypatch.setitem(SURROGATES, "mine", "my_surrogate")
    assert RunConfig(model="m", calibration={"a": "b"}, surrogate="mine").surrogate == "mine"
    surrogate = make_surrogate("mine", 3, quick=True)
    assert calls == [("mine", 3, True)]
    masks = all_masks(4)
    surrogate.fit(masks, masks.sum(axis=1).astype(np.float64))
    assert acquisition_model(surrogate) is surrogate
