"""Causal self-attention over whole windows, in place of a paged KV cache.

Pure torch; knows no vLLM. An `AttentionSpec` says what a layer's attention does, and its `attend`
does it for windows of one length, each attending to itself alone.

Shapes: B windows, T tokens, n = B * T, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_SCORE_BYTES = 64 << 20
"""Most memory of explicit attention scores at once (soft cap, sinks)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """One layer's attention, on this rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    scale: float
    window: int | None = None
    """Each token sees itself and the `window - 1` tokens before it; None: all before it."""
    chunk: int | None = None
    """Tokens see only tokens of their own chunk of this many; None: no chunks."""
    soft_cap: float | None = None
    """Scores become cap * tanh(score / cap)."""
    sinks: torch.Tensor | None = None
    """A learned score beside the keys' that takes probability and gives nothing."""
    alibi: torch.Tensor | None = None
    """Slope of the linear distance bias (ALiBi) of each head."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int
    ) -> torch.Tensor:
        """Attention output `[n, H * Dv]` of flat tokens `query` [n, H*D], `key`, `value` [n, K*D].

        Every `length` consecutive tokens are one window.
        """
        q = query.reshape(-1, length, self.num_heads, self.head_size).transpose(1, 2)
        k = key.reshape(-1, length, self.num_kv_heads, self.head_size).transpose(1, 2)
        v = value.reshape(-1, length, self.num_kv_heads, self.head_size_v).transpose(1, 2)
        explicit = self.soft_cap is not None or self.sinks is not None
        out = (_explicit if explicit else _fused)(q, k, v, self, length)
        return out.transpose(1, 2).reshape(-1, self.num_heads * self.head_size_v)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, length: int
) -> torch.Tensor:
    grouped = spec.num_kv_heads != spec.num_heads
    visible = _visible(length, spec.window, spec.chunk, q.device)
    if spec.alibi is not None:
        bias = _alibi(spec.alibi, length).to(q.dtype)
        causal = visible if visible is not None else _causal(length, q.device)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias.masked_fill(~causal, float("-inf")),
            scale=spec.scale,
            enable_gqa=grouped,
        )
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, scale=spec.scale, enable_gqa=grouped
    )


def _explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, length: int
) -> torch.Tensor:
    """Scores written out, in float32, a few windows at a time."""
    groups = spec.num_heads // spec.num_kv_heads
    visible = _visible(length, spec.window, spec.chunk, q.device)
    hidden = ~(visible if visible is not None else _causal(length, q.device))
    rows = max(1, _SCORE_BYTES // (4 * spec.num_heads * length * length))
    parts = []
    for start in range(0, q.shape[0], rows):
        part = slice(start, start + rows)
        keys = k[part].repeat_interleave(groups, dim=1)
        scores = (q[part] @ keys.transpose(2, 3)).float() * spec.scale
        if spec.soft_cap is not None:
            scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
        if spec.alibi is not None:
            scores = scores + _alibi(spec.alibi, length)
        scores = scores.masked_fill(hidden, float("-inf"))
        if spec.sinks is not None:
            sink = spec.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        parts.append(weights.to(v.dtype) @ v[part].repeat_interleave(groups, dim=1))
    return torch.cat(parts)


@functools.lru_cache(maxsize=64)
def _visible(
    length: int, window: int | None, chunk: int | None, device: torch.device
) -> torch.Tensor | None:
    """bool[T, T], True = may attend; None where plain causal attention says the same."""
    window = window if window is not None and window < length else None
    chunk = chunk if chunk is not None and chunk < length else None
    if window is None and chunk is None:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    if chunk is not None:
        visible = visible & (position[:, None] // chunk == position[None] // chunk)
    return visible


@functools.lru_cache(maxsize=16)
def _causal(length: int, device: torch.device) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _alibi(slopes: torch.Tensor, length: int) -> torch.Tensor:
    """float32[H, T, T]: slope * (key position - query position)."""
    position = torch.arange(length, device=slopes.device)
    distance = position[None] - position[:, None]
    return slopes.float().view(-1, 1, 1) * distance
