"""Backward: the row sums that every gradient needs, then one kernel for dq and one for dk and dv."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import DIFFERENTIABLE, Inputs, heads_last_empty
from ..sinks import sinks_gradient
from .arguments import RUNTIME, Problem, Rows, count_tiles, launch, rows
from .bias import bias_gradient
from .prefix import gate_gradient, prefix_gradient
from .primitives import (
    LOG2E,
    as_tile,
    head,
    key_tiles,
    load_row_sums,
    load_rows,
    position,
    prefix_gradients,
    product,
    query_range,
    rescale,
    row_keys,
    store_rows,
    token_gradients,
    weights,
)
from .ranges import find_ranges


@triton.jit(do_not_specialize=RUNTIME)
def row_deltas(
    out, d_out, p_d_lse, p_delta, T, heads,
    DV: tl.constexpr, WIDTH_V: tl.constexpr, ALIGNED: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``delta = sum(dO * O) - dL`` of ``ROWS`` queries of one head."""
    i_tiles = tl.cdiv(T, ROWS)
    i_bh, i_t = tl.program_id(0) // i_tiles, tl.program_id(0) % i_tiles * ROWS
    p_o, s_o = head(out, i_bh // heads, i_bh % heads, ALIGNED)
    p_do, s_do = head(d_out, i_bh // heads, i_bh % heads, ALIGNED)
    b_o = load_rows(p_o, s_o, i_t, T, DV, ROWS, WIDTH_V, True).to(W)  # [ROWS, WIDTH_V]
    b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True).to(W)  # [ROWS, WIDTH_V]
    b_delta = tl.sum(b_o * b_do, 1)
    o_t = i_t + tl.arange(0, ROWS)
    o_row = tl.cast(i_bh, tl.int64) * T + o_t
    if p_d_lse is not None:
        b_delta -= tl.load(p_d_lse + o_row, mask=o_t < T, other=0.0).to(W)
    tl.store(p_delta + o_row, b_delta, mask=o_t < T)


@triton.jit
def _query_tokens(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap, b_kept, i_b, i_h, i_t, i_base,
    T, S, M, left, right, threshold, i_first, i_end,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Add what the tokens ``i_first .. i_end - 1`` give to ``dq / scale``."""
    o_t = i_t + tl.arange(0, ROWS)[:, None]
    for i_n in tl.range(i_first, i_end, COLUMNS):
        o_n = i_n + tl.arange(0, COLUMNS)[None, :]
        b_k = load_rows(p_k, s_k, i_n, S, D, COLUMNS, WIDTH, CHECK)  # [COLUMNS, WIDTH]
        b_v = load_rows(p_v, s_v, i_n, S, DV, COLUMNS, WIDTH_V, CHECK)  # [COLUMNS, WIDTH_V]
        b_s = product(b_q, tl.trans(b_k), tl.zeros([ROWS, COLUMNS], W), PRECISION, W)
        b_r = product(b_do, tl.trans(b_v), tl.zeros([ROWS, COLUMNS], W), PRECISION, W)
        _, _, b_ds = token_gradients(
            b_s, b_r, b_lse, b_delta, seen, b_keys, b_scale, b_cap, b_kept, i_b, i_h, o_t, o_n, i_base,
            T, S, M, left, right, threshold, LEFT, RIGHT, CAPPED, CHECK,
        )  # fmt: skip
        b_dq = product(b_ds.to(b_k.dtype), b_k, b_dq, PRECISION, W)
    return b_dq


@triton.jit(do_not_specialize=RUNTIME)
def query_gradient(
    q, k, v, pk, pv, d_out, p_lse, p_delta, dq, gate, seen, p_ranges, p_seed,
    T, S, M, heads, group, offset: tl.int64, left: tl.int64, right: tl.int64, threshold,
    kept: tl.float64, scale: tl.float64, softcap: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, PER_QUERY: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """dq of ``ROWS`` queries of one head: through the prefix, then through the tokens they see."""
    i_tiles = tl.cdiv(T, ROWS)
    i_bh = tl.program_id(0) // i_tiles
    # Under a causal mask the last queries have most to do: they start first.
    i_t = (i_tiles - 1 - tl.program_id(0) % i_tiles) * ROWS
    i_b, i_h = i_bh // heads, i_bh % heads
    i_kv = i_h // group
    b_scale, b_cap, b_kept = as_tile(scale, W), as_tile(softcap, W), as_tile(kept, W)
    o_t = i_t + tl.arange(0, ROWS)[:, None]
    b_keys = row_keys(p_seed, i_bh, o_t)
    p_q, s_q = head(q, i_b, i_h, ALIGNED)
    p_do, s_do = head(d_out, i_b, i_h, ALIGNED)
    b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True)  # [ROWS, WIDTH]
    b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True)  # [ROWS, WIDTH_V]
    # A row past the end has an infinite log-sum-exp: all its probabilities are zero.
    b_lse = load_row_sums(p_lse, i_bh, o_t, T, float("inf")) * LOG2E  # [ROWS, 1]
    b_delta = load_row_sums(p_delta, i_bh, o_t, T, 0.0)  # [ROWS, 1]
    b_dq = tl.zeros([ROWS, WIDTH], W)

    p_pk, s_pk = head(pk, 0, i_kv, ALIGNED)
    p_pv, s_pv = head(pv, 0, i_kv, ALIGNED)
    for i_m in tl.range(0, M, PREFIX, num_stages=1):
        o_m = i_m + tl.arange(0, PREFIX)[None, :]
        b_g = weights(gate, i_b, o_t, o_m, T, M, PER_QUERY, W)  # [ROWS or 1, PREFIX or 1]
        b_k = load_rows(p_pk, s_pk, i_m, M, D, PREFIX, WIDTH, True)  # [PREFIX, WIDTH]
        b_v = load_rows(p_pv, s_pv, i_m, M, DV, PREFIX, WIDTH_V, True)  # [PREFIX, WIDTH_V]
        b_s = product(b_q, tl.trans(b_k), tl.zeros([ROWS, PREFIX], W), PRECISION, W)
        b_r = product(b_do, tl.trans(b_v), tl.zeros([ROWS, PREFIX], W), PRECISION, W)
        _, b_dz, _ = prefix_gradients(
            b_s, b_r, b_g, b_lse, b_delta, b_keys, b_scale, b_cap, b_kept, o_m, M, threshold, CAPPED
        )
        b_dq = product((b_dz * b_g).to(b_q.dtype), b_k, b_dq, PRECISION, W)

    p_k, s_k = head(k, i_b, i_kv, ALIGNED)
    p_v, s_v = head(v, i_b, i_kv, ALIGNED)
    i_base = position(seen, i_b, offset)
    i_first, i_whole, i_whole_end, i_end = key_tiles(
        p_ranges, i_b * i_tiles + i_t // ROWS, i_t, i_base, left, right, T, S, LEFT, RIGHT, ROWS, COLUMNS
    )
    if LEFT:
        b_dq = _query_tokens(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap, b_kept,
            i_b, i_h, i_t, i_base, T, S, M, left, right, threshold, i_first, i_whole,
            D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED, PRECISION, W, ROWS, COLUMNS, True,
        )  # fmt: skip
    b_dq = _query_tokens(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap, b_kept,
        i_b, i_h, i_t, i_base, T, S, M, left, right, threshold, i_whole, i_whole_end,
        D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED, PRECISION, W, ROWS, COLUMNS, False,
    )  # fmt: skip
    b_dq = _query_tokens(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap, b_kept,
        i_b, i_h, i_t, i_base, T, S, M, left, right, threshold, i_whole_end, i_end,
        D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED, PRECISION, W, ROWS, COLUMNS, True,
    )  # fmt: skip
    p_dq, s_dq = head(dq, i_b, i_h, ALIGNED)
    store_rows(p_dq, s_dq, i_t, T, b_dq * b_scale, D, ROWS, WIDTH)


@triton.jit(do_not_specialize=RUNTIME)
def key_value_gradient(
    q, k, v, d_out, p_lse, p_delta, dk, dv, seen, p_ranges, p_seed,
    T, S, M, heads, group, offset: tl.int64, left: tl.int64, right: tl.int64, threshold,
    kept: tl.float64, scale: tl.float64, softcap: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, PER_QUERY: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dk and dv of ``COLUMNS`` keys of one key head, over the queries of its group that see them."""
    i_tiles = tl.cdiv(S, COLUMNS)
    # Under a causal mask the first keys have most to do, and they start first.
    i_n = tl.program_id(0) % i_tiles * COLUMNS
    i_kv_heads = heads // group
    i_b, i_kv = tl.program_id(0) // i_tiles // i_kv_heads, tl.program_id(0) // i_tiles % i_kv_heads
    b_scale, b_cap, b_kept = as_tile(scale, W), as_tile(softcap, W), as_tile(kept, W)
    p_k, s_k = head(k, i_b, i_kv, ALIGNED)
    p_v, s_v = head(v, i_b, i_kv, ALIGNED)
    b_k = load_rows(p_k, s_k, i_n, S, D, COLUMNS, WIDTH, True)  # [COLUMNS, WIDTH]
    b_v = load_rows(p_v, s_v, i_n, S, DV, COLUMNS, WIDTH_V, True)  # [COLUMNS, WIDTH_V]
    b_dk, b_dv = tl.zeros([COLUMNS, WIDTH], W), tl.zeros([COLUMNS, WIDTH_V], W)
    o_n = i_n + tl.arange(0, COLUMNS)[:, None]
    i_base = position(seen, i_b, offset)
    i_first, i_end = query_range(
        p_ranges, i_b * i_tiles + i_n // COLUMNS, i_n, i_base, left, right, T, S, LEFT, RIGHT, ROWS, COLUMNS
    )
    # One loop that checks every tile: whole tiles in a loop of their own cost the registers of a wider tile.
    for i_g in tl.range(0, group):
        i_h = i_kv * group + i_g
        i_bh = i_b * heads + i_h
        p_q, s_q = head(q, i_b, i_h, ALIGNED)
        p_do, s_do = head(d_out, i_b, i_h, ALIGNED)
        for i_t in tl.range(i_first, i_end, ROWS):
            o_t = i_t + tl.arange(0, ROWS)[None, :]
            b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True)  # [ROWS, WIDTH]
            b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True)  # [ROWS, WIDTH_V]
            b_lse = load_row_sums(p_lse, i_bh, o_t, T, float("inf")) * LOG2E  # [1, ROWS]
            b_delta = load_row_sums(p_delta, i_bh, o_t, T, 0.0)  # [1, ROWS]
            b_s = product(b_k, tl.trans(b_q), tl.zeros([COLUMNS, ROWS], W), PRECISION, W)
            b_r = product(b_v, tl.trans(b_do), tl.zeros([COLUMNS, ROWS], W), PRECISION, W)
            b_p, _, b_ds = token_gradients(
                b_s, b_r, b_lse, b_delta, seen, row_keys(p_seed, i_bh, o_t), b_scale, b_cap, b_kept,
                i_b, i_h, o_t, o_n, i_base, T, S, M, left, right, threshold, LEFT, RIGHT, CAPPED, True,
            )  # fmt: skip
            b_dv = product(b_p.to(b_q.dtype), b_do, b_dv, PRECISION, W)
            b_dk = product(b_ds.to(b_q.dtype), b_q, b_dk, PRECISION, W)
    if dk.ptr is not None:
        p_dk, s_dk = head(dk, i_b, i_kv, ALIGNED)
        store_rows(p_dk, s_dk, i_n, S, b_dk * b_scale, D, COLUMNS, WIDTH)
    if dv.ptr is not None:
        p_dv, s_dv = head(dv, i_b, i_kv, ALIGNED)
        store_rows(p_dv, s_dv, i_n, S, rescale(b_dv, b_kept, p_seed), DV, COLUMNS, WIDTH_V)


