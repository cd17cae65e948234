"""The kernels' arguments (tensors and strides in tuples, numbers passed at run time), and the launch."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from contextvars import copy_context
from functools import cache as memoise
from operator import itemgetter
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs, set_allocator

from ..dropout import threshold
from ..inputs import Inputs, dense_last
from . import tiles

# From this stride on, offsets within a tile of 256 rows need more than 32 bits.
_FAR_ROWS = 1 << 23
_WIDE = 1 << 31  # numbers from here on have 64 bits
# Beyond every position: twice this number, encoded by `odd`, has 32 bits.
FAR = 1 << 28

# The dtype of sums as a Triton type.
WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}

LAUNCHES: Counter[str] = Counter()
# Compiled kernels, by `_Signature.key`.
_COMPILED: dict[tuple, object] = {}


def odd(n: int) -> int:
    """A number encoded so that Triton does not specialise on it: it does on 1 and on multiples of 16, and members of a
    tuple cannot be exempted from that."""
    return 2 * n + 3


class Rows(NamedTuple):
    """``[B, H, T, D]`` with a contiguous last dimension; for ``[H, M, D]`` the first stride is zero."""

    ptr: Tensor | None
    b: int
    h: int
    t: int


class Operands(NamedTuple):
    """The attention's inputs; the first dimension of the prefix is that of the adapters, if there are several."""

    q: Rows
    k: Rows
    v: Rows
    pk: Rows
    pv: Rows


class Numbers(NamedTuple):
    """Run-time numbers, encoded by `odd`: a new length or window needs no compilation. `FAR` is added to ``offset``,
    so that none is negative."""

    batch: int
    T: int
    S: int
    M: int
    heads: int
    group: int
    offset: int
    left: int
    right: int
    threshold: int


class Constants(NamedTuple):
    """Compile-time constants of every kernel: head sizes and their powers of two, which features the call uses, and
    how tiles are loaded and multiplied (``W``: the dtype of sums).

    ``DESCRIPTORS``: rows are loaded through tensor descriptors. ``PAD``: row sums are padded to its multiples.
    ``FAST``: sigmoids may use the chip's approximate division. ``GATE_ALIGNED``: rows of a gate are vectors of four.
    """

    D: int
    DV: int
    WIDTH: int
    WIDTH_V: int
    LEFT: bool
    RIGHT: bool
    CAPPED: bool
    POSITIVE: bool
    PER_QUERY: bool
    PRECISION: str
    W: tl.dtype
    SCAN: int
    PAD: int
    FAST: bool
    GATE_ALIGNED: bool
    ALIGNED: bool = False
    DESCRIPTORS: bool = False


class Adapters(NamedTuple):
    """With a prefix for each row: the adapter of each batch row ``[B]``, the length of each adapter ``[A]``; for the
    gradients of columns, the batch rows ordered by adapter ``[B]`` and where those of each adapter begin and the last
    end ``[A + 1]``. All are contiguous."""

    index: Tensor | None = None
    lengths: Tensor | None = None
    order: Tensor | None = None
    first: Tensor | None = None


class Gate(NamedTuple):
    """Gate logits by row and query, contiguous along the prefix; the index of the rows; the layer scale (by adapter);
    the prefix of each row."""

    ptr: Tensor | None
    b: int
    t: int
    index: Tensor | None
    index_b: int
    index_t: int
    scale: Tensor | None
    scale_a: int
    adapters: Adapters


class Seen(NamedTuple):
    """The tensors of a mask."""

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
    """Whether every stride is a multiple of 8 elements, so that rows load as vectors of 16 bytes, and no tile of rows
    spans 2^31 elements, so that offsets within it have 32 bits."""
    bits, farthest = 0, _ZERO
    for _, b, h, t in operands:
        bits |= (b - _ZERO) | (h - _ZERO) | (t - _ZERO)
        farthest = max(farthest, t)
    return bits % (2 * 8) == 0 and farthest < odd(_FAR_ROWS)


