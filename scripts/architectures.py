"""Print the table of docs/engines/vllm.md: which architectures vLLM serves, on which path, how
exactly.

    PYTHONPATH=. python scripts/architectures.py

For each architecture a tiny random model is scored in float32 by both paths and by transformers
with the layers deleted, on masks that keep all, none, one and some of the layers. A figure is the
largest relative difference of a mask's mean NLL from transformers.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

from lpserve.data.windows import TokenWindows
from lpserve.engine.vllm.engine import VllmEngine
from lpserve.errors import LpserveError
from lpserve.testing.reference import (
    VLLM_FAMILIES,
    reference_model,
    save_model,
    small_config,
    window_nll,
    with_layers_deleted,
)
from lpserve.types import EngineSpec

NUM_LAYERS = 6
ATTENTION = {
    "llama-mha": "multi-head",
    "llama": "grouped queries",
    "qwen3": "norms on queries and keys",
    "qwen3-moe": "norms on queries and keys; experts",
    "mixtral": "experts",
    "mistral-window": "sliding window",
    "gemma2": "soft caps, alternating window",
    "gemma3": "alternating window",
    "gpt-oss": "sinks, alternating window; experts",
    "bloom": "ALiBi",
    "deepseek-v2": "latent (MLA); experts",
    "opt": "learned positions",
    "gpt2": "learned positions",
    "cohere": "parallel block",
    "gpt-neox": "parallel block, partial rotary",
}


def main() -> None:
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    tokens_NT = rng.integers(0, 97, (3, 40))
    windows = TokenWindows.from_tokens(tokens_NT)
    full = np.ones(NUM_LAYERS, dtype=bool)
    masks_MP = np.stack(
        [
            full,
            ~full,
            *(np.arange(NUM_LAYERS) != i for i in (0, 5)),
            np.arange(NUM_LAYERS) == 3,
            *(rng.random((4, NUM_LAYERS)) < 0.6),
        ]
    )
    print("| architecture | attention | `scoring` | `requests` | state |")
    print("| --- | --- | ---: | ---: | --- |")
    for family in VLLM_FAMILIES:
        print(row(family, windows, masks_MP), flush=True)


def row(family: str, windows: TokenWindows, masks_MP: np.ndarray) -> str:
    name = f"{family} | {ATTENTION.get(family, 'plain')}"
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(small_config(family), Path(folder), 0)
        model = reference_model(path)
        expected_M = np.array(
            [
                window_nll(with_layers_deleted(model, m), windows.tokens_NT, windows.scored_NT)
                for m in masks_MP
            ]
        ).sum(axis=1)
        spec = EngineSpec(kind="vllm", model=str(path))
        try:
            with VllmEngine(spec, windows) as engine:
                runs = engine.info.path == "vllm/scoring"
                scoring = engine.score(masks_MP).nll_MN if runs else None
                requests = engine.score_by_requests(masks_MP, windows).nll_MN
                state, reason = engine.info.settings["state"], engine.info.path_reason
        except LpserveError as error:
            return f"| {name} | - | - | {error} |"
    figures = [
        "refused" if nll is None else f"{np.abs(nll.sum(axis=1) / expected_M - 1).max():.0e}"
        for nll in (scoring, requests)
    ]
    return f"| {name} | {' | '.join(figures)} | {state if scoring is not None else reason} |"


if __name__ == "__main__":
    sys.exit(main())