def _deltas(problem: Problem, out: Rows, d_out: Rows, d_logsumexp: Tensor | None) -> Tensor:
    """``sum(dO * O) - dL``, ``[B, Hq, T]``."""
    batch, heads, _, queries, *_ = problem.x.sizes
    constants = problem.constants(out, d_out)
    delta = torch.empty(batch, heads, queries, dtype=problem.x.compute_dtype, device=problem.x.query.device)
    tile = problem.tile("delta")
    launch(
        row_deltas, count_tiles(queries, tile.rows) * batch * heads, tile,
        out, d_out, None if d_logsumexp is None else d_logsumexp.contiguous(), delta, T=queries, heads=heads,
        **{name: constants[name] for name in ("DV", "WIDTH_V", "ALIGNED", "W")}, ROWS=tile.rows,
    )  # fmt: skip
    return delta


def _query_gradient(problem: Problem, d_out: Rows, logsumexp: Tensor, delta: Tensor) -> Tensor:
    batch, heads, _, queries, _, _, head_dim, _ = problem.x.sizes
    dq = heads_last_empty(problem.x.query, batch, heads, queries, head_dim)
    tile, to = problem.tile("query"), rows(dq)
    launch(
        query_gradient, count_tiles(queries, tile.rows) * batch * heads, tile,
        problem.query, problem.key, problem.value, problem.prefix_key, problem.prefix_value, d_out, logsumexp, delta,
        to, problem.gate, problem.seen, find_ranges(problem, tile.rows, True), problem.x.seed,
        **problem.numbers(), **problem.constants(d_out, to),
        ROWS=tile.rows, COLUMNS=tile.columns, PREFIX=problem.prefix_columns(tile),
    )  # fmt: skip
    return dq