def describable(operands: Iterable[Rows]) -> bool:
    """Whether tensor descriptors support these `aligned` operands: they begin at multiples of 16 bytes and are not
    expanded."""
    given = [(ptr, h, t) for ptr, _, h, t in operands if ptr is not None]
    return not any(ptr.data_ptr() % 16 or _repeats(ptr, h, t) for ptr, h, t in given)


def _repeats(tensor: Tensor, h: int, t: int) -> bool:
    """Whether rows or heads are expanded (have a stride of zero)."""
    return (t == _ZERO and tensor.shape[-2] > 1) or (h == _ZERO and tensor.shape[-3] > 1)


def _strides(tensor: Tensor | None, dims: int = 0) -> list[int]:
    """Strides, encoded; zero along dimensions of size one, whose stride has no meaning."""
    if tensor is None:
        return [_ZERO] * dims
    # `odd` inlined: a launch encodes about twenty strides.
    return [_ZERO if size == 1 else 2 * stride + 3 for size, stride in zip(tensor.shape, tensor.stride())]


_ZERO = odd(0)
_NO_ROWS = Rows(None, _ZERO, _ZERO, _ZERO)


def _gate(x: Inputs) -> Gate:
    gate = dense_last(x.gate)
    b, *t, _ = _strides(gate, 3)
    adapters = _ONE_PREFIX
    if x.prefix_index is not None:
        adapters = Adapters(x.prefix_index.contiguous(), x.prefix_lengths.contiguous())
    index = x.gate_index, *_strides(x.gate_index, 2)
    return Gate(gate, b, t[0] if t else _ZERO, *index, x.layer_scale, *_strides(x.layer_scale, 1), adapters)


_ONE_PREFIX = Adapters()


def _gate_aligned(gate: Gate) -> bool:
    """Whether the rows of a gate consist of vectors of four logits."""
    if gate.ptr is None:
        return False
    bits = (gate.b - _ZERO) | (gate.t - _ZERO) | 2 * gate.ptr.shape[-1]
    return bits % (2 * 4) == 0 and gate.ptr.data_ptr() % 16 == 0


def _seen(x: Inputs) -> Seen:
    if x.key_padding is x.query_segments is x.dense is x.bias is x.query_offset is None:
        return _ALL_SEEN
    parts = ((x.key_padding, 2), (x.query_segments, 2), (x.key_segments, 2), (x.dense, 4), (x.bias, 4))
    fields = [field for part, dims in parts for field in (part, *_strides(part, dims))]
    return Seen(*fields, x.query_offset, *_strides(x.query_offset, 1))


_ALL_SEEN = Seen._make(field for dims in (2, 2, 2, 4, 4, 1) for field in (None, *[_ZERO] * dims))


