"""Backward: the gradients of columns.

Some programs process a tile of keys over the queries that see them (dk, dv); some a tile of prefix columns over a share
of all queries (partial sums of dPk, dPv and of a gate per row); with a gate per query, some a tile of the gate over all
heads. They share a launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import heads_last_empty
from . import tiles
from .adapters import at_least_one, ordered_row, row_prefix, rows_of_part, scaled_by_row
from .arguments import Gate, Problem, Rows, count_tiles, launch, odd, rows
from .primitives import (
    LOG2E,
    as_tile,
    at,
    at_head,
    drop,
    exponent,
    head,
    kept_columns,
    layer_scale,
    lengths,
    load_head,
    load_sums,
    load_tile,
    longest_first,
    open_heads,
    open_rows,
    plain,
    position,
    product,
    rescale,
    row_keys,
    row_sums,
    sigmoids,
    similarity,
    store_opened,
    token_weights,
    uncap,
    weights,
)
from .ranges import query_tiles


class Roles(NamedTuple):
    """The programs of a launch: for dk and dv (``APART``: separate programs for each, since two sums of 256 columns do
    not fit the registers beside tiles of the size that Hopper's and Blackwell's matrix instructions need), for prefix
    columns, and for a gate per query."""

    KEY: bool
    VALUE: bool
    APART: bool
    PREFIXES: bool
    GATES: bool


class Work(NamedTuple):
    """The numbers of programs, encoded by `arguments.odd`.

    ``tokens`` for tiles of keys: each processes one of ``shares`` of a group's query heads (``share`` heads), ``band``
    of them concurrently. ``prefixes`` for tiles of prefix columns: each processes ``chunk`` batch rows, or one of
    ``splits`` of one row. ``adapters``: the number of prefixes; 0: one for all rows.
    """

    tokens: int
    shares: int
    share: int
    band: int
    prefixes: int
    chunk: int
    splits: int
    adapters: int


class Gradients(NamedTuple):
    """The tensors for gradients, or for the partial sums that `finish` completes.

    ``dk``, ``dv`` ``[shares * B, Hkv, S, D or Dv]``; ``dpk``, ``dpv``: one tile per program, that is ``[parts, Hkv,
    tiles * PREFIX, WIDTH or WIDTH_V]``; ``d_gate``: of the logits of a gate per query; ``dg``: of ``g``,
    ``[B, splits, Hkv, M]``, or ``[B, T, M]`` for an indexed gate per query; ``d_scale``: each program's part of the
    gradient of the layer scale.
    """

    dk: Rows
    dv: Rows
    dpk: Tensor | None
    dpv: Tensor | None
    d_gate: Tensor | None
    dg: Tensor | None
    d_scale: Tensor | None


@triton.jit
def _queries(
    b_dk, b_dv, columns, queries, seen, p_seed, place, n, scales, steps, C: tl.constexpr, ROWS: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Add the part of a range of queries of some heads to ``dk / scale`` and dv.

    ``steps``: the number of heads; the first query; the query before which the range skips queries, and their number;
    the end. ``CHECK``: positions may hide keys, or queries may be past the last.
    """
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    b_k, at_k, b_v, at_v = columns
    q, do, row = queries
    i_b, i_h, i_bh, o_n, i_base = place
    i_heads, i_first, i_skip, i_skipped, i_end = steps
    # One loop over heads and their tiles, which counts both without a division: nested loops need more registers.
    i_head, i_tile, i_last = i_first * 0, i_first, i_end - i_skipped
    for _ in tl.range(0, i_heads * ((i_last - i_first) // ROWS)):
        i_t = i_tile
        if CHECK:
            i_t = tl.multiple_of(tl.where(i_tile < i_skip, i_tile, i_tile + i_skipped), ROWS)
        o_t = i_t + tl.arange(0, ROWS)[None, :]
        b_q = load_head(q, i_head, i_t, D, ROWS, WIDTH, CHECK, C.ALIGNED, C.DESCRIPTORS)  # [ROWS, WIDTH]
        b_do = load_head(do, i_head, i_t, DV, ROWS, WIDTH_V, CHECK, C.ALIGNED, C.DESCRIPTORS)  # [ROWS, WIDTH_V]
        # A row past the end has an infinite log-sum-exp: all its probabilities are zero.
        b_lse = load_sums(row, i_head, i_t, False, ROWS)
        b_s = similarity(b_k, at_k, b_q, at_head(q, i_head, i_t), D, C)
        # Keys past the end need no check: their results are not stored.
        b_p, b_x = token_weights(
            b_s, b_lse[None, :], seen, (i_b, i_h + i_head, o_t, o_n, i_base), n, scales, C,
            CHECK and (C.LEFT or C.RIGHT),
        )  # fmt: skip
        m_kept = kept_columns(row_keys(p_seed, i_bh + i_head, o_t), plain(n.M) + o_n, plain(n.threshold))
        # dv before the second similarity: fewer tiles are held at a time.
        if VALUE:
            b_dv = product(drop(b_p, m_kept).to(b_q.dtype), b_do, b_dv, C)
        if KEY:
            b_delta = load_sums(row, i_head, i_t, True, ROWS)
            b_r = similarity(b_v, at_v, b_do, at_head(do, i_head, i_t), DV, C)
            b_dz = b_p * (rescale(drop(b_r, m_kept), scales[2], p_seed) - b_delta[None, :])
            b_dk = product(uncap(b_dz, b_x, scales[1], C.CAPPED).to(b_q.dtype), b_q, b_dk, C)
        i_tile += ROWS
        m_head = i_tile >= i_last
        i_head, i_tile = tl.where(m_head, i_head + 1, i_head), tl.where(m_head, i_first, i_tile)
    return b_dk, b_dv


@triton.jit
def _tokens(
    x, d_out, p_sums, to, seen, p_seed, i, work, n, scales, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """dk (``KEY``) and dv (``VALUE``) of ``COLUMNS`` keys of one key head, over the queries that see them."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, S, _ = lengths(n)
    batch, heads, group = plain(n.batch), plain(n.heads), plain(n.group)
    shares, i_kv_heads = plain(work.shares), heads // group
    # Under a causal mask the first keys are seen by the most queries.
    i_tile, i_head = longest_first(i, tl.cdiv(S, COLUMNS), batch * i_kv_heads * shares, plain(work.band))
    i_n, i_share = i_tile * COLUMNS, i_head % shares
    i_b, i_kv = i_head // shares // i_kv_heads, i_head // shares % i_kv_heads
    k = open_rows(x.k, i_b, i_kv, S, D, COLUMNS, WIDTH, C.ALIGNED, C.DESCRIPTORS)
    v = open_rows(x.v, i_b, i_kv, S, DV, COLUMNS, WIDTH_V, C.ALIGNED, C.DESCRIPTORS)
    b_k = load_tile(k, i_n, D, COLUMNS, WIDTH, True, C.ALIGNED, C.DESCRIPTORS)  # [COLUMNS, WIDTH]
    b_v = load_tile(v, i_n, DV, COLUMNS, WIDTH_V, True, C.ALIGNED, C.DESCRIPTORS)  # [COLUMNS, WIDTH_V]
    columns = (b_k, at(k, i_n), b_v, at(v, i_n))
    b_dk, b_dv = tl.zeros([COLUMNS, WIDTH], C.W), tl.zeros([COLUMNS, WIDTH_V], C.W)
    o_n = i_n + tl.arange(0, COLUMNS)[:, None]
    i_base = position(seen, i_b, n)
    i_first, i_whole, i_whole_end, i_end = query_tiles(seen, i_b, i_n, i_base, n, C, ROWS, COLUMNS)
    # Opened before the loop, which then needs fewer registers.
    i_part = i_share * batch + i_b
    if KEY:
        dk = open_rows(to.dk, i_part, i_kv, S, D, COLUMNS, WIDTH, C.ALIGNED, C.DESCRIPTORS)
    if VALUE:
        dv = open_rows(to.dv, i_part, i_kv, S, DV, COLUMNS, WIDTH_V, C.ALIGNED, C.DESCRIPTORS)
    i_heads = plain(work.share)
    i_h = i_kv * group + i_share * i_heads
    i_bh = i_b * heads + i_h
    queries = (
        open_heads(x.q, i_b, i_h, i_heads, T, D, ROWS, WIDTH, C.ALIGNED, C.DESCRIPTORS),
        open_heads(d_out, i_b, i_h, i_heads, T, DV, ROWS, WIDTH_V, C.ALIGNED, C.DESCRIPTORS),
        row_sums(p_sums, i_bh, T, C.PAD),
    )
    place = (i_b, i_h, i_bh, o_n, i_base)
    # One checked loop for both edges: it skips the whole tiles, which have their own loop.
    steps = (i_heads, i_first, i_whole, i_whole_end - i_whole, i_end)
    b_dk, b_dv = _queries(
        b_dk, b_dv, columns, queries, seen, p_seed, place, n, scales, steps, C, ROWS, KEY, VALUE, True
    )
    steps = (i_heads, i_whole, i_whole, 0, i_whole_end)
    b_dk, b_dv = _queries(
        b_dk, b_dv, columns, queries, seen, p_seed, place, n, scales, steps, C, ROWS, KEY, VALUE, False
    )
    if KEY:
        store_opened(dk, i_n, b_dk * scales[0], D, C)
    if VALUE:
        store_opened(dv, i_n, rescale(b_dv, scales[2], p_seed), DV, C)


@triton.jit
def _prefix_queries(
    b_dk, b_dv, columns, queries, gate, b_g, p_seed, place, M, n, scales, steps, C: tl.constexpr, ROWS: tl.constexpr
):
    """Add the part of tiles of queries to ``dPk / (scale g)`` and ``dPv / g``; without the division by ``g`` for a gate
    per query. ``steps``: the number of tiles, the head and the query of the first, and the end of each head."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, _, _ = lengths(n)
    b_k, at_k, b_v, at_v = columns
    q, do, row = queries
    i_b, i_bh, o_m = place
    i_units, i_head, i_t, i_end = steps
    for _ in tl.range(0, i_units):
        o_t = i_t + tl.arange(0, ROWS)[None, :]
        b_q = load_head(q, i_head, i_t, D, ROWS, WIDTH, True, C.ALIGNED, C.DESCRIPTORS)  # [ROWS, WIDTH]
        b_do = load_head(do, i_head, i_t, DV, ROWS, WIDTH_V, True, C.ALIGNED, C.DESCRIPTORS)  # [ROWS, WIDTH_V]
        b_lse = load_sums(row, i_head, i_t, False, ROWS)
        b_w = b_g  # [COLUMNS, ROWS or 1]
        if C.PER_QUERY:
            o_row = i_t + tl.arange(0, ROWS)[:, None]
            b_w = tl.trans(weights(gate, i_b, o_row, tl.trans(o_m), T, M, True, C))
        b_s = similarity(b_k, at_k, b_q, at_head(q, i_head, i_t), D, C)
        # Columns past the end need no check: their results are not stored.
        b_x = exponent(b_s, b_w, scales[0], scales[1], C.CAPPED)
        b_p = tl.exp2(b_x - b_lse[None, :])
        m_kept = kept_columns(row_keys(p_seed, i_bh + i_head, o_t), o_m, plain(n.threshold))
        if C.PER_QUERY:
            b_p = b_p * b_w
        b_dv = product(drop(b_p, m_kept).to(b_q.dtype), b_do, b_dv, C)
        b_delta = load_sums(row, i_head, i_t, True, ROWS)
        b_r = similarity(b_v, at_v, b_do, at_head(do, i_head, i_t), DV, C)
        b_dz = b_p * (rescale(drop(b_r, m_kept), scales[2], p_seed) * b_w - b_delta[None, :])
        b_dz = uncap(b_dz, b_x, scales[1], C.CAPPED)
        b_dk = product(b_dz.to(b_q.dtype), b_q, b_dk, C)
        i_t += ROWS
        m_head = i_t >= i_end
        i_head, i_t = tl.where(m_head, i_head + 1, i_head), tl.where(m_head, 0, i_t)
    return b_dk, b_dv


@triton.jit
def _add_part(p_parts, i_part, b_tile, more):
    """Store a tile of partial sums, or (``more``) add it to what this program stored there before. Tiles are contiguous
    in memory, so that their addresses need no registers."""
    if p_parts is not None:
        ROWS: tl.constexpr = b_tile.shape[0]
        WIDTH: tl.constexpr = b_tile.shape[1]
        o_r, o_d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
        p_tile = p_parts + tl.cast(i_part, tl.int64) * (ROWS * WIDTH) + (o_r * WIDTH + o_d)
        # A thread may load what another thread stored. One tile at a time, to save registers.
        tl.debug_barrier()
        if more:
            b_tile += tl.load(p_tile)
        tl.store(p_tile, b_tile)


@triton.jit
def _load_prefix(x, i_a, i_kv, i_first, limit, element, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                 C: tl.constexpr):  # fmt: skip
    """A tile of the prefix in the dtype of the products."""
    rows = open_rows(x, i_a, i_kv, limit, D, ROWS, WIDTH, C.ALIGNED, C.DESCRIPTORS)
    return load_tile(rows, i_first, D, ROWS, WIDTH, True, C.ALIGNED, C.DESCRIPTORS).to(element)


@triton.jit
def _prefix(
    x, d_out, p_sums, to, gate, p_seed, i, work, n, scales, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dPk and dPv of ``COLUMNS`` prefix columns of one key head over ``chunk`` batch rows, or one split of one row.

    A split is a share of the row's (head, query tile) pairs. For a gate per row, the loop is that of `_tokens` without
    a mask: the gate, a number for each column, multiplies the sums after the loop, and its own gradient is
    ``scale <Pk, sum dz q> + <Pv, sum p dO>``.
    """
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, _, i_most = lengths(n)
    heads, group, chunk, splits = plain(n.heads), plain(n.group), plain(work.chunk), plain(work.splits)
    i_tiles, i_kv_heads = tl.cdiv(i_most, COLUMNS), heads // group
    i_part = i // i_tiles // i_kv_heads
    i_kv, i_m, i_split = i // i_tiles % i_kv_heads, i % i_tiles * COLUMNS, i_part % splits
    i_first, i_end, i_a, M = rows_of_part(gate, i_part // splits, chunk, plain(work.adapters), n, C.SCAN)
    i_rows = at_least_one(gate, M)
    o_m = i_m + tl.arange(0, COLUMNS)[:, None]
    p_pk, s_pk = head(x.pk, i_a, i_kv, C.ALIGNED)
    p_pv, s_pv = head(x.pv, i_a, i_kv, C.ALIGNED)
    element = x.q.ptr.dtype.element_ty
    b_k = _load_prefix(x.pk, i_a, i_kv, i_m, i_rows, element, D, COLUMNS, WIDTH, C)  # [COLUMNS, WIDTH]
    b_v = _load_prefix(x.pv, i_a, i_kv, i_m, i_rows, element, DV, COLUMNS, WIDTH_V, C)  # [COLUMNS, WIDTH_V]
    b_d_scale = tl.zeros([COLUMNS, 1], C.W)
    i_query_tiles = tl.cdiv(T, ROWS)
    i_share = tl.cdiv(group * i_query_tiles, splits)
    i_unit, i_unit_end = i_split * i_share, tl.minimum((i_split + 1) * i_share, group * i_query_tiles)
    for i_row in tl.range(i_first, i_end, disable_licm=True):
        i_b = ordered_row(gate, i_row)
        columns = (b_k, (p_pk, s_pk, i_m, i_rows), b_v, (p_pv, s_pv, i_m, i_rows))
        b_dk, b_dv = tl.zeros([COLUMNS, WIDTH], C.W), tl.zeros([COLUMNS, WIDTH_V], C.W)
        b_g = tl.full((1, 1), 1.0, C.W)
        if not C.PER_QUERY:
            b_g = weights(gate, i_b, o_m, o_m, T, M, False, C)  # [COLUMNS or 1, 1]
        i_h, i_bh = i_kv * group, i_b * heads + i_kv * group
        queries = (
            open_heads(x.q, i_b, i_h, group, T, D, ROWS, WIDTH, C.ALIGNED, C.DESCRIPTORS),
            open_heads(d_out, i_b, i_h, group, T, DV, ROWS, WIDTH_V, C.ALIGNED, C.DESCRIPTORS),
            row_sums(p_sums, i_bh, T, C.PAD),
        )
        steps = (i_unit_end - i_unit, i_unit // i_query_tiles, i_unit % i_query_tiles * ROWS, i_query_tiles * ROWS)
        b_dk, b_dv = _prefix_queries(
            b_dk, b_dv, columns, queries, gate, b_g, p_seed, (i_b, i_bh, o_m), M, n, scales, steps, C, ROWS
        )
        b_dk, b_dv = b_dk * scales[0], rescale(b_dv, scales[2], p_seed)
        more = i_row > i_first
        b_dg = tl.zeros([COLUMNS, 1], C.W)
        if not C.PER_QUERY and (to.dg is not None or to.d_scale is not None):
            # Loaded again: to keep it would cost registers in the loop.
            tl.debug_barrier()
            b_rows = _load_prefix(x.pk, i_a, i_kv, i_m, i_rows, element, D, COLUMNS, WIDTH, C).to(C.W)
            b_dg = tl.sum(b_rows * b_dk, 1)[:, None]  # [COLUMNS, 1]
        _add_part(to.dpk, i, b_dk * b_g, more)
        if not C.PER_QUERY and (to.dg is not None or to.d_scale is not None):
            tl.debug_barrier()
            b_rows = _load_prefix(x.pv, i_a, i_kv, i_m, i_rows, element, DV, COLUMNS, WIDTH_V, C).to(C.W)
            b_dg += tl.sum(b_rows * b_dv, 1)[:, None]
            if to.dg is not None:
                p_row = to.dg + ((tl.cast(i_b, tl.int64) * splits + i_split) * i_kv_heads + i_kv) * i_most
                tl.store(p_row + o_m, scaled_by_row(gate, i_b, b_dg, C.W), mask=o_m < M)
            if to.d_scale is not None:
                # Columns past the end hold arbitrary sums.
                b_dg = tl.where(o_m < M, b_dg, 0.0)
                b_d_scale += b_dg * sigmoids(gate, i_b, o_m, o_m, T, M, False, C)
        _add_part(to.dpv, i, b_dv * b_g, more)
        # Carried by the loop, so that Triton keeps them in shared memory: it keeps the result of a cast in registers.
        b_k = _load_prefix(x.pk, i_a, i_kv, i_m, i_rows, element, D, COLUMNS, WIDTH, C)
        b_v = _load_prefix(x.pv, i_a, i_kv, i_m, i_rows, element, DV, COLUMNS, WIDTH_V, C)
    if not C.PER_QUERY and to.d_scale is not None:
        tl.store(to.d_scale + i, tl.sum(tl.sum(b_d_scale, 1), 0))


@triton.jit
def _query_gate(
    x, d_out, p_sums, to, gate, p_seed, i, n, scales, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A tile of the gradient of a gate per query, ``[B, T, M]``: a sum over heads, in registers."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, _, i_most = lengths(n)
    heads, group = plain(n.heads), plain(n.group)
    i_m_tiles, i_t_tiles = tl.cdiv(i_most, COLUMNS), tl.cdiv(T, ROWS)
    i_m = i % i_m_tiles * COLUMNS
    i_t = i // i_m_tiles % i_t_tiles * ROWS
    i_b = ordered_row(gate, i // i_m_tiles // i_t_tiles)
    i_a, M = row_prefix(gate, i_b, n)
    i_rows = at_least_one(gate, M)
    o_t, o_m = i_t + tl.arange(0, ROWS)[:, None], i_m + tl.arange(0, COLUMNS)[None, :]
    b_g = weights(gate, i_b, o_t, o_m, T, M, True, C)  # [ROWS, COLUMNS]
    b_weight = b_g * (scales[0] * LOG2E)
    b_dg = tl.zeros([ROWS, COLUMNS], C.W)
    element = x.q.ptr.dtype.element_ty
    q = open_heads(x.q, i_b, 0, heads, T, D, ROWS, WIDTH, C.ALIGNED, C.DESCRIPTORS)
    do = open_heads(d_out, i_b, 0, heads, T, DV, ROWS, WIDTH_V, C.ALIGNED, C.DESCRIPTORS)
    p_row, i_padded = row_sums(p_sums, i_b * heads, T, C.PAD)
    for i_kv in tl.range(0, heads // group):
        p_pk, s_pk = head(x.pk, i_a, i_kv, C.ALIGNED)
        p_pv, s_pv = head(x.pv, i_a, i_kv, C.ALIGNED)
        b_k = _load_prefix(x.pk, i_a, i_kv, i_m, i_rows, element, D, COLUMNS, WIDTH, C)  # [COLUMNS, WIDTH]
        b_v = _load_prefix(x.pv, i_a, i_kv, i_m, i_rows, element, DV, COLUMNS, WIDTH_V, C)  # [COLUMNS, WIDTH_V]
        for i_h in tl.range(i_kv * group, (i_kv + 1) * group):
            b_q = load_head(q, i_h, i_t, D, ROWS, WIDTH, True, C.ALIGNED, C.DESCRIPTORS)  # [ROWS, WIDTH]
            b_do = load_head(do, i_h, i_t, DV, ROWS, WIDTH_V, True, C.ALIGNED, C.DESCRIPTORS)  # [ROWS, WIDTH_V]
            b_s = similarity(b_q, at_head(q, i_h, i_t), b_k, (p_pk, s_pk, i_m, i_rows), D, C, True)
            b_r = similarity(b_do, at_head(do, i_h, i_t), b_v, (p_pv, s_pv, i_m, i_rows), DV, C, True)
            o_row = tl.cast(i_h, tl.int64) * 2 * i_padded + o_t
            b_lse, b_delta = tl.load(p_row + o_row), tl.load(p_row + i_padded + o_row)  # [ROWS, 1]
            b_x = b_s * b_weight
            if C.CAPPED:
                b_x = exponent(b_s, b_g, scales[0], scales[1], C.CAPPED)
            b_p = tl.exp2(b_x - b_lse)
            b_keys = row_keys(p_seed, i_b * heads + i_h, o_t)
            b_r = rescale(drop(b_r, kept_columns(b_keys, o_m, plain(n.threshold))), scales[2], b_keys)
            b_w = uncap(b_r * b_g - b_delta, b_x, scales[1], C.CAPPED)
            b_dg += b_p * (b_w * (b_s * scales[0]) + b_r)
    tl.debug_barrier()  # loaded again: to keep it would cost registers in the loop
    b_sigmoid = sigmoids(gate, i_b, o_t, o_m, T, M, True, C)  # [ROWS, COLUMNS]
    o_row = (tl.cast(i_b, tl.int64) * T + o_t) * i_most + o_m
    m_row = (o_t < T) & (o_m < i_most)
    if gate.adapters.index is not None:
        # Columns past the last of the row hold arbitrary sums.
        b_dg = tl.where(o_m < M, b_dg, 0.0)
    if to.dg is not None:
        tl.store(to.dg + o_row, scaled_by_row(gate, i_b, b_dg, C.W), mask=m_row)
    if to.d_gate is not None:
        b_d_gate = b_dg * layer_scale(gate, i_b, C.W) * b_sigmoid * (1 - b_sigmoid)
        tl.store(to.d_gate + o_row, b_d_gate.to(to.d_gate.dtype.element_ty), mask=m_row)
    if to.d_scale is not None:
        # Columns past the last hold arbitrary sums.
        tl.store(to.d_scale + i, tl.sum(tl.sum(tl.where(m_row, b_dg * b_sigmoid, 0.0), 1), 0))


@triton.jit
def _prefix_or_gate(
    x, d_out, p_sums, to, gate, p_seed, i, work, n, scales, C: tl.constexpr, ROLES: tl.constexpr,
    PREFIX_ROWS: tl.constexpr, PREFIX: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """Program ``i`` of those for prefix columns, followed by those for a gate."""
    GATE_ROWS: tl.constexpr = GATES[0]
    GATE: tl.constexpr = GATES[1]
    prefixes = plain(work.prefixes)
    if ROLES.PREFIXES:
        if (i >= 0) & (i < prefixes):
            _prefix(x, d_out, p_sums, to, gate, p_seed, i, work, n, scales, C, PREFIX_ROWS, PREFIX)
    if ROLES.GATES:
        if i >= prefixes:
            _query_gate(x, d_out, p_sums, to, gate, p_seed, i - prefixes, n, scales, C, GATE_ROWS, GATE)


@triton.jit
def column_gradients(
    x, d_out, p_sums, to, gate, seen, p_seed, work, n, scale: tl.float64, softcap: tl.float64, kept: tl.float64,
    C: tl.constexpr, ROLES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PREFIX_ROWS: tl.constexpr,
    PREFIX: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """One tile of keys (the first ``tokens`` programs; ``APART``: as many for dk, then as many for dv), of prefix
    columns, or of a gate."""
    i, tokens = tl.program_id(0), plain(work.tokens)
    scales = (as_tile(scale, C.W), as_tile(softcap, C.W), as_tile(kept, C.W))
    if ROLES.KEY:
        if i < tokens:
            _tokens(
                x, d_out, p_sums, to, seen, p_seed, i, work, n, scales, C, ROWS, COLUMNS, True,
                ROLES.VALUE and not ROLES.APART,
            )  # fmt: skip
    if ROLES.KEY and (ROLES.VALUE and ROLES.APART):
        i -= tokens
    if ROLES.VALUE and (ROLES.APART or not ROLES.KEY):
        if (i >= 0) & (i < tokens):
            _tokens(x, d_out, p_sums, to, seen, p_seed, i, work, n, scales, C, ROWS, COLUMNS, False, True)
    _prefix_or_gate(
        x, d_out, p_sums, to, gate, p_seed, i - tokens, work, n, scales, C, ROLES, PREFIX_ROWS, PREFIX, GATES
    )


@triton.jit
def prefix_column_gradients(
    x, d_out, p_sums, to, gate, p_seed, work, n, scale: tl.float64, softcap: tl.float64, kept: tl.float64,
    C: tl.constexpr, ROLES: tl.constexpr, PREFIX_ROWS: tl.constexpr, PREFIX: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """The programs of `column_gradients` for prefix and gate in a separate launch, so that those for dk and dv need
    fewer registers."""
    scales = (as_tile(scale, C.W), as_tile(softcap, C.W), as_tile(kept, C.W))
    _prefix_or_gate(
        x, d_out, p_sums, to, gate, p_seed, tl.program_id(0), work, n, scales, C, ROLES, PREFIX_ROWS, PREFIX, GATES
    )


class Columns(NamedTuple):
    """The results of the launches: gradients, and partial sums for `finish`; None for what is not needed.

    ``key`` and ``value``: ``[shares * B, Hkv, S, D or Dv]``, complete if there is one share. ``prefix_key`` and
    ``prefix_value``: ``[parts, Hkv, M, D or Dv]``, the last two padded to tiles. ``gate`` is complete.
    ``weights`` ``[B, n, M]``: gradients of ``g``, ``n`` rows for every batch row; times lambda with a prefix for each
    row. ``layer_scale``: ``[programs]``. ``division``: batch rows of a part of the prefix's gradient and its splits,
    and the same of a part of the layer scale's.
    """

    key: Tensor | None
    value: Tensor | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    gate: Tensor | None
    weights: Tensor | None
    layer_scale: Tensor | None
    division: tuple[int, int, int, int] = (1, 1, 1, 1)


def _parts(problem: Problem, tile: tiles.Tile) -> tuple[int, int, int]:
    """Batch rows per partial sum, the number of such chunks, and the splits of a row; they depend on shapes alone.

    With a prefix for each row, a chunk holds rows of one adapter, and there are as many as any mixture needs.
    """
    batch, heads, kv_heads, queries, _, length, *_ = problem.sizes
    base, most = count_tiles(length, tile.columns) * kv_heads, tiles.programs(problem.architecture)
    chunk = max(1, batch * base // most)
    chunks = count_tiles(batch, chunk)
    if chunk > 1:
        return chunk, batch // chunk + problem.adapters if problem.adapters else chunks, 1
    units = heads // kv_heads * count_tiles(queries, tile.rows)
    return chunk, chunks, max(1, min(units, most // (base * chunks)))


def _empty_columns(
    problem: Problem, need: dict[str, bool], shares: int, parts: int, padded_length: int, gate_rows: int, programs: int
) -> Columns:
    """Uninitialised results; ``gate_rows``: the rows of ``weights`` for each batch row."""
    x = problem.x
    batch, _, kv_heads, _, keys, length, head_dim, value_dim = problem.sizes
    by_query, indexed = x.gate_per_query, x.gate_index is not None

    def empty(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=x.compute_dtype, device=x.query.device) if wanted else None

    # No program processes a row without a prefix, or the columns beyond an adapter's length.
    weights = empty(need["gate"] and (indexed or not by_query), batch, gate_rows, length)
    if weights is not None and problem.adapters and not by_query:
        weights.zero_()

    # Partial sums of dk and dv have the dtype of sums.
    sums_like = torch.empty((), dtype=x.compute_dtype, device=x.query.device)
    like_key, like_value = (x.key, x.value) if shares == 1 else (sums_like, sums_like)
    return Columns(
        key=heads_last_empty(like_key, shares * batch, kv_heads, keys, head_dim) if need["key"] else None,
        value=heads_last_empty(like_value, shares * batch, kv_heads, keys, value_dim) if need["value"] else None,
        prefix_key=empty(need["prefix_key"], parts, kv_heads, padded_length, tiles.padded(head_dim)),
        prefix_value=empty(need["prefix_value"], parts, kv_heads, padded_length, tiles.padded(value_dim)),
        gate=torch.empty_like(x.gate, memory_format=torch.contiguous_format)
        if need["gate"] and by_query and not indexed
        else None,
        weights=weights,
        layer_scale=empty(need["layer_scale"], programs),
    )


def column_gradients_of(problem: Problem, ordered: Gate, d_out: Rows, sums: Tensor, need: dict[str, bool]) -> Columns:
    """Launch `column_gradients` for what is needed of key, value, prefix, gate and layer scale.

    ``ordered``: the result of `Problem.ordered_gate`.
    """
    x = problem.x
    batch, heads, kv_heads, queries, keys, length, _, _ = problem.sizes
    by_query = x.gate_per_query
    names = ("key_value", "prefix_by_query" if by_query else "prefix", "gate")
    tile, shared, gate = (problem.tile(name) for name in names)
    chunk, chunks, splits = _parts(problem, shared)
    weights = need["gate"] or need["layer_scale"]

    any_token, any_prefix = need["key"] or need["value"], need["prefix_key"] or need["prefix_value"]
    shares = problem.shares(tile)
    tokens = count_tiles(keys, tile.columns) * batch * kv_heads * shares if any_token else 0
    roles = Roles(
        KEY=need["key"],
        VALUE=need["value"],
        APART=tiles.is_apart(problem.architecture, x.query.element_size(), problem.dim),
        PREFIXES=any_prefix or (weights and not by_query),
        GATES=weights and by_query,
    )
    passes = need["key"] + need["value"] if roles.APART else 1
    prefixes = count_tiles(length, shared.columns) * kv_heads * chunks * splits if roles.PREFIXES else 0
    gates = count_tiles(length, gate.columns) * count_tiles(queries, gate.rows) * batch if roles.GATES else 0

    columns = _empty_columns(
        problem, need, shares, chunks * splits, count_tiles(length, shared.columns) * shared.columns,
        queries if by_query else splits * kv_heads, gates if by_query else prefixes,
    )  # fmt: skip
    of_scale = (1, gates // batch) if by_query else (chunk, prefixes // chunks)
    columns = columns._replace(division=(chunk, splits, *of_scale))
    to = Gradients(rows(columns.key), rows(columns.value), *columns[2:7])
    share = heads // kv_heads // shares
    band = problem.column_band(tile, shares)
    work = Work(*map(odd, (tokens, shares, share, band, prefixes, chunk, splits, problem.adapters)))
    given = (problem.operands, d_out, sums, to, ordered)
    rest = (x.seed, work, problem.numbers, *problem.scales)
    sizes = {
        "C": problem.constants(d_out, to.dk, to.dv),
        "PREFIX_ROWS": shared.rows,
        "PREFIX": shared.columns,
        "GATES": (gate.rows, gate.columns),
    }
    more = prefixes + gates
    if shared.warps and more:
        launch(prefix_column_gradients, more, shared, *given, *rest, ROLES=roles, **sizes)
        roles, more = roles._replace(PREFIXES=False, GATES=False), 0
    if tokens + more:
        launch(
            column_gradients, tokens * passes + more, tile, *given, problem.seen, *rest, ROLES=roles, ROWS=tile.rows,
            COLUMNS=tile.columns, **sizes,
        )  # fmt: skip
    return columns
