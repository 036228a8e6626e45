"""A checkpoint in transformers as users run it, for `lpserve speed`.

Imports nothing of lpserve but the classes of its slim exports.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def open_checkpoint(task: dict[str, Any], device: str, memory: Callable[..., Any]) -> Any:
    """Load a checkpoint; see `lpserve.evaluation.speed_worker.Opened`."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    importlib.import_module("lpserve.hf")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        task["model"],
        dtype=getattr(torch, task["dtype"]),
        local_files_only=True,
        trust_remote_code=False,
    )
    model = model.to(device).eval()

    @torch.inference_mode()
    def generate(prompts: Any, new: int) -> int:
        ids = torch.from_numpy(prompts).to(device)
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return int(made.shape[0] * (made.shape[1] - ids.shape[1]))

    config = model.config.get_text_config()
    about = {
        "num_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "version": transformers.__version__,
    }
    return generate, list, about
