"""The range of keys for a tile of queries, and of queries for a tile of keys: hidden tiles are skipped."""

import triton
import triton.language as tl

from .primitives import end_key, first_key, lengths, plain, within


@triton.jit
def _load_part(p, i_b, s_b, s_o, o, length, other):
    """Elements ``o`` of a batch row, in 64 bits."""
    return tl.load(p + tl.cast(i_b, tl.int64) * plain(s_b) + o * plain(s_o), mask=o < length, other=other).to(tl.int64)


@triton.jit
def _narrow(seen, i_b, i_own, i_first, i_end, T, S, QUERIES: tl.constexpr, SIZE: tl.constexpr, SCAN: tl.constexpr):
    """The part of the keys (or queries) ``i_first .. i_end - 1`` that padding and segments do not hide.

    The tile has ``SIZE`` queries (keys) from ``i_own``. Segments are compared by their range in it: the result may
    be too wide, never too narrow.
    """
    if seen.padding is not None or seen.query_segment is not None:
        own_length = T if QUERIES else S
        o_own = i_own + tl.arange(0, SIZE)
        m_own = o_own < own_length
        if seen.padding is not None and not QUERIES:
            m_own = m_own & (_load_part(seen.padding, i_b, seen.padding_b, seen.padding_s, o_own, S, 0) != 0)
            i_end = tl.where(tl.max(m_own.to(tl.int32), 0) != 0, i_end, 0)
        if seen.query_segment is not None:
            if QUERIES:
                b_own = _load_part(seen.query_segment, i_b, seen.query_b, seen.query_t, o_own, T, 0)
            else:
                b_own = _load_part(seen.key_segment, i_b, seen.key_b, seen.key_s, o_own, S, 0)
            i_low, i_high = tl.min(tl.where(m_own, b_own, 2**63 - 1), 0), tl.max(tl.where(m_own, b_own, -(2**63)), 0)
        if QUERIES or seen.query_segment is not None:
            b_first, b_end = tl.full([SCAN], 2**31 - 1, tl.int32), tl.zeros([SCAN], tl.int32)
            for i in tl.range(i_first, i_end, SCAN):
                o = i + tl.arange(0, SCAN)
                m_seen = o < i_end
                if seen.padding is not None and QUERIES:
                    m_seen = m_seen & (_load_part(seen.padding, i_b, seen.padding_b, seen.padding_s, o, i_end, 0) != 0)
                if seen.query_segment is not None:
                    if QUERIES:
                        b_other = _load_part(seen.key_segment, i_b, seen.key_b, seen.key_s, o, i_end, 0)
                    else:
                        b_other = _load_part(seen.query_segment, i_b, seen.query_b, seen.query_t, o, i_end, 0)
                    m_seen = m_seen & (b_other >= i_low) & (b_other <= i_high)
                b_first = tl.minimum(b_first, tl.where(m_seen, o, 2**31 - 1))
                b_end = tl.maximum(b_end, tl.where(m_seen, o + 1, 0))
            i_first, i_end = tl.maximum(i_first, tl.min(b_first, 0)), tl.minimum(i_end, tl.max(b_end, 0))
    i_end = tl.where(i_first < i_end, i_end, 0)
    return tl.minimum(i_first, i_end), i_end


@triton.jit
def key_tiles(seen, i_b, i_t, i_base, n, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The key tiles of queries ``i_t .. i_t + ROWS - 1``: the first key, first and end of those that need no check,
    and the end."""
    T, S, _ = lengths(n)
    left, right = plain(n.left), plain(n.right)
    i_last = tl.minimum(i_t + ROWS, T) - 1
    i_first, i_end = first_key(i_t, i_base, left, S, C.LEFT), end_key(i_last, i_base, right, S, C.RIGHT)
    i_first, i_end = _narrow(seen, i_b, i_t, i_first, i_end, T, S, True, ROWS, C.SCAN)
    i_first = i_first // COLUMNS * COLUMNS
    i_end = tl.maximum(i_end, i_first)
    i_whole = tl.cdiv(first_key(i_last, i_base, left, S, C.LEFT), COLUMNS) * COLUMNS
    i_whole = tl.minimum(tl.maximum(i_whole, i_first), tl.cdiv(i_end, COLUMNS) * COLUMNS)
    i_whole_end = tl.minimum(end_key(i_t, i_base, right, S, C.RIGHT), i_end) // COLUMNS * COLUMNS
    return i_first, i_whole, tl.maximum(i_whole_end, i_whole), i_end


@triton.jit
def key_share(seen, i_b, i_t, i_last, i_base, n, i_split, splits, C: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr):  # fmt: skip
    """Share ``i_split`` of the keys that queries ``i_t .. i_last``, at most ``ROWS``, see: whole tiles."""
    T, S, _ = lengths(n)
    i_first = first_key(i_t, i_base, plain(n.left), S, C.LEFT)
    i_end = end_key(i_last, i_base, plain(n.right), S, C.RIGHT)
    i_share = tl.cdiv(tl.cdiv(tl.maximum(i_end - i_first, 0), splits), COLUMNS) * COLUMNS
    i_first += i_split * i_share
    return _narrow(seen, i_b, i_t, i_first, tl.minimum(i_first + i_share, i_end), T, S, True, ROWS, C.SCAN)


@triton.jit
def query_tiles(seen, i_b, i_n, i_base, n, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tiles of ``ROWS`` queries that see keys ``i_n .. i_n + COLUMNS - 1``: the first query, first and end of those
    that need no check of positions, and the end; multiples of ``ROWS``."""
    T, S, _ = lengths(n)
    left, right = plain(n.left), plain(n.right)
    i_first, i_end = i_n * 0, i_n * 0 + T
    if C.RIGHT:
        i_first = within(i_n - right - i_base, T)
    if C.LEFT:
        i_end = within(tl.minimum(i_n + COLUMNS, S) + left - i_base, T)
    i_first, i_end = _narrow(seen, i_b, i_n, i_first, i_end, T, S, False, COLUMNS, C.SCAN)
    i_first = i_first // ROWS * ROWS
    i_last = tl.maximum(tl.cdiv(i_end, ROWS) * ROWS, i_first)
    i_whole, i_whole_end = i_first, i_end // ROWS * ROWS
    if C.RIGHT:
        i_whole = tl.cdiv(within(tl.minimum(i_n + COLUMNS, S) - 1 - right - i_base, T), ROWS) * ROWS
    if C.LEFT:
        i_whole_end = tl.minimum(i_whole_end, within(i_n + 1 + left - i_base, T) // ROWS * ROWS)
    i_whole = tl.minimum(tl.maximum(i_whole, i_first), i_last)
    return i_first, i_whole, tl.minimum(tl.maximum(i_whole_end, i_whole), i_last), i_last
