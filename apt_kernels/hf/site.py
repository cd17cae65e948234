"""One attention module of a model, as recorded by the recording pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Inline(NamedTuple):
    """The properties of a module that computes its attention inline."""

    time_major: bool  # hidden states are [T, B, d]
    key_factor: float  # a number that the key was multiplied with before the product
    changed: bool = False  # its result is changed in place
    from_end: bool = False  # a bias counts positions from the last key there is


@dataclass(frozen=True)
class Site:
    """One attention module: its name, its shapes, and its mask."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    hidden_size: int | None  # of the hidden states that a gate can read; None: the module receives none
    cross: bool
    causal: bool
    device: torch.device
    inline: Inline | None = None  # None: it attends through transformers' attention interface
    senses: frozenset[str] = frozenset(("text",))  # the input modalities of the innermost model around it
    repeated: bool = False  # it attends more than once in a forward
    mesh: Any = None  # of a module that tensor parallelism spreads over processes
    sharded: bool = False  # every process attends with a part of the heads; `heads` and `kv_heads` count them all

    @property
    def kind(self) -> str:
        return "cross-attention" if self.cross else "causal self-attention" if self.causal else "self-attention"
