"""Which keys a block of query rows can see at all, so that hidden ones are never computed."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .inputs import Inputs


class Rows(NamedTuple):
    """Query rows ``first .. first + count - 1``; keys ``low .. high - 1`` hold all that they see; ``masked``: the
    ranges among these where some query does not see some key."""

    first: int
    count: int
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
    """Of all queries: the first and last position of query 0, and the range of keys that are not padding."""

    least_offset: int
    most_offset: int
    low: int
    high: int


def key_limits(x: Inputs) -> Limits:
    """Read the limits from the offsets' and the padding's values."""
    least = most = x.offset
    if x.query_offset is not None:
        least, most = int(x.query_offset.min()), int(x.query_offset.max())
    low, high = 0, x.key.shape[2]
    if x.key_padding is not None:
        low, high = _range(x.key_padding.any(0))
    return Limits(least, most, low, high)


def visible_rows(x: Inputs, limits: Limits, first: int, count: int) -> Rows:
    """The keys that the queries ``first .. first + count - 1`` can see."""
    low, high = limits.low, limits.high
    # Keys from clear_low to clear_high are seen by all these queries, as far as positions go.
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
    """The range of the keys whose segment is not outside those of the queries."""
    segments = x.query_segments[:, first : first + count]
    keys = x.key_segments[:, low:high]
    near = (keys >= segments.amin(1, keepdim=True)) & (keys <= segments.amax(1, keepdim=True))
    start, stop = _range(near.any(0))
    return low + start, low + stop


def _range(wanted: torch.Tensor) -> tuple[int, int]:
    """First and one past the last True of a bool vector; (0, 0) where there is none."""
    where = wanted.nonzero()
    return (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
