"""Attention masks as a few numbers and small tensors instead of a 4-D tensor."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from .errors import ArgumentError, its_type

# What other libraries call the parts of a mask.
_NAMED_OTHERWISE = {
    "is_causal": "causal=",
    "attn_mask": "dense= (bool) or bias= (added to the logits)",
    "attention_mask": "key_padding= ([B, S] bool), dense= or bias=",
    "padding": "key_padding=",
    "key_padding_mask": "key_padding=, where True means that the key may be seen",
    "sliding_window": "window=(left, right)",
    "window_size": "window=(left, right)",
    "segment_ids": "query_segments= and key_segments=",
}


@dataclass(frozen=True, eq=False)
class Mask:
    """Which token keys each query may see. The parts combine by "and"; the prefix is always seen.

    Args:
        causal: key positions after the query's own are hidden.
        window: ``(left, right)``, the farthest visible key before and after the query's position, in tokens, both
            inclusive; ``None`` in either place leaves that side open.
        query_offset: position of query 0 among the keys, for ``causal`` and ``window``: an int, or an integer tensor
            of one element or of shape ``[B]``. Default ``S - T``.
        key_padding: ``[B, S]`` bool, True where the key may be seen.
        query_segments, key_segments: ``[B, T]`` and ``[B, S]`` integers; a query sees keys of its own segment only.
        dense: bool, broadcastable to ``[B, Hq, T, S]``, True where the key may be seen.
        bias: added to the scaled (and soft-capped) token logits, broadcastable to ``[B, Hq, T, S]``; it has a gradient
            where it requires one, and is zero on prefix columns.

    Examples:
        >>> attention_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> mask = apt_kernels.Mask(causal=True, key_padding=attention_mask.bool())
        >>> mask.visible(batch=2, queries=3, keys=3, device=torch.device("cpu"))[1, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 1, 0]], dtype=torch.int32)
        >>> window = apt_kernels.Mask(causal=True, window=(1023, None))  # the last 1,024 tokens
    """

    __signature__: ClassVar[inspect.Signature]

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    query_offset: int | Tensor | None = None
    key_padding: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None

    def __new__(cls, *args, **kwargs):
        """Raise `ArgumentError` for a name that other libraries use."""
        for name in kwargs:
            if name not in cls.__dataclass_fields__:
                known = ", ".join(field.name for field in fields(cls))
                hint = f"; use {_NAMED_OTHERWISE[name]}" if name in _NAMED_OTHERWISE else ""
                raise ArgumentError(f"Mask has no {name!r}{hint}. It has {known}")
        return super().__new__(cls)

    @property
    def window_sizes(self) -> tuple[int, int]:
        """``(left, right)`` with -1 for an open side."""
        left, right = self.window if self.window is not None else (None, None)
        return (-1 if left is None else left), (-1 if right is None else right)

    def to(self, *args, **kwargs) -> Mask:
        """A copy whose tensors were moved by ``Tensor.to(*args, **kwargs)``; dtypes other than the bias's are kept."""

        def move(name, value):
            if not isinstance(value, Tensor):
                return value
            moved = value.to(*args, **kwargs)
            return moved if name == "bias" else moved.to(value.dtype)

        return Mask(**{f.name: move(f.name, getattr(self, f.name)) for f in fields(self)})

    def visible(self, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
        """The mask without its bias as a bool tensor ``[B, 1 or Hq, T, S]``, True where the key may be seen."""
        self._check_causal()
        offset = keys - queries if self.query_offset is None else self.query_offset
        if isinstance(offset, Tensor):
            offset = offset.reshape(-1, 1)
        position = torch.arange(queries, device=device)[None] + offset
        parts = (self.causal, *self.window_sizes, self.key_padding, self.query_segments, self.key_segments, self.dense)
        seen = visible_keys(position, torch.arange(keys, device=device), *parts)
        shape = (batch, 1, queries, keys)
        return (
            torch.ones(shape, dtype=torch.bool, device=device)
            if seen is None
            else seen.broadcast_to(torch.broadcast_shapes(seen.shape, shape))
        )

    def check(self, batch: int, heads: int, queries: int, keys: int, device: torch.device) -> None:
        """Raise `ArgumentError` unless every part fits ``[B, Hq, T, S]`` on ``device``."""
        self._check_causal()
        if self.window is not None:
            if not isinstance(self.window, (tuple, list)) or len(self.window) != 2:
                raise ArgumentError(f"mask.window is {self.window!r}; it needs a pair (left, right)")
            for side in self.window:
                if side is not None and (not _is_int(side) or side < 0):
                    raise ArgumentError(f"mask.window is {self.window!r}; each side needs an int >= 0 or None")
        self._check_offset(batch, device)
        for name in ("key_padding", "query_segments", "key_segments", "dense", "bias"):
            part = getattr(self, name)
            if part is None:
                continue
            if not isinstance(part, Tensor):
                raise ArgumentError(f"mask.{name} is {its_type(part)}; it needs a torch.Tensor or None")
            check_place(f"mask.{name}", part, device)
            self._check_shape(name, part, batch, heads, queries, keys)
            if name in ("key_padding", "dense"):
                _check_bool(f"mask.{name}", part)
            elif name == "bias":
                if not part.is_floating_point():
                    raise ArgumentError(f"mask.bias has dtype {part.dtype}; it needs a floating-point dtype")
            else:
                _check_integer(f"mask.{name}", part)
        if (self.query_segments is None) != (self.key_segments is None):
            raise ArgumentError("mask.query_segments and mask.key_segments need each other: only one is given")

    def _check_causal(self) -> None:
        if not isinstance(self.causal, int) or self.causal not in (0, 1):
            raise ArgumentError(f"mask.causal is {self.causal!r}; it needs True or False")

    def _check_offset(self, batch: int, device: torch.device) -> None:
        offset = self.query_offset
        if isinstance(offset, Tensor):
            _check_integer("mask.query_offset", offset)
            if tuple(offset.shape) not in ((), (1,), (batch,)):
                raise ArgumentError(
                    f"mask.query_offset has shape {list(offset.shape)}; it needs [], [1] or [B] = [{batch}]"
                )
            check_place("mask.query_offset", offset, device)
        elif offset is not None and not _is_int(offset):
            raise ArgumentError(f"mask.query_offset is {offset!r}; it needs an int, an integer tensor or None")

    @staticmethod
    def _check_shape(name: str, part: Tensor, batch: int, heads: int, queries: int, keys: int) -> None:
        if name in ("dense", "bias"):
            _check_broadcast(f"mask.{name}", part, (batch, heads, queries, keys))
            return
        length = queries if name == "query_segments" else keys
        if tuple(part.shape) != (batch, length):
            raise ArgumentError(f"mask.{name} has shape {list(part.shape)}; it needs [{batch}, {length}]")


# `help` would show that of `__new__`.
Mask.__signature__ = inspect.Signature(list(inspect.signature(Mask.__init__).parameters.values())[1:])


def visible_keys(
    position: Tensor | None,
    key: Tensor | None,
    causal: bool,
    window_left: int,
    window_right: int,
    key_padding: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    dense: Tensor | None,
) -> Tensor | None:
    """bool, broadcastable to ``[B, Hq, T, S]``: which of the ``key`` positions ``[S]`` the query positions ``[B|1, T]``
    see; None: all of them. Without a causal mask and a window, positions may be None."""
    parts: list[Tensor] = []
    if position is not None and key is not None:
        position = position[:, None, :, None]
        if causal:
            parts.append(key <= position)
        if window_left >= 0:
            parts.append(key >= position - window_left)
        if window_right >= 0:
            parts.append(key <= position + window_right)
    if key_padding is not None:
        parts.append(key_padding[:, None, None, :])
    if query_segments is not None and key_segments is not None:
        parts.append(query_segments[:, None, :, None] == key_segments[:, None, None, :])
    if dense is not None:
        parts.append(dense)
    seen = None
    for part in parts:
        seen = part if seen is None else seen & part
    return seen


def _is_int(value) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _check_integer(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ArgumentError(f"{name} has dtype {tensor.dtype}; it needs an integer dtype")


def _check_bool(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.bool:
        raise ArgumentError(f"{name} has dtype {tensor.dtype}; it needs torch.bool (True: may be seen)")


def check_place(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise `ArgumentError` unless ``tensor`` is dense and on ``device``, the query's."""
    if tensor.layout is not torch.strided:
        raise ArgumentError(f"{name} has the layout {tensor.layout}; it needs a dense tensor (torch.strided)")
    if tensor.device != device:
        raise ArgumentError(f"{name} is on {tensor.device}; it needs the query's device, {device}")


def _check_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    sizes = (1,) * (len(shape) - tensor.ndim) + tuple(tensor.shape)
    if tensor.ndim > len(shape) or any(have != 1 and have != need for have, need in zip(sizes, shape)):
        raise ArgumentError(f"{name} has shape {list(tensor.shape)}; it needs one that broadcasts to {list(shape)}")
