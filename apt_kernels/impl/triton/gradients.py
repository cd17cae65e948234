"""Backward in three launches: dq and the row sums that the rest needs, the gradients of columns, their final sums.

Where a stock kernel took the tokens (``merge``), dk and dv are its own, and the prefix's part is added to its dq.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import DIFFERENTIABLE, Inputs, heads_last_empty
from . import stock, tiles
from .arguments import RUNTIME, Problem, Rows, count_tiles, launch, rows
from .bias import bias_gradient
from .columns import column_gradients_of
from .finish import finish
from .primitives import (
    LOG2E,
    as_tile,
    head,
    load_row_sums,
    load_rows,
    position,
    prefix_gradients,
    product,
    row_keys,
    similarity,
    store_rows,
    token_gradients,
    weights,
)
from .ranges import key_tiles


@triton.jit
def _query_tokens(
    b_dq, p_q, s_q, b_q, p_do, s_do, b_do, b_lse, b_delta, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap, b_kept,
    i_b, i_h, i_t, i_base,
    T, S, M, left, right, threshold, i_first, i_end,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Add what the tokens ``i_first .. i_end - 1`` give to ``dq / scale``."""
    o_t = i_t + tl.arange(0, ROWS)[:, None]
    for i_n in tl.range(i_first, i_end, COLUMNS):
        o_n = i_n + tl.arange(0, COLUMNS)[None, :]
        b_k = load_rows(p_k, s_k, i_n, S, D, COLUMNS, WIDTH, CHECK, ALIGNED)  # [COLUMNS, WIDTH]
        b_v = load_rows(p_v, s_v, i_n, S, DV, COLUMNS, WIDTH_V, CHECK, ALIGNED)  # [COLUMNS, WIDTH_V]
        b_s = similarity(b_q, (p_q, s_q, i_t, T), b_k, (p_k, s_k, i_n, S), D, PRECISION, W)
        b_r = similarity(b_do, (p_do, s_do, i_t, T), b_v, (p_v, s_v, i_n, S), DV, PRECISION, W)
        _, _, b_ds = token_gradients(
            b_s, b_r, b_lse, b_delta, seen, b_keys, b_scale, b_cap, b_kept, i_b, i_h, o_t, o_n, i_base,
            T, S, M, left, right, threshold, LEFT, RIGHT, CAPPED, CHECK,
        )  # fmt: skip
        b_dq = product(b_ds.to(b_k.dtype), b_k, b_dq, PRECISION, W)
    return b_dq


