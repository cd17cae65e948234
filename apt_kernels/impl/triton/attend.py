"""Forward: each program processes a tile of queries of one head over the prefix, then over the visible tokens.

With ``merge`` and ``merge_flash4``, a library's kernel computes the tokens; the program starts from its result and adds
the prefix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import Inputs, heads_last_empty
from . import stock
from .adapters import normalised, open_prefix, row_prefix, with_finite_maximum
from .arguments import Problem, count_tiles, launch, odd, rows
from .primitives import (
    LN2,
    LOG2E,
    add_bias,
    as_tile,
    at,
    column_weights,
    drop,
    head,
    hide,
    kept_columns,
    lengths,
    load_row_sums,
    load_rows,
    load_tile,
    logits,
    longest_first,
    online,
    open_rows,
    plain,
    position,
    product,
    rescale,
    row_keys,
    seen_tokens,
    similarity,
    store_tile,
    whole_prefix,
)
from .ranges import key_tiles
from .split import split_forward


@triton.jit
def _tokens(
    so_far, query, k, v, seen, b_keys, place, n, scales, i_first, i_end, C: tl.constexpr, COLUMNS: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Accumulate the tokens ``i_first .. i_end - 1`` into output, maximum and sum."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    b_out, b_max, b_sum = so_far
    b_q, at_q = query
    i_b, i_h, o_t, i_base = place
    for i_n in tl.range(i_first, i_end, COLUMNS):
        o_n = i_n + tl.arange(0, COLUMNS)[None, :]
        b_k = load_tile(k, i_n, D, COLUMNS, WIDTH, CHECK, C.ALIGNED, C.DESCRIPTORS)  # [COLUMNS, WIDTH]
        b_s = similarity(b_q, at_q, b_k, at(k, i_n), D, C)
        b_x, b_factor = logits(b_s, None, scales[0], scales[1], C.CAPPED, C.POSITIVE)
        b_x, b_factor = add_bias(b_x, b_factor, seen, (i_b, i_h, o_t, o_n, i_base), n)
        m_seen = seen_tokens(seen, (i_b, i_h, o_t, o_n, i_base), n, C.LEFT, C.RIGHT, CHECK)
        b_p, b_rescale, b_max, b_sum = online(hide(b_x, m_seen, float("-inf")), b_factor, b_max, b_sum)
        b_v = load_tile(v, i_n, DV, COLUMNS, WIDTH_V, CHECK, C.ALIGNED, C.DESCRIPTORS)  # [COLUMNS, WIDTH_V]
        b_p = drop(b_p, kept_columns(b_keys, plain(n.M) + o_n, plain(n.threshold))).to(b_v.dtype)
        b_out = product(b_p, b_v, b_out * b_rescale[:, None], C)
    return b_out, b_max, b_sum


@triton.jit
def _prefix(
    so_far, query, k, v, gate, b_keys, place, n, scales, i_first, i_end, M, C: tl.constexpr, PREFIX: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Accumulate the prefix columns ``i_first .. i_end - 1`` of ``M`` into output, maximum and sum."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, _, _ = lengths(n)
    b_out, b_max, b_sum = so_far
    b_q, at_q = query
    i_b, _, o_t, _ = place
    for i_m in tl.range(i_first, i_end, PREFIX):
        o_m = i_m + tl.arange(0, PREFIX)[None, :]
        b_g = column_weights(gate, i_b, o_t, i_m, T, M, PREFIX, C, CHECK)  # [ROWS or 1, PREFIX]
        b_k = load_tile(k, i_m, D, PREFIX, WIDTH, CHECK, C.ALIGNED, C.DESCRIPTORS).to(b_q.dtype)  # [PREFIX, WIDTH]
        b_s = similarity(b_q, at_q, b_k, at(k, i_m), D, C)
        b_x, b_factor = logits(b_s, b_g, scales[0], scales[1], C.CAPPED, C.POSITIVE)
        if CHECK:
            b_x = tl.where(o_m < M, b_x, float("-inf"))
        b_p, b_rescale, b_max, b_sum = online(b_x, b_factor, b_max, b_sum)
        b_v = load_tile(v, i_m, DV, PREFIX, WIDTH_V, CHECK, C.ALIGNED, C.DESCRIPTORS).to(b_q.dtype)  # [PREFIX, WIDTH_V]
        b_p = (drop(b_p, kept_columns(b_keys, o_m, plain(n.threshold))) * b_g).to(b_q.dtype)
        b_out = product(b_p, b_v, b_out * b_rescale[:, None], C)
    return b_out, b_max, b_sum


@triton.jit
def attention_forward(
    x, tokens, p_tokens_lse, to, p_lse, p_sinks, gate, seen, p_seed, band, n,
    scale: tl.float64, softcap: tl.float64, kept: tl.float64,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of ``ROWS`` queries of one head. ``tokens`` and ``p_tokens_lse``: those over the tokens
    alone, if they are computed already."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, S, _ = lengths(n)
    heads, i_tiles = plain(n.heads), tl.cdiv(T, ROWS)
    i_tile, i_bh = longest_first(tl.program_id(0), i_tiles, plain(n.batch) * heads, plain(band[0]))
    # Under a causal mask the last queries see the most keys.
    i_t = (i_tiles - 1 - i_tile) * ROWS
    i_b, i_h = i_bh // heads, i_bh % heads
    i_kv = i_h // plain(n.group)
    o_t = i_t + tl.arange(0, ROWS)[:, None]
    scales = (as_tile(scale, C.W), as_tile(softcap, C.W), as_tile(kept, C.W))
    p_q, s_q = head(x.q, i_b, i_h, C.ALIGNED)
    b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True, C.ALIGNED)  # [ROWS, WIDTH]
    query = (b_q, (p_q, s_q, i_t, T))
    b_keys = row_keys(p_seed, i_bh, o_t)
    i_base = position(seen, i_b, n)
    place = (i_b, i_h, o_t, i_base)

    b_out = tl.zeros([ROWS, WIDTH_V], C.W)
    b_max, b_sum = tl.full([ROWS], float("-inf"), C.W), tl.zeros([ROWS], C.W)
    if p_sinks is not None:
        b_max = tl.zeros([ROWS], C.W) + tl.load(p_sinks + i_h).to(C.W) * LOG2E
        b_sum += 1.0
    if tokens.ptr is not None:
        o_row = i_t + tl.arange(0, ROWS)
        b_max = load_row_sums(p_tokens_lse, i_bh, o_row, T, 0.0).to(C.W) * LOG2E
        b_sum += 1
        p_tokens, s_tokens = head(tokens, i_b, i_h, C.ALIGNED)
        b_out = load_rows(p_tokens, s_tokens, i_t, T, DV, ROWS, WIDTH_V, True, C.ALIGNED).to(C.W)  # [ROWS, WIDTH_V]

    b_max, b_sum = with_finite_maximum(gate.adapters, b_max, b_sum)
    i_a, M = row_prefix(gate, i_b, n)
    pk = open_prefix(x.pk, gate, i_a, i_kv, M, D, PREFIX, WIDTH, C)
    pv = open_prefix(x.pv, gate, i_a, i_kv, M, DV, PREFIX, WIDTH_V, C)
    so_far, i_whole = (b_out, b_max, b_sum), whole_prefix(M, PREFIX)
    so_far = _prefix(so_far, query, pk, pv, gate, b_keys, place, n, scales, 0, i_whole, M, C, PREFIX, False)
    so_far = _prefix(so_far, query, pk, pv, gate, b_keys, place, n, scales, i_whole, M, M, C, PREFIX, True)

    if tokens.ptr is None:
        k = open_rows(x.k, i_b, i_kv, S, D, COLUMNS, WIDTH, C.ALIGNED, C.DESCRIPTORS)
        v = open_rows(x.v, i_b, i_kv, S, DV, COLUMNS, WIDTH_V, C.ALIGNED, C.DESCRIPTORS)
        i_first, i_whole, i_whole_end, i_end = key_tiles(seen, i_b, i_t, i_base, n, C, ROWS, COLUMNS)
        if C.LEFT:
            so_far = _tokens(so_far, query, k, v, seen, b_keys, place, n, scales, i_first, i_whole, C, COLUMNS, True)
        so_far = _tokens(so_far, query, k, v, seen, b_keys, place, n, scales, i_whole, i_whole_end, C, COLUMNS, False)
        so_far = _tokens(so_far, query, k, v, seen, b_keys, place, n, scales, i_whole_end, i_end, C, COLUMNS, True)

    b_out, b_max, b_sum = so_far
    b_out, b_lse = normalised(gate.adapters, rescale(b_out, scales[2], p_seed), b_max, b_sum)
    store_tile(to, i_b, i_h, i_t, T, b_out, DV, C)
    o_row = i_t + tl.arange(0, ROWS)
    tl.store(p_lse + tl.cast(i_bh, tl.int64) * T + o_row, b_lse * LN2, mask=o_row < T)


def forward(x: Inputs, strategy: str) -> tuple[Tensor, Tensor]:
    """The op's forward: ``"fused"``, ``"split"``, or the name of a stock kernel."""
    batch, heads, _, queries, _, _, _, value_dim = x.sizes
    problem = Problem(x)
    out = heads_last_empty(x.query, batch, heads, queries, value_dim)
    logsumexp = torch.empty(batch, heads, queries, dtype=x.compute_dtype, device=x.query.device)
    if strategy == "split":
        split_forward(problem, rows(out), logsumexp)
        return out, logsumexp
    kernel = stock.KERNELS.get(strategy)
    tokens, tokens_logsumexp = kernel.forward(x) if kernel else (None, None)
    sinks = None if kernel and kernel.takes_sinks else x.sinks
    tile, first, to = problem.tile("forward"), rows(tokens), rows(out)
    launch(
        attention_forward, count_tiles(queries, tile.rows) * batch * heads, tile,
        problem.operands, first, tokens_logsumexp, to, logsumexp, sinks, problem.gate, problem.seen, x.seed,
        (odd(problem.band(tile)),), problem.numbers, *problem.scales, C=problem.constants(first, to),
        ROWS=tile.rows, COLUMNS=tile.columns, PREFIX=problem.prefix_columns("forward"),
    )  # fmt: skip
    return out, logsumexp
