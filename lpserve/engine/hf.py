"""The transformers engine: the trie executor over a model's own layers, on CPU or one GPU.

Exact by construction: the layers, their arguments, the norm and the head are transformers' own, so
a mask scores what transformers gives with the other layers deleted together with their per-layer
config entries (float32 on CPU: within 1e-5 relative a window).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from lpserve.checkpoint import Checkpoint, checkpoint_hash, read_checkpoint
from lpserve.engine.base import check_masks
from lpserve.engine.hf_stack import RecordedStack
from lpserve.engine.trie import TrieExecutor, TrieSettings
from lpserve.errors import EngineError, InputError
from lpserve.types import BoolArray, EngineInfo, EngineSpec, Player, Scores, Work
from lpserve.windows import TokenWindows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_MICRO_BATCH_TOKENS = 4096
CUDA_MICRO_BATCH_TOKENS = 32768
CPU_HEAD_CHUNK_BYTES = 8 << 20
CUDA_HEAD_CHUNK_BYTES = 256 << 20
MAX_STATE_BUDGET_BYTES = {"cpu": 1 << 30, "cuda": 32 << 30}
PADDED_LENGTH_STEP = 32


class TransformersEngine:
    """See `lpserve.engine.base.Engine`. Options:

    * `state_budget_mb`: memory for hidden states (default: a quarter of what is free, at most
      1 GiB on CPU, 32 GiB on a GPU).
    * `micro_batch_tokens`: most tokens a layer is given at once. Setting it fills micro-batches
      with states of several masks; the default does so on a GPU only (32,768), while on CPU a
      micro-batch is one state of at most 4,096 tokens.
    * `attn_implementation`: passed to transformers; default: transformers' own choice.
    """

    OPTIONS = ("state_budget_mb", "micro_batch_tokens", "attn_implementation")

    def __init__(self, spec: EngineSpec, windows: TokenWindows) -> None:
        if spec.dtype not in DTYPES:
            raise InputError(f"unknown dtype {spec.dtype!r}: one of {', '.join(DTYPES)}")
        checkpoint = read_checkpoint(spec.model)
        check_decoder(checkpoint)
        check_windows(checkpoint, windows)
        device = _device(spec.device)
        self._checkpoint = checkpoint
        self._model = _load(checkpoint, spec, device)
        settings = _settings(spec, device)
        head_chunk = CPU_HEAD_CHUNK_BYTES if device.type == "cpu" else CUDA_HEAD_CHUNK_BYTES
        self._windows: dict[str, list[tuple[np.ndarray, TokenWindows]]] = {}
        self._sizes: dict[str, np.ndarray] = {}
        with self._numerics():
            self._stack = RecordedStack(self._model, head_chunk_bytes=head_chunk)
            self._executor = TrieExecutor(self._stack, settings)
            self._default = self.register(windows)
        self.info = EngineInfo(
            kind="transformers",
            path=f"transformers/{self._model.config._attn_implementation}",
            model=str(Path(spec.model).resolve()),
            model_hash=checkpoint_hash(checkpoint),
            players=tuple(Player(index=i, layer=i) for i in range(self._stack.num_players)),
            dtype=spec.dtype,
            device=str(device),
            vocab_size=self._stack.vocab_size,
            versions={"torch": torch.__version__, "transformers": transformers.__version__},
            settings={
                "state_budget_bytes": settings.state_budget_bytes,
                "micro_batch_tokens": settings.micro_batch_tokens,
                "pack_states": settings.pack_states,
                "head_chunk_bytes": head_chunk,
                "threads": torch.get_num_threads(),
            },
        )

    def register(self, windows: TokenWindows) -> str:
        check_windows(self._checkpoint, windows)
        if windows.content_hash not in self._windows:
            groups = self._groups(windows)
            with self._numerics():
                for _, group in groups:
                    self._stack.prepare(group)
                    self._executor.group_rows(group.num_windows, group.length)
            self._windows[windows.content_hash] = groups
            self._sizes[windows.content_hash] = windows.num_tokens_N
        return windows.content_hash

    def score(self, masks_MP: BoolArray, windows: str | None = None) -> Scores:
        key = self._default if windows is None else windows
        if key not in self._windows:
            raise InputError(f"windows {key!r} are not registered with this engine")
        masks_MP = check_masks(masks_MP, self._stack.num_players)
        sizes_N = self._sizes[key]
        nll_MN = np.empty((len(masks_MP), len(sizes_N)))
        works = []
        with self._numerics():
            for rows, group in self._windows[key]:
                nll_MN[:, rows], work = self._executor.score(masks_MP, group)
                works.append(work)
        total = Work(
            masks=len(masks_MP),
            distinct_masks=works[0].distinct_masks,
            layer_forwards=works[0].layer_forwards,
            skip_layer_forwards=works[0].skip_layer_forwards,
            tokens=sum(work.tokens for work in works),
            seconds=sum(work.seconds for work in works),
        )
        return Scores(nll_MN=nll_MN, num_tokens_N=sizes_N, work=total)

    def close(self) -> None:
        if hasattr(self, "_model"):
            del self._model, self._stack, self._executor
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def __enter__(self) -> TransformersEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _groups(self, windows: TokenWindows) -> list[tuple[np.ndarray, TokenWindows]]:
        """Windows of one padded length each: rows, and the windows cut to that length."""
        # rotary tables that depend on the sequence length leave no room for padding
        rope = self._model.config.get_text_config().to_dict().get("rope_parameters") or {}
        step = 1 if "dynamic" in str(rope) or "longrope" in str(rope) else PADDED_LENGTH_STEP
        padded_N = np.minimum(-(-windows.lengths_N // step) * step, windows.length)
        groups = []
        for length in np.unique(padded_N):
            rows = np.flatnonzero(padded_N == length)
            groups.append((rows, windows.select(rows, int(length))))
        return groups

    @contextmanager
    def _numerics(self) -> Iterator[None]:
        """No gradients; float32 means float32 (no TF32); settings are put back afterwards."""
        matmul: Any = torch.backends.cuda.matmul
        cudnn: Any = torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        try:
            matmul.allow_tf32 = cudnn.allow_tf32 = False
            with torch.inference_mode():
                yield
        finally:
            matmul.allow_tf32, cudnn.allow_tf32 = before


def check_decoder(checkpoint: Checkpoint) -> None:
    """Raise InputError unless the config says decoder-only language model."""
    names = checkpoint.config.get("architectures") or []
    decoder = any(str(n).endswith(("ForCausalLM", "LMHeadModel")) for n in names)
    if not decoder or checkpoint.config.get("is_encoder_decoder"):
        raise InputError(
            f"model {checkpoint.path} is not a decoder-only language model: architectures is "
            f"{names}; a name ending in ForCausalLM is needed"
        )


def check_windows(checkpoint: Checkpoint, windows: TokenWindows) -> None:
    """Raise InputError when windows do not fit the model's positions or vocabulary."""
    config = checkpoint.config
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for field in ("max_position_embeddings", "n_positions"):
        limit = config.get(field) or (text or {}).get(field)
        if isinstance(limit, int) and windows.length > limit:
            raise InputError(
                f"windows of {windows.length} tokens are longer than the model's {limit} positions "
                f"({field}); use --length {limit} or less"
            )
    vocab = config.get("vocab_size") or (text or {}).get("vocab_size")
    if isinstance(vocab, int) and int(windows.tokens_NT.max()) >= vocab:
        raise InputError(
            f"token id {int(windows.tokens_NT.max())} is outside the model's vocabulary of "
            f"{vocab}: "
            "the windows were made with another tokenizer"
        )


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


