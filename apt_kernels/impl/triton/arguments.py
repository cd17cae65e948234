"""What the kernels take: tensors and their strides as small tuples, numbers as run-time arguments, and the launch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold
from ..inputs import Inputs
from . import table

# Arguments of every kernel that must not be compiled in: a new length or window costs no compilation.
RUNTIME = ("T", "S", "M", "heads", "group", "offset", "left", "right", "threshold")
# A tile of at most 256 rows of this stride reaches beyond 32 bits.
_FAR_ROWS = 1 << 23
_FAR = 1 << 40  # beyond every position; sums with it stay in 64 bits

# The dtype of sums, in Triton's terms.
WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}

LAUNCHES: Counter[str] = Counter()


def odd(n: int) -> int:
    """A stride in a form that Triton never compiles in: tuple members cannot be exempted, but only 1 and 16 k are."""
    return 2 * n + 3


class Rows(NamedTuple):
    """``[B, H, T, D]`` with a contiguous last dimension; for ``[H, M, D]`` the first stride is zero."""

    ptr: Tensor | None
    b: int
    h: int
    t: int


class Gate(NamedTuple):
    """Gate logits by row and query, contiguous along the prefix; the rows' index; the layer scale."""

    ptr: Tensor | None
    b: int
    t: int
    index: Tensor | None
    index_b: int
    index_t: int
    scale: Tensor | None


class Seen(NamedTuple):
    """The parts of a mask that are tensors."""

    padding: Tensor | None
    padding_b: int
    padding_s: int
    query_segment: Tensor | None
    query_b: int
    query_t: int
    key_segment: Tensor | None
    key_b: int
    key_s: int
    dense: Tensor | None
    dense_b: int
    dense_h: int
    dense_t: int
    dense_s: int
    bias: Tensor | None
    bias_b: int
    bias_h: int
    bias_t: int
    bias_s: int
    offset: Tensor | None
    offset_b: int


def _dense_last(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied only where its last dimension is not contiguous."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def rows(tensor: Tensor | None) -> Rows:
    """A tensor as `Rows`."""
    if tensor is None:
        return Rows(None, odd(0), odd(0), odd(0))
    tensor = _dense_last(tensor)
    *b, h, t, _ = _strides(tensor)
    return Rows(tensor, b[0] if b else odd(0), h, t)


def aligned(*tiles: Rows) -> bool:
    """Whether every stride is a multiple of 8 elements, so that rows load in vectors of 16 bytes, and no tile of rows
    spans 2^31 elements, so that offsets within it have 32 bits."""
    held = [x for x in tiles if x.ptr is not None]
    near = all((x.t - 3) // 2 < _FAR_ROWS for x in held)
    return near and all((stride - 3) // 2 % 8 == 0 for x in held for stride in x[1:])


def _strides(tensor: Tensor | None, dims: int = 0) -> list[int]:
    """Strides, encoded; zero along dimensions of size one, whatever the tensor says."""
    if tensor is None:
        return [odd(0)] * dims
    return [odd(0 if size == 1 else stride) for size, stride in zip(tensor.shape, tensor.stride())]


def _gate(x: Inputs) -> Gate:
    gate = _dense_last(x.gate)
    b, *t, _ = _strides(gate, 3)
    return Gate(gate, b, t[0] if t else odd(0), x.gate_index, *_strides(x.gate_index, 2), x.layer_scale)


def _seen(x: Inputs) -> Seen:
    parts = ((x.key_padding, 2), (x.query_segments, 2), (x.key_segments, 2), (x.dense, 4), (x.bias, 4))
    fields = [field for part, dims in parts for field in (part, *_strides(part, dims))]
    return Seen(*fields, x.query_offset, *_strides(x.query_offset, 1))


@dataclass(frozen=True)
class Problem:
    """`Inputs` as the kernels see them."""

    x: Inputs
    query: Rows
    key: Rows
    value: Rows
    prefix_key: Rows
    prefix_value: Rows
    gate: Gate
    seen: Seen
    architecture: str

    @classmethod
    def of(cls, x: Inputs) -> Problem:
        prefix = [x.prefix_key, x.prefix_value]
        if x.prefix_key.shape[1] >= table.LONG_PREFIX:
            # Every program reads it: half the bytes are worth two launches.
            prefix = [t.to(x.query.dtype) for t in prefix]
        core = [rows(t) for t in (x.query, x.key, x.value, *prefix)]
        return cls(x, *core, _gate(x), _seen(x), table.architecture(x.query.device))

    def numbers(self) -> dict:
        """The run-time numbers that every kernel takes."""
        x = self.x
        _, heads, kv_heads, queries, keys, length, _, _ = x.sizes
        right = _FAR if x.window_right < 0 else min(x.window_right, _FAR)
        return {
            "T": queries,
            "S": keys,
            "M": length,
            "heads": heads,
            "group": heads // kv_heads,
            "offset": max(-_FAR, min(x.offset, _FAR)),
            "left": min(x.window_left, _FAR),
            "right": 0 if x.causal else right,
            "threshold": threshold(x.dropout_p),
            "kept": 1 / (1 - x.dropout_p),
            "scale": float(x.scale),
            "softcap": float(x.softcap),
        }

    def constants(self, *tiles: Rows) -> dict:
        """The compile-time numbers that every kernel takes; ``tiles`` are the further `Rows` that it touches."""
        x = self.x
        *_, head_dim, value_dim = x.sizes
        core = (self.query, self.key, self.value, self.prefix_key, self.prefix_value)
        return {
            "D": head_dim,
            "DV": value_dim,
            "WIDTH": table.padded(head_dim),
            "WIDTH_V": table.padded(value_dim),
            "LEFT": x.window_left >= 0,
            "RIGHT": x.causal or x.window_right >= 0,
            "CAPPED": x.softcap != 0,
            "PER_QUERY": x.gate_by_query,
            "ALIGNED": head_dim % 8 == 0 and value_dim % 8 == 0 and aligned(*core, *tiles),
            "PRECISION": _precision(self.architecture),
            "W": WIDE[x.compute_dtype],
        }

    @property
    def dim(self) -> int:
        """The larger head size, by which tiles are chosen."""
        return max(self.x.sizes[-2:])

    def tile(self, kernel: str) -> table.Tile:
        """The table's entry for a kernel."""
        return table.tile(kernel, self.architecture, self.x.query.element_size(), self.dim)

    def prefix_columns(self, tile: table.Tile) -> int:
        """Prefix columns that a kernel over queries takes at once."""
        return table.prefix_columns(tile, self.dim, self.x.gate_by_query)


def _precision(architecture: str) -> str:
    """How tiles multiply; float32 ones as torch's own products do."""
    if architecture == "interpreter":
        return "upcast"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def launch(kernel, programs: int, tile: table.Tile, *arguments, **named) -> None:
    """Launch ``programs`` instances of a kernel. Every launch goes through here."""
    LAUNCHES[kernel.__name__] += 1
    named.update(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    execute(kernel, programs, *arguments, **named)


def execute(kernel, programs: int, *arguments, **named) -> None:
    """Run a kernel on the device of its tensors; `bench.ahead` puts a compiler in its place."""
    kernel[(programs,)](*arguments, **named)


def count_tiles(length: int, size: int) -> int:
    """How many tiles of ``size`` cover ``length``."""
    return triton.cdiv(length, size)