@triton.jit
def _query_gradient(
    q, k, v, pk, pv, p_do, s_do, b_do, b_delta, p_lse, tokens, dq, gate, seen, p_seed, i_b, i_h, i_t, i_bh, i_kv,
    T, S, M, offset, left, right, threshold, kept, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, PER_QUERY: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PREFIX: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """dq of ``ROWS`` queries of one head. ``tokens``: what the tokens give to it, where that is known."""
    o_t = i_t + tl.arange(0, ROWS)[:, None]
    b_scale, b_cap, b_kept = as_tile(scale, W), as_tile(softcap, W), as_tile(kept, W)
    b_keys = row_keys(p_seed, i_bh, o_t)
    p_q, s_q = head(q, i_b, i_h, ALIGNED)
    b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True, ALIGNED)  # [ROWS, WIDTH]
    # A row past the end has an infinite log-sum-exp: all its probabilities are zero.
    b_lse = load_row_sums(p_lse, i_bh, o_t, T, float("inf")) * LOG2E  # [ROWS, 1]
    b_dq = tl.zeros([ROWS, WIDTH], W)

    p_pk, s_pk = head(pk, 0, i_kv, ALIGNED)
    p_pv, s_pv = head(pv, 0, i_kv, ALIGNED)
    for i_m in tl.range(0, M, PREFIX, num_stages=1):
        o_m = i_m + tl.arange(0, PREFIX)[None, :]
        b_g = weights(gate, i_b, o_t, o_m, T, M, PER_QUERY, W)  # [ROWS or 1, PREFIX or 1]
        b_k = load_rows(p_pk, s_pk, i_m, M, D, PREFIX, WIDTH, True, ALIGNED).to(b_q.dtype)  # [PREFIX, WIDTH]
        b_v = load_rows(p_pv, s_pv, i_m, M, DV, PREFIX, WIDTH_V, True, ALIGNED).to(b_q.dtype)  # [PREFIX, WIDTH_V]
        b_s = similarity(b_q, (p_q, s_q, i_t, T), b_k, (p_pk, s_pk, i_m, M), D, PRECISION, W)
        b_r = similarity(b_do, (p_do, s_do, i_t, T), b_v, (p_pv, s_pv, i_m, M), DV, PRECISION, W)
        _, b_dz, _ = prefix_gradients(
            b_s, b_r, b_g, b_lse, b_delta, b_keys, b_scale, b_cap, b_kept, o_m, M, threshold, CAPPED
        )
        b_dq = product((b_dz * b_g).to(b_q.dtype), b_k, b_dq, PRECISION, W)

    if tokens.ptr is None:
        p_k, s_k = head(k, i_b, i_kv, ALIGNED)
        p_v, s_v = head(v, i_b, i_kv, ALIGNED)
        i_base = position(seen, i_b, offset)
        i_first, i_whole, i_whole_end, i_end = key_tiles(
            seen, i_b, i_t, i_base, left, right, T, S, LEFT, RIGHT, ROWS, COLUMNS, SCAN
        )
        if LEFT:
            b_dq = _query_tokens(
                b_dq, p_q, s_q, b_q, p_do, s_do, b_do, b_lse, b_delta, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap,
                b_kept, i_b, i_h, i_t, i_base, T, S, M, left, right, threshold, i_first, i_whole,
                D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED, ALIGNED, PRECISION, W, ROWS, COLUMNS, True,
            )  # fmt: skip
        b_dq = _query_tokens(
            b_dq, p_q, s_q, b_q, p_do, s_do, b_do, b_lse, b_delta, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap,
            b_kept, i_b, i_h, i_t, i_base, T, S, M, left, right, threshold, i_whole, i_whole_end,
            D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED, ALIGNED, PRECISION, W, ROWS, COLUMNS, False,
        )  # fmt: skip
        b_dq = _query_tokens(
            b_dq, p_q, s_q, b_q, p_do, s_do, b_do, b_lse, b_delta, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap,
            b_kept, i_b, i_h, i_t, i_base, T, S, M, left, right, threshold, i_whole_end, i_end,
            D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED, ALIGNED, PRECISION, W, ROWS, COLUMNS, True,
        )  # fmt: skip
    b_dq = b_dq * b_scale
    if tokens.ptr is not None:
        p_tokens, s_tokens = head(tokens, i_b, i_h, ALIGNED)
        b_dq += load_rows(p_tokens, s_tokens, i_t, T, D, ROWS, WIDTH, True, ALIGNED).to(W)
    p_dq, s_dq = head(dq, i_b, i_h, ALIGNED)
    store_rows(p_dq, s_dq, i_t, T, b_dq, D, ROWS, WIDTH)


