"""The kernels' arguments, in the order that the library declares, and the launch."""

from __future__ import annotations

import functools
from collections import Counter

import torch
from torch import Tensor

from ..dropout import threshold
from ..inputs import Inputs
from . import library

_FAR = 1 << 40  # beyond every position; sums with it stay in 64 bits
_TYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}  # torch's ScalarType

LAUNCHES: Counter[str] = Counter()


@functools.cache
def _fields(operators) -> list[list[str]]:
    """The names of tensors, integers, real numbers and kernels, each in the library's order."""
    return [part.split() for part in operators.fields().split(";")]


class Problem:
    """`Inputs` as arguments of the kernels."""

    def __init__(self, x: Inputs):
        self.x = x
        self._operators = library.device() if x.query.device.type == "cuda" else library.host
        self._names = _fields(self._operators)
        self._type = _TYPES[x.query.dtype]
        batch, heads, kv_heads, queries, keys, length, head_dim, value_dim = x.sizes
        self._tensors = self._take(x)
        self._integers = {
            "batch": batch,
            "heads": heads,
            "group": heads // kv_heads,
            "queries": queries,
            "keys": keys,
            "length": length,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "offset": max(-_FAR, min(x.offset, _FAR)),
            "left": _FAR if x.window_left < 0 else min(x.window_left, _FAR),
            "right": 0 if x.causal else _FAR if x.window_right < 0 else min(x.window_right, _FAR),
            "threshold": threshold(x.dropout_p),
            "chunk": 1,
            "splits": 1,
        }
        self._reals = {"scale": float(x.scale), "softcap": float(x.softcap), "kept": 1 / (1 - x.dropout_p)}

    @staticmethod
    def _take(x: Inputs) -> dict[str, Tensor | None]:
        """The tensors in the kernels' types; copied are small tensors and those whose rows are not contiguous."""
        dtype, single = x.query.dtype, torch.float32
        parts = {name: rows(getattr(x, name)) for name in ("query", "key", "value")}
        parts |= {name: rows(getattr(x, name).to(dtype)) for name in ("prefix_key", "prefix_value")}
        for name in ("gate", "layer_scale", "sinks"):
            parts[name] = _to(getattr(x, name), single)
        for name in ("gate_index", "query_segments", "key_segments", "query_offset", "seed"):
            parts[name] = _to(getattr(x, name), torch.int64)
        return parts | {name: getattr(x, name) for name in ("bias", "dense", "key_padding")}

    def tile(self, kernel: str) -> tuple[int, int]:
        """The tile size of a kernel: rows and columns of a block."""
        *_, head_dim, value_dim = self.x.sizes
        rows, columns, *_ = self._operators.tile(self._number(kernel), self._type, max(head_dim, value_dim))
        return rows, columns

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised float32 tensor on the inputs' device."""
        return torch.empty(shape, dtype=torch.float32, device=self.x.query.device)

    def is_plain(self, kernel: str, **more: Tensor | int | None) -> bool:
        """Whether straight loops compute a kernel: see `is_plain` in ``csrc/dispatch.h``; ``more`` as for `run`."""
        return self._operators.is_plain(self._number(kernel), self._type, *self._arguments(more))

    def _arguments(self, more: dict[str, Tensor | int | None]) -> tuple[list, list, list]:
        given = self._tensors | self._integers | self._reals | more
        tensors, integers, reals, _ = self._names
        return (
            [given.get(name) for name in tensors],
            [given[name] for name in integers],
            [given[name] for name in reals],
        )

    def run(self, kernel: str, **more: Tensor | int | None) -> None:
        """Launch a kernel on the current stream; ``more``: additional or replaced tensors and numbers."""
        LAUNCHES[kernel] += 1
        device = self.x.query.device
        self._operators.run(
            self._number(kernel),
            self._type,
            *self._arguments(more),
            torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
        )

    def _number(self, kernel: str) -> int:
        return self._names[3].index(kernel)


def rows(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def count_tiles(length: int, size: int) -> int:
    """How many tiles of ``size`` cover ``length``."""
    return -(-length // size)
