"""Types of configuration values, each with the rule that errors state (`lpserve.inputs.shapes`)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any

from msgspec import Meta

MOST = 2**63 - 1
"""No number is larger: arrays and databases hold 64 bits."""
PART_NAME = r"^\d{1,18}\.(?:attention|mlp)\Z"
"""How a part of a layer is named: `7.attention`."""
GROUP_NAME = r"^[A-Za-z_]\w{0,63}\Z"
"""How a group of parts is named."""
PLAYER_NAME = f"(?:{PART_NAME})|(?:{GROUP_NAME})"
"""How what is no whole layer is named."""

COSTS = ("params", "flops", "kv")
"""Names of what players cost (`lpserve.model.costs`)."""
_SHARE = r"0?\.(?=\d*[1-9])\d{1,15}"
TARGETS = rf"^(?:{'|'.join(COSTS)})={_SHARE}(?:,{_SHARE})*\Z"
"""How shares of a cost are named: `params=0.9,0.8`."""


def one_of(names: Iterable[str]) -> Meta:
    """The rule that a text is one of these."""
    pattern = "|".join(map(re.escape, names))
    return Meta(pattern=rf"^(?:{pattern})\Z", description=f"one of {', '.join(names)}")


Text = Annotated[str, Meta(min_length=1, description="a text")]
Seconds = Annotated[float, Meta(gt=0, description="seconds above 0")]
Count = Annotated[int, Meta(ge=1, le=MOST, description="a whole number, at least 1")]
CountOr0 = Annotated[int, Meta(ge=0, le=MOST, description="a whole number, at least 0")]
Length = Annotated[int, Meta(ge=2, le=MOST, description="a whole number, at least 2")]
Share = Annotated[float, Meta(gt=0, lt=1, description="a number above 0 and below 1")]
Positive = Annotated[float, Meta(gt=0, le=1e300, description="a number above 0")]
Sizes = Annotated[tuple[int, int], Meta(description="two whole numbers, k_min and k_max")]
Options = Annotated[dict[str, Any], Meta(description="a table")]
Switch = Annotated[bool, Meta(description="true or false")]
PlayerKind = Annotated[
    str,
    Meta(pattern=r"^(?:layer|half|groups:.+)\Z", description="one of layer, half, groups:FILE"),
]
Targets = Annotated[
    str,
    Meta(
        pattern=TARGETS,
        description=f"one of {', '.join(COSTS)}, = and shares above 0 and below 1, such as "
        "params=0.9,0.8",
    ),
]
LayerNames = Annotated[
    list[Annotated[int, Meta(ge=0, le=MOST)] | Annotated[str, Meta(pattern=PLAYER_NAME)]],
    Meta(
        description="a list of layers, numbered from 0, of parts such as 7.attention, or of groups"
    ),
]


def default_round_size(num_players: int, goal: str) -> int:
    """Masks of a round where none is given.

    A search of small rounds knows more when it chooses the next: on two games of 12 and 16 layers
    rounds of 8 took a fifth fewer masks to all best sets than rounds of a mask a layer. Masks for
    values hardly depend on one another, and larger rounds keep more engines busy.
    """
    return max(8, num_players // 4) if goal == "plan" else num_players
