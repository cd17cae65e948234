"""Backward: the gradients of prefix, gate and layer scale, which sum over rows, heads and positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gate import gate_gradients
from ..inputs import Inputs
from . import table
from .arguments import RUNTIME, WIDE, Problem, Rows, count_tiles, launch, rows
from .primitives import (
    LOG2E,
    as_tile,
    head,
    load_row_sums,
    load_rows,
    prefix_gradients,
    product,
    rescale,
    row_keys,
    store_rows,
    weights,
)


@triton.jit(do_not_specialize=(*RUNTIME, "batch", "chunk", "splits"))
def prefix_partials(
    q, pk, pv, d_out, p_lse, p_delta, dpk, dpv, p_dg, gate, p_seed, batch, chunk, splits,
    T, S, M, heads, group, offset: tl.int64, left: tl.int64, right: tl.int64, threshold,
    kept: tl.float64, scale: tl.float64, softcap: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, PER_QUERY: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dPk and dPv of ``COLUMNS`` prefix columns of one key head over ``chunk`` batch rows, or one split of one row.

    A split is a share of the row's (head, query tile) pairs. ``p_dg`` ``[splits, B, Hkv, M]`` takes the gradient of a
    gate that all the row's queries share.
    """
    i_tiles, i_kv_heads = tl.cdiv(M, COLUMNS), heads // group
    i_part = tl.program_id(0) // i_tiles // i_kv_heads
    i_kv = tl.program_id(0) // i_tiles % i_kv_heads
    i_m = tl.program_id(0) % i_tiles * COLUMNS
    i_split, i_first = i_part % splits, i_part // splits * chunk
    o_m = i_m + tl.arange(0, COLUMNS)[:, None]
    b_scale, b_cap, b_kept = as_tile(scale, W), as_tile(softcap, W), as_tile(kept, W)
    p_pk, s_pk = head(pk, 0, i_kv, ALIGNED)
    p_pv, s_pv = head(pv, 0, i_kv, ALIGNED)
    b_k = load_rows(p_pk, s_pk, i_m, M, D, COLUMNS, WIDTH, True)  # [COLUMNS, WIDTH]
    b_v = load_rows(p_pv, s_pv, i_m, M, DV, COLUMNS, WIDTH_V, True)  # [COLUMNS, WIDTH_V]
    b_dk, b_dv = tl.zeros([COLUMNS, WIDTH], W), tl.zeros([COLUMNS, WIDTH_V], W)
    i_query_tiles = tl.cdiv(T, ROWS)
    i_share = tl.cdiv(group * i_query_tiles, splits)
    for i_b in tl.range(i_first, tl.minimum(i_first + chunk, batch)):
        b_dg = tl.zeros([COLUMNS], W)
        b_g = weights(gate, i_b, o_m, o_m, T, M, False, W) if not PER_QUERY else None  # [COLUMNS or 1, 1]
        for i_unit in tl.range(i_split * i_share, tl.minimum((i_split + 1) * i_share, group * i_query_tiles)):
            i_h, i_t = i_kv * group + i_unit // i_query_tiles, i_unit % i_query_tiles * ROWS
            i_bh = i_b * heads + i_h
            o_t = i_t + tl.arange(0, ROWS)[None, :]
            p_q, s_q = head(q, i_b, i_h, ALIGNED)
            p_do, s_do = head(d_out, i_b, i_h, ALIGNED)
            b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True)  # [ROWS, WIDTH]
            b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True)  # [ROWS, WIDTH_V]
            b_lse = load_row_sums(p_lse, i_bh, o_t, T, float("inf")) * LOG2E  # [1, ROWS]
            b_delta = load_row_sums(p_delta, i_bh, o_t, T, 0.0)  # [1, ROWS]
            b_w = weights(gate, i_b, o_t, o_m, T, M, True, W) if PER_QUERY else b_g  # [COLUMNS or 1, ROWS or 1]
            b_s = product(b_k, tl.trans(b_q), tl.zeros([COLUMNS, ROWS], W), PRECISION, W)
            b_r = product(b_v, tl.trans(b_do), tl.zeros([COLUMNS, ROWS], W), PRECISION, W)
            b_p, b_dz, b_dw = prefix_gradients(
                b_s, b_r, b_w, b_lse, b_delta, row_keys(p_seed, i_bh, o_t), b_scale, b_cap, b_kept,
                o_m, M, threshold, CAPPED,
            )  # fmt: skip
            if p_dg is not None:
                b_dg += tl.sum(b_dw, 1)
            if dpv.ptr is not None:
                b_dv = product((b_p * b_w).to(b_q.dtype), b_do, b_dv, PRECISION, W)
            if dpk.ptr is not None:
                b_dk = product((b_dz * b_w).to(b_q.dtype), b_q, b_dk, PRECISION, W)
        if p_dg is not None:
            o_column = i_m + tl.arange(0, COLUMNS)
            p_row = p_dg + ((tl.cast(i_split, tl.int64) * batch + i_b) * i_kv_heads + i_kv) * M
            tl.store(p_row + o_column, b_dg, mask=o_column < M)
    if dpk.ptr is not None:
        p_dk, s_dk = head(dpk, i_part, i_kv, ALIGNED)
        store_rows(p_dk, s_dk, i_m, M, b_dk * b_scale, D, COLUMNS, WIDTH)
    if dpv.ptr is not None:
        p_dv, s_dv = head(dpv, i_part, i_kv, ALIGNED)
        store_rows(p_dv, s_dv, i_m, M, rescale(b_dv, b_kept, p_seed), DV, COLUMNS, WIDTH_V)


