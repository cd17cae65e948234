"""Backward: the gradients of columns, in one launch.

Some programs take a tile of keys through the queries that see them (dk, dv); some a tile of prefix columns through a
share of all queries (partial sums of dPk, dPv and of a gate that a row's queries share); and where each query has a
gate of its own, some take a tile of it through all heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import heads_last_empty
from . import tiles
from .arguments import RUNTIME, Problem, Rows, count_tiles, launch, rows
from .primitives import (
    LOG2E,
    as_tile,
    head,
    layer_scale,
    load_row_sums,
    load_rows,
    position,
    prefix_gradients,
    product,
    rescale,
    row_keys,
    sigmoids,
    similarity,
    store_rows,
    token_gradients,
    weights,
)
from .ranges import query_range


@triton.jit
def _tokens(
    q, k, v, d_out, p_lse, p_delta, dk, dv, seen, p_seed, b_scale, b_cap, b_kept, i,
    T, S, M, heads, group, offset, left, right, threshold,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCAN: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """dk (``KEY``) and dv (``VALUE``) of ``COLUMNS`` keys of one key head, over the queries that see them."""
    i_tiles, i_kv_heads = tl.cdiv(S, COLUMNS), heads // group
    # Under a causal mask the first keys have most to do, and they start first.
    i_n = i % i_tiles * COLUMNS
    i_b, i_kv = i // i_tiles // i_kv_heads, i // i_tiles % i_kv_heads
    p_k, s_k = head(k, i_b, i_kv, ALIGNED)
    p_v, s_v = head(v, i_b, i_kv, ALIGNED)
    b_k = load_rows(p_k, s_k, i_n, S, D, COLUMNS, WIDTH, True, ALIGNED)  # [COLUMNS, WIDTH]
    b_v = load_rows(p_v, s_v, i_n, S, DV, COLUMNS, WIDTH_V, True, ALIGNED)  # [COLUMNS, WIDTH_V]
    b_dk, b_dv = tl.zeros([COLUMNS, WIDTH], W), tl.zeros([COLUMNS, WIDTH_V], W)
    o_n = i_n + tl.arange(0, COLUMNS)[:, None]
    i_base = position(seen, i_b, offset)
    i_first, i_end = query_range(seen, i_b, i_n, i_base, left, right, T, S, LEFT, RIGHT, ROWS, COLUMNS, SCAN)
    for i_g in tl.range(0, group):
        i_h = i_kv * group + i_g
        i_bh = i_b * heads + i_h
        p_q, s_q = head(q, i_b, i_h, ALIGNED)
        p_do, s_do = head(d_out, i_b, i_h, ALIGNED)
        for i_t in tl.range(i_first, i_end, ROWS):
            o_t = i_t + tl.arange(0, ROWS)[None, :]
            b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True, ALIGNED)  # [ROWS, WIDTH]
            b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True, ALIGNED)  # [ROWS, WIDTH_V]
            # A row past the end has an infinite log-sum-exp: all its probabilities are zero.
            b_lse = load_row_sums(p_lse, i_bh, o_t, T, float("inf")) * LOG2E  # [1, ROWS]
            b_delta = load_row_sums(p_delta, i_bh, o_t, T, 0.0)  # [1, ROWS]
            b_s = similarity(b_k, (p_k, s_k, i_n, S), b_q, (p_q, s_q, i_t, T), D, PRECISION, W)
            b_r = similarity(b_v, (p_v, s_v, i_n, S), b_do, (p_do, s_do, i_t, T), DV, PRECISION, W)
            # Keys past the end need no check: what they get is not stored. Checking positions costs a comparison and
            # a selection; a loop of its own for whole tiles costs the registers of a wider tile.
            b_p, _, b_ds = token_gradients(
                b_s, b_r, b_lse, b_delta, seen, row_keys(p_seed, i_bh, o_t), b_scale, b_cap, b_kept,
                i_b, i_h, o_t, o_n, i_base, T, S, M, left, right, threshold, LEFT, RIGHT, CAPPED, LEFT or RIGHT,
            )  # fmt: skip
            if VALUE:
                b_dv = product(b_p.to(b_q.dtype), b_do, b_dv, PRECISION, W)
            if KEY:
                b_dk = product(b_ds.to(b_q.dtype), b_q, b_dk, PRECISION, W)
    if KEY:
        p_dk, s_dk = head(dk, i_b, i_kv, ALIGNED)
        store_rows(p_dk, s_dk, i_n, S, b_dk * b_scale, D, COLUMNS, WIDTH)
    if VALUE:
        p_dv, s_dv = head(dv, i_b, i_kv, ALIGNED)
        store_rows(p_dv, s_dv, i_n, S, rescale(b_dv, b_kept, p_seed), DV, COLUMNS, WIDTH_V)


@triton.jit
def _prefix(
    q, pk, pv, d_out, p_lse, p_delta, dpk, dpv, p_dg, p_d_scale, gate, p_seed, b_scale, b_cap, b_kept, i,
    batch, chunk, splits, T, M, heads, group, threshold,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CAPPED: tl.constexpr,
    PER_QUERY: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dPk and dPv of ``COLUMNS`` prefix columns of one key head over ``chunk`` batch rows, or one split of one row.

    A split is a share of the row's (head, query tile) pairs. ``p_dg`` ``[B, splits, Hkv, M]`` takes the gradient of a
    gate that all the row's queries share, ``p_d_scale`` what this program adds to that of lambda.
    """
    i_tiles, i_kv_heads = tl.cdiv(M, COLUMNS), heads // group
    i_part = i // i_tiles // i_kv_heads
    i_kv = i // i_tiles % i_kv_heads
    i_m = i % i_tiles * COLUMNS
    i_split, i_first = i_part % splits, i_part // splits * chunk
    o_m = i_m + tl.arange(0, COLUMNS)[:, None]
    p_pk, s_pk = head(pk, 0, i_kv, ALIGNED)
    p_pv, s_pv = head(pv, 0, i_kv, ALIGNED)
    element = q.ptr.dtype.element_ty
    b_k = load_rows(p_pk, s_pk, i_m, M, D, COLUMNS, WIDTH, True, ALIGNED).to(element)  # [COLUMNS, WIDTH]
    b_v = load_rows(p_pv, s_pv, i_m, M, DV, COLUMNS, WIDTH_V, True, ALIGNED).to(element)  # [COLUMNS, WIDTH_V]
    b_dk, b_dv = tl.zeros([COLUMNS, WIDTH], W), tl.zeros([COLUMNS, WIDTH_V], W)
    b_d_scale = tl.zeros([COLUMNS, 1], W)
    i_query_tiles = tl.cdiv(T, ROWS)
    i_share = tl.cdiv(group * i_query_tiles, splits)
    for i_b in tl.range(i_first, tl.minimum(i_first + chunk, batch)):
        b_dg = tl.zeros([COLUMNS, 1], W)
        b_g = weights(gate, i_b, o_m, o_m, T, M, False, W) if not PER_QUERY else None  # [COLUMNS or 1, 1]
        for i_unit in tl.range(i_split * i_share, tl.minimum((i_split + 1) * i_share, group * i_query_tiles)):
            i_h, i_t = i_kv * group + i_unit // i_query_tiles, i_unit % i_query_tiles * ROWS
            i_bh = i_b * heads + i_h
            o_t = i_t + tl.arange(0, ROWS)[None, :]
            p_q, s_q = head(q, i_b, i_h, ALIGNED)
            p_do, s_do = head(d_out, i_b, i_h, ALIGNED)
            b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True, ALIGNED)  # [ROWS, WIDTH]
            b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True, ALIGNED)  # [ROWS, WIDTH_V]
            b_lse = load_row_sums(p_lse, i_bh, o_t, T, float("inf")) * LOG2E  # [1, ROWS]
            b_delta = load_row_sums(p_delta, i_bh, o_t, T, 0.0)  # [1, ROWS]
            b_w = weights(gate, i_b, o_t, o_m, T, M, True, W) if PER_QUERY else b_g  # [COLUMNS or 1, ROWS or 1]
            b_s = similarity(b_k, (p_pk, s_pk, i_m, M), b_q, (p_q, s_q, i_t, T), D, PRECISION, W)
            b_r = similarity(b_v, (p_pv, s_pv, i_m, M), b_do, (p_do, s_do, i_t, T), DV, PRECISION, W)
            b_p, b_dz, b_dw = prefix_gradients(
                b_s, b_r, b_w, b_lse, b_delta, row_keys(p_seed, i_bh, o_t), b_scale, b_cap, b_kept,
                o_m, M, threshold, CAPPED,
            )  # fmt: skip
            if p_dg is not None or p_d_scale is not None:
                b_dg += tl.sum(b_dw, 1)[:, None]
            if dpv.ptr is not None:
                b_dv = product((b_p * b_w).to(b_q.dtype), b_do, b_dv, PRECISION, W)
            if dpk.ptr is not None:
                b_dk = product((b_dz * b_w).to(b_q.dtype), b_q, b_dk, PRECISION, W)
        if p_dg is not None:
            p_row = p_dg + ((tl.cast(i_b, tl.int64) * splits + i_split) * i_kv_heads + i_kv) * M
            tl.store(p_row + o_m, b_dg, mask=o_m < M)
        if p_d_scale is not None:
            b_d_scale += b_dg * sigmoids(gate, i_b, o_m, o_m, T, M, False, W)
    if p_d_scale is not None:
        tl.store(p_d_scale + i, tl.sum(tl.sum(b_d_scale, 1), 0))
    if dpk.ptr is not None:
        p_dk, s_dk = head(dpk, i_part, i_kv, ALIGNED)
        store_rows(p_dk, s_dk, i_m, M, b_dk * b_scale, D, COLUMNS, WIDTH)
    if dpv.ptr is not None:
        p_dv, s_dv = head(dpv, i_part, i_kv, ALIGNED)
        store_rows(p_dv, s_dv, i_m, M, rescale(b_dv, b_kept, p_seed), DV, COLUMNS, WIDTH_V)


