"""Packed documents: several in one row. ``segments [B, T]``: integers that are equal within a document."""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(segments: Tensor) -> Tensor:
    """``[B, T]``: the index in its row of the first token of each token's document."""
    position = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    return torch.where(_begins(segments), position, 0).cummax(dim=1).values


def first_states(hidden_states: Tensor, segments: Tensor) -> Tensor:
    """``[B, T, d]``: for every token the hidden state of its document's first token."""
    start = document_starts(segments)
    return hidden_states.gather(1, start[..., None].expand_as(hidden_states))


def mean_states(hidden_states: Tensor, real_tokens: Tensor | None, segments: Tensor) -> Tensor:
    """``[B, T, d]``: for every token the mean hidden state of its document's real tokens."""
    number = _begins(segments).cumsum(dim=1) - 1
    number = number[..., None].expand_as(hidden_states)
    wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    real = torch.ones_like(wide) if real_tokens is None else real_tokens[..., None].to(wide.dtype).expand_as(wide)
    total, count = (torch.zeros_like(wide).scatter_add(1, number, part) for part in (wide * real, real))
    return (total / count.clamp(min=1)).gather(1, number).to(hidden_states.dtype)


def _begins(segments: Tensor) -> Tensor:
    """``[B, T]`` bool: the first token of each document."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return begins
