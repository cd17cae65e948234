"""Functions that the kernels share.

Names: ``i_`` ids and first indices, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` blocks, ``s_`` strides.
Index tiles are expanded (``o_t`` ``[T, 1]`` beside ``o_n`` ``[1, N]``, or transposed), so that a function works on a
tile and on its transpose. Logits are in base 2. ``W`` is the dtype of sums.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from . import arguments, tiles

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PART = tl.constexpr(tiles.PART)
FAR = tl.constexpr(arguments.FAR)


@triton.jit
def plain(n):
    """The number that `arguments.odd` encoded."""
    return (n - 3) >> 1


@triton.jit
def lengths(n):
    """The numbers of queries, keys and prefix columns, of `Numbers`."""
    return plain(n.T), plain(n.S), plain(n.M)


@triton.jit
def longest_first(i, tiles, heads, band):
    """Tile and head of program ``i``, for ``tiles`` of each of ``heads``: the first tiles of all heads come first.

    ``band``: the number of heads processed concurrently, which share the L2 cache.
    """
    i_band = i // (tiles * band) * band
    i_rest, i_heads = i - i_band * tiles, tl.minimum(band, heads - i_band)
    return i_rest // i_heads, i_band + i_rest % i_heads


@triton.jit
def stride(n, ALIGNED: tl.constexpr):
    """`plain` of a stride. ``ALIGNED``: of a multiple of 8, written as a product so that the compiler sees it (Triton
    3.6 loses a hint on a returned value when it inlines, and then loads rows element by element), and so small that
    offsets within a tile have 32 bits."""
    s = tl.cast(n - 3, tl.int64) >> 1
    if ALIGNED:
        s = ((n - 3) >> 4) * 8
    return s


@triton.jit
def head(x, i_b, i_h, ALIGNED: tl.constexpr):
    """Pointer to the first row of a head of `Rows`, and the stride of its rows."""
    o_head = tl.cast(i_b, tl.int64) * stride(x.b, ALIGNED) + tl.cast(i_h, tl.int64) * stride(x.h, ALIGNED)
    return x.ptr + o_head, stride(x.t, ALIGNED)


@triton.jit
def load_rows(p, s_t, i_first, limit, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr,
              ALIGNED: tl.constexpr):  # fmt: skip
    """``[ROWS, WIDTH]`` from row ``i_first``, zero past the ``D`` columns and, where checked, past row ``limit``."""
    o_r, o_d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    p_tile = p + tl.cast(i_first, tl.int64) * s_t + (o_r * s_t + o_d)
    m_tile = (i_first + o_r < limit) & (o_d < D)
    if ALIGNED:
        # If i_first is the result of a reduction, Triton does not infer this and loads element by element.
        p_tile = tl.max_contiguous(tl.multiple_of(p_tile, (1, 16)), (1, WIDTH))
        m_tile = tl.max_constancy(m_tile, (1, 8))
    if CHECK:
        b_tile = tl.load(p_tile, mask=m_tile, other=0.0)
    elif D != WIDTH:
        b_tile = tl.load(p_tile, mask=o_d < D, other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def store_rows(p, s_t, i_first, limit, b_tile, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Store ``[ROWS, WIDTH]`` from row ``i_first``, up to row ``limit`` and column ``D``."""
    o_r, o_d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    p_tile = p + tl.cast(i_first, tl.int64) * s_t + (o_r * s_t + o_d)
    tl.store(p_tile, b_tile.to(p.dtype.element_ty), mask=(i_first + o_r < limit) & (o_d < D))


@triton.jit
def load_row_sums(p, i_bh, o_t, T, other):
    """Log-sum-exps of ``[B, Hq, T]``, in the shape of ``o_t``."""
    return tl.load(p + tl.cast(i_bh, tl.int64) * T + o_t, mask=o_t < T, other=other)


