"""Floating-point operations and bytes that the op needs, counted from a shape, for any implementation.

Sources: attention's forward is ``2 * B * Hq * T * columns * (D + Dv)`` and its backward 2.5 times that (five products
instead of two); the gate's product is ``2 * rows * d * M`` forward and twice that backward. Bytes: every tensor once,
the prefix once and not once a row.
"""

from __future__ import annotations

import torch

from .shapes import Shape


def visible(shape: Shape) -> float:
    """Token columns that a query sees, on average: keys that are not padding, and for causal shapes not later."""
    padding = shape.key_padding("cpu")
    if padding is None:
        return shape.keys - (shape.tokens - 1) / 2 if shape.causal else float(shape.keys)
    seen = padding.double()
    if not shape.causal:
        return float(seen.sum(1).mean())
    return float(seen.cumsum(1)[:, shape.keys - shape.tokens :].mean())


def attention_flops(shape: Shape, columns: float, which: str = "both") -> float:
    """Of attention in which every query sees ``columns`` columns, on average."""
    forward = 4 * shape.batch * shape.heads * shape.tokens * columns * shape.dim
    return forward * {"forward": 1, "backward": 2.5, "both": 3.5}[which]


def gate_flops(shape: Shape, which: str = "both") -> float:
    """Of the product of hidden states and the gate's weight, with the gradients of both."""
    rows = {"row": shape.batch, "query": shape.batch * shape.tokens}.get(shape.gate, 0)
    forward = 2 * rows * shape.heads * shape.dim * shape.length
    return forward * {"forward": 1, "backward": 2, "both": 3}[which]


def flops(shape: Shape, which: str = "both") -> float:
    """Of the whole op, gate product included."""
    return attention_flops(shape, visible(shape) + shape.length, which) + gate_flops(shape, which)


def flops_without(shape: Shape, which: str = "both") -> float:
    """Of the same attention with no prefix."""
    return attention_flops(shape, visible(shape), which)


def flop_overhead(shape: Shape, which: str = "both") -> float:
    """What the prefix adds, gate product included, as a fraction of the attention without it."""
    without = flops_without(shape, which)
    return (flops(shape, which) - without) / without


def fewest_bytes(shape: Shape, dtype: torch.dtype, which: str = "both", has_prefix: bool = True) -> int:
    """Read and written at least: inputs, output, log-sum-exp; in the backward those again and the gradients."""
    size = dtype.itemsize
    query = shape.batch * shape.heads * shape.tokens * shape.dim * size
    key = shape.batch * shape.kv_heads * shape.keys * shape.dim * size
    sums = shape.batch * shape.heads * shape.tokens * 4
    prefix = 2 * shape.kv_heads * shape.length * shape.dim * 4
    if shape.gate in ("row", "query"):
        rows = shape.batch * (shape.tokens if shape.gate == "query" else 1)
        width = shape.heads * shape.dim
        prefix += rows * width * size + shape.length * width * 4
    prefix = prefix if has_prefix else 0
    forward = 2 * query + 2 * key + sums + prefix
    # q, k, v, out, its gradient and the sums come in; dq, dk, dv and the prefix's gradients go out.
    backward = 4 * query + 4 * key + sums + 2 * prefix
    return {"forward": forward, "backward": backward, "both": forward + backward}[which]
