"""Attention over the tokens by the stock CPU flash kernel, and what it can and cannot do.

It takes float32, float64, bfloat16 and float16, any strides, grouped heads, an additive mask that broadcasts, and
causality from the top left. Its backward uses the output and the log-sum-exp that it is handed, so those of the whole
softmax give the exact gradients of a part of its columns. It refuses dropout and values of another size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cpu_ranges import key_limits
from .inputs import Inputs, heads_last, heads_last_empty, part_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Added to hidden logits. Finite, so that a row that sees no token has a log-sum-exp that weighs nothing; the kernel
# returns 0 for both the output and the log-sum-exp of a row of -inf.
HIDDEN = -1e30


def obstacle(x: Inputs) -> str | None:
    """Why the stock kernel cannot serve these inputs; None: it can."""
    one_query = x.query.shape[2] == 1
    checks = {
        "dropout": x.dropout_p > 0,
        "softcap": x.softcap > 0,
        "value size": x.value.shape[3] != x.query.shape[3],
        "window": not one_query and (x.window_left >= 0 or x.window_right >= 0),
        "segments": not one_query and x.query_segments is not None,
        "offset per row": not one_query and x.causal and x.query_offset is not None and x.query_offset.numel() > 1,
        "mask larger than its parts": not one_query and _mask_grows(x),
    }
    return next((name for name, found in checks.items() if found), None)


def _mask_grows(x: Inputs) -> bool:
    parts = [part for part in (x.dense, x.bias) if part is not None]
    if x.key_padding is not None:
        parts.append(x.key_padding[:, None, None])
    if not parts:
        return False
    return math.prod(torch.broadcast_shapes(*[part.shape for part in parts])) > max(part.numel() for part in parts)


class Part(NamedTuple):
    """One call of the kernel: queries from ``first`` on, keys ``low .. high - 1``, and what is added to the logits."""

    first: int
    low: int
    high: int
    causal: bool
    mask: Tensor | None

    def operands(self, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        keys = slice(self.low, self.high)
        return x.query[:, :, self.first :], x.key[:, :, keys], x.value[:, :, keys]


def parts(x: Inputs) -> list[Part]:
    """The calls that together cover every token that any query sees."""
    queries, keys = x.query.shape[2], x.key.shape[2]
    limits = key_limits(x)
    offset, mask = limits.most_offset, additive_mask(x)

    def part(first: int, low: int, high: int, causal: bool) -> list[Part]:
        low, high = max(low, limits.low if not causal else low), min(high, limits.high)
        if high <= low or first >= queries:
            return []
        cut = None if mask is None else part_of(mask, slice(first, None), slice(low, high))
        return [Part(first, low, high, causal, cut)]

    if not x.causal or queries == 1 or offset >= keys - 1:
        return part(0, 0, keys, False)
    if offset <= 0:
        return part(-offset, 0, queries + offset, True)
    return part(0, 0, offset, False) + part(0, offset, queries + offset, True)


def additive_mask(x: Inputs, prefix: int = 0) -> Tensor | None:
    """What is added to the logits, ``[B|1, Hq|1, T|1, prefix + S]``: zero on prefix columns; None: nothing.

    Causality is not in it unless there is one query.
    """
    if x.query.shape[2] == 1:
        visible = x.visible()
    else:
        seen = [part for part in (x.dense, _padding(x)) if part is not None]
        visible = seen[0] & seen[1] if len(seen) == 2 else (seen[0] if seen else None)
    if visible is None and x.bias is None:
        return None
    bias = x.query.new_zeros((), dtype=x.compute_dtype) if x.bias is None else x.bias.to(x.compute_dtype)
    tokens = bias if visible is None else torch.where(visible, bias, HIDDEN)
    tokens = tokens.clamp_min(HIDDEN) if x.bias is not None else tokens
    tokens = tokens.expand(*tokens.shape[:3], x.key.shape[2])
    return torch.nn.functional.pad(tokens, (prefix, 0)) if prefix else tokens


def _padding(x: Inputs) -> Tensor | None:
    return None if x.key_padding is None else x.key_padding[:, None, None]


def call(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """The stock kernel: output and log-sum-exp, the latter not contiguous."""
    return _flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)


def call_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The stock backward; ``out`` and ``logsumexp`` may be those of a softmax over more columns."""
    return _flash_backward(grad_out, query, key, value, out, logsumexp, 0.0, causal, attn_mask=mask, scale=scale)


def merge_(out: Tensor, logsumexp: Tensor, part: Part, x: Inputs) -> None:
    """Add the tokens of a part to an output and a log-sum-exp, in place."""
    rows = slice(part.first, None)
    tokens, tokens_logsumexp = call(*part.operands(x), part.mask, x.scale, part.causal)
    out, logsumexp = out[:, :, rows], logsumexp[:, :, rows]
    out.lerp_(tokens, torch.sigmoid(tokens_logsumexp - logsumexp)[..., None].to(out.dtype))
    logsumexp.copy_(torch.logaddexp(logsumexp, tokens_logsumexp))


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output, stored heads last, and log-sum-exp over the tokens alone.

    Where a row sees no token the output is finite, and the log-sum-exp -inf or so low that it weighs nothing.
    """
    calls = parts(x)
    if not calls or calls[0].first:
        batch, heads, _, queries, _, _, _, value_dim = x.sizes
        out = heads_last_empty(x.query, batch, heads, queries, value_dim).zero_()
        logsumexp = x.query.new_full((batch, heads, queries), HIDDEN, dtype=x.compute_dtype)
    else:
        first = calls.pop(0)
        out, logsumexp = call(*first.operands(x), first.mask, x.scale, first.causal)
    for part in calls:
        merge_(out, logsumexp, part, x)
    return heads_last(out), logsumexp


def backward(x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through the tokens; ``out, logsumexp`` are those of the whole softmax."""
    calls, total = parts(x), None
    for part in calls:
        rows = slice(part.first, None)
        part_out, part_logsumexp = out[:, :, rows], logsumexp[:, :, rows]
        grads = call_backward(
            grad_out[:, :, rows], *part.operands(x), part.mask, part_out, part_logsumexp, x.scale, part.causal
        )
        if grads[0].shape == x.query.shape and grads[1].shape == x.key.shape:
            return grads
        if total is None:
            total = [heads_last_empty(like, *like.shape).zero_() for like in (x.query, x.key, x.value)]
        total[0][:, :, rows].add_(grads[0])
        for whole, grad in zip(total[1:], grads[1:]):
            whole[:, :, part.low : part.high].copy_(grad)
    return tuple(total) if total else tuple(torch.zeros_like(like) for like in (x.query, x.key, x.value))
