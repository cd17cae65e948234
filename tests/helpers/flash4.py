"""A module with the two functions of flash-attn-4 that `merge_flash4` calls, computed by PyTorch.

They have the arguments that the strategy uses, in the library's layouts: ``[B, T, H, D]`` and, for sums over rows,
``[B, H, T]`` in float32. `make flash4` calls the library itself.
"""

from __future__ import annotations

import math

import torch


def _scores(q, k, scale, causal, softcap, left, right):
    """Soft-capped scores ``[B, Hq, T, S]`` in float64, -inf where hidden; the last query is at the last key."""
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    wide = k.double().repeat_interleave(group, 2)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), wide) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    columns, rows = torch.arange(keys, device=q.device), torch.arange(queries, device=q.device)
    distance = columns - rows[:, None] - (keys - queries)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        hidden |= distance < -left
    if causal or right is not None:
        hidden |= distance > (0 if causal else right)
    return scores.masked_fill(hidden, -math.inf)


def _flash_attn_fwd(
    q, k, v, *, softmax_scale, causal, softcap, window_size_left, window_size_right, learnable_sink, return_lse
):
    """``out, lse`` and three results of other modes. A sink is a column of ``lse`` without a value."""
    scores = _scores(q, k, softmax_scale, causal, softcap, window_size_left, window_size_right)
    if learnable_sink is not None:
        sink = learnable_sink.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0.0)[..., : k.shape[1]]
    wide = v.double().repeat_interleave(q.shape[2] // v.shape[2], 2)
    out = torch.einsum("bhts,bshd->bthd", weights, wide).to(q.dtype)
    return out, lse.float() if return_lse else None, None, None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    *,
    softmax_scale,
    causal,
    softcap,
    window_size_left,
    window_size_right,
    deterministic,
    dlse,
):
    """``dq, dk, dv``: the probabilities come from ``lse``, and the row sums of ``dS`` from ``out`` and ``dlse``."""
    batch, keys, heads = k.shape[:3]
    group = q.shape[2] // heads
    scores = _scores(q, k, softmax_scale, causal, softcap, window_size_left, window_size_right)
    weights = torch.exp(scores - lse.double()[..., None]).nan_to_num(0.0)
    wide_k, wide_v = (part.double().repeat_interleave(group, 2) for part in (k, v))
    delta = torch.einsum("bthd,bthd->bht", out.double(), dout.double())
    delta = delta if dlse is None else delta - dlse.double()
    of_scores = weights * (torch.einsum("bthd,bshd->bhts", dout.double(), wide_v) - delta[..., None])
    if softcap:
        of_scores = of_scores * (1 - (scores.masked_fill(scores.isinf(), 0.0) / softcap) ** 2)
    of_scores = of_scores * softmax_scale
    of_query = torch.einsum("bhts,bshd->bthd", of_scores, wide_k)
    of_key = torch.einsum("bhts,bthd->bshd", of_scores, q.double())
    of_value = torch.einsum("bhts,bthd->bshd", weights, dout.double())
    of_key, of_value = (g.reshape(batch, keys, heads, group, -1).sum(3) for g in (of_key, of_value))
    return of_query.to(q.dtype), of_key.to(k.dtype), of_value.to(v.dtype)