@triton.jit(do_not_specialize=RUNTIME)
def query_gradient(
    q, k, v, pk, pv, out, d_out, p_lse, p_d_lse, p_delta, tokens, dq, gate, seen, p_seed,
    T, S, M, heads, group, offset: tl.int64, left: tl.int64, right: tl.int64, threshold,
    kept: tl.float64, scale: tl.float64, softcap: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, PER_QUERY: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PREFIX: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """``delta = sum(dO * O) - dL`` of ``ROWS`` queries of one head and, where wanted, dq: through the prefix, then
    through the tokens they see."""
    i_tiles = tl.cdiv(T, ROWS)
    i_bh = tl.program_id(0) // i_tiles
    # Under a causal mask the last queries have most to do: they start first.
    i_t = (i_tiles - 1 - tl.program_id(0) % i_tiles) * ROWS
    i_b, i_h = i_bh // heads, i_bh % heads
    i_kv = i_h // group
    o_t = i_t + tl.arange(0, ROWS)[:, None]
    p_o, s_o = head(out, i_b, i_h, ALIGNED)
    p_do, s_do = head(d_out, i_b, i_h, ALIGNED)
    b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True, ALIGNED)  # [ROWS, WIDTH_V]
    b_o = load_rows(p_o, s_o, i_t, T, DV, ROWS, WIDTH_V, True, ALIGNED)  # [ROWS, WIDTH_V]
    b_delta = tl.sum(b_o.to(W) * b_do.to(W), 1)[:, None]  # [ROWS, 1]
    if p_d_lse is not None:
        b_delta -= load_row_sums(p_d_lse, i_bh, o_t, T, 0.0).to(W)
    tl.store(p_delta + tl.cast(i_bh, tl.int64) * T + o_t, b_delta, mask=o_t < T)
    if dq.ptr is not None:
        _query_gradient(
            q, k, v, pk, pv, p_do, s_do, b_do, b_delta, p_lse, tokens, dq, gate, seen, p_seed, i_b, i_h, i_t, i_bh,
            i_kv, T, S, M, offset, left, right, threshold, kept, scale, softcap, D, DV, WIDTH, WIDTH_V, LEFT, RIGHT,
            CAPPED, PER_QUERY, ALIGNED, PRECISION, W, ROWS, COLUMNS, PREFIX, SCAN,
        )  # fmt: skip


def _query_gradient_of(
    problem: Problem,
    out: Rows,
    d_out: Rows,
    logsumexp: Tensor,
    d_logsumexp: Tensor | None,
    of_tokens: Tensor | None,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """``sum(dO * O) - dL``, ``[B, Hq, T]``, and dq where it is wanted; ``of_tokens``: the tokens' part, where known."""
    x = problem.x
    batch, heads, _, queries, _, _, head_dim, _ = problem.sizes
    dq = heads_last_empty(x.query, batch, heads, queries, head_dim) if wanted else None
    delta = torch.empty(batch, heads, queries, dtype=x.compute_dtype, device=x.query.device)
    tile, tokens, to = problem.tile("query"), rows(of_tokens), rows(dq)
    d_logsumexp = None if d_logsumexp is None else d_logsumexp.contiguous()
    launch(
        query_gradient, count_tiles(queries, tile.rows) * batch * heads, tile,
        problem.query, problem.key, problem.value, problem.prefix_key, problem.prefix_value, out, d_out, logsumexp,
        d_logsumexp, delta, tokens, to, problem.gate, problem.seen, x.seed,
        **problem.numbers, **problem.constants(out, d_out, tokens, to),
        ROWS=tile.rows, COLUMNS=tile.columns, PREFIX=problem.prefix_columns(tile), SCAN=tiles.SCAN,
    )  # fmt: skip
    return delta, dq


def backward(
    x: Inputs,
    out: Tensor,
    logsumexp: Tensor,
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    needs: list[bool],
    way: str,
) -> list[Tensor | None]:
    """The op's backward; what nobody needs is not computed. ``way`` as in `attend.forward`."""
    need, grads = dict(zip(DIFFERENTIABLE, needs)), dict.fromkeys(DIFFERENTIABLE)
    of_query, still = None, need
    # The stock backward has no place for a gradient of the log-sum-exp; ours has, and takes any way's output.
    if way == "merge" and grad_logsumexp is None and any(needs[:3]):
        of_query, grads["key"], grads["value"] = stock.backward(x, out, logsumexp, grad_out)
        still = need | {"key": False, "value": False}
    problem, d_out = Problem(x), rows(grad_out)
    rest = (logsumexp, grad_logsumexp, of_query if need["query"] else None, need["query"])
    delta, grads["query"] = _query_gradient_of(problem, rows(out), d_out, *rest)
    rest = (problem, d_out, logsumexp, delta)
    columns = column_gradients_of(*rest, still)
    if still is need:
        grads["key"], grads["value"] = columns.key, columns.value
    grads.update(finish(problem, columns, logsumexp, delta, need))
    if need["bias"]:
        grads["bias"] = bias_gradient(*rest)
    return [grads[name] if need[name] else None for name in DIFFERENTIABLE]
