"""The transformers engine: the trie executor over a model's own layers, on CPU or one GPU.

Exact by construction: the layers, their arguments, the norm and the head are transformers' own, so
a mask scores what transformers gives with the other layers deleted together with their per-layer
config entries (float32 on CPU: within 1e-5 relative a window).
"""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as hf_logging

from lpserve.data.prepare import check_windows
from lpserve.data.windows import TokenWindows
from lpserve.engine.base import (
    HiddenStates,
    check_extra_metrics,
    check_masks,
    scores_of,
)
from lpserve.engine.hf.allocator import keep_for
from lpserve.engine.hf.criteria import hidden_states, taylor_importance
from lpserve.engine.hf.stack import RecordedStack
from lpserve.engine.scorer import (
    HEAD_CHUNK_BYTES,
    PADDED_LENGTH_STEP,
    StackScorer,
    free_bytes,
    full_precision,
    trie_settings,
)
from lpserve.errors import InputError, LpserveError, typed_first_line
from lpserve.model.architecture import check_decoder, read_architecture
from lpserve.model.checkpoint import Checkpoint, read_checkpoint
from lpserve.model.content_hash import checkpoint_hash
from lpserve.model.gguf import gguf_record
from lpserve.model.loading import load_pretrained
from lpserve.types import BoolArray, EngineInfo, EngineSpec, FloatArray, Scores
from lpserve.utility import METRICS

KERNEL_PACKAGES = ("mamba-ssm", "causal-conv1d", "flash-linear-attention", "kernels")
"""Packages of kernels for scans, convolutions and linear attention: transformers takes them where
they are installed, else its own PyTorch code."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformersEngine:
    """See `lpserve.engine.base.Engine`. Options:

    * `state_budget_mb`: memory for hidden states (default: a quarter of what is free, at most
      1 GiB on CPU, 32 GiB on a GPU).
    * `micro_batch_tokens`: most tokens a layer is given at once. Setting it fills micro-batches
      with states of several masks; the default does so on a GPU only (32,768), while on CPU a
      micro-batch is one state of at most 4,096 tokens.
    * `attn_implementation`: passed to transformers; default: transformers' own choice, and `eager`
      where soft-capped scores need it.
    * `compile_layers`: run the layers, and the reduction of logits, through `torch.compile`, which
      fuses norms, rotary and gates (default: on a GPU). Layers of one shape share what is compiled.
    * `keep_freed_memory`: what layers free stays with the process until the engine is closed, see
      `lpserve.engine.hf.allocator` (default: on CPU).
    """

    def __init__(self, spec: EngineSpec, windows: TokenWindows) -> None:
        if spec.dtype not in DTYPES:
            raise InputError(f"unknown dtype {spec.dtype!r}: one of {', '.join(DTYPES)}")
        checkpoint = read_checkpoint(spec.model)
        check_decoder(checkpoint)
        check_windows(checkpoint, windows)
        device = _device(spec.device)
        self._checkpoint = checkpoint
        self._model = _load(checkpoint, spec, device)
        settings = trie_settings(spec.options, device.type, free_bytes(device))
        head_chunk = HEAD_CHUNK_BYTES[device.type]
        compiled = _switch(spec, "compile_layers", device.type == "cuda")
        allocator, self._end_keeping = "not asked to keep freed memory", lambda: None
        if _switch(spec, "keep_freed_memory", device.type == "cpu"):
            allocator, self._end_keeping = keep_for(self)
        with full_precision():
            stack = RecordedStack(
                self._model,
                dtype=DTYPES[spec.dtype],
                num_layers=read_architecture(checkpoint).num_layers,
                players=spec.players,
                head_chunk_bytes=head_chunk,
                compile_layers=compiled,
            )
        self._stack = stack
        self._scorer = StackScorer(stack, settings, padded_step=_padded_step(self._model))
        self._default = self.register(windows)
        self.info = EngineInfo(
            kind="transformers",
            path=f"transformers/{self._model.config._attn_implementation}"
            + ("/compiled" if compiled else ""),
            model=str(Path(spec.model).resolve()),
            model_hash=checkpoint_hash(checkpoint),
            players=stack.players,
            dtype=spec.dtype,
            device=str(device),
            noise_nll=self._scorer.batch_noise(self._default) if settings.pack_states else 0.0,
            vocab_size=stack.vocab_size,
            metrics=METRICS,
            has_overlap=True,
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                **_kernel_versions(),
            },
            settings={
                "state_budget_bytes": settings.state_budget_bytes,
                "micro_batch_tokens": settings.micro_batch_tokens,
                "pack_states": settings.pack_states,
                "head_chunk_bytes": head_chunk,
                "padded_length_step": self._scorer.padded_step,
                "compile_layers": compiled,
                "threads": torch.get_num_threads(),
                "first_not_finite": stack.first_not_finite,
                "allocator": allocator,
                "modules": {n: dict(parts) for n, parts in stack.modules.items()},
                "absent": stack.absent,
                "dequantized_from": gguf_record(checkpoint.path),
            },
        )

    def register(self, windows: TokenWindows) -> str:
        check_windows(self._checkpoint, windows)
        return self._scorer.register(windows)

    def score(
        self, masks_MP: BoolArray, windows: str | None = None, extra_metrics: Sequence[str] = ()
    ) -> Scores:
        key = self._default if windows is None else windows
        masks_MP = check_masks(masks_MP, self.info.num_players)
        extra_metrics = check_extra_metrics(self.info, extra_metrics)
        metric_values, work = self._scorer.score(masks_MP, key, extra_metrics)
        return scores_of(metric_values, extra_metrics, self._scorer.num_tokens(key), work)

    def score_overlap(
        self, masks_MP: BoolArray, windows: str | None = None, extra_metrics: Sequence[str] = ()
    ) -> Scores:
        """See `lpserve.engine.base.HasOverlap`."""
        key = self._default if windows is None else windows
        masks_MP = check_masks(masks_MP, self.info.num_players)
        names = check_extra_metrics(self.info, extra_metrics)
        metric_values, work, overlap_MM = self._scorer.score_overlap(masks_MP, key, names)
        return scores_of(metric_values, names, self._scorer.num_tokens(key), work, overlap_MM)

    def hidden_states(self, windows: str | None = None) -> HiddenStates:
        """Block influence and angular distances in the full model, on registered windows."""
        with full_precision():
            return hidden_states(self._stack, self._scorer.blocks(windows or self._default))

    def taylor_importance(self, windows: str | None = None) -> FloatArray:
        """First-order importance of every player's weights, `float64[P]`; takes gradients."""
        blocks = self._scorer.blocks(windows or self._default)
        return taylor_importance(self._stack, blocks)

    def close(self) -> None:
        if hasattr(self, "_model"):
            del self._model, self._scorer, self._stack
            gc.collect()
            self._end_keeping()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def __enter__(self) -> TransformersEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _switch(spec: EngineSpec, name: str, default: bool) -> bool:
    value = spec.options.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false: got {value!r}")
    return value


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}: auto, cpu or cuda[:n]") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: auto, cpu or cuda[:n]")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} is asked for, but torch sees no GPU")
    return device