def _key_value_gradient(
    problem: Problem, d_out: Rows, logsumexp: Tensor, delta: Tensor, key: bool, value: bool
) -> tuple[Tensor | None, Tensor | None]:
    batch, _, kv_heads, _, keys, _, head_dim, value_dim = problem.x.sizes
    dk = heads_last_empty(problem.x.key, batch, kv_heads, keys, head_dim) if key else None
    dv = heads_last_empty(problem.x.value, batch, kv_heads, keys, value_dim) if value else None
    tile, to = problem.tile("key_value"), (rows(dk), rows(dv))
    launch(
        key_value_gradient, count_tiles(keys, tile.columns) * batch * kv_heads, tile,
        problem.query, problem.key, problem.value, d_out, logsumexp, delta, *to, problem.seen,
        find_ranges(problem, tile.columns, False), problem.x.seed,
        **problem.numbers(), **problem.constants(d_out, *to), ROWS=tile.rows, COLUMNS=tile.columns,
    )  # fmt: skip
    return dk, dv


def backward(
    x: Inputs, out: Tensor, logsumexp: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """The op's backward; a kernel runs only where its gradients are needed."""
    need, grads = dict(zip(DIFFERENTIABLE, needs)), dict.fromkeys(DIFFERENTIABLE)
    problem, d_out = Problem.of(x), rows(grad_out)
    delta = _deltas(problem, rows(out), d_out, grad_logsumexp)
    rest = (problem, d_out, logsumexp, delta)
    if need["query"]:
        grads["query"] = _query_gradient(*rest)
    if need["key"] or need["value"]:
        grads["key"], grads["value"] = _key_value_gradient(*rest, need["key"], need["value"])
    gate_needed = need["gate"] or need["layer_scale"]
    shared_gate = gate_needed and not x.gate_per_query
    d_weights = None
    if need["prefix_key"] or need["prefix_value"] or shared_gate:
        grads["prefix_key"], grads["prefix_value"], d_weights = prefix_gradient(
            *rest, need["prefix_key"], need["prefix_value"], shared_gate
        )
    if gate_needed:
        grads["gate"], grads["layer_scale"] = gate_gradient(*rest, d_weights)
    if need["sinks"]:
        grads["sinks"] = sinks_gradient(x, logsumexp, delta)
    if need["bias"]:
        grads["bias"] = bias_gradient(*rest)
    return [grads[name] if need[name] else None for name in DIFFERENTIABLE]