def _settings(spec: EngineSpec, device: torch.device) -> TrieSettings:
    options = spec.options
    for name in ("state_budget_mb", "micro_batch_tokens"):
        value = options.get(name)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise InputError(f"{name} must be a number above 0: got {value!r}")
    budget_mb = options.get("state_budget_mb")
    if budget_mb is not None:
        budget = int(float(budget_mb) * 2**20)
    else:
        free = (
            psutil.virtual_memory().available
            if device.type == "cpu"
            else torch.cuda.mem_get_info(device)[0]
        )
        budget = min(free // 4, MAX_STATE_BUDGET_BYTES[device.type])
    tokens = options.get("micro_batch_tokens")
    default = CPU_MICRO_BATCH_TOKENS if device.type == "cpu" else CUDA_MICRO_BATCH_TOKENS
    return TrieSettings(
        state_budget_bytes=budget,
        micro_batch_tokens=int(tokens) if tokens is not None else default,
        pack_states=tokens is not None or device.type != "cpu",
    )


def _load(checkpoint: Checkpoint, spec: EngineSpec, device: torch.device) -> Any:
    kwargs: dict[str, Any] = {}
    if spec.options.get("attn_implementation"):
        kwargs["attn_implementation"] = spec.options["attn_implementation"]
    with _quiet_transformers():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(checkpoint.path),
                dtype=DTYPES[spec.dtype],
                local_files_only=True,
                output_loading_info=True,
                **kwargs,
            )
        except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
            line = str(error).strip().splitlines()[0]
            raise InputError(f"transformers cannot load {checkpoint.path}: {line}") from error
    model, report = loaded
    absent = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if absent:
        raise InputError(
            f"model {checkpoint.path}: {len(absent)} weights are missing or misshapen, first "
            f"{absent[0]}; copy the checkpoint again"
        )
    model = model.to(device).eval()
    if len({p.dtype for p in model.parameters() if p.is_floating_point()}) != 1:
        raise EngineError(f"model {checkpoint.path} keeps weights of several dtypes: not supported")
    return model


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
