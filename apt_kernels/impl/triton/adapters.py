"""A prefix for each row: the adapter of a batch row, the batch rows of an adapter, and rows that see nothing.

With one prefix for all rows, these functions add no instruction.
"""

import triton
import triton.language as tl

from ..inputs import NOTHING
from .primitives import LOG2E, layer_scale, open_rows, plain

# Base-2 logits up to this one hide a column, as `inputs.NOTHING` does.
LEAST = tl.constexpr(NOTHING * LOG2E.value)


@triton.jit
def row_prefix(gate, i_b, n):
    """The adapter of a batch row, and its number of prefix columns; for one prefix 0 and M."""
    i_a, i_length = i_b * 0, plain(n.M)
    if gate.adapters.index is not None:
        i_row = tl.load(gate.adapters.index + i_b)
        i_a = tl.maximum(i_row, 0).to(tl.int32)
        i_length = tl.where(i_row < 0, 0, tl.load(gate.adapters.lengths + i_a)).to(tl.int32)
    return i_a, i_length


@triton.jit
def at_least_one(gate, i_length):
    """A prefix length for the load of rows: a tensor descriptor accepts no size of zero, and columns past the last
    have no effect."""
    if gate.adapters.index is not None:
        i_length = tl.maximum(i_length, 1)
    return i_length


@triton.jit
def open_prefix(x, gate, i_a, i_kv, i_length, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                C: tl.constexpr):  # fmt: skip
    """`primitives.open_rows` of an adapter's key or value."""
    return open_rows(x, i_a, i_kv, at_least_one(gate, i_length), D, ROWS, WIDTH, C.ALIGNED, C.DESCRIPTORS)


@triton.jit
def with_finite_maximum(adapters, b_max, b_sum):
    """Maximum and sum of an online softmax, before its columns, for rows that may see none: the maximum is finite."""
    if adapters.index is not None:
        b_finite = tl.maximum(b_max, LEAST)
        b_sum = b_sum * tl.exp2(b_max - b_finite)
        b_max = b_finite
    return b_max, b_sum


@triton.jit
def normalised(adapters, b_out, b_max, b_sum):
    """Output and base-2 log-sum-exp of sums over all columns; of a row that saw none, 0 and -inf.

    ``b_sum`` and ``b_max`` have the shape of the rows, ``b_out`` one dimension more.
    """
    if adapters.index is not None:
        m_nothing = b_sum == 0
        b_out = tl.where(m_nothing[:, None], 0.0, b_out / tl.where(m_nothing, 1.0, b_sum)[:, None])
        b_lse = tl.where(m_nothing, float("-inf"), b_max + tl.log2(b_sum))
    else:
        b_out = b_out / b_sum[:, None]
        b_lse = b_max + tl.log2(b_sum)
    return b_out, b_lse


@triton.jit
def hidden_rows(adapters, b_lse):
    """Base-2 log-sum-exps for the backward: +inf in place of -inf, so that all probabilities of the row are zero."""
    if adapters.index is not None:
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    return b_lse


@triton.jit
def first_part(o_first, o_a, chunk):
    """The first partial sum of adapters ``o_a`` whose rows begin at ``o_first`` in the order of rows.

    Each adapter has one for ``chunk`` rows, and no two share one.
    """
    return (o_first // chunk + tl.where(chunk > 1, o_a, 0)).to(tl.int32)


@triton.jit
def parts_of(adapters, i_a, chunk, splits):
    """The first partial sum of an adapter, and one past the last."""
    i_first, i_end = tl.load(adapters.first + i_a), tl.load(adapters.first + i_a + 1)
    i_part = first_part(i_first, i_a, chunk)
    return i_part * splits, (i_part + tl.cdiv((i_end - i_first).to(tl.int32), chunk)) * splits


@triton.jit
def rows_of_part(gate, i_part, chunk, adapters, n, SCAN: tl.constexpr):
    """The rows of partial sum ``i_part``: its first and end (in the order of rows by adapter, if there are several
    adapters), the adapter and its number of prefix columns."""
    i_first = i_part * chunk
    i_a, i_length, i_end = i_part * 0, plain(n.M), tl.minimum(i_first + chunk, plain(n.batch))
    if gate.adapters.index is not None:
        # The last adapter whose partial sums begin here or before; rows without a prefix precede all.
        b_count = tl.zeros([SCAN], tl.int32)
        for i in tl.range(0, adapters, SCAN):
            o_a = i + tl.arange(0, SCAN)
            o_first = tl.load(gate.adapters.first + o_a, mask=o_a < adapters, other=0)
            b_count += ((o_a < adapters) & (first_part(o_first, o_a, chunk) <= i_part)).to(tl.int32)
        i_last = tl.sum(b_count, 0) - 1
        i_a = tl.maximum(i_last, 0)
        i_own, i_own_end = tl.load(gate.adapters.first + i_a), tl.load(gate.adapters.first + i_a + 1)
        i_first = (i_own + (i_part - first_part(i_own, i_a, chunk)) * chunk).to(tl.int32)
        i_end = tl.where(i_last < 0, i_first, tl.minimum(i_first + chunk, i_own_end)).to(tl.int32)
        i_length = tl.load(gate.adapters.lengths + i_a).to(tl.int32)
    return i_first, i_end, i_a, i_length


@triton.jit
def ordered_row(gate, i):
    """The batch row at place ``i`` of the order of rows by adapter; ``i`` itself for one prefix."""
    if gate.adapters.index is not None:
        i = tl.load(gate.adapters.order + i).to(tl.int32)
    return i


@triton.jit
def scaled_by_row(gate, i_b, b_dg, W: tl.constexpr):
    """The gradient of a row's weights times lambda, which differs between the rows that a gate's gradient sums; with
    one prefix, `finish` multiplies the sum."""
    if gate.adapters.index is not None:
        b_dg = b_dg * layer_scale(gate, i_b, W)
    return b_dg
