"""Tile sizes, warps and pipeline stages: the only place where they stand.

One entry for an architecture, the bytes of an element, a padded head size and a kernel. ``rows`` counts queries,
``columns`` keys or prefix columns. `bench.compile_report` compiles every entry and checks that none spills registers.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How a kernel is cut: queries, keys, warps, stages."""

    rows: int
    columns: int
    warps: int
    stages: int


class Entry(NamedTuple):
    """The tiles of the kernels that hold whole heads."""

    forward: Tile
    query: Tile
    key_value: Tile
    prefix: Tile
    gate: Tile
    bias: Tile


def _entry(*tiles: tuple[int, int, int, int]) -> Entry:
    return Entry(*(Tile(*tile) for tile in tiles))


# How many programs the prefix's gradient is spread over, at least; each leaves a partial sum.
PROGRAMS = 512
# The kernels that hold no heads are cut alike everywhere.
_EVERYWHERE = {"delta": Tile(64, 0, 4, 1), "index": Tile(64, 64, 4, 1), "range": Tile(0, 1024, 4, 1)}
# Small, so that small inputs have whole, partial and skipped tiles.
_INTERPRETER = _entry(*[(16, 16, 4, 1)] * 6)

_SCALAR = {
    64: _entry((64, 32, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    128: _entry((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    256: _entry((32, 16, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
_DOUBLE = {
    64: _entry(*[(32, 16, 4, 1)] * 2, *[(16, 32, 4, 1)] * 2, *[(16, 16, 4, 1)] * 2),
    128: _entry(*[(16, 16, 4, 1)] * 6),
    256: _entry(*[(16, 16, 8, 1)] * 6),
}
_TABLE = {
    "sm_80": {
        2: {
            64: _entry((128, 64, 4, 2), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
            128: _entry((128, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
            256: _entry((64, 32, 8, 2), (64, 32, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        },
        4: _SCALAR,
        8: _DOUBLE,
    },
}
_TABLE["sm_86"] = _TABLE["sm_120"] = _TABLE["sm_80"]
_TABLE["sm_100"] = {
    2: {
        64: _entry((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1)),
        128: _entry((128, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1)),
        256: _entry((128, 32, 8, 2), (64, 32, 8, 1), (32, 64, 8, 1), (32, 64, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1)),
    },
    4: _SCALAR,
    8: _DOUBLE,
}
_TABLE["sm_90"] = _TABLE["sm_100"]
_TABLE["gfx90a"] = _TABLE["gfx942"] = {
    2: {
        64: _entry((128, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1), (64, 64, 4, 1)),
        128: _entry((64, 64, 4, 1), (64, 32, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
        256: _entry((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    },
    4: _SCALAR,
    8: _DOUBLE,
}
ARCHITECTURES = tuple(sorted(_TABLE))
WIDTHS = (2, 4, 8)
HEADS = (64, 128, 256)


def padded(dim: int) -> int:
    """Head size as the kernels hold it: the next power of two, at least 16."""
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


def tile(kernel: str, architecture: str, width: int, dim: int) -> Tile:
    """The entry that serves a head size."""
    if kernel in _EVERYWHERE:
        return _EVERYWHERE[kernel]
    if architecture == "interpreter":
        return getattr(_INTERPRETER, kernel)
    return getattr(_TABLE[architecture][width][next(head for head in HEADS if dim <= head)], kernel)


def prefix_columns(tile: Tile, dim: int) -> int:
    """How many prefix columns the kernels over queries take at once: prefixes are short, and gates need registers."""
    return min(tile.columns, 32 if dim <= 128 else 16)


def programs(architecture: str) -> int:
    """How many programs the prefix's gradient is spread over."""
    return 8 if architecture == "interpreter" else PROGRAMS
