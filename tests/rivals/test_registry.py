"""The registry of rivals: every name leads to a proposer that starts, and listing is cheap."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lpserve.errors import InputError
from lpserve.rivals.proposer import SearchSetting
from lpserve.rivals.registry import GRADIENTS, HIDDEN_STATES, RIVALS

MEASURED = {
    None: None,
    HIDDEN_STATES: SimpleNamespace(influence_P=np.arange(8.0), distance_LL=np.ones((9, 9))),
    GRADIENTS: np.arange(8.0),
}


def setting(budget: int = 60, measured: object = None) -> SearchSetting:
    return SearchSetting(
        num_players=8, max_removed=3, num_windows=4, budget=budget, seed=0, measured=measured
    )


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_starts_with_masks_of_its_game(name):
    rival = RIVALS[name]
    ask = next(rival.make(setting(measured=MEASURED[rival.needs])))
    assert ask.masks_MP.dtype == bool
    assert ask.masks_MP.shape[1] == 8
    assert (~ask.masks_MP).sum(axis=1).max() <= 8


@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.plans_its_budget])
def test_a_rival_that_plans_its_budget_refuses_one_that_is_too_small(name):
    with pytest.raises(InputError, match="budget"):
        next(RIVALS[name].make(setting(budget=5)))


def test_listing_the_rivals_loads_no_numeric_library():
    code = "import sys, lpserve.rivals.registry; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
