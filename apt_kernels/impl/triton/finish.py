"""Backward: the second stage of every sum over rows, heads and positions, in a fixed order, in one launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import heads_last_empty
from .adapters import parts_of
from .arguments import Gate, Problem, count_tiles, launch, odd
from .columns import Columns
from .primitives import LOG2E, layer_scale, plain


class Parts(NamedTuple):
    """The partial sums of `columns.Columns`, the sinks, and the row sums (see `primitives.row_sums`)."""

    key: Tensor | None
    value: Tensor | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    weights: Tensor | None
    layer_scale: Tensor | None
    sinks: Tensor | None
    sums: Tensor


class Done(NamedTuple):
    """The tensors for the gradients."""

    key: Tensor | None
    value: Tensor | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    gate: Tensor | None
    layer_scale: Tensor | None
    sinks: Tensor | None


class Counts(NamedTuple):
    """Run-time numbers, encoded by `arguments.odd`.

    The numbers of programs for dk and dv (if they have ``shares``), dPk, dPv, the gate and lambda; of parts of the
    prefix's gradients and of lambda's; of rows of the gate, and of its partial sums per batch row. ``length`` and
    ``padded_length``: prefix columns, and those of a part; ``padded``: the padded number of queries in row sums.
    For `adapters.parts_of`: the batch rows of a part and its splits (``chunk``, ``splits``), and of a part of lambda's
    (``scale_chunk``, ``scale_splits``).
    """

    token_key_programs: int
    token_value_programs: int
    key_programs: int
    value_programs: int
    gate_programs: int
    scale_programs: int
    shares: int
    parts: int
    scale_parts: int
    gate_rows: int
    share: int
    batch: int
    heads: int
    kv_heads: int
    length: int
    padded_length: int
    padded: int
    key_size: int
    value_size: int
    chunk: int
    splits: int
    scale_chunk: int
    scale_splits: int


@triton.jit
def _sum_shares(p_parts, p_sum, i, shares, size, W: tl.constexpr, COLUMNS: tl.constexpr):
    """``COLUMNS`` of ``size`` elements, each summed over a few shares in order."""
    o = tl.cast(i, tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    b_sum = tl.zeros([COLUMNS], W)
    for i_share in tl.range(0, shares):
        b_sum += tl.load(p_parts + tl.cast(i_share, tl.int64) * size + o, mask=o < size, other=0.0)
    tl.store(p_sum + o, b_sum.to(p_sum.dtype.element_ty), mask=o < size)


@triton.jit
def _sum_parts(p_parts, p_sum, adapters, i, c, D: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr,
               ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """``COLUMNS`` elements of ``[Hkv, M, D]``, of one adapter if there are several, each summed over its padded
    parts."""
    length, padded_length, heads, parts = plain(c.length), plain(c.padded_length), plain(c.kv_heads), plain(c.parts)
    i_first = i * 0
    if adapters.index is not None:
        i_tiles = tl.cdiv(heads * length * D, COLUMNS)
        i_a = i // i_tiles
        i = i % i_tiles
        i_first, parts = parts_of(adapters, i_a, plain(c.chunk), plain(c.splits))
    o = i * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    m_o = o < heads * length * D
    o_row = o // D
    o_in_part = (o_row // length * padded_length + o_row % length) * WIDTH + o % D
    b_sum = tl.zeros([COLUMNS], W)
    for i_part in tl.range(i_first, parts, ROWS):
        o_part = i_part + tl.arange(0, ROWS)[:, None]
        p_tile = p_parts + tl.cast(o_part, tl.int64) * (heads * padded_length * WIDTH) + o_in_part
        b_sum += tl.sum(tl.load(p_tile, mask=(o_part < parts) & m_o, other=0.0), 0)
    b_sum = b_sum[None, :]
    if adapters.index is not None:
        # Parts hold arbitrary sums in the columns that the adapter has not.
        b_sum = tl.where(o_row % length < tl.load(adapters.lengths + i_a), b_sum, 0.0)
        p_sum += tl.cast(i_a, tl.int64) * (heads * length * D)
    tl.store(p_sum + o, b_sum.to(p_sum.dtype.element_ty), mask=m_o)


@triton.jit
def _sum_gate(p_weights, p_d_gate, gate, i, c, W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A part of one gate row's gradient: the sum over the rows ``[B * share, M]`` that used it."""
    batch, gate_rows, share, M = plain(c.batch), plain(c.gate_rows), plain(c.share), plain(c.length)
    i_tiles = tl.cdiv(M, COLUMNS)
    i_g, o_m = i // i_tiles, i % i_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    i_first, i_end = 0, batch * share
    if gate.index is None:
        # One gate per batch row, or one for all.
        i_first = tl.where(gate_rows == 1, 0, i_g * share)
        i_end = tl.where(gate_rows == 1, batch * share, (i_g + 1) * share)
    b_dg = tl.zeros([COLUMNS], W)
    for i_row in tl.range(i_first, i_end, ROWS):
        o_row = i_row + tl.arange(0, ROWS)[:, None]
        m_row = o_row < i_end
        if gate.index is not None:
            o_index = tl.cast(o_row // share, tl.int64) * plain(gate.index_b) + o_row % share * plain(gate.index_t)
            m_row = m_row & (tl.load(gate.index + o_index, mask=m_row, other=-1) == i_g)
        b_dg += tl.sum(tl.load(p_weights + tl.cast(o_row, tl.int64) * M + o_m, mask=m_row & (o_m < M), other=0.0), 0)
    b_logit = tl.load(gate.ptr + tl.cast(i_g, tl.int64) * plain(gate.b) + o_m, mask=o_m < M, other=0.0)
    b_sigmoid = 1 / (1 + tl.exp2(b_logit.to(W) * -LOG2E))
    b_d_gate = b_dg[None, :]
    if gate.adapters.index is None:
        b_d_gate *= layer_scale(gate, 0, W)
    else:
        # The logits in columns that no row has are arbitrary.
        b_sigmoid = tl.where(b_d_gate == 0, 0.0, b_sigmoid)
    b_d_gate = b_d_gate * b_sigmoid * (1 - b_sigmoid)
    tl.store(p_d_gate + tl.cast(i_g, tl.int64) * M + o_m, b_d_gate.to(p_d_gate.dtype.element_ty), mask=o_m < M)


@triton.jit
def _sum_scale(p_parts, p_sum, adapters, i, c, W: tl.constexpr, BLOCK: tl.constexpr):
    """Lambda's gradient, or adapter ``i``'s if each has its own: the sum over its parts."""
    i_first, i_end = i * 0, plain(c.scale_parts)
    if adapters.index is not None:
        if plain(c.scale_programs) > 1:
            i_first, i_end = parts_of(adapters, i, plain(c.scale_chunk), plain(c.scale_splits))
    b_sum = tl.zeros([BLOCK], W)
    for i_part in tl.range(i_first, i_end, BLOCK):
        o_part = i_part + tl.arange(0, BLOCK)
        b_sum += tl.load(p_parts + o_part, mask=o_part < i_end, other=0.0)
    tl.store(p_sum + i, tl.sum(b_sum, 0).to(p_sum.dtype.element_ty))


@triton.jit
def _sum_sink(p_sinks, p_d_sinks, p_sums, i_h, batch, heads, padded, W: tl.constexpr, BLOCK: tl.constexpr):
    """One head's sink: minus its probability times delta, over batch rows and queries (see `primitives.row_sums`)."""
    b_sink, b_sum = tl.load(p_sinks + i_h).to(W) * LOG2E, tl.zeros([BLOCK], W)
    for i_b in tl.range(0, batch):
        p_row = p_sums + (tl.cast(i_b, tl.int64) * heads + i_h) * 2 * padded
        for i_t in tl.range(0, padded, BLOCK):
            o_t = i_t + tl.arange(0, BLOCK)
            b_lse = tl.load(p_row + o_t, mask=o_t < padded, other=float("inf"))
            b_sum -= tl.exp2(b_sink - b_lse) * tl.load(p_row + padded + o_t, mask=o_t < padded, other=0.0)
    tl.store(p_d_sinks + i_h, tl.sum(b_sum, 0).to(p_d_sinks.dtype.element_ty))


@triton.jit
def finish_gradients(
    parts, to, gate, c, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first programs sum the shares of dk and of dv, if there are any; the next ones are ``keys`` for dPk,
    ``values`` for dPv, ``gates`` for the gate, ``scales`` for lambda, and one per head for the sinks."""
    i, keys, values = tl.program_id(0), plain(c.key_programs), plain(c.value_programs)
    gates, scales = plain(c.gate_programs), plain(c.scale_programs)
    if to.key is not None:
        if i < plain(c.token_key_programs):
            _sum_shares(parts.key, to.key, i, plain(c.shares), plain(c.key_size), W, ROWS * COLUMNS)
    i -= plain(c.token_key_programs)
    if to.value is not None:
        if (i >= 0) & (i < plain(c.token_value_programs)):
            _sum_shares(parts.value, to.value, i, plain(c.shares), plain(c.value_size), W, ROWS * COLUMNS)
    i -= plain(c.token_value_programs)
    if to.prefix_key is not None:
        if (i >= 0) & (i < keys):
            _sum_parts(parts.prefix_key, to.prefix_key, gate.adapters, i, c, D, WIDTH, W, ROWS, COLUMNS)
    i -= keys
    if to.prefix_value is not None:
        if (i >= 0) & (i < values):
            _sum_parts(parts.prefix_value, to.prefix_value, gate.adapters, i, c, DV, WIDTH_V, W, ROWS, COLUMNS)
    i -= values
    if to.gate is not None:
        if (i >= 0) & (i < gates):
            _sum_gate(parts.weights, to.gate, gate, i, c, W, ROWS, COLUMNS)
    i -= gates
    if to.layer_scale is not None:
        if (i >= 0) & (i < scales):
            _sum_scale(parts.layer_scale, to.layer_scale, gate.adapters, i, c, W, ROWS * COLUMNS)
    i -= scales
    if to.sinks is not None:
        if i >= 0:
            _sum_sink(
                parts.sinks, to.sinks, parts.sums, i, plain(c.batch), plain(c.heads), plain(c.padded), W, ROWS * COLUMNS
            )


def finish(
    problem: Problem, ordered: Gate, columns: Columns, sums: Tensor, need: dict[str, bool]
) -> dict[str, Tensor | None]:
    """The gradients of key, value, prefix, gate, layer scale and sinks that are needed; ``ordered`` as in
    `columns.column_gradients_of`."""
    x, tile, constants = problem.x, problem.tile("finish"), problem.constants()
    batch, heads, kv_heads, _, _, length, *_ = problem.sizes

    def like(name: str) -> Tensor | None:
        wanted = need[name] and (name != "gate" or columns.gate is None)
        return torch.empty_like(getattr(x, name), memory_format=torch.contiguous_format) if wanted else None

    shares = 1 if columns.key is columns.value is None else problem.shares(problem.tile("key_value"))
    tokens = [
        None if part is None or shares == 1 else heads_last_empty(given, batch, kv_heads, *part.shape[2:])
        for part, given in ((columns.key, x.key), (columns.value, x.value))
    ]
    to = Done(*tokens, *[like(name) for name in Done._fields[2:]])
    sizes = Done(*[0 if made is None else made.numel() for made in to])
    gate_rows = sizes.gate // length
    adapters = max(1, problem.adapters)
    programs = (
        *(count_tiles(size, tile.rows * tile.columns) for size in sizes[:2]),
        *(adapters * count_tiles(size // adapters, tile.columns) for size in sizes[2:4]),
        gate_rows * count_tiles(length, tile.columns),
        sizes.layer_scale,
    )
    partial = columns.prefix_key if columns.prefix_key is not None else columns.prefix_value
    counts = (
        *programs,
        shares,
        0 if partial is None else partial.shape[0],
        0 if columns.layer_scale is None else columns.layer_scale.numel(),
        gate_rows,
        0 if columns.weights is None else columns.weights.shape[1],
        batch,
        heads,
        kv_heads,
        length,
        0 if partial is None else partial.shape[2],
        sums.shape[3],
        sizes.key,
        sizes.value,
        *columns.division,
    )
    shared = [None if whole is None else part for part, whole in zip(columns[:2], tokens)]
    parts = Parts(*shared, *columns[2:4], columns.weights, columns.layer_scale, x.sinks, sums)
    if sum(programs) + sizes.sinks:
        launch(
            finish_gradients, sum(programs) + sizes.sinks, tile, parts, to, ordered, Counts(*map(odd, counts)),
            D=constants.D, DV=constants.DV, WIDTH=constants.WIDTH, WIDTH_V=constants.WIDTH_V, W=constants.W,
            ROWS=tile.rows, COLUMNS=tile.columns,
        )  # fmt: skip
    done = to._asdict()
    for name in ("key", "value", "gate"):
        if done[name] is None:
            done[name] = getattr(columns, name)
    return done
