"""What the kernels take: tensors and their strides as small tuples, numbers as run-time arguments, and the launch."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache as memoise
from operator import itemgetter
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..dropout import threshold
from ..inputs import Inputs, dense_last
from . import tiles

# Arguments of every kernel that must not be compiled in: a new length or window costs no compilation.
RUNTIME = ("T", "S", "M", "heads", "group", "offset", "left", "right", "threshold")
# A tile of at most 256 rows of this stride reaches beyond 32 bits.
_FAR_ROWS = 1 << 23
_WIDE = 1 << 31  # numbers from here on have 64 bits
_FAR = 1 << 40  # beyond every position; sums with it stay in 64 bits

# The dtype of sums, in Triton's terms.
WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}

LAUNCHES: Counter[str] = Counter()
# What Triton compiled, by `_Signature.key`.
_COMPILED: dict[tuple, object] = {}


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


def rows(tensor: Tensor | None) -> Rows:
    """A tensor as `Rows`."""
    if tensor is None:
        return _NO_ROWS
    tensor = dense_last(tensor)
    strides = _strides(tensor)
    return Rows(tensor, *strides[:3]) if len(strides) == 4 else Rows(tensor, _ZERO, *strides[:2])


def aligned(operands: Iterable[Rows]) -> bool:
    """Whether every stride is a multiple of 8 elements, so that rows load in vectors of 16 bytes, and no tile of rows
    spans 2^31 elements, so that offsets within it have 32 bits."""
    bits, farthest = 0, _ZERO
    for _, b, h, t in operands:
        bits |= (b - _ZERO) | (h - _ZERO) | (t - _ZERO)
        farthest = max(farthest, t)
    return bits % (2 * 8) == 0 and farthest < odd(_FAR_ROWS)


def _strides(tensor: Tensor | None, dims: int = 0) -> list[int]:
    """Strides, encoded; zero along dimensions of size one, whatever the tensor says."""
    if tensor is None:
        return [_ZERO] * dims
    # `odd`, written out: every launch asks for some twenty.
    return [_ZERO if size == 1 else 2 * stride + 3 for size, stride in zip(tensor.shape, tensor.stride())]


_ZERO = odd(0)
_NO_ROWS = Rows(None, _ZERO, _ZERO, _ZERO)


def _gate(x: Inputs) -> Gate:
    gate = dense_last(x.gate)
    b, *t, _ = _strides(gate, 3)
    return Gate(gate, b, t[0] if t else _ZERO, x.gate_index, *_strides(x.gate_index, 2), x.layer_scale)


def _seen(x: Inputs) -> Seen:
    if x.key_padding is x.query_segments is x.dense is x.bias is x.query_offset is None:
        return _ALL_SEEN
    parts = ((x.key_padding, 2), (x.query_segments, 2), (x.key_segments, 2), (x.dense, 4), (x.bias, 4))
    fields = [field for part, dims in parts for field in (part, *_strides(part, dims))]
    return Seen(*fields, x.query_offset, *_strides(x.query_offset, 1))


_ALL_SEEN = Seen._make(field for dims in (2, 2, 2, 4, 4, 1) for field in (None, *[_ZERO] * dims))


class Problem:
    """`Inputs` as the kernels see them: tensors, the run-time ``numbers`` that every kernel takes, and its tiles."""

    def __init__(self, x: Inputs):
        prefix = [x.prefix_key, x.prefix_value]
        if x.prefix_key.shape[1] >= tiles.LONG_PREFIX:
            # Every program reads it: half the bytes are worth two launches.
            prefix = [t.to(x.query.dtype) for t in prefix]
        core = [rows(t) for t in (x.query, x.key, x.value, *prefix)]
        self.x, self.sizes, self.architecture = x, x.sizes, tiles.architecture(x.query.device)
        self.query, self.key, self.value, self.prefix_key, self.prefix_value = core
        self.gate, self.seen, self.numbers = _gate(x), _seen(x), self._numbers()
        *_, head_dim, value_dim = self.sizes
        self.dim = max(head_dim, value_dim)  # by which tiles are chosen
        self._aligned = head_dim % 8 == 0 and value_dim % 8 == 0 and aligned(core)
        self._constants = {
            "D": head_dim,
            "DV": value_dim,
            "WIDTH": tiles.padded(head_dim),
            "WIDTH_V": tiles.padded(value_dim),
            "LEFT": x.window_left >= 0,
            "RIGHT": x.causal or x.window_right >= 0,
            "CAPPED": x.softcap != 0,
            "PER_QUERY": x.gate_by_query,
            "PRECISION": _precision(self.architecture),
            "W": WIDE[x.compute_dtype],
        }

    def _numbers(self) -> dict:
        x = self.x
        _, heads, kv_heads, queries, keys, length, _, _ = self.sizes
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

    def constants(self, *operands: Rows) -> dict:
        """The compile-time numbers that every kernel takes; ``operands`` are the further `Rows` that it touches."""
        return {**self._constants, "ALIGNED": self._aligned and aligned(operands)}

    def tile(self, kernel: str) -> tiles.Tile:
        """The table's entry for a kernel."""
        crowded = self.x.bias is not None or self.x.dense is not None or not self._aligned
        return tiles.tile(kernel, self.architecture, self.x.query.element_size(), self.dim, crowded)

    def prefix_columns(self, tile: tiles.Tile) -> int:
        """Prefix columns that a kernel over queries takes at once."""
        return tiles.prefix_columns(tile, self.dim, self.x.gate_by_query)


