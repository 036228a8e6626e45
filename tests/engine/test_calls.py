"""Hidden states in outputs of every form that modules return."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from lpserve.engine.calls import Slot, hidden_of, like_output
from lpserve.errors import EngineError

STATE, OTHER = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize("form", [tuple, list])
def test_the_first_of_several_is_the_state_and_the_rest_is_none(form):
    output = form([STATE, OTHER, 3])
    assert hidden_of(output) is STATE
    assert like_output(output, OTHER) == form([OTHER, None, None])


def test_a_tensor_is_the_state():
    assert hidden_of(STATE) is STATE
    assert like_output(STATE, OTHER) is OTHER


def test_an_output_of_transformers_keeps_its_class():
    output = BaseModelOutputWithPast(**{"last_hidden_state": STATE, "hidden_states": (OTHER,)})
    assert hidden_of(output) is STATE
    made = like_output(output, OTHER)
    assert isinstance(made, BaseModelOutputWithPast)
    assert made.last_hidden_state is OTHER
    assert made.hidden_states is None


@pytest.mark.parametrize("output", [None, (), (3, STATE), "text"])
def test_no_state_is_refused(output):
    with pytest.raises(EngineError, match=r"a layer returned .*, not a tensor"):
        hidden_of(output)


def test_a_slot_is_a_position_or_a_name():
    assert Slot(1).of((OTHER, STATE), {}) is STATE
    assert Slot("hidden").of((OTHER,), {"hidden": STATE}) is STATE
