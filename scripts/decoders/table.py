"""The page of the sweep's records: which decoders are served, and why the others are not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Records = Mapping[str, Mapping[str, Any]]
EXACT = 1e-5
"""Largest relative difference in float32 that rounding explains (sums in another order)."""


def page(folder: Path) -> str:
    """docs/engines/decoders.md, from the records of the stages in a folder."""
    score, export, vllm = (_tried(_stage(folder, name)) for name in ("score", "export", "vllm"))
    versions = json.loads((folder / "score.json").read_text())["versions"]
    parts = [
        "# Every decoder\n",
        "Tiny random models (6 layers) of every causal decoder of transformers "
        f"{versions['transformers']}, of other forms of their configurations, of older ways to "
        "write config.json, and of checkpoints that also read pictures. Made by "
        "`scripts/decoders/sweep.py`, which uses nothing of lpserve to say what is right: the "
        "model with the dropped layers deleted. Names are model types; after a colon another "
        "form.\n",
        *_scoring(score),
        *(_halves(_tried(_stage(folder, "halves"))) if (folder / "halves.json").exists() else ()),
        *_exports(export),
        *_vllm(vllm, versions["vllm"]),
    ]
    return "\n".join(parts)


def counts(folder: Path) -> dict[str, int]:
    """What README tells of the sweep."""
    score, export = _tried(_stage(folder, "score")), _tried(_stage(folder, "export"))
    return {
        "models": len(score),
        "scored": len(_of(score, "served")),
        "exported": len(_of(export, "served")),
        "exports": len(export),
    }


def _stage(folder: Path, name: str) -> Records:
    return json.loads((folder / f"{name}.json").read_text())["records"]


def _tried(records: Records) -> Records:
    return {name: one for name, one in records.items() if one["status"] != "not built"}


def _of(records: Records, status: str) -> Records:
    return {name: one for name, one in records.items() if one["status"] == status}


def _scoring(records: Records) -> Iterable[str]:
    served = _of(records, "served")
    half = {
        n: one["bfloat16"] for n, one in served.items() if one["bfloat16"]["status"] == "served"
    }
    yield "## Scored with transformers\n"
    yield (
        f"{len(served)} of {len(records)} models. In float32 every window's loss is within "
        f"{_most(served, 'worst')} (relative) of the reference, windows of unequal length within "
        f"{_most(served, 'unequal')}; in bfloat16 {len(half)} are served, within "
        f"{_most(half, 'worst')} of the same model in bfloat16.\n"
    )
    yield f"{_names(served)}\n"
    refused = {n: one["reason"] for n, one in records.items() if n not in served}
    refused |= {
        f"{n} in bfloat16": one["bfloat16"]["reason"] for n, one in served.items() if n not in half
    }
    yield from _reasons(refused)


def _halves(records: Records) -> Iterable[str]:
    served = _of(records, "served")
    exact = {n: one for n, one in served.items() if max(one["worst"], one["parts"]) < EXACT}
    yield "## Attention and feed-forward parts apart\n"
    yield (
        f"{len(exact)} of {len(records)} models with `--players half`, in transformers: masks of "
        f"both parts of layers within {_most(exact, 'worst')} of the layers deleted, random masks "
        f"of parts within {_most(exact, 'parts')} of the model with the same modules zeroed.\n"
    )
    yield f"{_names(exact)}\n"
    others = {n: one["reason"] for n, one in records.items() if n not in served}
    for name, one in served.items():
        if name not in exact:
            others[name] = f"off by {max(one['worst'], one['parts']):.0e}"
    yield from _reasons(others)


def _exports(records: Records) -> Iterable[str]:
    whole = _of(records, "served")
    sets = [one for record in records.values() for one in record["sets"].values()]
    written = [one for one in sets if one["status"] == "served"]
    worst = max((one["worst"] for one in written), default=0.0)
    yield "## Exported\n"
    yield (
        f"Without layers 1; 0 and 3; 5; 2, 3 and 4: {len(written)} of {len(sets)} sets were "
        f"written, loaded by transformers and scored within {worst:.0e} of the reference; all four "
        f"of {len(whole)} of {len(records)} models. "
        "Wherever the unpruned model continues a text alike with a cache and without, so did the "
        f"exported one, but for: {_unlike(records) or 'none'}.\n"
    )
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, record in records.items():
        for removed, one in record["sets"].items():
            if one["status"] != "served":
                reasons.setdefault((name, one["reason"]), []).append(removed[1:-1])
    yield from _reasons(
        {f"{name} without {'; '.join(some)}": reason for (name, reason), some in reasons.items()}
    )


def _unlike(records: Records) -> str:
    found = [
        f"{name} without {removed[1:-1]} ({one['continues']})"
        for name, record in records.items()
        if record["whole_continues"] == "same"
        for removed, one in record["sets"].items()
        if one["status"] == "served" and one["continues"] != "same"
    ]
    return "; ".join(found)


def _vllm(records: Records, version: str) -> Iterable[str]:
    served = _of(records, "served")
    told = {n: one for n, one in served.items() if one["told"]}
    exact = {n: one for n, one in served.items() if n not in told and "dtype" not in one}
    yield "## Scored with vLLM\n"
    yield (
        f"{len(served)} of {len(records)} models tried in vLLM {version}'s build for CPU, which "
        "lacks many kernels. "
        f"{len(exact)} are within {_most(exact, 'worst')} of transformers in float32; by requests, "
        "not by the trie in vLLM's workers: "
        f"{_names({n: one for n, one in exact.items() if one['path'] == 'vllm/requests'})}\n"
    )
    yield f"{_names(exact)}\n"
    others = {n: one["reason"] for n, one in records.items() if n not in served}
    for name, one in served.items():
        if name in told:
            others[name] = f"served, and told to be unlike transformers: off by {one['worst']:.0e}"
        elif name not in exact:
            others[name] = f"served in {one['dtype']}: within {one['worst']:.0e}"
    yield from _reasons(others)


def _most(records: Records, key: str) -> str:
    return f"{max((one[key] for one in records.values()), default=0.0):.0e}"


def _names(records: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(records)) + "."


def _reasons(reasons: Mapping[str, str]) -> Iterable[str]:
    yield "| model | what happens |"
    yield "| --- | --- |"
    for name, reason in reasons.items():
        said = re.sub(r"^model DIR\S* (cannot be exported without layers \[[^]]*\]: )?", "", reason)
        yield f"| {name} | {said.replace('|', '/')} |"
    yield ""
