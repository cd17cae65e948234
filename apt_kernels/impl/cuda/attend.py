"""Forward and backward: one kernel each for the output, dq, dk and dv, the prefix, a gate per query, and the bias."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gate import gate_gradients
from ..inputs import DIFFERENTIABLE, Inputs, heads_last_empty
from ..sinks import sinks_gradient
from .launch import Problem, count_tiles, rows
from .ranges import find_ranges

# Enough blocks for every device. The number of the prefix's partial sums depends on this and on shapes alone, so that
# results are the same on every device.
_BLOCKS = 512


def forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """The op's forward."""
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    problem = Problem(x)
    out = heads_last_empty(x.query, batch, heads, queries, value_dim)
    logsumexp = problem.empty(batch, heads, queries)
    ranges = find_ranges(x, problem.tile("forward")[0], True)
    problem.run("forward", out=out, logsumexp=logsumexp, ranges=ranges)
    return out, logsumexp


def backward(
    x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """The op's backward; a kernel runs only where its gradients are needed."""
    need, grads = dict(zip(DIFFERENTIABLE, needs)), dict.fromkeys(DIFFERENTIABLE)
    problem, delta = Problem(x), torch.empty_like(logsumexp)
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.contiguous()
    given = {"grad_out": rows(grad_out), "logsumexp": logsumexp, "delta": delta}
    problem.run("delta", out=rows(out), grad_logsumexp=grad_logsumexp, **given)
    if need["query"]:
        grads["query"] = heads_last_empty(x.query, *x.query.shape)
        ranges = find_ranges(x, problem.tile("query")[0], True)
        problem.run("query", grad_query=grads["query"], ranges=ranges, **given)
    if need["key"] or need["value"]:
        for name in ("key", "value"):
            like = getattr(x, name)
            grads[name] = heads_last_empty(like, *like.shape) if need[name] else None
        ranges = find_ranges(x, problem.tile("key_value")[0], False)
        problem.run("key_value", grad_key=grads["key"], grad_value=grads["value"], ranges=ranges, **given)
    gate_needed = need["gate"] or need["layer_scale"]
    shared_gate = gate_needed and not x.gate_per_query
    d_weights = None
    if need["prefix_key"] or need["prefix_value"] or shared_gate:
        wanted = need["prefix_key"], need["prefix_value"], shared_gate
        grads["prefix_key"], grads["prefix_value"], d_weights = _prefix_gradient(problem, given, *wanted)
    if gate_needed:
        if d_weights is None:
            batch, _, _, queries, _, length, *_ = x.sizes
            d_weights = problem.empty(batch, queries, length)
            # With a head dimension of size one, as the kernel writes it.
            problem.run("gate", sums=_beside_heads(d_weights), **given)
        elif x.gate is None or (x.gate_index is None and x.gate.shape[0] == 1):
            d_weights = d_weights.sum(0, keepdim=True)
        grads["gate"], grads["layer_scale"] = gate_gradients(x, d_weights, _sum_by_index)
    if need["sinks"]:
        grads["sinks"] = sinks_gradient(x, logsumexp, delta)
    if need["bias"]:
        grads["bias"] = problem.empty(*x.bias.shape)
        problem.run("bias", sums=grads["bias"], **given)
    return [grads[name] if need[name] else None for name in DIFFERENTIABLE]


def _beside_heads(d_weights: Tensor) -> Tensor:
    return d_weights[:, None]


def _parts(problem: Problem) -> tuple[int, int, int]:
    """Batch rows per partial sum, the number of such chunks, and the splits of a row; they depend on shapes alone."""
    batch, heads, kv_heads, queries, _, length, *_ = problem.x.sizes
    size, columns = problem.tile("prefix")
    base = count_tiles(length, size) * kv_heads
    chunk = max(1, batch * base // _BLOCKS)
    chunks = count_tiles(batch, chunk)
    if chunk > 1:
        return chunk, chunks, 1
    units = heads // kv_heads * count_tiles(queries, columns)
    return chunk, chunks, max(1, min(units, _BLOCKS // (base * chunks)))


def _prefix_gradient(
    problem: Problem, given: dict[str, Tensor], key: bool, value: bool, gate: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dPk, dPv, and the gradient ``[B, 1, M]`` of a gate per row: partial sums, then their sum."""
    batch, _, kv_heads, _, _, length, head_dim, value_dim = problem.x.sizes
    chunk, chunks, splits = _parts(problem)
    keys = problem.empty(chunks * splits, kv_heads, length, head_dim) if key else None
    values = problem.empty(chunks * splits, kv_heads, length, value_dim) if value else None
    gates = problem.empty(splits, batch, kv_heads, length) if gate else None
    problem.run("prefix", grad_key=keys, grad_value=values, sums=gates, chunk=chunk, splits=splits, **given)
    return (
        keys.sum(0) if key else None,
        values.sum(0) if value else None,
        gates.sum((0, 2))[:, None] if gate else None,
    )


def _sum_by_index(x: Inputs, d_gate: Tensor) -> Tensor:
    """``[G, M]``: the rows ``[B, T|1, M]`` summed, in order, by their index in the gate."""
    problem = Problem(x)
    summed = problem.empty(*x.gate.shape)
    problem.run("index", delta=d_gate.contiguous(), sums=summed, queries=d_gate.shape[1], splits=x.gate.shape[0])
    return summed
