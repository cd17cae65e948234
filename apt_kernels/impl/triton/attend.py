"""Forward: each program takes a tile of queries of one head through the prefix, then through the tokens it sees.

Where a stock kernel took the tokens (``merge``), it begins with what that left, and only the prefix is its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Inputs, heads_last_empty
from . import stock, tiles
from .arguments import RUNTIME, Problem, count_tiles, launch, rows
from .primitives import (
    LN2,
    LOG2E,
    add_bias,
    as_tile,
    drop,
    head,
    hide,
    kept_columns,
    load_row_sums,
    load_rows,
    logits,
    online,
    position,
    product,
    rescale,
    row_keys,
    seen_tokens,
    similarity,
    store_rows,
    weights,
)
from .ranges import key_tiles
from .split import split_forward


@triton.jit
def _tokens(
    b_out, b_max, b_sum, p_q, s_q, b_q, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap, i_b, i_h, i_t, i_base,
    T, S, M, left, right, threshold, i_first, i_end,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, POSITIVE: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Take the tokens ``i_first .. i_end - 1`` into the running output, maximum and sum."""
    o_t = i_t + tl.arange(0, ROWS)[:, None]
    for i_n in tl.range(i_first, i_end, COLUMNS):
        o_n = i_n + tl.arange(0, COLUMNS)[None, :]
        b_k = load_rows(p_k, s_k, i_n, S, D, COLUMNS, WIDTH, CHECK, ALIGNED)  # [COLUMNS, WIDTH]
        b_s = similarity(b_q, (p_q, s_q, i_t, T), b_k, (p_k, s_k, i_n, S), D, PRECISION, W)
        b_x, b_factor = logits(b_s, None, b_scale, b_cap, CAPPED, POSITIVE)
        b_x, b_factor = add_bias(b_x, b_factor, seen, i_b, i_h, o_t, o_n, T, S)
        m_seen = seen_tokens(seen, i_b, i_h, o_t, o_n, i_base, left, right, T, S, LEFT, RIGHT, CHECK)
        b_p, b_rescale, b_max, b_sum = online(hide(b_x, m_seen, float("-inf")), b_factor, b_max, b_sum)
        b_v = load_rows(p_v, s_v, i_n, S, DV, COLUMNS, WIDTH_V, CHECK, ALIGNED)  # [COLUMNS, WIDTH_V]
        b_p = drop(b_p, kept_columns(b_keys, M + o_n, threshold)).to(b_v.dtype)
        b_out = product(b_p, b_v, b_out * b_rescale[:, None], PRECISION, W)
    return b_out, b_max, b_sum


