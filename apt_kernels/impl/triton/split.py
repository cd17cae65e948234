"""Forward of few queries over many keys (decoding): the keys are split among programs, whose results are merged.

The query heads of a group, and the few queries of each, are rows of one tile, so that every key is read once. Where the
prefix is the same for all batch rows, its programs process rows of the whole batch; with a prefix for each row, the
rows of one batch row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .adapters import normalised, row_prefix, with_finite_maximum
from .arguments import Problem, Rows, count_tiles, launch, odd
from .primitives import (
    LN2,
    LOG2E,
    PART,
    add_bias,
    as_tile,
    drop,
    head,
    hide,
    kept_columns,
    lengths,
    load_columns,
    load_rows,
    logits,
    plain,
    position,
    product,
    rescale,
    row_keys,
    seen_tokens,
    similarity,
    weights,
)
from .ranges import key_share


@triton.jit
def _load_queries(q, o_b, o_h, o_t, i_d, T, D: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """``[rows, WIDTH]``: the queries ``o_t`` of the heads ``o_h`` of the batch rows ``o_b``, from column ``i_d``; zero
    past the last."""
    o_d = i_d + tl.arange(0, WIDTH)[None, :]
    o_row = tl.cast(o_b, tl.int64) * plain(q.b) + tl.cast(o_h, tl.int64) * plain(q.h)
    p_tile = q.ptr + (o_row + tl.cast(o_t, tl.int64) * plain(q.t)) + o_d
    if ALIGNED:
        p_tile = tl.max_contiguous(tl.multiple_of(p_tile, (1, 16)), (1, WIDTH))
    return tl.load(p_tile, mask=(o_t < T) & (o_d < D), other=0.0)


@triton.jit
def _similarity(b_q, q, rows, b_k, at_k, D: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr):  # fmt: skip
    """`primitives.similarity` of queries that are not consecutive rows, or (``TRANSPOSED``) of keys and queries;
    ``rows``: batch rows, heads and positions, each ``[rows, 1]``, and the number of positions."""
    if b_q.dtype.primitive_bitwidth < 32 or b_q.shape[1] <= 128:
        b_s = similarity(b_k, None, b_q, None, D, C) if TRANSPOSED else similarity(b_q, None, b_k, None, D, C)
    else:
        COLUMNS: tl.constexpr = PART // b_q.dtype.primitive_bitwidth
        b_s = tl.zeros([b_q.shape[0], b_k.shape[0]], C.W)
        for i_d in tl.range(0, b_q.shape[1], COLUMNS, num_stages=1):
            b_left = _load_queries(q, rows[0], rows[1], rows[2], i_d, rows[3], D, COLUMNS, False)
            b_right = load_columns(at_k, i_d, D, b_k.shape[0], COLUMNS).to(b_q.dtype)
            b_s = product(b_left, tl.trans(b_right), b_s, C)
        if TRANSPOSED:
            b_s = tl.trans(b_s)
    return b_s


@triton.jit
def _online(b_x, b_factor, b_max, b_sum, AXIS: tl.constexpr):
    """`primitives.online` along an axis, for rows that may have seen no column yet."""
    b_new = tl.maximum(b_max, tl.max(b_x, AXIS) * b_factor)
    b_finite = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_rescale = tl.exp2(b_max - b_finite)
    b_p = tl.exp2(b_x * b_factor - tl.expand_dims(b_finite, AXIS))
    return b_p, b_rescale, b_new, b_sum * b_rescale + tl.sum(b_p, AXIS)


@triton.jit
def _store_part(part, b_out, b_max, b_sum, o_row, m_row, i_slot, slots, DV: tl.constexpr, WIDTH_V: tl.constexpr):
    """Store one program's results for its rows: the sums relative to its own maximum."""
    p_out, p_max, p_sum = part
    o_slot, o_d = tl.cast(o_row, tl.int64) * slots + i_slot, tl.arange(0, WIDTH_V)[None, :]
    tl.store(p_out + o_slot[:, None] * DV + o_d, b_out, mask=m_row[:, None] & (o_d < DV))
    tl.store(p_max + o_slot, b_max, mask=m_row)
    tl.store(p_sum + o_slot, b_sum, mask=m_row)