def _precision(architecture: str) -> str:
    """How tiles multiply; float32 ones as torch's own products do (gfx90a has no tf32)."""
    if architecture == "interpreter":
        return "upcast"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and architecture != "gfx90a" else "ieee"


class _Signature(NamedTuple):
    """A kernel's parameters in order; the values of those that are compiled in; numbers of which the width is."""

    names: list[str]
    constants: Callable[[dict], tuple]
    numbers: list[str]

    def key(self, arguments: tuple, named: dict) -> tuple | None:
        """All that Triton compiles in of a launch: numbers by their width, for none is compiled in by its value, and
        tensors by dtype and alignment. None where a number has more than 32 bits: which one would matter."""
        bits, device, forms = 0, None, []
        add = forms.append
        for name in self.numbers:
            bits |= named.get(name, 0)
        for argument in arguments:
            if argument is None or argument is _ALL_SEEN:
                add(None)
                continue
            for part in argument if isinstance(argument, tuple) else (argument,):
                if part is None:
                    add(None)
                elif type(part) is int:
                    bits |= part
                elif type(part) is not float:
                    device = part.get_device() if device is None else device
                    add(part.dtype)
                    add(part.data_ptr() % 16)
        if bits >= _WIDE:
            return None
        options = named["num_warps"], named["num_stages"], named.get("maxnreg")
        return device, options, self.constants(named), *forms


@memoise
def _signature(function) -> _Signature:
    """That of the Python function which a kernel was made of."""
    kinds = {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
    constants = [name for name, kind in kinds.items() if kind in (tl.constexpr, "tl.constexpr")]
    # Without an annotation: those have the width that their value asks for.
    numbers = [name for name in RUNTIME if kinds.get(name) is inspect.Parameter.empty]
    return _Signature(list(kinds), itemgetter(*constants), numbers)


def launch(kernel, programs: int, tile: tiles.Tile, *arguments, **named) -> None:
    """Launch ``programs`` instances of a kernel. Every launch goes through here."""
    LAUNCHES[kernel.__name__] += 1
    named.update(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    if tile.registers:
        named["maxnreg"] = tile.registers
    execute(kernel, programs, *arguments, **named)


def execute(kernel, programs: int, *arguments, **named) -> None:
    """Run a kernel on the device of its tensors; `bench.compiled.aot_compile` puts a compiler in its place.

    What Triton asks of the arguments of every launch costs it 25 microseconds; what is compiled is therefore kept here
    by the same facts, told in fewer.
    """
    signature = _signature(kernel.fn)
    facts = signature.key(arguments, named)
    key = facts and (kernel.fn, knobs.runtime.debug, knobs.compilation.instrumentation_mode, facts)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[(programs, 1, 1)](*arguments, *[named[name] for name in signature.names[len(arguments) :]])
        return
    compiled = kernel[(programs,)](*arguments, **named)
    # Interpreted, nothing is compiled. For AMD, Triton also asks how far a tensor's memory reaches.
    if key and compiled is not None and not torch.version.hip:
        _COMPILED[key] = compiled


def count_tiles(length: int, size: int) -> int:
    """How many tiles of ``size`` cover ``length``."""
    return -(-length // size)
