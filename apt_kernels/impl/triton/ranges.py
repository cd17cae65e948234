"""Which tiles padding and segments leave anything of: a range for every tile, found before the kernels that use it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import RUNTIME, Problem, count_tiles, launch
from .primitives import plain


@triton.jit
def _load_part(p, i_b, s_b, s_o, o, length, other):
    """Elements ``o`` of a batch row, in 64 bits."""
    return tl.load(p + tl.cast(i_b, tl.int64) * plain(s_b) + o * plain(s_o), mask=o < length, other=other).to(tl.int64)


@triton.jit(do_not_specialize=RUNTIME)
def visible_ranges(p_ranges, seen, T, S, QUERIES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """First and end of the keys that a tile of ``SIZE`` queries may see, or of the queries that may see a tile of keys.

    Segments are compared by their range in the tile: the result may be too wide, never too narrow.
    """
    own_length = T if QUERIES else S
    length = S if QUERIES else T
    i_tiles = tl.cdiv(own_length, SIZE)
    i_b = tl.program_id(0) // i_tiles
    o_own = tl.program_id(0) % i_tiles * SIZE + tl.arange(0, SIZE)
    m_own = o_own < own_length
    if seen.padding is not None and not QUERIES:
        m_own = m_own & (_load_part(seen.padding, i_b, seen.padding_b, seen.padding_s, o_own, S, 0) != 0)
    if seen.query_segment is not None:
        if QUERIES:
            b_own = _load_part(seen.query_segment, i_b, seen.query_b, seen.query_t, o_own, T, 0)
        else:
            b_own = _load_part(seen.key_segment, i_b, seen.key_b, seen.key_s, o_own, S, 0)
        i_low, i_high = tl.min(tl.where(m_own, b_own, 2**63 - 1), 0), tl.max(tl.where(m_own, b_own, -(2**63)), 0)
    any_own = tl.max(m_own.to(tl.int32), 0) != 0
    b_first, b_end = tl.full([BLOCK], 2**31 - 1, tl.int32), tl.zeros([BLOCK], tl.int32)
    for i in tl.range(0, length, BLOCK):
        o = i + tl.arange(0, BLOCK)
        m_seen = (o < length) & any_own
        if seen.padding is not None and QUERIES:
            m_seen = m_seen & (_load_part(seen.padding, i_b, seen.padding_b, seen.padding_s, o, S, 0) != 0)
        if seen.query_segment is not None:
            if QUERIES:
                b_other = _load_part(seen.key_segment, i_b, seen.key_b, seen.key_s, o, S, 0)
            else:
                b_other = _load_part(seen.query_segment, i_b, seen.query_b, seen.query_t, o, T, 0)
            m_seen = m_seen & (b_other >= i_low) & (b_other <= i_high)
        b_first = tl.minimum(b_first, tl.where(m_seen, o, 2**31 - 1))
        b_end = tl.maximum(b_end, tl.where(m_seen, o + 1, 0))
    p_range = p_ranges + tl.cast(tl.program_id(0), tl.int64) * 2
    tl.store(p_range, tl.min(b_first, 0))
    tl.store(p_range + 1, tl.max(b_end, 0))


def find_ranges(problem: Problem, size: int, queries: bool) -> Tensor | None:
    """int32 ``[B, tiles, 2]`` for tiles of ``size`` queries or keys; None without padding and segments."""
    x = problem.x
    if x.key_padding is None and x.query_segments is None:
        return None
    batch, _, _, length, keys, *_ = x.sizes
    tiles = count_tiles(length if queries else keys, size) * batch
    ranges = torch.empty(tiles, 2, dtype=torch.int32, device=x.query.device)
    tile = problem.tile("range")
    launch(visible_ranges, tiles, tile, ranges, problem.seen, length, keys, queries, size, tile.columns)
    return ranges
