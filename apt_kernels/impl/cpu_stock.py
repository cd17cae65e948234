"""The stock CPU flash kernel on the tokens, and what it can and cannot do.

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
from .cpu_scratch import Scratch
from .inputs import Inputs, heads_last_empty, part_of

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Added to hidden logits. Finite, so that a row that sees no token has a log-sum-exp that weighs nothing; the kernel
# returns 0 for both the output and the log-sum-exp of a row of -inf.
HIDDEN = -1e30

# Query rows for each key from which a copy of the keys that the kernel reads faster pays: see bench/NOTES.md.
COPY_ROWS = 64


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


class Call(NamedTuple):
    """One call of the kernel. ``mask`` is additive; ``first``: which query of the whole is its first."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    causal: bool = False
    first: int = 0
    low: int = 0

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, in layouts of the kernel's choice."""
        return _flash(self.query, self.key, self.value, 0.0, self.causal, attn_mask=self.mask, scale=self.scale)

    def backward(self, out: Tensor, logsumexp: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value; ``out, logsumexp`` may be those of a softmax over more columns."""
        options = {"attn_mask": self.mask, "scale": self.scale}
        return _flash_backward(grad_out, self.query, self.key, self.value, out, logsumexp, 0.0, self.causal, **options)

    def merge_(self, out: Tensor, logsumexp: Tensor) -> None:
        """Add these columns to an output and a log-sum-exp over others, in place."""
        tokens, tokens_logsumexp = self.forward()
        out, logsumexp = out[:, :, self.first :], logsumexp[:, :, self.first :]
        out.lerp_(tokens, torch.sigmoid(tokens_logsumexp - logsumexp)[..., None].to(out.dtype))
        logsumexp.copy_(torch.logaddexp(logsumexp, tokens_logsumexp))


def parts(x: Inputs, scratch: Scratch) -> list[Call]:
    """The calls that together cover every token that any query sees."""
    _, heads, kv_heads, queries, keys, *_ = x.sizes
    limits = key_limits(x)
    offset, low, high = limits.most_offset, limits.low, limits.high
    copy = queries * heads >= COPY_ROWS * kv_heads
    key, value = (_heads_first(scratch, *pair, copy) for pair in (("key", x.key), ("value", x.value)))

    def part(first: int, low: int, high: int, causal: bool) -> list[Call]:
        if high <= low or first >= queries:
            return []
        mask = additive_mask(x, low, high)
        mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, first:]
        return [
            Call(x.query[:, :, first:], key[:, :, low:high], value[:, :, low:high], mask, x.scale, causal, first, low)
        ]

    if not x.causal or queries == 1 or offset >= keys - 1:
        return part(0, low, high, False)
    if offset <= 0:
        return part(-offset, 0, min(high, queries + offset), True)
    return part(0, low, min(high, offset), False) + part(0, offset, min(high, queries + offset), True)


def _heads_first(scratch: Scratch, name: str, tensor: Tensor, copy: bool) -> Tensor:
    if not copy or tensor.is_contiguous():
        return tensor
    return scratch.take(name, *tensor.shape).copy_(tensor)


def additive_mask(x: Inputs, low: int, high: int, prefix: int = 0) -> Tensor | None:
    """What is added to the logits of the keys ``low .. high - 1``, ``[B|1, Hq|1, T|1, prefix + keys]``; None: nothing.

    Zero on prefix columns. Causality is not in it unless there is one query.
    """
    keys = slice(low, high)
    if x.query.shape[2] == 1:
        visible = x.visible(0, 1, low, high - low)
    else:
        padding = None if x.key_padding is None else x.key_padding[:, None, None, keys]
        seen = [] if padding is None or bool(padding.all()) else [padding]
        if x.dense is not None:
            seen.append(part_of(x.dense, slice(None), keys))
        visible = seen[0] & seen[1] if len(seen) == 2 else (seen[0] if seen else None)
    if visible is None and x.bias is None:
        return None
    if x.bias is None:
        tokens = torch.where(visible, 0.0, HIDDEN).to(x.compute_dtype)
    else:
        tokens = part_of(x.bias, slice(None), keys).to(x.compute_dtype).clamp_min(HIDDEN)
        tokens = tokens if visible is None else torch.where(visible, tokens, HIDDEN)
    tokens = tokens.expand(*tokens.shape[:3], high - low)
    return torch.nn.functional.pad(tokens, (prefix, 0)) if prefix else tokens


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Output, stored heads last, and log-sum-exp over the tokens alone.

    Where a row sees no token the output is finite, and the log-sum-exp so low that it weighs nothing.
    """
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    calls = parts(x, Scratch(x.query, x.query.dtype))
    out = heads_last_empty(x.query, batch, heads, queries, value_dim)
    logsumexp = x.query.new_empty(batch, heads, queries, dtype=x.compute_dtype)
    if calls and not calls[0].first:
        for whole, part in zip((out, logsumexp), calls.pop(0).forward()):
            whole.copy_(part)
    else:
        out.zero_()
        logsumexp.fill_(HIDDEN)
    for call in calls:
        call.merge_(out, logsumexp)
    return out, logsumexp


def backward(
    x: Inputs, scratch: Scratch, out: Tensor, logsumexp: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through the tokens; ``out, logsumexp`` are those of the whole softmax."""
    total = None
    for call in parts(x, scratch):
        rows = slice(call.first, None)
        grads = call.backward(out[:, :, rows], logsumexp[:, :, rows], grad_out[:, :, rows])
        if grads[0].shape == x.query.shape and grads[1].shape == x.key.shape:
            return grads
        if total is None:
            total = [heads_last_empty(like, *like.shape).zero_() for like in (x.query, x.key, x.value)]
        total[0][:, :, rows].add_(grads[0])
        for whole, grad in zip(total[1:], grads[1:]):
            whole[:, :, call.low : call.low + grad.shape[2]].copy_(grad)
    return tuple(total) if total else tuple(torch.zeros_like(like) for like in (x.query, x.key, x.value))
