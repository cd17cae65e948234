"""Tile sizes, warps and pipeline stages of the Triton kernels; no other module defines any.

One entry for an architecture, the bytes of an element, a padded head size and a kernel. ``rows`` counts queries,
``columns`` keys or prefix columns. `python -m bench compiled` compiles every entry and checks that none spills.

Source of its entries: compiled, not timed; bench/compiled/report.py.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from typing import NamedTuple

import torch

from ..inputs import Inputs


class Tile(NamedTuple):
    """Tile size in queries and keys, warps, pipeline stages (0: those of the launch that the kernel is part of).

    ``registers``: the limit per thread; 0: none is passed to the compiler. Without a limit, NVIDIA's assembler spills
    registers to reach a higher occupancy.
    """

    rows: int
    columns: int
    warps: int = 0
    stages: int = 0
    registers: int = 255


# `prefix` and `gate` are programs of the launch of `key_value`, or, if the tile of `prefix` has warps, of a separate
# launch; `split_prefix` belongs to the launch of `split`. `prefix_by_query`, if there is one, replaces `prefix` for a
# gate per query.
KERNELS = ("forward", "query", "key_value", "prefix", "gate", "bias", "split", "split_prefix")


def _entry(tiles: str, **more: int) -> dict[str, Tile]:
    """Tiles of `KERNELS`, each written ``rows x columns / warps / stages``."""
    return {name: Tile(*map(int, re.split("[x/]", text)), **more) for name, text in zip(KERNELS, tiles.split())}


# Bits of a row that float32 and float64 products process at once (see `primitives.similarity`).
PART = 2048
# The least number of programs for the prefix's gradient; each writes a partial sum.
PROGRAMS = 512
# Kernels whose tiles do not depend on architecture and head size.
_EVERYWHERE = {"finish": Tile(32, 128, 4, 1, 0), "merge": Tile(16, 0, 4, 1, 0)}
# Elements of padding or segments that a program loads at once.
SCAN = 1024
# The prefix length from which a float32 prefix is cast once to half-precision activations, not in every program.
LONG_PREFIX = 512
# `split`: the most rows (queries times heads of a group), the number of programs to aim for, and the least keys for
# each.
_SPLIT_ROWS, _SPLIT_PROGRAMS, _SPLIT_KEYS = 16, 512, 256
# Small, so that small inputs have whole, partial and skipped tiles.
_INTERPRETER = _entry("16x16/4/1 16x16/4/1 16x16/4/1 16x16 16x16 16x16/4/1 16x16/4/1 16x16", registers=0)

# Kernels:      forward     query      key_value   prefix  gate    bias       split      split_prefix
_IEEE_FLOAT32 = {
    64: _entry("32x16/8/1   32x16/4/1  16x32/8/1   16x32   16x16   32x32/8/1  16x32/4/1  16x32"),
    128: _entry("32x16/8/1   32x16/8/1  16x32/8/1   16x32   32x32   32x32/8/1  16x32/8/1  16x32"),
    256: _entry("32x16/8/1   32x16/8/1  16x16/8/1   16x16   16x16   16x16/8/1  16x32/8/1  16x32"),
}
_FLOAT64 = {
    64: _entry("16x16/8/1   16x16/8/1  16x16/8/1   16x16   16x16   16x16/8/1  16x16/8/1  16x16"),
    128: _entry("16x16/8/1   32x32/8/1  16x16/8/1   16x16   16x16   16x16/8/1  16x16/8/1  16x16"),
    256: _entry("16x16/8/1   32x16/8/1  16x16/8/1   16x16   16x16   16x16/8/1  16x16/8/1  16x16"),
}
_AMPERE = {
    64: _entry("128x64/8/2  64x64/8/2  32x128/8/1  32x64   32x32   32x32/4/1  16x64/4/2  64x32"),
    128: _entry("128x64/8/1  64x64/8/2  64x64/8/1   64x64   32x16   64x32/8/1  16x64/4/2  32x32"),
    256: _entry("64x32/8/2   32x32/8/1  32x32/8/1   32x32   32x16   32x16/8/1  16x32/4/2  16x32"),
}
_RTX_BLACKWELL = {
    64: _AMPERE[64] | _entry("128x64/8/2  32x64/4/2") | {"split": Tile(16, 32, 4, 2)},
    128: _AMPERE[128] | _entry("64x64/8/2   64x64/8/2  64x32/8/1"),
    256: _AMPERE[256],
}
_HOPPER = {
    64: _entry("64x128/4/2  128x128/8/2 64x64/4/2  64x64   64x64   64x64/8/1  16x128/4/3 64x32")
    | {"prefix_by_query": Tile(64, 64, 4, 2)},
    128: _entry("128x128/8/2 128x64/8/2 64x64/4/2  64x64/4/2 64x64  64x64/8/1  16x64/4/3  32x32")
    | {"prefix_by_query": Tile(32, 64, 4, 2)},
    256: _entry("128x32/8/2  128x16/8/3 16x128/8/2  16x32   16x16   64x32/8/1  16x32/4/3  16x32"),
}
_BLACKWELL = {
    64: _entry("128x64/8/2  128x64/8/2 64x64/8/2   32x64   32x64   64x64/8/1  16x64/4/2  64x32"),
    128: _entry("128x64/8/2  64x64/8/2  64x64/8/1   32x128  64x64   64x64/8/1  16x64/4/2  32x32"),
    256: _entry("64x32/8/1   64x32/8/1  16x64/8/1   32x32   32x16   32x16/8/1  16x32/4/2  16x32"),
}
_CDNA = {
    # dk and dv under a dense mask do not compile in two stages: AMD's compiler then also stages the mask's tiles.
    64: _entry("128x64/8/2  128x64/4/2 64x64/4/1   32x64   64x64   64x64/4/1  16x64/4/2  64x32"),
    128: _entry("64x64/4/1   64x64/4/1  32x64/4/1   32x64   64x64   64x64/8/1  16x64/4/2  32x32"),
    256: _entry("32x32/4/1   32x32/4/1  32x32/4/1   32x16   32x32   32x32/4/1  16x32/4/2  16x32"),
}
_CDNA_FLOAT32 = {
    64: _IEEE_FLOAT32[64],
    128: _IEEE_FLOAT32[128] | _entry("32x16/8/1   32x16/8/1  16x32/4/1   16x32   16x32"),
    256: _IEEE_FLOAT32[256] | _entry("32x16/8/1   32x16/8/1  32x16/8/1   16x16   16x16"),
}


def _limited(architecture: str, heads: dict[int, dict[str, Tile]]) -> dict[int, dict[str, Tile]]:
    """Entries by head size with the architecture's limit on registers: AMD's compiler gets none."""
    if architecture.startswith("sm_"):
        return heads
    return {head: {name: tile._replace(registers=0) for name, tile in tiles.items()} for head, tiles in heads.items()}


# By architecture, bytes of an element, and padded head size.
_TABLE = {
    name: {2: _limited(name, halves), 4: _limited(name, float32), 8: _limited(name, _FLOAT64)}
    for names, halves, float32 in (
        (("sm_80", "sm_86"), _AMPERE, _IEEE_FLOAT32),
        (("sm_120",), _RTX_BLACKWELL, _IEEE_FLOAT32),
        (("sm_90",), _HOPPER, _IEEE_FLOAT32),
        (("sm_100",), _BLACKWELL, _IEEE_FLOAT32),
        (("gfx90a", "gfx942"), _CDNA, _CDNA_FLOAT32),
    )
    for name in names
}
# Where heads wider than 128 have separate programs for dk and dv; with float64 they always have.
_APART = {("sm_90", 2), ("sm_100", 2), ("interpreter", 4)}
# Architectures and bytes of an element for which tiles are loaded by tensor descriptors.
_DESCRIPTORS = {("sm_90", 2), ("sm_100", 2), ("sm_120", 2), ("interpreter", 2), ("interpreter", 4), ("interpreter", 8)}
# Architectures, or their kernels over queries, whose tiles of a half-precision prefix have 64 columns.
_WIDE_PREFIX = {"sm_90", "sm_100", "sm_120", ("sm_80", "query"), ("sm_86", "query")}
# Bytes that concurrent programs may share: half of the L2 cache.
_CACHE = {
    "sm_80": 20 << 20, "sm_86": 3 << 20, "sm_90": 25 << 20, "sm_100": 60 << 20, "sm_120": 24 << 20,
    "gfx90a": 4 << 20, "gfx942": 4 << 20, "interpreter": 1 << 12,
}  # fmt: skip
# The least number of programs of a band for each multiprocessor.
_BAND_PROGRAMS = 8
# Multiprocessors of the chips.
_PROCESSORS = {
    "sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx90a": 104, "gfx942": 304,
    "interpreter": 1,
}  # fmt: skip
# By architecture and head size, a stock kernel and the number of tokens from which it is used. Not measured: empty.
_MERGED: dict[tuple[str, int], tuple[str, int]] = {}
ARCHITECTURES = tuple(sorted(_TABLE))
WIDTHS = (2, 4, 8)
HEADS = (64, 128, 256)


def padded(dim: int) -> int:
    """Head size of the kernels' tiles: the next power of two, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def architecture(device: torch.device) -> str:
    """The table's name for a device."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return name if name in _TABLE else "gfx90a"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor == 0 else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_120")


def tile(kernel: str, architecture: str, width: int, dim: int, crowded: bool = False) -> Tile:
    """The entry of a head size. ``crowded``: a bias or a dense mask needs registers for another tile, or rows loaded
    element by element need them for pointers; tiles of the kernels over queries then have half as many columns."""
    if kernel in _EVERYWHERE:
        return _EVERYWHERE[kernel]
    if architecture == "interpreter":
        return _INTERPRETER[kernel.partition("_by_")[0]]
    entry = _TABLE[architecture][width][HEADS[bisect_left(HEADS, dim)]]
    chosen = entry.get(kernel) or entry[kernel.partition("_by_")[0]]
    if crowded and width == 2 and kernel in ("forward", "query"):
        return chosen._replace(columns=max(16, chosen.columns // 2))
    return chosen


def entries(architecture: str, width: int) -> dict[int, dict[str, Tile]]:
    """The table of an architecture and bytes of an element, by head size; `bench.compiled.tune` replaces entries."""
    return _TABLE[architecture][width]


def prefix_columns(kernel: str, architecture: str, width: int, dim: int, gate_per_query: bool, length: int) -> int:
    """The most columns of a tile of a kernel over queries along a prefix of ``length``.

    Wide tiles share what is done once for a tile: accumulators are rescaled, operands are prepared. But a tile is
    computed whole, however short the prefix, so that a second size, for which a kernel is compiled again, pays.
    """
    most = 16 if dim > 128 or (gate_per_query and dim > 64) else 32
    if width == 2 and dim <= 128 and (architecture in _WIDE_PREFIX or (architecture, kernel) in _WIDE_PREFIX):
        most = 64
    return min(most, 32) if length <= 32 else most


def programs(architecture: str) -> int:
    """The least number of programs for the prefix's gradient."""
    return 8 if architecture == "interpreter" else PROGRAMS