@triton.jit
def _all_tokens(
    b_out, b_max, b_sum, p_q, s_q, b_q, k, v, seen, b_keys, b_scale, b_cap, i_b, i_h, i_kv, i_t,
    T, S, M, offset, left, right, threshold,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, POSITIVE: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Take all tokens that the queries see: whole tiles without a check, those at the edges with one."""
    p_k, s_k = head(k, i_b, i_kv, ALIGNED)
    p_v, s_v = head(v, i_b, i_kv, ALIGNED)
    i_base = position(seen, i_b, offset)
    i_first, i_whole, i_whole_end, i_end = key_tiles(
        seen, i_b, i_t, i_base, left, right, T, S, LEFT, RIGHT, ROWS, COLUMNS, SCAN
    )
    if LEFT:
        b_out, b_max, b_sum = _tokens(
            b_out, b_max, b_sum, p_q, s_q, b_q, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap, i_b, i_h, i_t, i_base,
            T, S, M, left, right, threshold, i_first, i_whole,
            D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED, POSITIVE, ALIGNED, PRECISION, W, ROWS, COLUMNS, True,
        )  # fmt: skip
    b_out, b_max, b_sum = _tokens(
        b_out, b_max, b_sum, p_q, s_q, b_q, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap, i_b, i_h, i_t, i_base,
        T, S, M, left, right, threshold, i_whole, i_whole_end,
        D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED, POSITIVE, ALIGNED, PRECISION, W, ROWS, COLUMNS, False,
    )  # fmt: skip
    b_out, b_max, b_sum = _tokens(
        b_out, b_max, b_sum, p_q, s_q, b_q, p_k, s_k, p_v, s_v, seen, b_keys, b_scale, b_cap, i_b, i_h, i_t, i_base,
        T, S, M, left, right, threshold, i_whole_end, i_end,
        D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED, POSITIVE, ALIGNED, PRECISION, W, ROWS, COLUMNS, True,
    )  # fmt: skip
    return b_out, b_max, b_sum


@triton.jit(do_not_specialize=RUNTIME)
def attention_forward(
    q, k, v, pk, pv, tokens, p_tokens_lse, out, p_lse, p_sinks, gate, seen, p_seed,
    T, S, M, heads, group, offset: tl.int64, left: tl.int64, right: tl.int64, threshold,
    kept: tl.float64, scale: tl.float64, softcap: tl.float64,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, CAPPED: tl.constexpr, POSITIVE: tl.constexpr, PER_QUERY: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PREFIX: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of ``ROWS`` queries of one head; ``tokens``: both over the tokens, where known."""
    i_tiles = tl.cdiv(T, ROWS)
    i_bh = tl.program_id(0) // i_tiles
    # Under a causal mask the last queries have most to do: they start first.
    i_t = (i_tiles - 1 - tl.program_id(0) % i_tiles) * ROWS
    i_b, i_h = i_bh // heads, i_bh % heads
    i_kv = i_h // group
    b_scale, b_cap = as_tile(scale, W), as_tile(softcap, W)
    o_t = i_t + tl.arange(0, ROWS)[:, None]
    b_keys = row_keys(p_seed, i_bh, o_t)

    p_q, s_q = head(q, i_b, i_h, ALIGNED)
    b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True, ALIGNED)  # [ROWS, WIDTH]
    b_out = tl.zeros([ROWS, WIDTH_V], W)
    b_max, b_sum = tl.full([ROWS], float("-inf"), W), tl.zeros([ROWS], W)
    if p_sinks is not None:
        b_max = tl.zeros([ROWS], W) + tl.load(p_sinks + i_h).to(W) * LOG2E
        b_sum += 1
    if tokens.ptr is not None:
        o_row = i_t + tl.arange(0, ROWS)
        b_max = load_row_sums(p_tokens_lse, i_bh, o_row, T, 0.0).to(W) * LOG2E
        b_sum += 1
        p_tokens, s_tokens = head(tokens, i_b, i_h, ALIGNED)
        b_out = load_rows(p_tokens, s_tokens, i_t, T, DV, ROWS, WIDTH_V, True, ALIGNED).to(W)  # [ROWS, WIDTH_V]

    p_pk, s_pk = head(pk, 0, i_kv, ALIGNED)
    p_pv, s_pv = head(pv, 0, i_kv, ALIGNED)
    for i_m in tl.range(0, M, PREFIX, num_stages=1):
        o_m = i_m + tl.arange(0, PREFIX)[None, :]
        b_g = weights(gate, i_b, o_t, o_m, T, M, PER_QUERY, W)  # [ROWS or 1, PREFIX or 1]
        b_k = load_rows(p_pk, s_pk, i_m, M, D, PREFIX, WIDTH, True, ALIGNED).to(b_q.dtype)  # [PREFIX, WIDTH]
        b_s = similarity(b_q, (p_q, s_q, i_t, T), b_k, (p_pk, s_pk, i_m, M), D, PRECISION, W)
        b_x, b_factor = logits(b_s, b_g, b_scale, b_cap, CAPPED, POSITIVE)
        b_p, b_rescale, b_max, b_sum = online(hide(b_x, o_m < M, float("-inf")), b_factor, b_max, b_sum)
        b_v = load_rows(p_pv, s_pv, i_m, M, DV, PREFIX, WIDTH_V, True, ALIGNED).to(b_q.dtype)  # [PREFIX, WIDTH_V]
        b_p = (drop(b_p, kept_columns(b_keys, o_m, threshold)) * b_g).to(b_q.dtype)
        b_out = product(b_p, b_v, b_out * b_rescale[:, None], PRECISION, W)

    if tokens.ptr is None:
        b_out, b_max, b_sum = _all_tokens(
            b_out, b_max, b_sum, p_q, s_q, b_q, k, v, seen, b_keys, b_scale, b_cap, i_b, i_h, i_kv, i_t,
            T, S, M, offset, left, right, threshold, D, DV, WIDTH, WIDTH_V, LEFT, RIGHT, CAPPED, POSITIVE, ALIGNED,
            PRECISION, W, ROWS, COLUMNS, SCAN,
        )  # fmt: skip

    b_out = rescale(b_out, as_tile(kept, W), p_seed)
    p_out, s_out = head(out, i_b, i_h, ALIGNED)
    store_rows(p_out, s_out, i_t, T, b_out / b_sum[:, None], DV, ROWS, WIDTH_V)
    o_row = i_t + tl.arange(0, ROWS)
    tl.store(p_lse + tl.cast(i_bh, tl.int64) * T + o_row, (b_max + tl.log2(b_sum)) * LN2, mask=o_row < T)


def forward(x: Inputs, way: str) -> tuple[Tensor, Tensor]:
    """The op's forward, ``"fused"``, ``"split"`` or ``"merge"``."""
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    problem = Problem(x)
    out = heads_last_empty(x.query, batch, heads, queries, value_dim)
    logsumexp = torch.empty(batch, heads, queries, dtype=x.compute_dtype, device=x.query.device)
    if way == "split":
        split_forward(problem, rows(out), logsumexp)
        return out, logsumexp
    tokens, tokens_logsumexp = stock.forward(x) if way == "merge" else (None, None)
    tile, first, to = problem.tile("forward"), rows(tokens), rows(out)
    launch(
        attention_forward, count_tiles(queries, tile.rows) * batch * heads, tile,
        problem.query, problem.key, problem.value, problem.prefix_key, problem.prefix_value, first, tokens_logsumexp,
        to, logsumexp, x.sinks, problem.gate, problem.seen, x.seed, **problem.numbers, **problem.constants(first, to),
        POSITIVE=x.scale > 0, ROWS=tile.rows, COLUMNS=tile.columns, PREFIX=problem.prefix_columns(tile),
        SCAN=tiles.SCAN,
    )  # fmt: skip
    return out, logsumexp