@triton.jit
def row_sums(p_sums, i_bh, T, PAD: tl.constexpr):
    """Pointer to the row sums of a head, ``[2, padded]``: base-2 log-sum-exps, infinite past ``T``, and deltas, zero
    past ``T``; and the padded length, a multiple of ``PAD``."""
    i_padded = tl.cdiv(T, PAD) * PAD
    return p_sums + tl.cast(i_bh, tl.int64) * 2 * i_padded, i_padded


@triton.jit
def load_sums(row, i_head, i_t, DELTA: tl.constexpr, ROWS: tl.constexpr):
    """``[ROWS]`` base-2 log-sum-exps, or deltas, from query ``i_t`` on of a head beyond that of `row_sums`."""
    p_row, i_padded = row
    # As a vector: with a [1, ROWS] tile, every thread copies many elements in Triton 3.6.
    return tl.load(p_row + ((i_head * 2 + DELTA) * i_padded + i_t) + tl.arange(0, ROWS))


@triton.jit
def open_rows(x, i_b, i_h, limit, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
              DESCRIPTORS: tl.constexpr):  # fmt: skip
    """A head of `Rows` for `load_tile`: a tensor descriptor (or the pointer again), pointer, stride, number of rows."""
    p, s_t = head(x, i_b, i_h, ALIGNED)
    d = p
    if DESCRIPTORS:
        # A descriptor does not accept a stride of zero, which a single row has; all others are 8 or more.
        d = tl.make_tensor_descriptor(p, [limit, D], [tl.maximum(s_t, 8), 1], [ROWS, WIDTH])
    return d, p, s_t, limit


