"""The op's arguments after validation, as every implementation receives them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from ..mask import visible_keys

# The differentiable inputs, in the order in which `backward` returns their gradients.
DIFFERENTIABLE = (
    "query",
    "key",
    "value",
    "prefix_key",
    "prefix_value",
    "gate",
    "layer_scale",
    "sinks",
    "bias",
)

# With a prefix for each row, one whose logits are all at most this sees nothing: additive masks hide with the minimum
# of float32 or of bfloat16.
NOTHING = torch.finfo(torch.float32).min / 2

# Why an implementation does not compute a prefix for each query.
BY_QUERY = "prefix_index is [B, T]; it takes one adapter for each batch row, [B]. 'reference' takes one for each query"


# Not frozen, which would double the time to make one; nothing assigns to a field.
@dataclass(eq=False)
class Inputs:
    """Validated arguments in schema order. B rows, Hq query heads, Hkv key/value heads, T queries, S keys, M prefix.

    ``gate`` holds logits, ``[B|1, T|1, M]``, or ``[G, M]`` when ``gate_index`` (int64 ``[B, T|1]``) picks the rows.
    ``layer_scale`` is ``[1]``, ``sinks`` ``[Hq]``; ``bias`` and ``dense`` are 4-D and broadcast to ``[B, Hq, T, S]``.
    ``query_offset`` (int64 ``[1]`` or ``[B]``), where given, replaces ``offset``. Windows: -1 is open.
    ``softcap`` 0 is off. ``seed`` is int64 ``[1]``, given iff ``dropout_p > 0``.

    With a prefix for each row or query, ``prefix_index`` (int64 ``[B]`` or ``[B, T]``, -1: none) and ``prefix_lengths``
    (int64 ``[A]``) are given, ``prefix_key`` and ``prefix_value`` are ``[A, Hkv, M, .]``, and ``layer_scale`` is
    ``[1]`` or ``[A]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    gate: Tensor | None
    layer_scale: Tensor | None
    sinks: Tensor | None
    bias: Tensor | None
    gate_index: Tensor | None
    dense: Tensor | None
    key_padding: Tensor | None
    query_segments: Tensor | None
    key_segments: Tensor | None
    query_offset: Tensor | None
    seed: Tensor | None
    prefix_index: Tensor | None
    prefix_lengths: Tensor | None
    offset: int
    causal: bool
    window_left: int
    window_right: int
    scale: float
    softcap: float
    dropout_p: float

    def flat(self) -> tuple:
        """The fields in schema order."""
        return tuple(getattr(self, name) for name in _NAMES)

    def tensors(self) -> list[Tensor]:
        """Every tensor that was given."""
        of_query = self.query, self.key, self.value, self.prefix_key, self.prefix_value
        others = (
            *(self.gate, self.layer_scale, self.sinks, self.bias, self.gate_index, self.dense, self.key_padding),
            *(self.query_segments, self.key_segments, self.query_offset, self.seed),
            *(self.prefix_index, self.prefix_lengths),
        )
        return [*of_query, *[part for part in others if part is not None]]

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int, int]:
        """``B, Hq, Hkv, T, S, M, D, Dv``."""
        batch, heads, queries, head_dim = self.query.shape
        return (
            batch,
            heads,
            self.key.shape[1],
            queries,
            self.key.shape[2],
            self.prefix_key.shape[-2],
            head_dim,
            self.value.shape[3],
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of sums and of the log-sum-exp: float64 for float64 inputs, else float32."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    @property
    def has_positions(self) -> bool:
        """Whether query positions matter: a causal or a windowed mask."""
        return self.causal or self.window_left >= 0 or self.window_right >= 0

    @property
    def gate_per_query(self) -> bool:
        """Whether each query of a row has its own gate (a single query has the gate of its row)."""
        rows = self.gate if self.gate_index is None else self.gate_index
        return rows is not None and rows.shape[1] > 1

    def gate_rows(self) -> Tensor | None:
        """The gate's logits as ``[B|1, T|1, M]`` (indexed rows gathered); None without a gate."""
        gate = self.gate
        if gate is not None and self.gate_index is not None:
            gate = gate[self.gate_index]
        if gate is not None and self.prefix_index is not None:
            seen = self.prefix_seen()
            gate = gate.masked_fill(~(seen if self.prefix_by_query else seen[:, None]), 0.0)
        return gate

    def weights(self) -> Tensor | None:
        """``g = lambda * sigmoid(gate)``, ``[B|1, T|1, M]`` (``[B|1, 1, 1]`` when there is only a scale), or None."""
        gate, scale, wide = self.gate_rows(), self.layer_scale, self.compute_dtype
        if gate is None:
            return self.scale_rows()
        weights = torch.sigmoid(gate if gate.dtype == wide else gate.to(wide))
        if scale is None:
            return weights
        if scale.dtype == wide and scale.shape[0] == 1:
            return weights * scale
        return weights * cast("Tensor", self.scale_rows())

    def scale_rows(self) -> Tensor | None:
        """lambda as ``[B|1, T|1, 1]`` in `compute_dtype`; None without one."""
        if self.layer_scale is None:
            return None
        scale = self.layer_scale.to(self.compute_dtype)
        if scale.shape[0] > 1:
            index = self.adapter_index()
            scale = of_index(scale, index.flatten())
            if self.prefix_by_query:
                return scale.view(*index.shape, 1)
        return scale.view(-1, 1, 1)

    @property
    def prefix_by_query(self) -> bool:
        """Whether each query of a row has a prefix of its own."""
        return self.prefix_index is not None and self.prefix_index.ndim == 2

    def adapter_index(self) -> Tensor:
        """``prefix_index`` with any valid index, 0, in the rows without a prefix."""
        return cast("Tensor", self.prefix_index).clamp(min=0)

    def prefix_seen(self) -> Tensor:
        """bool ``[B, M]``, or ``[B, T, M]``: which prefix columns each row, or query, has where it has its own."""
        index, lengths = cast("Tensor", self.prefix_index), cast("Tensor", self.prefix_lengths)
        length = torch.where(index < 0, 0, lengths[self.adapter_index()])
        return torch.arange(self.prefix_key.shape[-2], device=length.device) < length[..., None]

    def prefix_rows(self, prefix: Tensor) -> Tensor:
        """``prefix_key`` or ``prefix_value`` of each row, ``[B, Hkv, M, .]``, zero in the columns that it has not."""
        rows = of_index(prefix, self.adapter_index())
        return rows.masked_fill(~self.prefix_seen()[:, None, :, None], 0.0)

    def positions(self) -> Tensor:
        """Position of every query among the keys, int64 ``[B|1, T]``."""
        row = torch.arange(self.query.shape[2], device=self.query.device)
        if self.query_offset is None:
            return (row + self.offset)[None]
        return row[None] + self.query_offset[:, None]

    def _last_sees_all(self) -> bool:
        """Whether a single query sees every key: plain decoding, with no mask but a causal one that hides nothing."""
        if self.query.shape[2] > 1 or self.query_offset is not None or self.window_left >= 0 or self.window_right >= 0:
            return False
        parts = (self.key_padding, self.query_segments, self.dense)
        return self.offset >= self.key.shape[2] - 1 and all(part is None for part in parts)

    def visible(
        self,
        first: int = 0,
        rows: int | None = None,
        first_key: int = 0,
        keys: int | None = None,
        by_position: bool = True,
    ) -> Tensor | None:
        """bool, broadcastable to ``[B, Hq, rows, keys]``: which keys the queries see; None: every key.

        Of the queries ``first .. first + rows - 1`` and the keys ``first_key .. first_key + keys - 1``. With
        ``by_position`` False, neither a causal mask nor a window hides a key.
        """
        if self._last_sees_all():
            return None
        rows = self.query.shape[2] - first if rows is None else rows
        keys = self.key.shape[2] - first_key if keys is None else keys
        here, there = slice(first, first + rows), slice(first_key, first_key + keys)
        positions = by_position and self.has_positions
        return visible_keys(
            self.positions()[:, here] if positions else None,
            torch.arange(first_key, first_key + keys, device=self.query.device) if positions else None,
            positions and self.causal,
            self.window_left if positions else -1,
            self.window_right if positions else -1,
            None if self.key_padding is None else self.key_padding[:, there],
            None if self.query_segments is None else self.query_segments[:, here],
            None if self.key_segments is None else self.key_segments[:, there],
            None if self.dense is None else part_of(self.dense, here, there),
        )


_NAMES = tuple(field.name for field in fields(Inputs))


def of_index(tensor: Tensor, index: Tensor) -> Tensor:
    """``tensor[index]``, with a deterministic gradient: the usual one is atomic on a CPU, `index_select`'s on a GPU."""
    return tensor.index_select(0, index) if tensor.device.type == "cpu" else tensor[index]


def part_of(tensor: Tensor, rows: slice, keys: slice) -> Tensor:
    """The given rows and keys of a 4-D tensor that broadcasts to ``[B, Hq, T, S]``."""
    tensor = tensor if tensor.shape[2] == 1 else tensor[:, :, rows]
    return tensor if tensor.shape[3] == 1 else tensor[..., keys]


def heads_last_empty(
    like: Tensor, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype | None = None
) -> Tensor:
    """An uninitialised ``[B, H, T, D]`` stored as ``[B, T, H, D]``: the layout of every output and of dq, dk, dv."""
    return like.new_empty(batch, length, heads, dim, dtype=dtype).transpose(1, 2)


def heads_last(tensor: Tensor) -> Tensor:
    """``[B, H, T, D]`` stored as ``[B, T, H, D]``; a copy only where it is not."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def dense_last(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied only where its last dimension is not contiguous."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()
