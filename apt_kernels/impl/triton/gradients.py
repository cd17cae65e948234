"""Backward in three launches: dq and the row sums that the others need; the gradients of columns; their final sums.

It is four launches where the prefix has its own. With ``merge``, a library's kernel computes dk, dv and the tokens'
part of dq, to which the prefix's part is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import DIFFERENTIABLE, Inputs, heads_last_empty
from . import stock
from .adapters import hidden_rows, open_prefix, row_prefix
from .arguments import Problem, Rows, count_tiles, launch, odd, rows
from .bias import bias_gradient
from .columns import column_gradients_of
from .finish import finish
from .primitives import (
    LOG2E,
    as_tile,
    at,
    column_weights,
    head,
    lengths,
    load_row_sums,
    load_rows,
    load_tile,
    longest_first,
    open_rows,
    plain,
    position,
    prefix_gradients,
    product,
    row_keys,
    row_sums,
    similarity,
    store_tile,
    token_gradients,
    whole_prefix,
)
from .ranges import key_tiles


@triton.jit
def _query_tokens(
    b_dq, query, k, v, seen, b_keys, place, n, scales, i_first, i_end, C: tl.constexpr, COLUMNS: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Add the part of the tokens ``i_first .. i_end - 1`` to ``dq / scale``."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    b_q, at_q, b_do, at_do, b_lse, b_delta = query
    i_b, i_h, o_t, i_base = place
    for i_n in tl.range(i_first, i_end, COLUMNS):
        o_n = i_n + tl.arange(0, COLUMNS)[None, :]
        b_k = load_tile(k, i_n, D, COLUMNS, WIDTH, CHECK, C.ALIGNED, C.DESCRIPTORS)  # [COLUMNS, WIDTH]
        b_v = load_tile(v, i_n, DV, COLUMNS, WIDTH_V, CHECK, C.ALIGNED, C.DESCRIPTORS)  # [COLUMNS, WIDTH_V]
        b_s = similarity(b_q, at_q, b_k, at(k, i_n), D, C)
        b_r = similarity(b_do, at_do, b_v, at(v, i_n), DV, C)
        b_ds = token_gradients(
            b_s, b_r, b_lse, b_delta, seen, b_keys, (i_b, i_h, o_t, o_n, i_base), n, scales, C, CHECK
        )[1]
        b_dq = product(b_ds.to(b_k.dtype), b_k, b_dq, C)
    return b_dq


@triton.jit
def _query_prefix(
    b_dq, query, k, v, gate, b_keys, place, n, scales, i_first, i_end, M, C: tl.constexpr, PREFIX: tl.constexpr,
    CHECK: tl.constexpr,
):  # fmt: skip
    """Add the part of the prefix columns ``i_first .. i_end - 1`` of ``M`` to ``dq / scale``."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, _, _ = lengths(n)
    b_q, at_q, b_do, at_do, b_lse, b_delta = query
    i_b, _, o_t, _ = place
    for i_m in tl.range(i_first, i_end, PREFIX):
        o_m = i_m + tl.arange(0, PREFIX)[None, :]
        b_g = column_weights(gate, i_b, o_t, i_m, T, M, PREFIX, C, CHECK)  # [ROWS or 1, PREFIX]
        b_k = load_tile(k, i_m, D, PREFIX, WIDTH, CHECK, C.ALIGNED, C.DESCRIPTORS).to(b_q.dtype)  # [PREFIX, WIDTH]
        b_v = load_tile(v, i_m, DV, PREFIX, WIDTH_V, CHECK, C.ALIGNED, C.DESCRIPTORS).to(b_q.dtype)  # [PREFIX, WIDTH_V]
        b_s = similarity(b_q, at_q, b_k, at(k, i_m), D, C)
        b_r = similarity(b_do, at_do, b_v, at(v, i_m), DV, C)
        b_dz = prefix_gradients(b_s, b_r, b_g, b_lse, b_delta, b_keys, o_m, M, n, scales, C, CHECK)[1]
        b_dq = product((b_dz * b_g).to(b_q.dtype), b_k, b_dq, C)
    return b_dq


