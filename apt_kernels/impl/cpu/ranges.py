"""Splitting a call into chunks of batch rows and heads, and into query rows with the keys that these can see."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import Inputs


class Chunk(NamedTuple):
    """A unit of work: batch rows, query heads, their key/value heads; blocks of at most ``rows`` queries."""

    batch: slice
    heads: slice
    kv_heads: slice
    rows: int

    def narrow(self, tensor: Tensor | None, *cuts: slice) -> Tensor | None:
        """Slice the leading dimensions, except those of size 1, which broadcast."""
        for dim, cut in enumerate(cuts):
            if tensor is not None and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, cut.start, cut.stop - cut.start)
        return tensor

    def of(self, x: Inputs) -> Inputs:
        """The inputs of these streams."""
        batch, heads, kv_heads = self.batch, self.heads, self.kv_heads
        return replace(
            x,
            query=self.narrow(x.query, batch, heads),
            key=self.narrow(x.key, batch, kv_heads),
            value=self.narrow(x.value, batch, kv_heads),
            prefix_key=x.prefix_key[..., kv_heads, :, :],
            prefix_value=x.prefix_value[..., kv_heads, :, :],
            gate=x.gate if x.gate_index is not None else self.narrow(x.gate, batch),
            sinks=self.narrow(x.sinks, heads),
            bias=self.narrow(x.bias, batch, heads),
            gate_index=self.narrow(x.gate_index, batch),
            dense=self.narrow(x.dense, batch, heads),
            key_padding=self.narrow(x.key_padding, batch),
            query_segments=self.narrow(x.query_segments, batch),
            key_segments=self.narrow(x.key_segments, batch),
            query_offset=self.narrow(x.query_offset, batch),
            prefix_index=self.narrow(x.prefix_index, batch),
        )


class Rows(NamedTuple):
    """Query rows ``first .. first + count - 1``, which see no keys outside of ``low .. high - 1``; ``masked``: the
    ranges among these where some query does not see some key."""

    first: int
    count: int  # type: ignore[assignment]  # tuple.count is not used
    low: int
    high: int
    masked: list[slice]

    @property
    def here(self) -> slice:
        return slice(self.first, self.first + self.count)

    @property
    def there(self) -> slice:
        return slice(self.low, self.high)


class Limits(NamedTuple):
    """Over all batch rows: the first and last position of query 0, and the range of keys that are not padding."""

    least_offset: int
    most_offset: int
    low: int
    high: int


def of_queries(x: Inputs, rows: slice) -> Inputs:
    """The inputs with a gate per query, of which those of these queries alone remain: no weights ``[B, T, M]``."""
    if x.gate_index is not None:
        return replace(x, gate_index=x.gate_index[:, rows])
    return replace(x, gate=x.gate[:, rows])


def key_limits(x: Inputs) -> Limits:
    """Read the limits from the offsets' and the padding's values."""
    least = most = x.offset
    if x.query_offset is not None:
        least, most = int(x.query_offset.min()), int(x.query_offset.max())
    low, high = 0, x.key.shape[2]
    if x.key_padding is not None:
        low, high = _range(x.key_padding.any(0))
    return Limits(least, most, low, high)


def row_ends(x: Inputs) -> tuple[list[int], list[bool]]:
    """For each batch row: one past its last key that is not padding, and whether padding lies before that."""
    batch, keys = x.query.shape[0], x.key.shape[2]
    if x.key_padding is None:
        return [keys] * batch, [False] * batch
    place = torch.arange(1, keys + 1, device=x.key_padding.device)
    ends = (x.key_padding * place).amax(1)
    return ends.tolist(), (ends > x.key_padding.sum(1)).tolist()


def visible_rows(x: Inputs, limits: Limits, first: int, count: int) -> Rows:
    """The keys that the queries ``first .. first + count - 1`` can see."""
    low, high = limits.low, limits.high
    # By position alone, all these queries see the keys from clear_low to clear_high.
    clear_low, clear_high = low, high
    right = 0 if x.causal else x.window_right
    if right >= 0:
        high = min(high, first + count - 1 + limits.most_offset + right + 1)
        clear_high = min(clear_high, first + limits.least_offset + right + 1)
    if x.window_left >= 0:
        low = max(low, first + limits.least_offset - x.window_left)
        clear_low = max(clear_low, first + count - 1 + limits.most_offset - x.window_left)
    if x.query_segments is not None and high > low:
        low, high = _of_segments(x, first, count, low, high)
    if high <= low:
        return Rows(first, count, low, low, [])
    if x.key_padding is not None or x.query_segments is not None or x.dense is not None or clear_low >= clear_high:
        return Rows(first, count, low, high, [slice(low, high)])
    edges = [slice(low, min(clear_low, high)), slice(max(clear_high, low), high)]
    return Rows(first, count, low, high, [edge for edge in edges if edge.stop > edge.start])


def _of_segments(x: Inputs, first: int, count: int, low: int, high: int) -> tuple[int, int]:
    """The range of the keys whose segments are among those of the queries."""
    segments = x.query_segments[:, first : first + count]
    keys = x.key_segments[:, low:high]
    near = (keys >= segments.amin(1, keepdim=True)) & (keys <= segments.amax(1, keepdim=True))
    start, stop = _range(near.any(0))
    return low + start, low + stop


def _range(wanted: Tensor) -> tuple[int, int]:
    """First and one past the last True of a bool vector; (0, 0) where there is none."""
    where = wanted.nonzero()
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)


def by_batch(x: Inputs, size: int) -> list[Chunk]:
    """Chunks of ``size`` batch rows with all heads and queries."""
    batch, heads, kv_heads, queries, *_ = x.sizes
    starts = range(0, batch, size)
    return [Chunk(slice(b, min(b + size, batch)), slice(0, heads), slice(0, kv_heads), queries) for b in starts]
