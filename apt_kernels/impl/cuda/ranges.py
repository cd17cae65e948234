"""The visible range of each tile under padding and segments, so that kernels skip hidden tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..inputs import Inputs
from .launch import count_tiles


def find_ranges(x: Inputs, size: int, queries: bool) -> Tensor | None:
    """int32 ``[B, tiles, 2]`` for tiles of ``size`` queries (or keys); None without padding and segments.

    First and end of the keys that a tile of queries may see, or of the queries that may see a tile of keys. Segments
    are compared by their range in the tile: the result may be too wide, never too narrow.
    """
    if x.key_padding is None and x.query_segments is None:
        return None
    batch, _, _, length, others, *_ = x.sizes
    segments, other_segments = x.query_segments, x.key_segments
    if not queries:
        length, others, segments, other_segments = others, length, other_segments, segments
    tiles = count_tiles(length, size)

    def tiled(tensor: Tensor, fill: int) -> Tensor:
        return pad(tensor, (0, tiles * size - length), value=fill).view(batch, tiles, size)

    real = torch.ones(batch, length, dtype=torch.bool, device=x.query.device)
    if x.key_padding is not None and not queries:
        real = x.key_padding
    if segments is None:
        seen = tiled(real, 0).any(-1)[..., None].expand(-1, -1, others)
    else:
        limits, own, other = torch.iinfo(torch.int64), segments.to(torch.int64), other_segments[:, None]
        low = tiled(torch.where(real, own, limits.max), limits.max).amin(-1)[..., None]
        high = tiled(torch.where(real, own, limits.min), limits.min).amax(-1)[..., None]
        seen = (other >= low) & (other <= high)
    if x.key_padding is not None and queries:
        seen = seen & x.key_padding[:, None]
    index = torch.arange(others, dtype=torch.int32, device=x.query.device)
    first, end = torch.where(seen, index, others).amin(-1), torch.where(seen, index + 1, 0).amax(-1)
    return torch.stack((first, end), -1).to(torch.int32)