def _padded_step(model: Any) -> int:
    """Some models leave no room for padding: those whose rotary tables depend on the sequence's
    length, and those that attend to a few chosen tokens (DeepSeek-V3.2), where the number of tokens
    decides between equals. Others are found out when the stack is prepared, on real windows."""
    text = model.config.get_text_config().to_dict()
    rope = str(text.get("rope_parameters") or {})
    chosen = any(key.startswith(("index_", "indexer_")) for key in text)
    exact = chosen or "dynamic" in rope or "longrope" in rope
    return 1 if exact else PADDED_LENGTH_STEP


def _load(checkpoint: Checkpoint, spec: EngineSpec, device: torch.device) -> Any:
    attention = spec.options.get("attn_implementation") or read_architecture(checkpoint).attention
    kwargs: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    with _quiet_transformers():
        try:
            loaded: Any = load_pretrained(
                checkpoint.config,
                str(checkpoint.path),
                dtype=DTYPES[spec.dtype],
                output_loading_info=True,
                **kwargs,
            )
        except LpserveError:  # a signal
            raise
        except Exception as error:  # whatever a model's classes raise for what its config says
            raise InputError(
                f"transformers cannot load {checkpoint.path}: {typed_first_line(error)}"
            ) from error
    model, report = loaded
    absent = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if absent:
        raise InputError(
            f"model {checkpoint.path}: {len(absent)} weights are missing or misshapen, first "
            f"{absent[0]}; copy the checkpoint again"
        )
    if spec.dtype != "float16" and getattr(model.config, "rescale_every", 0):
        # RWKV halves its states every so many layers, by position, against overflow in float16;
        # where nothing overflows it only moves the head's rounding with the layers that stay
        model.config.rescale_every = 0
    return model.to(device).eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars or notices while loading; put back afterwards."""
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _kernel_versions() -> dict[str, str]:
    """Packages whose kernels transformers prefers to its own PyTorch code, those that there are."""
    found = {}
    for name in KERNEL_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
