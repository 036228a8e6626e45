"""Scores a checkpoint in a process of its own with AutoModelForCausalLM alone. Run as a script.

    python reload.py CHECKPOINT WINDOWS.npz DTYPE DEVICE [ATTENTION]

WINDOWS.npz holds `tokens` int [N, T] and `scored` bool [N, T]. Prints one JSON line: the summed NLL
of every window in nats. Imports nothing of lpserve, so that what it checks is what users load.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

ROWS_TOKENS = 4096


@torch.inference_mode()
def score_checkpoint(
    checkpoint: str, windows: str, dtype: str, device: str, attention: str | None = None
) -> None:
    """Score a checkpoint; see the module for the arguments and the output."""
    with np.load(windows, allow_pickle=False) as data:
        tokens_NT, scored_NT = data["tokens"].astype(np.int64), data["scored"]
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        **({"attn_implementation": attention} if attention else {}),
    )
    model = model.to(device).eval()
    rows = max(1, ROWS_TOKENS // tokens_NT.shape[1])
    nll: list[float] = []
    for start in range(0, len(tokens_NT), rows):
        ids = torch.from_numpy(tokens_NT[start : start + rows]).to(device)
        scored = torch.from_numpy(scored_NT[start : start + rows]).to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        token_nll = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(ids.shape[0], -1)
        nll += (token_nll.double() * scored[:, 1:]).sum(1).tolist()
    print(json.dumps(nll))


if __name__ == "__main__":
    score_checkpoint(*sys.argv[1:6])