@triton.jit
def load_tile(x, i_first, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr,
              ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """``[ROWS, WIDTH]`` from row ``i_first`` of the result of `open_rows`, zero past its ends."""
    d, p, s_t, limit = x
    b_tile = d.load([i_first, 0]) if DESCRIPTORS else load_rows(p, s_t, i_first, limit, D, ROWS, WIDTH, CHECK, ALIGNED)
    return b_tile


@triton.jit
def open_heads(x, i_b, i_h, heads, limit, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
               ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """`open_rows` of ``heads`` heads from ``i_h`` on, for `load_head`; and the stride between heads."""
    p, s_t = head(x, i_b, i_h, ALIGNED)
    s_h = stride(x.h, ALIGNED)
    d = p
    if DESCRIPTORS:
        d = tl.make_tensor_descriptor(
            p, [heads, limit, D], [tl.maximum(s_h, 8), tl.maximum(s_t, 8), 1], [1, ROWS, WIDTH]
        )
    return d, p, s_t, limit, s_h


@triton.jit
def load_head(x, i_head, i_first, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr,
              ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr):  # fmt: skip
    """`load_tile` of a head of the result of `open_heads`."""
    d, p, s_t, limit, s_h = x
    if DESCRIPTORS:
        b_tile = tl.reshape(d.load([i_head, i_first, 0]), [ROWS, WIDTH])
    else:
        p += tl.cast(i_head, tl.int64) * s_h
        b_tile = load_rows(p, s_t, i_first, limit, D, ROWS, WIDTH, CHECK, ALIGNED)
    return b_tile


@triton.jit
def at_head(x, i_head, i_first):
    """`at` of a head of the result of `open_heads`."""
    return x[1] + tl.cast(i_head, tl.int64) * x[4], x[2], i_first, x[3]


@triton.jit
def store_opened(x, i_first, b_tile, D: tl.constexpr, C: tl.constexpr):
    """Store a tile from row ``i_first`` of the result of `open_rows`, up to its last row and column ``D``."""
    ROWS: tl.constexpr = b_tile.shape[0]
    WIDTH: tl.constexpr = b_tile.shape[1]
    if C.DESCRIPTORS:
        x[0].store([i_first, 0], b_tile.to(x[1].dtype.element_ty))
    else:
        store_rows(x[1], x[2], i_first, x[3], b_tile, D, ROWS, WIDTH)


@triton.jit
def store_tile(x, i_b, i_h, i_first, limit, b_tile, D: tl.constexpr, C: tl.constexpr):
    """Store a tile of a head of `Rows` from row ``i_first`` on, up to row ``limit`` and column ``D``."""
    ROWS: tl.constexpr = b_tile.shape[0]
    WIDTH: tl.constexpr = b_tile.shape[1]
    rows = open_rows(x, i_b, i_h, limit, D, ROWS, WIDTH, C.ALIGNED, C.DESCRIPTORS)
    store_opened(rows, i_first, b_tile, D, C)


@triton.jit
def whole_prefix(M, PREFIX: tl.constexpr):
    """The first of the last prefix columns, which do not fill a tile."""
    return M // PREFIX * PREFIX


@triton.jit
def at(x, i_first):
    """The origin of a tile of `open_rows` for `similarity`: pointer, stride, first row and number of rows."""
    return x[1], x[2], i_first, x[3]


@triton.jit
def product(a, b, acc, C: tl.constexpr):
    """``a @ b + acc``. ``"upcast"``: exact in ``W``, for the interpreter, which cannot multiply bfloat16."""
    if C.PRECISION == "upcast":
        a, b = a.to(C.W), b.to(C.W)
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=C.W)
    return tl.dot(a, b, acc, input_precision=C.PRECISION, out_dtype=C.W)


@triton.jit
def load_columns(at, i_d, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``COLUMNS`` columns from ``i_d`` of the rows at the origin ``at``."""
    p, s_t, i_first, limit = at
    o_r, o_d = tl.arange(0, ROWS)[:, None], i_d + tl.arange(0, COLUMNS)[None, :]
    p_tile = p + tl.cast(i_first, tl.int64) * s_t + (o_r * s_t + o_d)
    return tl.load(p_tile, mask=(i_first + o_r < limit) & (o_d < D), other=0.0)


@triton.jit
def similarity(b_a, at_a, b_b, at_b, D: tl.constexpr, C: tl.constexpr, ONCE: tl.constexpr = False):
    """``b_a @ b_b.T``; ``at``: pointer, stride, first row and number of rows from which each was loaded, or None.

    float32 and float64 products hold both rows of a sum in registers, so wide rows are loaded again in parts.
    ``ONCE``: neither tile is used again, so that half-precision ones are loaded in parts for the same reason.
    """
    BITS: tl.constexpr = b_a.dtype.primitive_bitwidth
    b_s = tl.zeros([b_a.shape[0], b_b.shape[0]], C.W)
    if at_a is None:
        b_s = product(b_a, tl.trans(b_b), b_s, C)
    else:
        if b_a.shape[1] * BITS <= PART or (BITS < 32 and not ONCE):
            b_s = product(b_a, tl.trans(b_b), b_s, C)
        else:
            for i_d in tl.range(0, b_a.shape[1], PART // BITS, num_stages=1):
                b_left = load_columns(at_a, i_d, D, b_a.shape[0], PART // BITS).to(b_a.dtype)
                b_right = load_columns(at_b, i_d, D, b_b.shape[0], PART // BITS).to(b_a.dtype)
                b_s = product(b_left, tl.trans(b_right), b_s, C)
    return b_s


@triton.jit
def as_tile(x, W: tl.constexpr):
    """A ``[1]`` tile of a scalar argument: one conversion, and exact in float64."""
    return (tl.full((1,), 1.0, W) * x).to(W)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, accurate to a few ulp, near zero too, where the formula with one exponential is not."""
    square = x * x
    if x.dtype == tl.float64:
        b_small = x / (1 + square / (3 + square / (5 + square / (7 + square / (9 + square / (11 + square / 13))))))
    else:
        b_small = -5.70498872745e-3 * square + 2.06390887954e-2
        b_small = (b_small * square - 5.37397155531e-2) * square + 1.33314422036e-1
        b_small = (b_small * square - 3.33332819422e-1) * square * x + x
    b_large = 1 - 2 / (1 + tl.exp2(tl.abs(x) * (2 * LOG2E)))
    b_large = tl.where(x < 0, -b_large, b_large)
    return tl.where(tl.abs(x) < 0.4, b_small, b_large)


@triton.jit
def logits(b_s, b_g, b_scale, b_cap, CAPPED: tl.constexpr, POSITIVE: tl.constexpr):
    """A tile and the positive factor that converts it to base-2 logits; `online` applies the factor at no cost.

    ``POSITIVE``: the scale is.
    """
    if b_g is not None:
        b_s = b_s * b_g
    if CAPPED:
        return tanh(b_s * (b_scale / b_cap)), b_cap * LOG2E
    if not POSITIVE:
        return b_s * (b_scale * LOG2E), tl.full((1,), 1.0, b_s.dtype)
    return b_s, b_scale * LOG2E


@triton.jit
def online(b_x, b_factor, b_max, b_sum):
    """One step of the online softmax over the base-2 logits ``b_x * b_factor``: probabilities relative to the new
    maximum, and the factor for earlier sums. The maximum is finite: the prefix, always visible, comes first."""
    b_new = tl.maximum(b_max, tl.max(b_x, 1) * b_factor)
    b_rescale = tl.exp2(b_max - b_new)
    b_p = tl.exp2(b_x * b_factor - b_new[:, None])
    return b_p, b_rescale, b_new, b_sum * b_rescale + tl.sum(b_p, 1)


@triton.jit
def exponent(b_s, b_g, b_scale, b_cap, CAPPED: tl.constexpr):
    """Base-2 logits: products times scale and gate (or None), soft-capped. Multiplied in the order that leaves the
    fewest products a pair: the last one is part of a multiply-add with what the caller subtracts."""
    if b_g is not None:
        if b_g.shape == b_s.shape:
            b_s = b_s * b_g
        else:
            b_scale = b_scale * b_g
    b_x = b_s * (b_scale * LOG2E)
    if CAPPED:
        b_x = tanh(b_s * (b_scale / b_cap)) * (b_cap * LOG2E)
    return b_x


@triton.jit
def uncap(b_dz, b_x, b_cap, CAPPED: tl.constexpr):
    """The gradient of logits before the soft-cap that returned ``b_x``."""
    if CAPPED:
        b_tanh = b_x / (b_cap * LOG2E)
        b_dz = b_dz * (1 - b_tanh * b_tanh)
    return b_dz


# The gate.


@triton.jit
def sigmoid(b_x, FAST: tl.constexpr):
    """``1 / (1 + exp(-x))``. ``FAST``: by the chip's approximate division, at most 2 ulp off, where operands of
    products are rounded to half precision anyway."""
    b_sum = 1 + tl.exp2(b_x * -LOG2E)
    if FAST:
        return libdevice.fast_dividef(1.0, b_sum)
    return 1 / b_sum


@triton.jit
def gate_stride(n, ALIGNED: tl.constexpr):
    """`plain` of a stride in 64 bits, as `stride`, with multiples of 4."""
    s = tl.cast(n - 3, tl.int64) >> 1
    if ALIGNED:
        s = tl.cast((n - 3) >> 3, tl.int64) * 4
    return s


@triton.jit
def gate_rows(gate, i_b, o_t, T, C: tl.constexpr):
    """Where the logits of a gate per query begin, for queries ``o_t``; past the last query those of the last."""
    i_row = tl.cast(i_b, tl.int64)
    o_t = tl.minimum(o_t, T - 1)
    if gate.index is not None:
        o_index = i_row * plain(gate.index_b) + o_t * plain(gate.index_t)
        o_row = tl.load(gate.index + o_index) * gate_stride(gate.b, C.GATE_ALIGNED)
    else:
        o_row = i_row * gate_stride(gate.b, C.GATE_ALIGNED)
        o_row += tl.cast(o_t, tl.int64) * gate_stride(gate.t, C.GATE_ALIGNED)
    return o_row


@triton.jit
def sigmoids(gate, i_b, o_t, o_m, T, M, PER_QUERY: tl.constexpr, C: tl.constexpr, CHECK: tl.constexpr = True):
    """``sigmoid(gate)`` of prefix columns ``o_m``, of which there are ``M``, 1 without a gate; a 2-D tile only for a
    gate per query. ``CHECK``: some columns may be past the last."""
    b_sigmoid = tl.full((1, 1), 1.0, C.W)
    if gate.ptr is not None:
        if PER_QUERY:
            p_logit, m_column = gate.ptr + gate_rows(gate, i_b, o_t, T, C) + o_m, o_m < M
            if C.GATE_ALIGNED and gate.adapters.index is None:
                m_column = tl.max_constancy(m_column, (1, 4))  # M is a multiple of 4
            b_logit = tl.load(p_logit, mask=m_column, other=0.0) if CHECK else tl.load(p_logit)
        else:
            i_row = tl.cast(i_b, tl.int64)
            if gate.index is not None:
                i_row = tl.load(gate.index + i_row * plain(gate.index_b))
            b_logit = tl.load(gate.ptr + i_row * plain(gate.b) + o_m, mask=o_m < M, other=0.0)
        b_sigmoid = sigmoid(b_logit.to(C.W), C.FAST)
    return b_sigmoid


@triton.jit
def layer_scale(gate, i_b, W: tl.constexpr):
    """Lambda of a batch row as a ``[1]`` tile; 1 without a layer scale."""
    b_lambda = tl.full((1,), 1.0, W)
    if gate.scale is not None:
        p_scale = gate.scale
        if gate.adapters.index is not None:
            p_scale += tl.maximum(tl.load(gate.adapters.index + i_b), 0) * plain(gate.scale_a)
        b_lambda = b_lambda * tl.load(p_scale).to(W)
    return b_lambda


@triton.jit
def weights(gate, i_b, o_t, o_m, T, M, PER_QUERY: tl.constexpr, C: tl.constexpr, CHECK: tl.constexpr = True):
    """``g = lambda * sigmoid(gate)``."""
    return sigmoids(gate, i_b, o_t, o_m, T, M, PER_QUERY, C, CHECK) * layer_scale(gate, i_b, C.W)


@triton.jit
def column_weights(gate, i_b, o_t, i_m, T, M, PREFIX: tl.constexpr, C: tl.constexpr, CHECK: tl.constexpr):
    """`weights` of a tile: ``[ROWS, PREFIX]``, or ``[1, PREFIX]`` for a gate per row."""
    if C.PER_QUERY:
        b_g = weights(gate, i_b, o_t, i_m + tl.arange(0, PREFIX)[None, :], T, M, True, C, CHECK)
    else:
        b_g = weights(gate, i_b, o_t, i_m + tl.arange(0, PREFIX)[:, None], T, M, False, C)
        # A sum over one element, which Triton does not move: without it, every thread computes the sigmoids of all
        # columns that it multiplies, those of other threads included.
        b_g = tl.sum(tl.broadcast_to(b_g, [PREFIX, 1]), 1)[None, :]
    return b_g


# Visibility of tokens.


@triton.jit
def position(seen, i_b, n):
    """Position of query 0 among the keys, in 64 bits."""
    i_base = tl.cast(plain(n.offset) - FAR, tl.int64)
    if seen.offset is not None:
        i_base = tl.load(seen.offset + i_b * plain(seen.offset_b))
    return i_base


@triton.jit
def within(i, limit):
    """``i`` clamped to ``0..limit``, in 32 bits."""
    return tl.minimum(tl.maximum(i, 0), limit).to(tl.int32)


@triton.jit
def first_key(i_t, i_base, left, S, LEFT: tl.constexpr):
    """The first key that query ``i_t`` sees through the window."""
    i_first = i_t * 0
    if LEFT:
        i_first = within(i_base + i_t - left, S)
    return i_first


@triton.jit
def end_key(i_t, i_base, right, S, RIGHT: tl.constexpr):
    """One past the last key that query ``i_t`` sees through causality and window."""
    i_end = i_t * 0 + S
    if RIGHT:
        i_end = within(i_base + i_t + right + 1, S)
    return i_end


@triton.jit
def near(i):
    """A difference of positions in 32 bits; one that exceeds every length may be clamped."""
    return tl.minimum(tl.maximum(i, -(2**30)), 2**30).to(tl.int32)


@triton.jit
def both(m, m_more):
    """``m & m_more``; None hides nothing."""
    if m is not None:
        m_more = m & m_more
    return m_more


@triton.jit
def hide(b, m_seen, value: tl.constexpr):
    """A tile with ``value`` where ``m_seen`` is false; None hides nothing."""
    if m_seen is not None:
        b = tl.where(m_seen, b, value)
    return b


@triton.jit
def seen_tokens(seen, place, n, LEFT: tl.constexpr, RIGHT: tl.constexpr, CHECK: tl.constexpr):
    """Which keys of a tile its queries see; None: all. ``CHECK``: positions, or the end of the keys, may hide some.

    ``place``: batch row, head, queries, keys, and the position of query 0 among the keys.
    """
    i_b, i_h, o_t, o_n, i_base = place
    T, S, _ = lengths(n)
    m_seen = None
    if CHECK:
        m_seen = o_n < S
        i_right = near(i_base + plain(n.right) + 1)
        if LEFT:
            # One comparison and one bound per row: below the first key, the unsigned difference wraps.
            i_left = near(i_base - plain(n.left))
            m_seen = m_seen & ((o_n - (o_t + i_left)).to(tl.uint32) < (i_right - i_left).to(tl.uint32))
        elif RIGHT:
            m_seen = o_n < tl.minimum(o_t + i_right, S)
    i_b, i_h, o_t64 = tl.cast(i_b, tl.int64), tl.cast(i_h, tl.int64), tl.cast(o_t, tl.int64)
    if seen.padding is not None:
        m_key = tl.load(seen.padding + i_b * plain(seen.padding_b) + o_n * plain(seen.padding_s), mask=o_n < S, other=0)
        m_seen = both(m_seen, m_key != 0)
    if seen.query_segment is not None:
        p_query = seen.query_segment + i_b * plain(seen.query_b) + o_t * plain(seen.query_t)
        p_key = seen.key_segment + i_b * plain(seen.key_b) + o_n * plain(seen.key_s)
        m_same = tl.load(p_query, mask=o_t < T, other=0) == tl.load(p_key, mask=o_n < S, other=0)
        m_seen = both(m_seen, m_same)
    if seen.dense is not None:
        p_dense = seen.dense + i_b * plain(seen.dense_b) + i_h * plain(seen.dense_h) + o_t64 * plain(seen.dense_t)
        m_dense = tl.load(p_dense + tl.cast(o_n, tl.int64) * plain(seen.dense_s), mask=(o_t < T) & (o_n < S), other=0)
        m_seen = both(m_seen, m_dense != 0)
    return m_seen


@triton.jit
def add_bias(b_x, b_factor, seen, place, n):
    """Base-2 logits plus the bias, and the factor that remains to be applied. ``place`` as in `seen_tokens`."""
    i_b, i_h, o_t, o_n, _ = place
    T, S, _ = lengths(n)
    if seen.bias is not None:
        i_b, i_h, o_t64 = tl.cast(i_b, tl.int64), tl.cast(i_h, tl.int64), tl.cast(o_t, tl.int64)
        p_bias = seen.bias + i_b * plain(seen.bias_b) + i_h * plain(seen.bias_h) + o_t64 * plain(seen.bias_t)
        b_bias = tl.load(p_bias + tl.cast(o_n, tl.int64) * plain(seen.bias_s), mask=(o_t < T) & (o_n < S), other=0.0)
        b_x = b_x * b_factor + b_bias.to(b_x.dtype) * LOG2E
        b_factor = tl.full((1,), 1.0, b_x.dtype)
    return b_x, b_factor


# Dropout: the stream of `impl.dropout`.


@triton.jit
def mix(x):
    """The 32-bit finaliser of `impl.dropout.mix`, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(p_seed, i_bh, o_t):
    """`impl.dropout.row_keys` of queries ``o_t``; None without dropout."""
    b_keys = None
    if p_seed is not None:
        seed = tl.load(p_seed)
        key = mix(mix(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
        b_keys = mix(mix(key + tl.cast(i_bh, tl.uint32)) + o_t.to(tl.uint32))
    return b_keys


@triton.jit
def kept_columns(b_keys, o_column, threshold):
    """Which columns dropout keeps; None without dropout."""
    m_kept = None
    if b_keys is not None:
        b_hash = mix(b_keys ^ (o_column.to(tl.uint32) * 0x9E3779B9))
        m_kept = (b_hash >> 8).to(tl.int32) >= threshold
    return m_kept


@triton.jit
def drop(b, m_kept):
    """A tile with the dropped columns at zero; the kept ones are not rescaled."""
    if m_kept is not None:
        b = tl.where(m_kept, b, 0.0)
    return b


@triton.jit
def rescale(b, b_kept, p_seed):
    """A sum over kept columns, rescaled."""
    if p_seed is not None:
        b = b * b_kept
    return b


# Backward, tile by tile: `b_s` are the products of queries and keys, `b_r` those of output gradients and values.


@triton.jit
def token_weights(b_s, b_lse, seen, place, n, scales, C: tl.constexpr, CHECK: tl.constexpr):
    """Probabilities before dropout, and base-2 logits before the bias. ``place`` as in `seen_tokens`."""
    b_x = exponent(b_s, None, scales[0], scales[1], C.CAPPED)
    b_y, _ = add_bias(b_x, 1.0, seen, place, n)
    m_seen = seen_tokens(seen, place, n, C.LEFT, C.RIGHT, CHECK)
    return hide(tl.exp2(b_y - b_lse), m_seen, 0.0), b_x


@triton.jit
def token_gradients(b_s, b_r, b_lse, b_delta, seen, b_keys, place, n, scales, C: tl.constexpr, CHECK: tl.constexpr):
    """The gradients of the logits after and before bias and soft-cap."""
    b_p, b_x = token_weights(b_s, b_lse, seen, place, n, scales, C, CHECK)
    m_kept = kept_columns(b_keys, plain(n.M) + place[3], plain(n.threshold))
    b_dz = b_p * (rescale(drop(b_r, m_kept), scales[2], b_keys) - b_delta)
    return b_dz, uncap(b_dz, b_x, scales[1], C.CAPPED)


@triton.jit
def prefix_gradients(b_s, b_r, b_g, b_lse, b_delta, b_keys, o_m, M, n, scales, C: tl.constexpr, CHECK: tl.constexpr):
    """Of prefix columns: probabilities after dropout, and the gradient of ``g s``.

    ``CHECK``: columns past the last are hidden; without it, their results must not be used. A gate of one number per
    column costs nothing here: existing multiply-adds include it.
    """
    b_x = exponent(b_s, b_g, scales[0], scales[1], C.CAPPED)
    b_p = tl.exp2(b_x - b_lse)
    if CHECK:
        b_p = tl.where(o_m < M, b_p, 0.0)
    m_kept = kept_columns(b_keys, o_m, plain(n.threshold))
    b_r = rescale(drop(b_r, m_kept), scales[2], b_keys)
    b_dz = uncap(b_p * (b_r * b_g - b_delta), b_x, scales[1], C.CAPPED)
    return drop(b_p, m_kept), b_dz