@triton.jit
def _query_gradient(
    x, tokens, to, gate, seen, p_seed, do, sums, place, n, scales, C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """dq of ``ROWS`` queries of one head. ``tokens``: the tokens' part, if it is computed already."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, S, _ = lengths(n)
    i_b, i_h, i_bh, i_t = place
    i_kv = i_h // plain(n.group)
    o_t = i_t + tl.arange(0, ROWS)[:, None]
    b_keys = row_keys(p_seed, i_bh, o_t)
    p_q, s_q = head(x.q, i_b, i_h, C.ALIGNED)
    b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True, C.ALIGNED)  # [ROWS, WIDTH]
    query = (b_q, (p_q, s_q, i_t, T), do[0], do[1], sums[0], sums[1])
    i_base = position(seen, i_b, n)
    here = (i_b, i_h, o_t, i_base)
    b_dq = tl.zeros([ROWS, WIDTH], C.W)

    i_a, M = row_prefix(gate, i_b, n)
    pk = open_prefix(x.pk, gate, i_a, i_kv, M, D, PREFIX, WIDTH, C)
    pv = open_prefix(x.pv, gate, i_a, i_kv, M, DV, PREFIX, WIDTH_V, C)
    i_whole = whole_prefix(M, PREFIX)
    b_dq = _query_prefix(b_dq, query, pk, pv, gate, b_keys, here, n, scales, 0, i_whole, M, C, PREFIX, False)
    b_dq = _query_prefix(b_dq, query, pk, pv, gate, b_keys, here, n, scales, i_whole, M, M, C, PREFIX, True)

    if tokens.ptr is None:
        k = open_rows(x.k, i_b, i_kv, S, D, COLUMNS, WIDTH, C.ALIGNED, C.DESCRIPTORS)
        v = open_rows(x.v, i_b, i_kv, S, DV, COLUMNS, WIDTH_V, C.ALIGNED, C.DESCRIPTORS)
        i_first, i_whole, i_whole_end, i_end = key_tiles(seen, i_b, i_t, i_base, n, C, ROWS, COLUMNS)
        if C.LEFT:
            b_dq = _query_tokens(b_dq, query, k, v, seen, b_keys, here, n, scales, i_first, i_whole, C, COLUMNS, True)
        b_dq = _query_tokens(b_dq, query, k, v, seen, b_keys, here, n, scales, i_whole, i_whole_end, C, COLUMNS, False)
        b_dq = _query_tokens(b_dq, query, k, v, seen, b_keys, here, n, scales, i_whole_end, i_end, C, COLUMNS, True)
    b_dq = b_dq * scales[0]
    if tokens.ptr is not None:
        p_tokens, s_tokens = head(tokens, i_b, i_h, C.ALIGNED)
        b_dq += load_rows(p_tokens, s_tokens, i_t, T, D, ROWS, WIDTH, True, C.ALIGNED).to(C.W)
    store_tile(to, i_b, i_h, i_t, T, b_dq, D, C)


@triton.jit
def query_gradient(
    x, out, d_out, p_lse, p_d_lse, p_sums, tokens, to, gate, seen, p_seed, band, n,
    scale: tl.float64, softcap: tl.float64, kept: tl.float64,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """Row sums of ``ROWS`` queries of one head (see `primitives.row_sums`; delta is ``sum(dO * O) - dL``) and, if
    needed, dq: over the prefix, then over the visible tokens."""
    DV: tl.constexpr = C.DV
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, _, _ = lengths(n)
    heads, i_tiles = plain(n.heads), tl.cdiv(T, ROWS)
    i_tile, i_bh = longest_first(tl.program_id(0), i_tiles, plain(n.batch) * heads, plain(band[0]))
    # Under a causal mask the last queries see the most keys.
    i_t = (i_tiles - 1 - i_tile) * ROWS
    i_b, i_h = i_bh // heads, i_bh % heads
    o_t = i_t + tl.arange(0, ROWS)[:, None]
    p_o, s_o = head(out, i_b, i_h, C.ALIGNED)
    p_do, s_do = head(d_out, i_b, i_h, C.ALIGNED)
    b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True, C.ALIGNED)  # [ROWS, WIDTH_V]
    b_o = load_rows(p_o, s_o, i_t, T, DV, ROWS, WIDTH_V, True, C.ALIGNED)  # [ROWS, WIDTH_V]
    b_delta = tl.sum(b_o.to(C.W) * b_do.to(C.W), 1)[:, None]  # [ROWS, 1]
    if p_d_lse is not None:
        b_delta -= load_row_sums(p_d_lse, i_bh, o_t, T, 0.0).to(C.W)
    # A row past the end has an infinite log-sum-exp: all its probabilities are zero.
    b_lse = hidden_rows(gate.adapters, load_row_sums(p_lse, i_bh, o_t, T, float("inf")) * LOG2E)  # [ROWS, 1]
    p_row, i_padded = row_sums(p_sums, i_bh, T, C.PAD)
    tl.store(p_row + o_t, b_lse)
    tl.store(p_row + i_padded + o_t, b_delta)
    if to.ptr is not None:
        _query_gradient(
            x, tokens, to, gate, seen, p_seed, (b_do, (p_do, s_do, i_t, T)), (b_lse, b_delta), (i_b, i_h, i_bh, i_t),
            n, (as_tile(scale, C.W), as_tile(softcap, C.W), as_tile(kept, C.W)), C, ROWS, COLUMNS, PREFIX,
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
    """Row sums ``[B, Hq, 2, padded T]``, and dq if ``wanted``; ``of_tokens``: the tokens' part, if computed already."""
    x = problem.x
    batch, heads, _, queries, _, _, head_dim, _ = problem.sizes
    tile, tokens = problem.tile("query"), rows(of_tokens)
    n_tiles = count_tiles(queries, tile.rows)
    to = rows(heads_last_empty(x.query, batch, heads, queries, head_dim) if wanted else None)
    sums = torch.empty(batch, heads, 2, n_tiles * tile.rows, dtype=x.compute_dtype, device=x.query.device)
    d_logsumexp = None if d_logsumexp is None else d_logsumexp.contiguous()
    launch(
        query_gradient, n_tiles * batch * heads, tile,
        problem.operands, out, d_out, logsumexp, d_logsumexp, sums, tokens, to, problem.gate, problem.seen, x.seed,
        (odd(problem.band(tile)),), problem.numbers, *problem.scales, C=problem.constants(out, d_out, tokens, to),
        ROWS=tile.rows, COLUMNS=tile.columns, PREFIX=problem.prefix_columns("query"),
    )  # fmt: skip
    return sums, to.ptr


def backward(
    x: Inputs,
    out: Tensor,
    logsumexp: Tensor,
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    needs: list[bool],
    strategy: str,
) -> list[Tensor | None]:
    """The op's backward; only the gradients in ``needs`` are computed. ``strategy`` as in `attend.forward`."""
    need, grads = dict(zip(DIFFERENTIABLE, needs)), dict.fromkeys(DIFFERENTIABLE)
    of_query, still = None, need
    kernel = stock.KERNELS.get(strategy)
    # Ours takes a gradient of the log-sum-exp, whichever strategy the forward used; a library's may not.
    if kernel and (grad_logsumexp is None or kernel.takes_logsumexp_gradient) and any(needs[:3]):
        of_query, grads["key"], grads["value"] = kernel.backward(x, out, logsumexp, grad_out, grad_logsumexp)
        still = need | {"key": False, "value": False}
    problem, d_out = Problem(x), rows(grad_out)
    rest = (logsumexp, grad_logsumexp, of_query if need["query"] else None, need["query"])
    sums, grads["query"] = _query_gradient_of(problem, rows(out), d_out, *rest)
    of_adapters = any(need[name] for name in ("prefix_key", "prefix_value", "gate", "layer_scale"))
    ordered = problem.ordered_gate() if of_adapters else problem.gate
    columns = column_gradients_of(problem, ordered, d_out, sums, still)
    done = finish(problem, ordered, columns, sums, need)
    # With those of key and value from the library's kernel, `done` has none.
    grads.update(done if still is need else {name: t for name, t in done.items() if name not in ("key", "value")})
    if need["bias"]:
        grads["bias"] = bias_gradient(problem, d_out, sums)
    return [grads[name] if need[name] else None for name in DIFFERENTIABLE]
