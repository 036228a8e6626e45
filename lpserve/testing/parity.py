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
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Metric -> [M, N], one mask at a time from whole logits; and by how much rounding may change
    each, where logits within `CLOSE` of each other may change places: another token is the most
    probable, or another is the last of the full model's `TOP`."""
    truncated = f"kl_top{TOP}"
    model = reference_model(folder)
    full_logits = logits_of(model, windows)
    log_p = full_logits.log_softmax(-1)
    scored = torch.from_numpy(windows.scored_NT[:, 1:])
    targets = torch.from_numpy(windows.tokens_NT[:, 1:]).long()
    ids = full_logits.topk(TOP + 1, dim=-1).indices
    swapped = torch.cat([ids[..., : TOP - 1], ids[..., TOP:]], dim=-1)
    ids = ids[..., :TOP]
    close_top = _gap(full_logits, TOP) < CLOSE
    found: dict[str, list[np.ndarray]] = {"misses": [], "kl": [], truncated: []}
    doubt: dict[str, list[np.ndarray]] = {name: [] for name in found}
    for mask in masks:
        logits = logits_of(with_layers_deleted(model, mask), windows)
        log_q = logits.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        lumped = _lumped(log_p, log_q, ids)
        assert (lumped <= kl + 1e-9).all()
        other = (_lumped(log_p, log_q, swapped) - lumped).abs()
        figures = {"misses": logits.argmax(-1) != targets, "kl": kl, truncated: lumped}
        doubts = {"misses": _gap(logits, 1) < CLOSE, "kl": torch.zeros_like(kl)}
        doubts[truncated] = torch.where(close_top, other, 0.0)
        for sums, values in ((found, figures), (doubt, doubts)):
            for name in sums:
                sums[name].append((values[name] * scored).sum(1).numpy().astype(np.float64))
    count = len(masks) * int(scored.sum())
    assert np.array(doubt["misses"]).sum() < 0.01 * count
    return (
        {name: np.array(rows) for name, rows in found.items()},
        {name: np.array(rows) for name, rows in doubt.items()},
    )


def overlap_by_hand(folder: Path, masks: np.ndarray, windows: lpserve.TokenWindows) -> np.ndarray:
    """`types.Scores.overlap_MM` from whole logits in float64: at every scored target the covariance
    matrix of p, explicitly, between the changes of two masks."""
    model = reference_model(folder)
    scored = torch.from_numpy(windows.scored_NT[:, 1:])
    logits = [logits_of(with_layers_deleted(model, mask), windows)[scored] for mask in masks]
    p = logits[0].softmax(-1)
    covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    changes = torch.stack([each - logits[0] for each in logits])
    return torch.einsum("itv,tvw,jtw->ij", changes, covariance, changes).numpy()


def _gap(logits: torch.Tensor, place: int) -> torch.Tensor:
    """From each `place`-th highest logit to the next."""
    highest = logits.topk(place + 1, dim=-1).values
    return highest[..., place - 1] - highest[..., place]


def _lumped(log_p: torch.Tensor, log_q: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """KL divergence where all tokens but these are one outcome."""
    top_p, top_q = log_p.gather(-1, ids), log_q.gather(-1, ids)
    rest_p, rest_q = 1 - top_p.exp().sum(-1), 1 - top_q.exp().sum(-1)
    return (top_p.exp() * (top_p - top_q)).sum(-1) + rest_p * (rest_p / rest_q).log()