class Problem:
    """`Inputs` as arguments of the kernels: tensors, the run-time ``numbers`` of every kernel, and the tiles."""

    def __init__(self, x: Inputs):
        prefix = [x.prefix_key, x.prefix_value]
        if x.sizes[5] >= tiles.LONG_PREFIX and (x.prefix_index is None or len(x.prefix_key) <= len(x.query)):
            # Every program reads the prefix: half the bytes outweigh two launches. Not so if few of many are used.
            prefix = [t.to(x.query.dtype) for t in prefix]
        self.x, self.sizes, self.architecture = x, x.sizes, tiles.architecture(x.query.device)
        self.operands = Operands(*[rows(t) for t in (x.query, x.key, x.value, *prefix)])
        self.gate, self.seen, self.numbers = _gate(x), _seen(x), self._numbers()
        self.scales = (float(x.scale), float(x.softcap), 1 / (1 - x.dropout_p))
        *_, head_dim, value_dim = self.sizes
        self.dim = max(head_dim, value_dim)  # the head size by which tiles are chosen
        self._aligned = head_dim % 8 == 0 and value_dim % 8 == 0 and aligned(self.operands)
        self._described = self._aligned and tiles.has_descriptors(self.architecture, x.query.element_size())
        self._described = self._described and describable(self.operands)
        self._constants = Constants(
            D=head_dim,
            DV=value_dim,
            WIDTH=tiles.padded(head_dim),
            WIDTH_V=tiles.padded(value_dim),
            LEFT=x.window_left >= 0,
            RIGHT=x.causal or x.window_right >= 0,
            CAPPED=x.softcap != 0,
            POSITIVE=x.scale > 0,
            PER_QUERY=x.gate_per_query,
            PRECISION=_precision(self.architecture),
            W=WIDE[x.compute_dtype],
            SCAN=tiles.SCAN,
            PAD=self.tile("query").rows,
            FAST=self.architecture != "interpreter" and x.query.element_size() == 2,
            GATE_ALIGNED=x.gate_per_query and _gate_aligned(self.gate),
        )

    @property
    def adapters(self) -> int:
        """The number of prefixes that may be used; 0: one prefix for all rows."""
        return 0 if self.x.prefix_index is None else len(self.x.prefix_key)

    def ordered_gate(self) -> Gate:
        """`Gate` with the batch rows ordered by adapter; the device computes the order, and the host does not wait."""
        index = self.gate.adapters.index
        if index is None:
            return self.gate
        of_rows, order = index.sort(stable=True)
        first = torch.searchsorted(of_rows, torch.arange(self.adapters + 1, device=index.device))
        return self.gate._replace(adapters=self.gate.adapters._replace(order=order, first=first))

    def _numbers(self) -> Numbers:
        x = self.x
        batch, heads, kv_heads, queries, keys, length, _, _ = self.sizes
        right = FAR if x.window_right < 0 else min(x.window_right, FAR)
        numbers = (
            batch,
            queries,
            keys,
            length,
            heads,
            heads // kv_heads,
            FAR + max(-FAR, min(x.offset, FAR)),
            max(0, min(x.window_left, FAR)),
            0 if x.causal else right,
            threshold(x.dropout_p),
        )
        return Numbers(*map(odd, numbers))

    def constants(self, *operands: Rows) -> Constants:
        """The compile-time constants of a kernel; ``operands`` are the `Rows` that it accesses beside the inputs."""
        straight = self._aligned and aligned(operands)
        return self._constants._replace(
            ALIGNED=straight, DESCRIPTORS=straight and self._described and describable(operands)
        )

    def band(self, tile: tiles.Tile) -> int:
        """How many query heads the kernels over queries process concurrently: whole groups whose keys and values fit
        the L2 cache together (see `tiles.band`)."""
        _, heads, kv_heads, queries, keys, _, head_dim, value_dim = self.sizes
        group, row = heads // kv_heads, keys * (head_dim + value_dim) * self.x.query.element_size()
        return tiles.band(self.architecture, row, count_tiles(queries, tile.rows) * group) * group

    def shares(self, tile: tiles.Tile) -> int:
        """The number of shares into which a group's query heads are divided for dk and dv."""
        batch, heads, kv_heads, queries, keys, *_ = self.sizes
        counts = count_tiles(keys, tile.columns), count_tiles(queries, tile.rows)
        return tiles.shares(self.architecture, batch * kv_heads, heads // kv_heads, *counts, self._constants.RIGHT)

    def column_band(self, tile: tiles.Tile, shares: int) -> int:
        """`band` for the programs over key tiles, each of which processes one of ``shares`` of a group's heads."""
        _, heads, kv_heads, queries, keys, _, head_dim, value_dim = self.sizes
        row = queries * (head_dim + value_dim) * self.x.query.element_size()
        return tiles.band(self.architecture, row * (heads // kv_heads) // shares, count_tiles(keys, tile.columns))

    def tile(self, kernel: str) -> tiles.Tile:
        """The table's entry for a kernel."""
        crowded = self.x.bias is not None or self.x.dense is not None or not self._aligned
        return tiles.tile(kernel, self.architecture, self.x.query.element_size(), self.dim, crowded)

    def prefix_columns(self, kernel: str) -> int:
        """The tile size of a kernel over queries along the prefix."""
        x = self.x
        most = tiles.prefix_columns(
            kernel, self.architecture, x.query.element_size(), self.dim, x.gate_per_query, self.sizes[5]
        )
        return min(self.tile(kernel).columns, most)


def _precision(architecture: str) -> str:
    """The precision of products of float32 tiles: that of torch's own products (gfx90a has no tf32)."""
    if architecture == "interpreter":
        return "upcast"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" and architecture != "gfx90a" else "ieee"


class _Signature(NamedTuple):
    """The names of a kernel's parameters, in order, and a getter for the values of its compile-time constants."""

    names: list[str]
    constants: Callable[[dict], tuple]

    def key(self, arguments: tuple, named: dict) -> tuple | None:
        """The properties of a launch on which compiled code depends: the width of numbers (not their values), dtype and
        alignment of tensors. None where a number has more than 32 bits, since it would matter which one."""
        bits, device, forms = 0, None, []
        add = forms.append
        for argument in arguments:
            if argument is None or argument is _ALL_SEEN:
                add(None)
                continue
            for part in _parts(argument):
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


def _parts(argument) -> Iterable:
    """The tensors and numbers of a kernel's argument, flattened over two levels of tuples."""
    if not isinstance(argument, tuple):
        return (argument,)
    parts = []
    for part in argument:
        if isinstance(part, tuple):
            parts.extend(part)
        else:
            parts.append(part)
    return parts


@memoise
def _signature(function) -> _Signature:
    """The signature of a kernel's Python function."""
    kinds = {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
    constants = [name for name, kind in kinds.items() if kind in (tl.constexpr, "tl.constexpr")]
    return _Signature(list(kinds), itemgetter(*constants))


def launch(kernel, programs: int, tile: tiles.Tile, *arguments, **named) -> None:
    """Launch ``programs`` instances of a kernel. Every launch uses this function."""
    LAUNCHES[kernel.__name__] += 1
    named.update(num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    if tile.registers:
        named["maxnreg"] = tile.registers
    execute(kernel, programs, *arguments, **named)


def execute(kernel, programs: int, *arguments, **named) -> None:
    """Run a kernel on the device of its tensors; `bench.compiled.aot_compile` replaces this by a compilation.

    Compiled kernels are looked up by `_Signature.key`, since Triton's own lookup takes about 25 us per launch.
    """
    signature = _signature(kernel.fn)
    facts = signature.key(arguments, named)
    key = facts and (kernel.fn, knobs.runtime.debug, knobs.compilation.instrumentation_mode, facts)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        rest = [named[name] for name in signature.names[len(arguments) :]]
        _with_scratch(named, compiled[(programs, 1, 1)], *arguments, *rest)
        return
    compiled = _with_scratch(named, kernel[(programs,)], *arguments, **named)
    # The interpreter compiles nothing. For AMD, Triton also specialises on the size of a tensor's memory.
    if key and compiled is not None and not torch.version.hip:
        _COMPILED[key] = compiled


def _with_scratch(constants: dict, call: Callable, *arguments, **named):
    """``call(...)`` with an allocator for the tensor descriptors that a kernel writes. Triton reads the allocator from
    a context variable, which users may set themselves: it is changed for this call alone."""
    if "C" in constants and constants["C"].DESCRIPTORS:
        return copy_context().run(_call_with_scratch, call, arguments, named)
    return call(*arguments, **named)


def _call_with_scratch(call: Callable, arguments: tuple, named: dict):
    set_allocator(_allocate)
    return call(*arguments, **named)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of the current device; torch reuses it in the order of the stream, that is after the launch."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def count_tiles(length: int, size: int) -> int:
    """How many tiles of ``size`` cover ``length``."""
    return -(-length // size)
