"""Backward: the second stage of every sum over rows, heads and positions, in a fixed order, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import WIDE, Problem, count_tiles, launch
from .columns import Columns
from .primitives import LOG2E, layer_scale, plain


@triton.jit
def _sum_parts(p_parts, p_sum, i, size, parts, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``COLUMNS`` of ``size`` elements, each summed over ``parts``."""
    o = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b_sum = tl.zeros([COLUMNS], W)
    for i_part in tl.range(0, parts, ROWS):
        o_part = i_part + tl.arange(0, ROWS)[:, None]
        p_tile = p_parts + tl.cast(o_part, tl.int64) * size + o
        b_sum += tl.sum(tl.load(p_tile, mask=(o_part < parts) & (o < size), other=0.0), 0)
    tl.store(p_sum + o, b_sum[None, :].to(p_sum.dtype.element_ty), mask=o < size)


@triton.jit
def _sum_gate(
    p_weights, p_d_gate, gate, i, batch, gate_rows, share, M, W: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A part of one gate row's gradient: the sum over the rows ``[B * share, M]`` that it served."""
    i_tiles = tl.cdiv(M, COLUMNS)
    i_g, o_m = i // i_tiles, i % i_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    i_first, i_end = 0, batch * share
    if gate.index is None:
        # A gate for each batch row, or one for all.
        i_first = tl.where(gate_rows == 1, 0, i_g * share)
        i_end = tl.where(gate_rows == 1, batch * share, (i_g + 1) * share)
    b_dg = tl.zeros([COLUMNS], W)
    for i_row in tl.range(i_first, i_end, ROWS):
        o_row = i_row + tl.arange(0, ROWS)[:, None]
        m_row = o_row < i_end
        if gate.index is not None:
            o_index = tl.cast(o_row // share, tl.int64) * plain(gate.index_b) + o_row % share * plain(gate.index_t)
            m_row = m_row & (tl.load(gate.index + o_index, mask=m_row, other=-1) == i_g)
        b_dg += tl.sum(tl.load(p_weights + tl.cast(o_row, tl.int64) * M + o_m, mask=m_row & (o_m < M), other=0.0), 0)
    b_logit = tl.load(gate.ptr + tl.cast(i_g, tl.int64) * plain(gate.b) + o_m, mask=o_m < M, other=0.0)
    b_sigmoid = 1 / (1 + tl.exp2(b_logit.to(W) * -LOG2E))
    b_d_gate = b_dg[None, :] * layer_scale(gate, W) * b_sigmoid * (1 - b_sigmoid)
    tl.store(p_d_gate + tl.cast(i_g, tl.int64) * M + o_m, b_d_gate.to(p_d_gate.dtype.element_ty), mask=o_m < M)


@triton.jit
def _sum_sink(p_sinks, p_d_sinks, p_lse, p_delta, i_h, batch, heads, T, W: tl.constexpr, BLOCK: tl.constexpr):
    """One head's sink: minus its probability times delta, over batch rows and queries."""
    b_sink, b_sum = tl.load(p_sinks + i_h).to(W), tl.zeros([BLOCK], W)
    for i_b in tl.range(0, batch):
        o_bh = (tl.cast(i_b, tl.int64) * heads + i_h) * T
        for i_t in tl.range(0, T, BLOCK):
            o_t = i_t + tl.arange(0, BLOCK)
            b_lse = tl.load(p_lse + o_bh + o_t, mask=o_t < T, other=float("inf"))
            b_sum -= tl.exp2((b_sink - b_lse) * LOG2E) * tl.load(p_delta + o_bh + o_t, mask=o_t < T, other=0.0)
    tl.store(p_d_sinks + i_h, tl.sum(b_sum, 0).to(p_d_sinks.dtype.element_ty))


@triton.jit(do_not_specialize=(
    "keys", "values", "gates", "scales", "key_size", "value_size", "parts", "scale_parts", "gate_rows", "share",
    "batch", "heads", "T", "M",
))  # fmt: skip
def finish_gradients(
    p_key_parts, p_key, p_value_parts, p_value, p_weights, p_d_gate, p_scale_parts, p_d_scale, p_sinks, p_d_sinks,
    p_lse, p_delta, gate, keys, values, gates, scales, key_size, value_size, parts, scale_parts, gate_rows, share,
    batch, heads, T, M, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first ``keys`` programs sum dPk, then ``values`` dPv, ``gates`` the gate's, ``scales`` (one, or none)
    lambda's, and one a head the sinks'."""
    i = tl.program_id(0)
    if p_key is not None:
        if i < keys:
            _sum_parts(p_key_parts, p_key, i, key_size, parts, W, ROWS, COLUMNS)
    i -= keys
    if p_value is not None:
        if (i >= 0) & (i < values):
            _sum_parts(p_value_parts, p_value, i, value_size, parts, W, ROWS, COLUMNS)
    i -= values
    if p_d_gate is not None:
        if (i >= 0) & (i < gates):
            _sum_gate(p_weights, p_d_gate, gate, i, batch, gate_rows, share, M, W, ROWS, COLUMNS)
    i -= gates
    if p_d_scale is not None:
        if (i >= 0) & (i < scales):
            b_sum = tl.zeros([ROWS * COLUMNS], W)
            for i_part in tl.range(0, scale_parts, ROWS * COLUMNS):
                o_part = i_part + tl.arange(0, ROWS * COLUMNS)
                b_sum += tl.load(p_scale_parts + o_part, mask=o_part < scale_parts, other=0.0)
            tl.store(p_d_scale, tl.sum(b_sum, 0).to(p_d_scale.dtype.element_ty))
    i -= scales
    if p_d_sinks is not None:
        if i >= 0:
            _sum_sink(p_sinks, p_d_sinks, p_lse, p_delta, i, batch, heads, T, W, ROWS * COLUMNS)


def finish(
    problem: Problem, columns: Columns, logsumexp: Tensor, delta: Tensor, need: dict[str, bool]
) -> dict[str, Tensor | None]:
    """The gradients of prefix, gate, layer scale and sinks that are needed."""
    x, tile = problem.x, problem.tile("finish")
    batch, heads, _, queries, _, length, *_ = problem.sizes

    def like(name: str) -> Tensor | None:
        wanted = need[name] and (name != "gate" or columns.gate is None)
        return torch.empty_like(getattr(x, name), memory_format=torch.contiguous_format) if wanted else None

    done = {name: like(name) for name in ("prefix_key", "prefix_value", "gate", "layer_scale", "sinks")}
    sizes = {name: 0 if made is None else made.numel() for name, made in done.items()}
    keys, values = (count_tiles(sizes[name], tile.columns) for name in ("prefix_key", "prefix_value"))
    gate_rows = sizes["gate"] // length
    gates, scales = gate_rows * count_tiles(length, tile.columns), sizes["layer_scale"]
    programs = keys + values + gates + scales + sizes["sinks"]
    partial = columns.prefix_key if columns.prefix_key is not None else columns.prefix_value
    if programs:
        launch(
            finish_gradients, programs, tile,
            columns.prefix_key, done["prefix_key"], columns.prefix_value, done["prefix_value"], columns.weights,
            done["gate"], columns.layer_scale, done["layer_scale"], x.sinks, done["sinks"], logsumexp, delta,
            problem.gate, keys, values, gates, scales, sizes["prefix_key"], sizes["prefix_value"],
            0 if partial is None else partial.shape[0],
            0 if columns.layer_scale is None else columns.layer_scale.numel(), gate_rows,
            0 if columns.weights is None else columns.weights.shape[1], batch, heads, queries, length,
            W=WIDE[x.compute_dtype], ROWS=tile.rows, COLUMNS=tile.columns,
        )  # fmt: skip
    if columns.gate is not None:
        done["gate"] = columns.gate
    return done