@triton.jit(do_not_specialize=RUNTIME)
def query_gate_gradient(
    q, pk, pv, d_out, p_lse, p_delta, p_dg, gate, p_seed,
    T, S, M, heads, group, offset: tl.int64, left: tl.int64, right: tl.int64, threshold,
    kept: tl.float64, scale: tl.float64, softcap: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, PER_QUERY: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of ``g``, ``[B, T, M]``, where each query has its own: a sum over heads, in registers."""
    i_m_tiles, i_t_tiles = tl.cdiv(M, COLUMNS), tl.cdiv(T, ROWS)
    i_m = tl.program_id(0) % i_m_tiles * COLUMNS
    i_t = tl.program_id(0) // i_m_tiles % i_t_tiles * ROWS
    i_b = tl.program_id(0) // i_m_tiles // i_t_tiles
    o_t, o_m = i_t + tl.arange(0, ROWS)[:, None], i_m + tl.arange(0, COLUMNS)[None, :]
    b_scale, b_cap, b_kept = as_tile(scale, W), as_tile(softcap, W), as_tile(kept, W)
    b_g = weights(gate, i_b, o_t, o_m, T, M, PER_QUERY, W)  # [ROWS, COLUMNS]
    b_dg = tl.zeros([ROWS, COLUMNS], W)
    for i_h in tl.range(0, heads):
        i_bh = i_b * heads + i_h
        p_q, s_q = head(q, i_b, i_h, ALIGNED)
        p_do, s_do = head(d_out, i_b, i_h, ALIGNED)
        p_pk, s_pk = head(pk, 0, i_h // group, ALIGNED)
        p_pv, s_pv = head(pv, 0, i_h // group, ALIGNED)
        b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True)  # [ROWS, WIDTH]
        b_k = load_rows(p_pk, s_pk, i_m, M, D, COLUMNS, WIDTH, True)  # [COLUMNS, WIDTH]
        b_s = product(b_q, tl.trans(b_k), tl.zeros([ROWS, COLUMNS], W), PRECISION, W)
        b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True)  # [ROWS, WIDTH_V]
        b_v = load_rows(p_pv, s_pv, i_m, M, DV, COLUMNS, WIDTH_V, True)  # [COLUMNS, WIDTH_V]
        b_r = product(b_do, tl.trans(b_v), tl.zeros([ROWS, COLUMNS], W), PRECISION, W)
        b_lse = load_row_sums(p_lse, i_bh, o_t, T, float("inf")) * LOG2E  # [ROWS, 1]
        b_delta = load_row_sums(p_delta, i_bh, o_t, T, 0.0)  # [ROWS, 1]
        _, _, b_dw = prefix_gradients(
            b_s, b_r, b_g, b_lse, b_delta, row_keys(p_seed, i_bh, o_t), b_scale, b_cap, b_kept,
            o_m, M, threshold, CAPPED,
        )  # fmt: skip
        b_dg += b_dw
    o_row = tl.cast(i_b, tl.int64) * T + o_t
    tl.store(p_dg + o_row * M + o_m, b_dg, mask=(o_t < T) & (o_m < M))


@triton.jit(do_not_specialize=("rows", "queries", "index_b", "index_t", "M"))
def indexed_sum(
    p_rows, p_index, p_sum, rows, queries, index_b, index_t, M, W: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One gate row's gradient: the sum, in order, of the rows ``[B * T, M]`` that picked it."""
    i_tiles = tl.cdiv(M, COLUMNS)
    i_g, o_m = tl.program_id(0) // i_tiles, tl.program_id(0) % i_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b_sum = tl.zeros([1, COLUMNS], W)
    for i_row in tl.range(0, rows, ROWS):
        o_row = i_row + tl.arange(0, ROWS)[:, None]
        o_index = tl.cast(o_row // queries, tl.int64) * index_b + o_row % queries * index_t
        m_mine = tl.load(p_index + o_index, mask=o_row < rows, other=-1) == i_g
        b_rows = tl.load(p_rows + tl.cast(o_row, tl.int64) * M + o_m, mask=m_mine & (o_m < M), other=0.0)
        b_sum += tl.sum(b_rows, 0)[None, :]
    tl.store(p_sum + tl.cast(i_g, tl.int64) * M + o_m, b_sum, mask=o_m < M)


def _parts(problem: Problem, tile: table.Tile) -> tuple[int, int, int]:
    """Batch rows that share a partial sum, how many such chunks, and the splits of a row. By shape alone."""
    batch, heads, kv_heads, queries, _, length, *_ = problem.x.sizes
    base, most = count_tiles(length, tile.columns) * kv_heads, table.programs(problem.architecture)
    chunk = max(1, batch * base // most)
    chunks = count_tiles(batch, chunk)
    if chunk > 1:
        return chunk, chunks, 1
    units = heads // kv_heads * count_tiles(queries, tile.rows)
    return chunk, chunks, max(1, min(units, most // (base * chunks)))


def prefix_gradient(
    problem: Problem, d_out: Rows, logsumexp: Tensor, delta: Tensor, key: bool, value: bool, gate: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dPk, dPv, and the gradient ``[B, 1, M]`` of a gate that a row's queries share: partial sums, then their sum."""
    x, tile = problem.x, problem.tile("prefix")
    batch, _, kv_heads, _, _, length, head_dim, value_dim = x.sizes
    chunk, chunks, splits = _parts(problem, tile)

    def partial(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=x.compute_dtype, device=x.query.device) if wanted else None

    keys = partial(key, chunks * splits, kv_heads, length, head_dim)
    values = partial(value, chunks * splits, kv_heads, length, value_dim)
    gates = partial(gate, splits, batch, kv_heads, length)
    to = rows(keys), rows(values)
    launch(
        prefix_partials, count_tiles(length, tile.columns) * kv_heads * chunks * splits, tile,
        problem.query, problem.prefix_key, problem.prefix_value, d_out, logsumexp, delta, *to, gates,
        problem.gate, x.seed, batch, chunk, splits, **problem.numbers(), **problem.constants(d_out, *to),
        ROWS=tile.rows, COLUMNS=tile.columns,
    )  # fmt: skip
    return (
        keys.sum(0) if key else None,
        values.sum(0) if value else None,
        gates.sum((0, 2))[:, None] if gate else None,
    )


def gate_gradient(
    problem: Problem, d_out: Rows, logsumexp: Tensor, delta: Tensor, d_weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the gate's logits and of the layer scale; ``d_weights`` is that of ``g`` where rows share one."""
    x = problem.x
    if d_weights is None:
        d_weights = _query_gate_gradient(problem, d_out, logsumexp, delta)
    elif x.gate is None or (x.gate_index is None and x.gate.shape[0] == 1):
        d_weights = d_weights.sum(0, keepdim=True)
    return gate_gradients(x, d_weights, _sum_by_index)


def _query_gate_gradient(problem: Problem, d_out: Rows, logsumexp: Tensor, delta: Tensor) -> Tensor:
    x, tile = problem.x, problem.tile("gate")
    batch, _, _, queries, _, length, *_ = x.sizes
    d_weights = torch.empty(batch, queries, length, dtype=x.compute_dtype, device=x.query.device)
    launch(
        query_gate_gradient, count_tiles(length, tile.columns) * count_tiles(queries, tile.rows) * batch, tile,
        problem.query, problem.prefix_key, problem.prefix_value, d_out, logsumexp, delta, d_weights, problem.gate,
        x.seed, **problem.numbers(), **problem.constants(d_out), ROWS=tile.rows, COLUMNS=tile.columns,
    )  # fmt: skip
    return d_weights


def _sum_by_index(x: Inputs, rows: Tensor) -> Tensor:
    """``[G, M]``: the rows ``[B, T|1, M]`` summed, in order, by the row of the gate that they picked."""
    batch, queries, length = rows.shape
    tile = table.tile("index", table.architecture(rows.device), rows.element_size(), 0)
    summed = torch.empty(x.gate.shape, dtype=rows.dtype, device=rows.device)
    launch(
        indexed_sum, count_tiles(length, tile.columns) * x.gate.shape[0], tile,
        rows.contiguous(), x.gate_index, summed, batch * queries, queries, *x.gate_index.stride(), length,
        W=WIDE[x.compute_dtype], ROWS=tile.rows, COLUMNS=tile.columns,
    )  # fmt: skip
    return summed
