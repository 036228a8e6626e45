"""Scores a checkpoint in a process of its own with transformers alone. Run as a script.

    python reload.py CHECKPOINT WINDOWS.npz DTYPE DEVICE [ATTENTION]

WINDOWS.npz holds `tokens` int [N, T] and `scored` bool [N, T]. Prints one JSON line:

* `nll`: the summed NLL of every window in nats;
* `regret`: how far the tokens that `generate` chooses with a cache are from the most probable ones
  of a forward pass without, in standard deviations of the logits; or why `generate` fails.

Imports nothing of lpserve, so that what it checks is what users load; but `lpserve.hf` for
checkpoints without the weights of absent parts, which nothing else loads.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

ROWS_TOKENS = 4096
PROMPT_TOKENS, NEW_TOKENS = 8, 4


def load_checkpoint(checkpoint: str, dtype: str, attention: str | None) -> Any:
    """The model as users load it; fails where the files lack one of its weights."""
    config = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") == "lpserve":
        importlib.import_module("lpserve.hf")  # as its users do
    names = [n for n in config.get("architectures") or [] if n.endswith("ConditionalGeneration")]
    loader: Any = getattr(transformers, (names or ["AutoModelForCausalLM"])[0])
    model, report = loader.from_pretrained(
        checkpoint,
        dtype=getattr(torch, dtype),
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **({"attn_implementation": attention} if attention else {}),
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise SystemExit(f"{len(missing)} weights are missing, first {missing[0]}")
    return model


@torch.inference_mode()
def score_checkpoint(
    checkpoint: str, windows: str, dtype: str, device: str, attention: str | None = None
) -> None:
    """Score a checkpoint; see the module for the arguments and the output."""
    with np.load(windows, allow_pickle=False) as data:
        tokens_NT, scored_NT = data["tokens"].astype(np.int64), data["scored"]
    model = load_checkpoint(checkpoint, dtype, attention).to(device).eval()
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
    prompt = torch.from_numpy(tokens_NT[:1, :PROMPT_TOKENS]).to(device)
    print(json.dumps({"nll": nll, "regret": generation_regret(model, prompt)}))


def generation_regret(model: Any, prompt: torch.Tensor) -> float | str:
    """See the module; the prompt is `int64[1, T]`."""
    try:
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        logits = model(input_ids=ids, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
    except Exception as error:  # whatever a model's generate may raise
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    chosen = logits.gather(-1, ids[0, prompt.shape[1] :, None])[:, 0]
    return float(((logits.amax(-1) - chosen) / logits.std(-1).clamp(min=1e-6)).max())


if __name__ == "__main__":
    score_checkpoint(*sys.argv[1:6])