@triton.jit
def _query_gate(
    q, pk, pv, d_out, p_lse, p_delta, p_d_gate, p_dg, p_d_scale, gate, p_seed, b_scale, b_cap, b_kept, i,
    T, M, heads, group, threshold,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, CAPPED: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of a gate ``[B, T, M]``, where each query has its own: a sum over heads, in registers.

    ``p_d_gate`` takes that of the logits, ``p_dg`` (for an indexed gate) that of ``g``.
    """
    i_m_tiles, i_t_tiles = tl.cdiv(M, COLUMNS), tl.cdiv(T, ROWS)
    i_m = i % i_m_tiles * COLUMNS
    i_t = i // i_m_tiles % i_t_tiles * ROWS
    i_b = i // i_m_tiles // i_t_tiles
    o_t, o_m = i_t + tl.arange(0, ROWS)[:, None], i_m + tl.arange(0, COLUMNS)[None, :]
    b_sigmoid = sigmoids(gate, i_b, o_t, o_m, T, M, True, W)  # [ROWS, COLUMNS]
    b_lambda = layer_scale(gate, W)
    b_g = b_sigmoid * b_lambda
    b_dg = tl.zeros([ROWS, COLUMNS], W)
    for i_h in tl.range(0, heads):
        i_bh = i_b * heads + i_h
        p_q, s_q = head(q, i_b, i_h, ALIGNED)
        p_do, s_do = head(d_out, i_b, i_h, ALIGNED)
        p_pk, s_pk = head(pk, 0, i_h // group, ALIGNED)
        p_pv, s_pv = head(pv, 0, i_h // group, ALIGNED)
        b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True, ALIGNED)  # [ROWS, WIDTH]
        b_k = load_rows(p_pk, s_pk, i_m, M, D, COLUMNS, WIDTH, True, ALIGNED).to(b_q.dtype)  # [COLUMNS, WIDTH]
        b_s = similarity(b_q, (p_q, s_q, i_t, T), b_k, (p_pk, s_pk, i_m, M), D, PRECISION, W, True)
        b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True, ALIGNED)  # [ROWS, WIDTH_V]
        b_v = load_rows(p_pv, s_pv, i_m, M, DV, COLUMNS, WIDTH_V, True, ALIGNED).to(b_q.dtype)  # [COLUMNS, WIDTH_V]
        b_r = similarity(b_do, (p_do, s_do, i_t, T), b_v, (p_pv, s_pv, i_m, M), DV, PRECISION, W, True)
        b_lse = load_row_sums(p_lse, i_bh, o_t, T, float("inf")) * LOG2E  # [ROWS, 1]
        b_delta = load_row_sums(p_delta, i_bh, o_t, T, 0.0)  # [ROWS, 1]
        _, _, b_dw = prefix_gradients(
            b_s, b_r, b_g, b_lse, b_delta, row_keys(p_seed, i_bh, o_t), b_scale, b_cap, b_kept,
            o_m, M, threshold, CAPPED,
        )  # fmt: skip
        b_dg += b_dw
    o_row = (tl.cast(i_b, tl.int64) * T + o_t) * M + o_m
    m_row = (o_t < T) & (o_m < M)
    if p_dg is not None:
        tl.store(p_dg + o_row, b_dg, mask=m_row)
    if p_d_gate is not None:
        b_d_gate = b_dg * b_lambda * b_sigmoid * (1 - b_sigmoid)
        tl.store(p_d_gate + o_row, b_d_gate.to(p_d_gate.dtype.element_ty), mask=m_row)
    if p_d_scale is not None:
        tl.store(p_d_scale + i, tl.sum(tl.sum(b_dg * b_sigmoid, 1), 0))


@triton.jit(do_not_specialize=(*RUNTIME, "tokens", "prefixes", "batch", "chunk", "splits"))
def column_gradients(
    q, k, v, pk, pv, d_out, p_lse, p_delta, dk, dv, dpk, dpv, p_d_gate, p_dg, p_d_scale, gate, seen, p_seed,
    tokens, prefixes, batch, chunk, splits,
    T, S, M, heads, group, offset: tl.int64, left: tl.int64, right: tl.int64, threshold,
    kept: tl.float64, scale: tl.float64, softcap: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, PER_QUERY: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PREFIX_ROWS: tl.constexpr, PREFIX: tl.constexpr, GATE_ROWS: tl.constexpr, GATE: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, APART: tl.constexpr, PREFIXES: tl.constexpr, GATES: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """One tile of keys (the first ``tokens`` programs), of prefix columns (``prefixes`` more), or of a gate.

    ``APART``: dk and dv come from programs of their own, ``tokens`` for each. Two sums of 256 columns do not fit the
    registers beside tiles of the size that Hopper's and Blackwell's matrix instructions need.
    """
    i = tl.program_id(0)
    b_scale, b_cap, b_kept = as_tile(scale, W), as_tile(softcap, W), as_tile(kept, W)
    if KEY:
        if i < tokens:
            _tokens(
                q, k, v, d_out, p_lse, p_delta, dk, dv, seen, p_seed, b_scale, b_cap, b_kept, i,
                T, S, M, heads, group, offset, left, right, threshold, D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED,
                ALIGNED, PRECISION, W, ROWS, COLUMNS, SCAN, True, VALUE and not APART,
            )  # fmt: skip
    if KEY and (VALUE and APART):
        i -= tokens
    if VALUE and (APART or not KEY):
        if (i >= 0) & (i < tokens):
            _tokens(
                q, k, v, d_out, p_lse, p_delta, dk, dv, seen, p_seed, b_scale, b_cap, b_kept, i,
                T, S, M, heads, group, offset, left, right, threshold, D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED,
                ALIGNED, PRECISION, W, ROWS, COLUMNS, SCAN, False, True,
            )  # fmt: skip
    if PREFIXES:
        if (i >= tokens) & (i < tokens + prefixes):
            _prefix(
                q, pk, pv, d_out, p_lse, p_delta, dpk, dpv, None if PER_QUERY else p_dg,
                None if PER_QUERY else p_d_scale, gate, p_seed, b_scale, b_cap, b_kept, i - tokens,
                batch, chunk, splits, T, M, heads, group, threshold,
                D, DV, WIDTH, WIDTH_V, CAPPED, PER_QUERY, ALIGNED, PRECISION, W, PREFIX_ROWS, PREFIX,
            )  # fmt: skip
    if GATES:
        if i >= tokens + prefixes:
            _query_gate(
                q, pk, pv, d_out, p_lse, p_delta, p_d_gate, p_dg, p_d_scale, gate, p_seed, b_scale, b_cap, b_kept,
                i - tokens - prefixes, T, M, heads, group, threshold,
                D, DV, WIDTH, WIDTH_V, CAPPED, ALIGNED, PRECISION, W, GATE_ROWS, GATE,
            )  # fmt: skip


class Columns(NamedTuple):
    """What the launch leaves: gradients, and partial sums for `finish`; None for what is not needed.

    ``prefix_key`` and ``prefix_value``: ``[parts, Hkv, M, D or Dv]``. ``gate`` is done. ``weights`` ``[B, n, M]``:
    gradients of ``g``, ``n`` rows for every batch row. ``layer_scale``: ``[programs]``.
    """

    key: Tensor | None
    value: Tensor | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    gate: Tensor | None
    weights: Tensor | None
    layer_scale: Tensor | None


def _parts(problem: Problem, tile: tiles.Tile) -> tuple[int, int, int]:
    """Batch rows that share a partial sum, how many such chunks, and the splits of a row. By shape alone."""
    batch, heads, kv_heads, queries, _, length, *_ = problem.sizes
    base, most = count_tiles(length, tile.columns) * kv_heads, tiles.programs(problem.architecture)
    chunk = max(1, batch * base // most)
    chunks = count_tiles(batch, chunk)
    if chunk > 1:
        return chunk, chunks, 1
    units = heads // kv_heads * count_tiles(queries, tile.rows)
    return chunk, chunks, max(1, min(units, most // (base * chunks)))


def column_gradients_of(
    problem: Problem, d_out: Rows, logsumexp: Tensor, delta: Tensor, need: dict[str, bool]
) -> Columns:
    """Launch `column_gradients` for what is needed of key, value, prefix, gate and layer scale."""
    x = problem.x
    batch, _, kv_heads, queries, keys, length, head_dim, value_dim = problem.sizes
    tile, shared, gate = (problem.tile(name) for name in ("key_value", "prefix", "gate"))
    chunk, chunks, splits = _parts(problem, shared)
    by_query, scaled = x.gate_by_query, need["layer_scale"]
    weights = need["gate"] or scaled

    tokens = count_tiles(keys, tile.columns) * batch * kv_heads if need["key"] or need["value"] else 0
    apart = tiles.is_apart(problem.architecture, x.query.element_size(), problem.dim)
    passes = need["key"] + need["value"] if apart else 1
    any_prefix = need["prefix_key"] or need["prefix_value"] or (weights and not by_query)
    prefixes = count_tiles(length, shared.columns) * kv_heads * chunks * splits if any_prefix else 0
    gates = count_tiles(length, gate.columns) * count_tiles(queries, gate.rows) * batch if weights and by_query else 0
    if not tokens + prefixes + gates:
        return Columns(*[None] * 7)

    def empty(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=x.compute_dtype, device=x.query.device) if wanted else None

    indexed = x.gate_index is not None
    columns = Columns(
        key=heads_last_empty(x.key, batch, kv_heads, keys, head_dim) if need["key"] else None,
        value=heads_last_empty(x.value, batch, kv_heads, keys, value_dim) if need["value"] else None,
        prefix_key=empty(need["prefix_key"], chunks * splits, kv_heads, length, head_dim),
        prefix_value=empty(need["prefix_value"], chunks * splits, kv_heads, length, value_dim),
        gate=torch.empty_like(x.gate, memory_format=torch.contiguous_format)
        if need["gate"] and by_query and not indexed
        else None,
        weights=empty(
            need["gate"] and (indexed or not by_query), batch, queries if by_query else splits * kv_heads, length
        ),
        layer_scale=empty(scaled, gates if by_query else prefixes),
    )
    to = [rows(part) for part in columns[:4]]
    launch(
        column_gradients, tokens * passes + prefixes + gates, tile,
        problem.query, problem.key, problem.value, problem.prefix_key, problem.prefix_value, d_out, logsumexp, delta,
        *to, columns.gate, columns.weights, columns.layer_scale, problem.gate, problem.seen, x.seed,
        tokens, prefixes, batch, chunk, splits, **problem.numbers, **problem.constants(d_out, *to),
        ROWS=tile.rows, COLUMNS=tile.columns, PREFIX_ROWS=shared.rows, PREFIX=shared.columns,
        GATE_ROWS=gate.rows, GATE=gate.columns, KEY=need["key"], VALUE=need["value"], APART=apart,
        PREFIXES=prefixes > 0, GATES=gates > 0,
        SCAN=tiles.SCAN,
    )  # fmt: skip
    return columns
