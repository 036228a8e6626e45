"""What is asked about each decoder: scored rightly, in halves too, exported rightly, the same in
vLLM?

Each gives a record of plain values with a `status`: `served`, `refused` (by lpserve, which gives a
reason), `traceback` (what lpserve should have refused), or `not built` (transformers itself fails).
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import (
    LENGTH,
    NUM_LAYERS,
    difference,
    layer_list,
    load,
    make,
    modules_zeroed,
    window_nll,
)

import lpserve
import lpserve.engine.hf.engine
import lpserve.export  # before any fork
from lpserve.errors import LpserveError

REMOVED: tuple[tuple[int, ...], ...] = ((1,), (0, 3), (5,), (2, 3, 4))
Record = dict[str, Any]


def score(name: str) -> Record:
    """Masks by the transformers engine against layers deleted: float32, windows of unequal length,
    bfloat16."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        record, model = _built(name, folder)
        if model is None:
            return record
        tokens_NT = some_tokens(3, 3)
        masks_MP = some_masks(_num_layers(model))
        windows = lpserve.TokenWindows.from_tokens(tokens_NT.numpy())
        unequal, scored_NT = some_tokens(5, 2), np.ones((2, LENGTH), dtype=bool)
        scored_NT[:, 0] = scored_NT[0, LENGTH // 2 :] = False
        short = lpserve.TokenWindows.from_tokens(unequal.numpy(), scored_NT)

        def scored() -> Record:
            with lpserve.open_engine(str(folder), windows, dtype="float32") as engine:
                got_MN = engine.score(masks_MP).nll_MN
                short_MN = engine.score(masks_MP, engine.register(short)).nll_MN
            each = [
                difference(model, mask_P, some, short_MN[row, place : place + 1])
                for row, mask_P in enumerate(masks_MP)
                for place, some in enumerate((unequal[:1, : LENGTH // 2], unequal[1:]))
                if mask_P.any()
            ]
            return {
                "worst": _worst(model, masks_MP, tokens_NT, got_MN),
                "unequal": _rounded(max(each)),
            }

        record = _tried(scored, root)
        if record["status"] == "served":
            record["bfloat16"] = _tried(lambda: _half(name, folder, windows, tokens_NT), root)
        return record


def _half(name: str, folder: Path, windows: lpserve.TokenWindows, tokens_NT: torch.Tensor) -> Any:
    model = load(folder, name, torch.bfloat16)
    masks_MP = some_masks(_num_layers(model))
    with lpserve.open_engine(str(folder), windows, dtype="bfloat16") as engine:
        got_MN = engine.score(masks_MP).nll_MN
    return {"worst": _worst(model, masks_MP, tokens_NT, got_MN)}


def halves(name: str) -> Record:
    """Masks of halves of layers: of both halves together against layers deleted, and random ones
    against the model with the modules zeroed that the engine takes for a layer's parts."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        record, model = _built(name, folder)
        if model is None:
            return record
        tokens_NT = some_tokens(3, 3)
        windows = lpserve.TokenWindows.from_tokens(tokens_NT.numpy())

        def scored() -> Record:
            with lpserve.open_engine(
                str(folder), windows, dtype="float32", players="half"
            ) as engine:
                players, modules = engine.info.players, engine.info.settings["modules"]
                layers = [player.layer for player in players]
                whole_ML = some_masks(len(set(layers)))
                random_MP = np.random.default_rng(1).random((6, len(players))) < 0.6
                got_MN = engine.score(np.concatenate([whole_ML[:, layers], random_MP])).nll_MN
            parts = []
            for mask_P, got_N in zip(random_MP, got_MN[len(whole_ML) :], strict=True):
                gone = [player for player, kept in zip(players, mask_P, strict=True) if not kept]
                with modules_zeroed(model, gone, modules):
                    wanted_N = window_nll(model, tokens_NT)
                parts.append(np.abs(got_N / wanted_N - 1).max())
            return {
                "worst": _worst(model, whole_ML, tokens_NT, got_MN),
                "parts": _rounded(max(parts)),
                "players": len(players),
                "modules": sorted({str(sorted(some.items())) for some in modules.values()}),
            }

        return _tried(scored, root)


def export(name: str) -> Record:
    """Four sets exported, reloaded by transformers, scored, continued with a cache and without."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "model")
        record, model = _built(name, folder)
        if model is None:
            return record
        tokens_NT = some_tokens(3, 3)
        whole = _continues(copy.deepcopy(model), tokens_NT[:1, :10])
        sets = {}
        for number, removed in enumerate(REMOVED):
            if max(removed) < _num_layers(model):
                out = Path(root, f"out{number}")
                sets[str(list(removed))] = _tried(
                    lambda removed=removed, out=out: _exported(name, model, removed, folder, out),
                    root,
                )
                shutil.rmtree(out, ignore_errors=True)
        kinds = {one["status"] for one in sets.values()}
        worst = next((k for k in ("traceback", "refused") if k in kinds), "served")
        return {"status": worst, "whole_continues": whole, "sets": sets}


def _exported(name: str, model: Any, removed: tuple[int, ...], folder: Path, out: Path) -> Record:
    # one of the four also by the export's own check
    lpserve.export_checkpoint(folder, removed=removed, out=out, verify=removed == REMOVED[0])
    tokens_NT = some_tokens(3, 3)
    mask_P = ~np.isin(np.arange(_num_layers(model)), removed)
    pruned = load(out, name)
    worst = difference(model, mask_P, tokens_NT, window_nll(pruned, tokens_NT))
    return {"worst": _rounded(worst), "continues": _continues(pruned, tokens_NT[:1, :10])}


def _continues(model: Any, tokens_NT: torch.Tensor) -> str:
    """Whether greedy text is the same with a cache of keys and values and without."""
    texts = []
    for use_cache in (True, False):
        try:
            with torch.no_grad():
                ids = model.generate(
                    input_ids=tokens_NT,
                    attention_mask=torch.ones_like(tokens_NT),
                    max_new_tokens=8,
                    min_new_tokens=8,
                    do_sample=False,
                    use_cache=use_cache,
                    eos_token_id=None,
                    pad_token_id=0,
                )
        except Exception as error:  # whatever a model's generate may raise
            return f"fails: {_line(error)}"[:200]
        texts.append(ids[0].tolist())
    return "same" if texts[0] == texts[1] else "differ"


def vllm(name: str) -> Record:
    """Masks by vLLM's paths against layers deleted in transformers."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        record, model = _built(name, folder, for_vllm=True)
        if model is None:
            return record
        windows = lpserve.TokenWindows.from_tokens(some_tokens(3, 3).numpy())

        def tried(dtype: torch.dtype, **options: Any) -> Record:
            other = model if dtype == torch.float32 else load(folder, name, dtype)
            return _tried(lambda: _by_vllm(folder, other, windows, options), root)

        record = tried(torch.float32)
        reason = record.get("reason", "").lower()
        if "bf16" in reason or "bfloat16" in reason:
            record = tried(torch.bfloat16) | {"dtype": "bfloat16"}
        elif record["status"] != "served" and ("memory" in reason or "block" in reason):
            record = tried(torch.float32, kv_cache_memory_bytes=256 << 20)
        return record


def _by_vllm(folder: Path, model: Any, windows: Any, options: Record) -> Record:
    masks_MP = some_masks(_num_layers(model))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    with lpserve.open_engine(str(folder), windows, kind="vllm", dtype=dtype, **options) as engine:
        got_MN = engine.score(masks_MP).nll_MN
        info = engine.info
        # what was scored before must not matter
        again_MN = engine.score(masks_MP[::-1].copy()).nll_MN[::-1]
    tokens_NT = torch.from_numpy(windows.tokens_NT)
    return {
        "worst": _worst(model, masks_MP, tokens_NT, got_MN),
        "whole": _worst(model, masks_MP[:1], tokens_NT, got_MN),
        "order": _rounded(np.abs(again_MN / got_MN - 1).max()),
        "path": info.path,
        "told": info.settings["unlike_transformers"],
    }


# -- what they share -----------------------------------------------------------------------------


def some_tokens(seed: int, rows: int) -> torch.Tensor:
    return torch.randint(4, 280, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def some_masks(players: int) -> np.ndarray:
    """All kept, none kept, without the first, without the last, one kept, and five at random."""
    full = np.ones(players, dtype=bool)
    at = np.arange(players)
    rng = np.random.default_rng(0)
    random = rng.random((5, players)) < 0.6
    return np.stack([full, ~full, at != 0, at != players - 1, at == players // 2, *random])


def _num_layers(model: Any) -> int:
    try:
        return layer_list(model)[1]
    except IndexError:  # no list of that length: lpserve says what it thinks of that
        return int(getattr(model.config.get_text_config(), "num_hidden_layers", NUM_LAYERS))


def _built(name: str, folder: Path, **more: bool) -> tuple[Record, Any]:
    """The saved model as transformers loads it, or a record that says why there is none."""
    try:
        make(name, folder, **more)
        model = load(folder, name)
        if not np.isfinite(window_nll(model, some_tokens(3, 3))).all():
            return {"status": "not built", "reason": "the model gives NaN"}, None
    except Exception as error:  # of transformers, for a configuration that it cannot build
        return {"status": "not built", "reason": _line(error)}, None
    return {}, model


def _tried(call: Callable[[], Record], root: str) -> Record:
    """A call's record with its status."""
    try:
        return {"status": "served", **call()}
    except LpserveError as error:
        return {"status": "refused", "reason": _line(error).replace(root, "DIR")}
    except Exception as error:  # what this sweep looks for
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({Path(last.filename).name}:{last.lineno})"
        return {"status": "traceback", "reason": _line(error).replace(root, "DIR") + where}


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (
        text[:300] if isinstance(error, LpserveError) else f"{type(error).__name__}: {text[:300]}"
    )


def _worst(model: Any, masks_MP: np.ndarray, tokens_NT: torch.Tensor, got_MN: np.ndarray) -> float:
    """Largest relative difference of masks' losses from the reference's."""
    pairs = zip(masks_MP, got_MN, strict=False)
    return _rounded(max(difference(model, mask_P, tokens_NT, got_N) for mask_P, got_N in pairs))


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")
