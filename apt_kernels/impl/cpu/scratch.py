"""Buffers that one call reuses."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Buffers by name, reused from block to block: new memory pages cost as much as the arithmetic on them."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.like, self.dtype = like, dtype
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised contiguous tensor that is valid until the name is requested again."""
        count = 1
        for size in shape:
            count *= size
        buffer = self.kept.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self.kept[name] = self.like.new_empty(count, dtype=dtype or self.dtype)
        return buffer[:count].view(shape)