def is_apart(architecture: str, width: int, dim: int) -> bool:
    """Whether dk and dv of a head size have separate programs (see `columns.column_gradients`)."""
    return (width == 8 or (architecture, width) in _APART) and dim > 128


def has_descriptors(architecture: str, width: int) -> bool:
    """Whether the kernels load tiles of rows through tensor descriptors, if these support the tensors."""
    return (architecture, width) in _DESCRIPTORS


def band(architecture: str, share: int, n_tiles: int) -> int:
    """The number of heads, of ``n_tiles`` programs each, to process at once if each needs ``share`` bytes of cache.

    At least enough to keep all multiprocessors busy while the last programs of a band end.
    """
    busy = -(-_BAND_PROGRAMS * _PROCESSORS[architecture] // n_tiles)
    return max(1, busy, _CACHE[architecture] // max(1, share))


def processors(architecture: str) -> int:
    """Multiprocessors of a chip."""
    return _PROCESSORS[architecture]


def shares(architecture: str, heads: int, group: int, columns: int, rows: int, causal: bool) -> int:
    """The number of shares of the query heads of a group for dk and dv, each with its own partial sum.

    There are ``heads * columns`` tiles of keys, each processed over ``rows`` tiles of queries of ``group`` heads. The
    result is the least number for which the longest program takes no more than an even division of all the work.
    """
    ideal = heads * group * columns * rows / (2 if causal else 1) / _PROCESSORS[architecture]
    fitting = (n for n in range(1, group) if group % n == 0 and rows * (group // n) <= ideal)
    return next(fitting, group) if heads * columns * group > _PROCESSORS[architecture] else 1


def is_split(x: Inputs, architecture: str) -> bool:
    """Whether the forward splits the keys among programs: decoding, and other calls of few queries over many keys."""
    _, heads, kv_heads, queries, keys, *_ = x.sizes
    few = queries * (heads // kv_heads) <= _SPLIT_ROWS
    return queries == 1 or (few and keys >= _split_sizes(architecture)[1])


def merged_by(x: Inputs, architecture: str) -> str | None:
    """The stock kernel to use where it supports the call (see `stock.Kernel`); None: none."""
    name, least = _MERGED.get((architecture, padded(x.query.shape[3])), (None, 0))
    return name if min(x.query.shape[2], x.key.shape[2]) >= least else None


def splits(architecture: str, programs: int, columns: int) -> int:
    """The number of shares of ``columns``, where ``programs`` would otherwise process all of them each."""
    most, least = _split_sizes(architecture)
    return max(1, min(most // programs, -(-columns // least)))


def _split_sizes(architecture: str) -> tuple[int, int]:
    return (8, 16) if architecture == "interpreter" else (_SPLIT_PROGRAMS, _SPLIT_KEYS)