@triton.jit
def _prefix_share(
    x, part, gate, p_seed, i, splits, slots, n, scales, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A share of the prefix for ``ROWS`` rows (batch row, query, head of a group), of one batch row if each has a
    prefix of its own."""
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, _, M = lengths(n)
    batch, heads, group = plain(n.batch), plain(n.heads), plain(n.group)
    i_rows, i_shared, i_a = batch * T * group, i // splits, i * 0
    if gate.adapters.index is not None:
        i_b, i_shared, i_rows = i_shared % batch, i_shared // batch, T * group
        i_a, M = row_prefix(gate, i_b, n)
    i_row_tiles = tl.cdiv(i_rows, ROWS)
    i_split, i_row = i % splits, i_shared % i_row_tiles * ROWS
    i_kv = i_shared // i_row_tiles
    o_r = i_row + tl.arange(0, ROWS)
    m_r = o_r < i_rows
    if gate.adapters.index is not None:
        o_r = tl.where(m_r, o_r + i_b * i_rows, 0)
    o_b, o_h = tl.where(m_r, o_r // (T * group), 0), i_kv * group + o_r % group
    o_t = tl.where(m_r, o_r // group % T, T)
    b_q = _load_queries(x.q, o_b[:, None], o_h[:, None], o_t[:, None], 0, T, D, WIDTH, C.ALIGNED)  # [ROWS, WIDTH]
    b_keys = row_keys(p_seed, (o_b * heads + o_h)[:, None], o_t[:, None])
    b_out = tl.zeros([ROWS, WIDTH_V], C.W)
    b_max, b_sum = tl.full([ROWS], float("-inf"), C.W), tl.zeros([ROWS], C.W)
    p_pk, s_pk = head(x.pk, i_a, i_kv, C.ALIGNED)
    p_pv, s_pv = head(x.pv, i_a, i_kv, C.ALIGNED)
    i_share = tl.cdiv(tl.cdiv(M, splits), COLUMNS) * COLUMNS
    for i_m in tl.range(i_split * i_share, tl.minimum((i_split + 1) * i_share, M), COLUMNS, num_stages=1):
        o_m = i_m + tl.arange(0, COLUMNS)[None, :]
        b_g = weights(gate, o_b[:, None], o_t[:, None], o_m, T, M, True, C)  # [ROWS or 1, COLUMNS or 1]
        b_k = load_rows(p_pk, s_pk, i_m, M, D, COLUMNS, WIDTH, True, C.ALIGNED).to(b_q.dtype)  # [COLUMNS, WIDTH]
        rows = (o_b[:, None], o_h[:, None], o_t[:, None], T)
        b_s = _similarity(b_q, x.q, rows, b_k, (p_pk, s_pk, i_m, M), D, C, False)
        b_x, b_factor = logits(b_s, b_g, scales[0], scales[1], C.CAPPED, C.POSITIVE)
        b_p, b_rescale, b_max, b_sum = _online(hide(b_x, o_m < M, float("-inf")), b_factor, b_max, b_sum, 1)
        b_v = load_rows(p_pv, s_pv, i_m, M, DV, COLUMNS, WIDTH_V, True, C.ALIGNED).to(b_q.dtype)  # [COLUMNS, WIDTH_V]
        b_p = (drop(b_p, kept_columns(b_keys, o_m, plain(n.threshold))) * b_g).to(b_q.dtype)
        b_out = product(b_p, b_v, b_out * b_rescale[:, None], C)
    _store_part(part, b_out, b_max, b_sum, (o_b * heads + o_h) * T + o_t, m_r, i_split, slots, DV, WIDTH_V)


@triton.jit
def _token_share(
    x, part, seen, p_seed, i, splits, first_slot, slots, n, scales, C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A share of the keys of one batch row and key head for ``ROWS`` rows (query, head of the group).

    Rows are few and keys many, so tiles are transposed: keys, and columns of the values, are divided among the warps.
    """
    D: tl.constexpr = C.D
    DV: tl.constexpr = C.DV
    WIDTH: tl.constexpr = C.WIDTH
    WIDTH_V: tl.constexpr = C.WIDTH_V
    T, S, M = lengths(n)
    heads, group = plain(n.heads), plain(n.group)
    i_row_tiles, i_kv_heads = tl.cdiv(T * group, ROWS), heads // group
    i_split, i_row = i % splits, i // splits % i_row_tiles * ROWS
    i_kv = i // splits // i_row_tiles % i_kv_heads
    i_b = i // splits // i_row_tiles // i_kv_heads
    o_r = i_row + tl.arange(0, ROWS)
    m_r = o_r < T * group
    o_h, o_t = i_kv * group + o_r % group, tl.where(m_r, o_r // group, T)
    b_q = _load_queries(x.q, i_b, o_h[:, None], o_t[:, None], 0, T, D, WIDTH, C.ALIGNED)  # [ROWS, WIDTH]
    b_keys = row_keys(p_seed, (i_b * heads + o_h)[None, :], o_t[None, :])
    b_out = tl.zeros([WIDTH_V, ROWS], C.W)
    b_max, b_sum = tl.full([ROWS], float("-inf"), C.W), tl.zeros([ROWS], C.W)
    p_k, s_k = head(x.k, i_b, i_kv, C.ALIGNED)
    p_v, s_v = head(x.v, i_b, i_kv, C.ALIGNED)
    i_base = position(seen, i_b, n)
    i_last = tl.minimum(i_row + ROWS, T * group) - 1
    i_first, i_end = key_share(seen, i_b, i_row // group, i_last // group, i_base, n, i_split, splits, C, ROWS, COLUMNS)
    for i_n in tl.range(i_first, i_end, COLUMNS):
        o_n = i_n + tl.arange(0, COLUMNS)[:, None]
        b_k = load_rows(p_k, s_k, i_n, S, D, COLUMNS, WIDTH, True, C.ALIGNED)  # [COLUMNS, WIDTH]
        rows = (i_b, o_h[:, None], o_t[:, None], T)
        b_s = _similarity(b_q, x.q, rows, b_k, (p_k, s_k, i_n, S), D, C, True)
        b_x, b_factor = logits(b_s, None, scales[0], scales[1], C.CAPPED, C.POSITIVE)
        place = (i_b, o_h[None, :], o_t[None, :], o_n, i_base)
        b_x, b_factor = add_bias(b_x, b_factor, seen, place, n)
        m_seen = (o_n < i_end) & seen_tokens(seen, place, n, C.LEFT, C.RIGHT, True)
        b_p, b_rescale, b_max, b_sum = _online(hide(b_x, m_seen, float("-inf")), b_factor, b_max, b_sum, 0)
        b_v = load_rows(p_v, s_v, i_n, S, DV, COLUMNS, WIDTH_V, True, C.ALIGNED)  # [COLUMNS, WIDTH_V]
        b_p = drop(b_p, kept_columns(b_keys, M + o_n, plain(n.threshold))).to(b_v.dtype)
        b_out = product(tl.trans(b_v), b_p, b_out * b_rescale[None, :], C)
    o_row = (i_b * heads + o_h) * T + o_t
    _store_part(part, tl.trans(b_out), b_max, b_sum, o_row, m_r, first_slot + i_split, slots, DV, WIDTH_V)


class Shares(NamedTuple):
    """The division of work, encoded by `arguments.odd`: the number of programs for the prefix, and into how many shares
    the prefix and the keys are split."""

    prefix_programs: int
    prefix_splits: int
    token_splits: int


@triton.jit
def split_attention(
    x, part, gate, seen, p_seed, shares, n, scale: tl.float64, softcap: tl.float64, kept: tl.float64,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PREFIX_ROWS: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    """The unnormalised sums of a share of the prefix or of the keys, in a slot for each share."""
    prefix_splits, token_splits = plain(shares.prefix_splits), plain(shares.token_splits)
    i, prefix_programs, slots = tl.program_id(0), plain(shares.prefix_programs), prefix_splits + token_splits
    scales = (as_tile(scale, C.W), as_tile(softcap, C.W), as_tile(kept, C.W))
    if i < prefix_programs:
        _prefix_share(x, part, gate, p_seed, i, prefix_splits, slots, n, scales, C, PREFIX_ROWS, PREFIX)
    else:
        _token_share(
            x, part, seen, p_seed, i - prefix_programs, token_splits, prefix_splits, slots, n, scales, C, ROWS, COLUMNS
        )


@triton.jit(do_not_specialize=("slots", "heads", "T"))
def merge_shares(
    part, out, p_lse, p_sinks, p_seed, adapters, slots, heads, T, kept: tl.float64,
    DV: tl.constexpr, WIDTH_V: tl.constexpr, W: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one query of one head, from its shares in order."""
    p_out, p_max, p_sum = part
    i_row, i_h = tl.program_id(0), tl.program_id(0) // T % heads
    i_t, i_b = i_row % T, i_row // T // heads
    o_d, i_slot = tl.arange(0, WIDTH_V), tl.cast(i_row, tl.int64) * slots
    i_max = tl.full([1], float("-inf"), W)
    if p_sinks is not None:
        i_max = tl.zeros([1], W) + tl.load(p_sinks + i_h).to(W) * LOG2E
    b_sink_max = i_max
    i_max, _ = with_finite_maximum(adapters, i_max, i_max)
    for i in tl.range(0, slots, SLOTS):
        o_s = i + tl.arange(0, SLOTS)
        b_max = tl.load(p_max + i_slot + o_s, mask=o_s < slots, other=float("-inf"))
        i_max = tl.maximum(i_max, tl.max(b_max, 0))
    b_out, b_sum = tl.zeros([WIDTH_V], W), tl.zeros([1], W)
    if p_sinks is not None:
        b_sum += tl.exp2(b_sink_max - i_max)
    for i in tl.range(0, slots, SLOTS):
        o_s = i + tl.arange(0, SLOTS)
        b_weight = tl.exp2(tl.load(p_max + i_slot + o_s, mask=o_s < slots, other=float("-inf")) - i_max)
        b_sum += tl.sum(tl.load(p_sum + i_slot + o_s, mask=o_s < slots, other=0.0) * b_weight, 0)
        p_tile = p_out + (i_slot + o_s)[:, None] * DV + o_d[None, :]
        b_part = tl.load(p_tile, mask=(o_s < slots)[:, None] & (o_d < DV)[None, :], other=0.0)  # [SLOTS, WIDTH_V]
        b_out += tl.sum(b_part * b_weight[:, None], 0)
    b_out, b_lse = normalised(adapters, rescale(b_out, as_tile(kept, W), p_seed)[None, :], i_max, b_sum)
    b_out = tl.reshape(b_out, [WIDTH_V])
    o_out = tl.cast(i_b, tl.int64) * plain(out.b) + tl.cast(i_h, tl.int64) * plain(out.h) + i_t * plain(out.t)
    tl.store(out.ptr + o_out + o_d, b_out.to(out.ptr.dtype.element_ty), mask=o_d < DV)
    tl.store(p_lse + i_row + tl.arange(0, 1), b_lse * LN2)


def split_forward(problem: Problem, out: Rows, logsumexp: Tensor) -> None:
    """Fill the output and the log-sum-exp."""
    x, tile, shared = problem.x, problem.tile("split"), problem.tile("split_prefix")
    batch, heads, kv_heads, queries, keys, length, _, value_dim = problem.sizes
    group = heads // kv_heads
    prefix_programs = kv_heads * count_tiles(batch * queries * group, shared.rows)
    if problem.adapters:
        shared = shared._replace(rows=min(shared.rows, tile.rows))
        prefix_programs = batch * kv_heads * count_tiles(queries * group, shared.rows)
    prefix_splits = tiles.splits(problem.architecture, prefix_programs, length)
    token_programs = batch * kv_heads * count_tiles(queries * group, tile.rows)
    token_splits = tiles.splits(problem.architecture, token_programs, keys)
    slots, like = prefix_splits + token_splits, {"dtype": x.compute_dtype, "device": x.query.device}
    part = (
        torch.empty(batch * heads * queries, slots, value_dim, **like),
        *(torch.empty(batch * heads * queries, slots, **like) for _ in range(2)),
    )
    shares = Shares(*map(odd, (prefix_programs * prefix_splits, prefix_splits, token_splits)))
    # Every gate is passed as one per query, and rows are loaded by pointers: fewer variants to compile.
    constants = problem.constants(out)._replace(PER_QUERY=False, DESCRIPTORS=False, PAD=0)
    launch(
        split_attention, prefix_programs * prefix_splits + token_programs * token_splits, tile,
        problem.operands, part, problem.gate, problem.seen, x.seed, shares, problem.numbers, *problem.scales,
        C=constants, ROWS=tile.rows, COLUMNS=tile.columns, PREFIX_ROWS=shared.rows, PREFIX=shared.columns,
    )  # fmt: skip
    merging = problem.tile("merge")
    launch(
        merge_shares, batch * heads * queries, merging, part, out, logsumexp, x.sinks, x.seed, problem.gate.adapters,
        slots, heads, queries, problem.scales[2], DV=constants.DV, WIDTH_V=constants.WIDTH_V, W=constants.W,
        SLOTS=merging.rows,
    )  # fmt: skip
