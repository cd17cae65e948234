"""Backward: the gradient of the additive bias, summed where the bias was broadcast."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Problem, Rows, count_tiles, launch, odd
from .primitives import (
    as_tile,
    end_key,
    first_key,
    head,
    lengths,
    load_rows,
    plain,
    position,
    row_keys,
    row_sums,
    similarity,
    token_gradients,
)


class Ones(NamedTuple):
    """Along which dimensions the bias has size one, encoded by `arguments.odd`: run-time numbers, so that lengths of
    one need no compilation."""

    batch: int
    head: int
    row: int
    column: int


@triton.jit
def token_bias_gradient(
    x, d_out, p_sums, p_sum, seen, p_seed, ones, n, scale: tl.float64, softcap: tl.float64, kept: tl.float64,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of the bias's gradient: a sum over the dimensions along which it was broadcast, in a fixed order."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, S, _ = lengths(n)
    batch, heads, group = plain(n.batch), plain(n.heads), plain(n.group)
    one_row, one_column = plain(ones.row), plain(ones.column)
    i_t_tiles, i_n_tiles = tl.cdiv(T, ROWS), tl.cdiv(S, COLUMNS)
    # Along each dimension, the number of tiles of the gradient, and of tiles of the scores that each of them sums.
    i_t_sums, i_n_sums = tl.where(one_row != 0, i_t_tiles, 1), tl.where(one_column != 0, i_n_tiles, 1)
    i_b_sums, i_h_sums = tl.where(plain(ones.batch) != 0, batch, 1), tl.where(plain(ones.head) != 0, heads, 1)
    i_columns, i_rows, i_heads = i_n_tiles // i_n_sums, i_t_tiles // i_t_sums, heads // i_h_sums
    i_column, i_row = tl.program_id(0) % i_columns, tl.program_id(0) // i_columns % i_rows
    i_bh_sum = tl.program_id(0) // i_columns // i_rows
    scales = (as_tile(scale, C.W), as_tile(softcap, C.W), as_tile(kept, C.W))
    b_sum = tl.zeros([ROWS, COLUMNS], C.W)
    for i in tl.range(0, i_b_sums * i_h_sums * i_t_sums * i_n_sums):
        i_n = (i_column + i % i_n_sums) * COLUMNS
        i_t = (i_row + i // i_n_sums % i_t_sums) * ROWS
        i_h = i_bh_sum % i_heads + i // i_n_sums // i_t_sums % i_h_sums
        i_b = i_bh_sum // i_heads + i // i_n_sums // i_t_sums // i_h_sums
        i_base = position(seen, i_b, n)
        i_last = tl.minimum(i_t + ROWS, T) - 1
        i_begin = first_key(i_t, i_base, plain(n.left), S, C.LEFT)
        i_end = end_key(i_last, i_base, plain(n.right), S, C.RIGHT)
        if (i_n < i_end) & (i_n + COLUMNS > i_begin):
            i_bh = i_b * heads + i_h
            o_t, o_n = i_t + tl.arange(0, ROWS)[:, None], i_n + tl.arange(0, COLUMNS)[None, :]
            p_q, s_q = head(x.q, i_b, i_h, C.ALIGNED)
            p_k, s_k = head(x.k, i_b, i_h // group, C.ALIGNED)
            b_q = load_rows(p_q, s_q, i_t, T, D, ROWS, WIDTH, True, C.ALIGNED)  # [ROWS, WIDTH]
            b_k = load_rows(p_k, s_k, i_n, S, D, COLUMNS, WIDTH, True, C.ALIGNED)  # [COLUMNS, WIDTH]
            b_s = similarity(b_q, (p_q, s_q, i_t, T), b_k, (p_k, s_k, i_n, S), D, C)
            p_do, s_do = head(d_out, i_b, i_h, C.ALIGNED)
            p_v, s_v = head(x.v, i_b, i_h // group, C.ALIGNED)
            b_do = load_rows(p_do, s_do, i_t, T, DV, ROWS, WIDTH_V, True, C.ALIGNED)  # [ROWS, WIDTH_V]
            b_v = load_rows(p_v, s_v, i_n, S, DV, COLUMNS, WIDTH_V, True, C.ALIGNED)  # [COLUMNS, WIDTH_V]
            b_r = similarity(b_do, (p_do, s_do, i_t, T), b_v, (p_v, s_v, i_n, S), DV, C)
            p_row, i_padded = row_sums(p_sums, i_bh, T, C.PAD)
            m_row = o_t < i_padded
            b_lse = tl.load(p_row + o_t, mask=m_row, other=float("inf"))  # [ROWS, 1]
            b_delta = tl.load(p_row + i_padded + o_t, mask=m_row, other=0.0)  # [ROWS, 1]
            b_sum += token_gradients(
                b_s, b_r, b_lse, b_delta, seen, row_keys(p_seed, i_bh, o_t), (i_b, i_h, o_t, o_n, i_base), n, scales,
                C, True,
            )[0]  # fmt: skip
    # p_sum is contiguous, [B or 1, Hq or 1, T or 1, S or 1].
    i_length, i_width = tl.where(one_row != 0, 1, T), tl.where(one_column != 0, 1, S)
    o_t = i_row * ROWS + tl.arange(0, ROWS)[:, None]
    o_n = i_column * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if one_row != 0:
        b_sum = tl.broadcast_to(tl.sum(b_sum, 0)[None, :], [ROWS, COLUMNS])
    if one_column != 0:
        b_sum = tl.broadcast_to(tl.sum(b_sum, 1)[:, None], [ROWS, COLUMNS])
    o_sum = (tl.cast(i_bh_sum, tl.int64) * i_length + o_t) * i_width + o_n
    tl.store(p_sum + o_sum, b_sum.to(p_sum.dtype.element_ty), mask=(o_t < i_length) & (o_n < i_width))


def bias_gradient(problem: Problem, d_out: Rows, sums: Tensor) -> Tensor:
    """The gradient of the bias, in its own shape: tiles are summed in registers, none is stored first."""
    x, tile = problem.x, problem.tile("bias")
    batches, bias_heads, queries, keys = x.bias.shape
    summed = torch.empty(x.bias.shape, dtype=x.bias.dtype, device=x.bias.device)
    tiles = count_tiles(queries, tile.rows) * count_tiles(keys, tile.columns)
    launch(
        token_bias_gradient, batches * bias_heads * tiles, tile,
        problem.operands, d_out, sums, summed, problem.seen, x.seed, Ones(*[odd(have == 1) for have in x.bias.shape]),
        problem.numbers, *problem.scales, C=problem.constants(d_out), ROWS=tile.rows, COLUMNS=tile.columns,
    )  # fmt: skip
    return summed
