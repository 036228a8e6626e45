"""Masks, windows and metrics by hand, for engines held against models with layers deleted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import lpserve
from lpserve.testing.reference import reference_model, with_layers_deleted

NUM_LAYERS = 6
"""Layers of the reference models."""
TOP = 5
"""Tokens of the truncated divergence."""
CLOSE = 2e-4
"""Logits between which rounding may decide. float32 ones of these models missed those of float64 by
up to 4e-5 (5e7 logits of three families); two engines, two logits: four times that. Of random
models, one target in 2500 is so close."""


def edge_masks() -> np.ndarray:
    """All layers, none, all but the first or last, the first or last alone: `bool[M, P]`."""
    full = np.ones(NUM_LAYERS, dtype=bool)
    masks = [full, ~full]
    for layer in (0, NUM_LAYERS - 1):
        masks += [np.arange(NUM_LAYERS) != layer, np.arange(NUM_LAYERS) == layer]
    return np.array(masks)


def some_windows(
    rng: np.random.Generator, num: int = 3, length: int = 40, *, ragged: bool = True
) -> lpserve.TokenWindows:
    """Random windows of which four tokens in five are scored; the first is shorter if `ragged`."""
    tokens = rng.integers(0, 97, (num, length))
    scored = rng.random((num, length)) < 0.8
    scored[:, 0] = False
    scored[:, 1] = True
    if ragged:
        scored[0, length // 2 :] = False  # right padding
    return lpserve.TokenWindows.from_tokens(tokens, scored)


def logits_of(model: torch.nn.Module, windows: lpserve.TokenWindows) -> torch.Tensor:
    """float64 logits [N, T - 1, V] that predict tokens 1..T-1."""
    tokens = torch.from_numpy(windows.tokens_NT).long()
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits[:, :-1].double()


def metrics_by_hand(
    folder: Path, masks: np.ndarray, windows: lpserve.TokenWindows
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Metric -> [M, N], one mask at a time from whole logits."""
    model = reference_model(folder)
    log_p = logits_of(model, windows).log_softmax(-1)
    scored = torch.from_numpy(windows.scored_NT[:, 1:])
    targets = torch.from_numpy(windows.tokens_NT[:, 1:]).long()
    found: dict[str, list[np.ndarray]] = {"misses": [], "kl": [], f"kl_top{TOP}": [], "close": []}
    for mask in masks:
        logits = logits_of(with_layers_deleted(model, mask), windows)
        two = logits.topk(2, dim=-1).values
        close = two[..., 0] - two[..., 1] < CLOSE
        log_q = logits.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        top, ids = log_p.topk(TOP, dim=-1)
        rest_p, rest_q = 1 - top.exp().sum(-1), 1 - log_q.gather(-1, ids).exp().sum(-1)
        lumped = (top.exp() * (top - log_q.gather(-1, ids))).sum(-1)
        lumped += rest_p * (rest_p / rest_q).log()
        assert (lumped <= kl + 1e-9).all()
        missed = logits.argmax(-1) != targets
        for name, values in zip(found, (missed, kl, lumped, close), strict=True):
            found[name].append((values * scored).sum(1).numpy())
    arrays = {name: np.array(rows, dtype=np.float64) for name, rows in found.items()}
    close_MN = arrays.pop("close")
    assert close_MN.sum() < 0.01 * len(masks) * int(scored.sum())
    return arrays, close_MN
